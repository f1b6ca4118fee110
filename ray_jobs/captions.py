"""Captions of a large corpus: encoded by all of a cluster's devices with Ray Data, searched by all of its cores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from retrieval.clip import load_clip
from retrieval.corpus import corpus_files, read_corpus
from retrieval.index import Hits, merge_hits, read_header, search
from retrieval.select import Search

BATCH = 8192
"""Captions an actor encodes at a time."""


def encoded_corpus(
    corpus: str, clip: str, *, actors: int, cpus: int, gpus: bool
) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    """Unit text features, (n, d) float32, beside their rows (`retrieval.corpus.read_corpus`), in the corpus's order.

    actors: processes that hold the CLIP model, each on so many CPU cores, or a GPU.
    """
    files = corpus_files(corpus)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    dataset = (
        ray.data.from_items([{"file": file} for file in files], override_num_blocks=len(files))
        .map_batches(_read, batch_size=1)
        .map_batches(
            _Encoder,
            fn_constructor_args=(clip,),
            batch_size=BATCH,
            batch_format="pyarrow",
            concurrency=(1, actors),
            num_gpus=1 if gpus else 0,
            num_cpus=1 if gpus else cpus,
        )
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for part in batch.combine_chunks().to_batches():
            column = part.column("embedding")
            vectors = column.flatten().to_numpy().reshape(len(column), -1)
            yield vectors, part.drop_columns(["embedding"])


def _read(batch: dict[str, Any]) -> Iterator[pa.Table]:
    for file in batch["file"]:
        for rows in read_corpus(str(file)):
            yield pa.table(rows)


class _Encoder:
    def __init__(self, clip: str) -> None:
        self.clip = load_clip(clip)

    def __call__(self, rows: pa.Table) -> pa.Table:
        vectors = self.clip.encode_text(rows.column("caption").to_pylist())
        flat = pa.array(vectors.ravel())
        return rows.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))


def search_on_cluster(index: Callable[[], Path]) -> Search:
    """A search of the index in the folder that `index` finds, on whichever node it is called: a task for each core, or
    shard if they are fewer. It finds exactly what `retrieval.index.search` finds."""

    def search(index_dir: Path, queries: np.ndarray, k: int) -> Hits:
        shards = len(read_header(index_dir)["shards"])
        parts = max(1, min(shards, int(ray.cluster_resources().get("CPU", 1))))
        bounds = [shards * i // parts for i in range(parts + 1)]
        put = ray.put(queries)
        tasks = [_search.remote(index, put, k, range(first, last)) for first, last in itertools.pairwise(bounds)]
        return merge_hits(ray.get(tasks), k)

    return search


@ray.remote(num_cpus=1, max_retries=2)
def _search(index: Callable[[], Path], queries: np.ndarray, k: int, shards: range) -> Hits:
    return search(index(), queries, k, shards)
