"""A corpus encoded by Ray Data's actors makes the index that one process makes."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.spec import MINIATURE
from ray_jobs.captions import encoded_corpus
from ray_jobs.concept_batch import ray_session
from retrieval.clip import load_clip
from retrieval.corpus import read_corpus
from retrieval.index import build_index, build_index_from_blocks


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
