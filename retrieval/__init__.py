"""Captions in, regularisation set out.

corpus    parquet tables or published embeddings -> batches of (url, caption)
clip      captions -> unit vectors
index     vectors -> a FAISS index on disk, searched exactly
select    class prompts -> the captions nearest to them
addresses which web addresses may be asked at all
fetch     the process img2dataset runs in
decoding  the process images are decoded in, those of concepts too
download  candidates -> a verified, de-duplicated RegularizationSet
"""
