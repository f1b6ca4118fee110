"""Retrieval at 1 M captions: 200 candidates for each of 100 classes, from published embeddings.

Makes clustered random unit embeddings, 512 wide, with captions and urls, in the layout that clip-retrieval writes
(float16), in a temporary folder that is removed afterwards; then builds the index of them, searches it, and compares
with an exact float32 search. Aims, on 2 cores: under 10 s, recall at least 0.99.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # else this file, which bears its name, would hide the package

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from retrieval.corpus import precomputed  # noqa: E402
from retrieval.index import build_index_from_embeddings, search  # noqa: E402
from retrieval.select import nearest  # noqa: E402

ROWS, WIDTH, CLASSES, COUNT, CLUSTERS = 1_000_000, 512, 100, 200, 2000
FILE_ROWS = 250_000


def make_corpus(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the corpus; return its vectors as float32 unit rows (ROWS, WIDTH) and the queries (CLASSES, WIDTH)."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((CLUSTERS, WIDTH), dtype=np.float32)
    (folder / "text_emb").mkdir()
    (folder / "metadata").mkdir()
    vectors = np.empty((ROWS, WIDTH), np.float32)
    for number, start in enumerate(range(0, ROWS, FILE_ROWS)):
        rows = np.arange(start, start + FILE_ROWS)
        cluster = random.integers(CLUSTERS, size=FILE_ROWS)
        block = centres[cluster] + 0.7 * random.standard_normal((FILE_ROWS, WIDTH), dtype=np.float32)
        block = (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float16)
        np.save(folder / f"text_emb/text_emb_{number}.npy", block)
        block = block.astype(np.float32)
        vectors[start : start + FILE_ROWS] = block / np.linalg.norm(block, axis=1, keepdims=True)
        table = {
            "url": [f"https://images.example.com/{row % 97}/{row:08d}.jpg" for row in rows],
            "caption": [
                f"a photo of thing {c} in place {row % 7919}, number {row}"
                for c, row in zip(cluster, rows, strict=True)
            ],
        }
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{number}.parquet")
    queries = centres[:CLASSES] + 0.3 * random.standard_normal((CLASSES, WIDTH), dtype=np.float32)
    return vectors, queries / np.linalg.norm(queries, axis=1, keepdims=True)


def exact_rows(vectors: np.ndarray, queries: np.ndarray) -> list[set[int]]:
    """Find each query's COUNT nearest rows by a plain float32 product."""
    scores = queries @ vectors.T
    return [set(row.tolist()) for row in np.argpartition(-scores, COUNT, axis=1)[:, :COUNT]]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-retrieval-") as folder:
        corpus, index = Path(folder) / "corpus", Path(folder) / "index"
        corpus.mkdir()
        print(f"set-up, not counted: {ROWS:,} embeddings of {WIDTH} in float16, with urls and captions in parquet")
        vectors, queries = make_corpus(corpus)
        print("counted as build: reading these files, unit length, index and table written to disk")
        start, start_cpu = time.perf_counter(), time.process_time()
        build_index_from_embeddings(precomputed(str(corpus)), index)
        built = time.perf_counter()
        print(f"counted as search: {COUNT} candidates (url, caption) for each of {CLASSES} class embeddings, from disk")
        chosen = nearest(index, queries, COUNT)
        done, done_cpu = time.perf_counter(), time.process_time()
        assert all(table.num_rows == COUNT for table in chosen)
        print("not counted: encoding the class prompts, and the exact search that recall is measured against")
        _, found = search(index, queries, COUNT)
        exact = exact_rows(vectors, queries)
        recall = np.mean(
            [len(truth.intersection(rows)) / COUNT for truth, rows in zip(exact, found.tolist(), strict=True)]
        )
    figures = {
        "seconds": round(done - start, 2),
        "build_seconds": round(built - start, 2),
        "search_seconds": round(done - built, 2),
        "processor_seconds": round(done_cpu - start_cpu, 2),
        "recall": round(float(recall), 5),
        "rows": ROWS,
        "classes": CLASSES,
        "candidates": COUNT,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
