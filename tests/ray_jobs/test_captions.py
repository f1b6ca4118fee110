"""A corpus encoded and searched by many processes: the index and the hits of one process."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipeline.miniature.corpus import serve_corpus, write_corpus
from pipeline.spec import MINIATURE
from ray_jobs.captions import encoded_corpus, search_on_cluster
from ray_jobs.session import ray_session
from retrieval.clip import load_clip
from retrieval.corpus import read_corpus
from retrieval.download import download
from retrieval.index import build_index, build_index_from_blocks
from retrieval.select import candidates_by_class


@pytest.mark.slow
def test_the_same_index(tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(3):
        rows = [{"URL": f"http://example.org/{i}-{k}.jpg", "TEXT": f"photo of a cat {i} {k}"} for k in range(20 + i)]
        rows[5]["TEXT"] = ""  # left out
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus" / f"{i}.parquet")
    clip, corpus = str(MINIATURE / "clip"), str(tmp_path / "corpus")
    alone = build_index(read_corpus(corpus), load_clip(clip).encode_text, tmp_path / "alone", model="m")
    with ray_session():
        blocks = encoded_corpus(corpus, clip, actors=2, cpus=1, gpus=False)
        together = build_index_from_blocks(blocks, tmp_path / "together", model="m")
    for file in ("index.json", "0000-0000.faiss"):
        assert (together / file).read_bytes() == (alone / file).read_bytes()
    tables = [pa.ipc.open_file(folder / "0000-0000.arrow").read_all() for folder in (alone, together)]
    assert tables[0].num_rows == 60 and tables[0].equals(tables[1])


@pytest.mark.slow
def test_the_same_hits_and_images(tmp_path):
    """Shards of an index searched by tasks, and img2dataset's shards downloaded by tasks."""
    write_corpus(tmp_path / "corpus.parquet", 120, seed=0)
    clip = load_clip(str(MINIATURE / "clip"))
    rows, folder = read_corpus(str(tmp_path / "corpus.parquet")), tmp_path / "index"
    build_index(rows, clip.encode_text, folder, model=clip.digest, shard_rows=50)
    with ray_session():
        (chosen,) = candidates_by_class(folder, clip, ["cat"], 30, search=search_on_cluster(lambda: folder))
        with serve_corpus() as address:
            settings = {"count": 6, "image_size": 32, "local": True, "base_url": address}
            alone = download(chosen, tmp_path / "alone", **settings)
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
            try:
                spread = download(chosen, tmp_path / "spread", distributor="ray", **settings)
            finally:
                del os.environ["RAY_ADDRESS"]
    (expected,) = candidates_by_class(folder, clip, ["cat"], 30)
    assert chosen.equals(expected)
    assert alone.got == 6 and (spread.path / "00000.tar").read_bytes() == (alone.path / "00000.tar").read_bytes()
