"""A vector index of captions on disk, searched exactly.

An index is a directory: `index.json`, and per shard `0000.faiss` (unit vectors in half precision, inner product) beside
`0000.arrow` (their urls and captions). Both are memory-mapped, so a search needs no more memory than its hits, and of
the table only the rows that were hit are read; that is why the table is an Arrow file and not parquet.

Half precision, not IndexFlatIP: half the disk, as quick to search, and 0.9997 of its neighbours the same (measured:
`bench/retrieval.py`). It is also deterministic: each score is computed on its own, so equal captions score equally
wherever they lie, which the blocked matrix product behind IndexFlatIP does not promise.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import faiss
import fsspec
import fsspec.implementations.local
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from retrieval.corpus import read_table, usable
from retrieval.whole import whole_directory

log = logging.getLogger(__name__)

SHARD_ROWS = 1_000_000
BLOCK_ROWS = 8192
"""Rows handled at a time: 16 MB of 512 float32, which the allocator gives back again and again without new pages."""
SCHEMA = pa.schema([("url", pa.string()), ("caption", pa.string()), ("nsfw", pa.float32()), ("sha256", pa.string())])


def build_index(
    batches: Iterable[pa.RecordBatch],
    encode: Callable[[list[str]], np.ndarray],
    out: Path,
    *,
    model: str | None = None,
    shard_rows: int = SHARD_ROWS,
) -> Path:
    """Encode captions and write their index.

    Args:
        batches: what `read_corpus` yields.
        encode: texts -> (n, d) float32 rows of unit length, `ClipModel.encode_text`.
        out: the index directory, written whole or not at all.
        model: digest of the encoding model, kept so that another model's queries are refused.
        shard_rows: rows of a shard at most.

    Raises:
        ValueError: there are no captions, or `out` is there already.
    """
    blocks = ((encode(batch.column("caption").to_pylist()), batch) for batch in batches if batch.num_rows)
    return _write(blocks, Path(out), model, shard_rows)


def build_index_from_embeddings(
    pairs: list[tuple[str, str]], out: Path, *, model: str | None = None, shard_rows: int = SHARD_ROWS
) -> Path:
    """Write the index of published embeddings, brought to unit length.

    Args:
        pairs: what `precomputed` returned.
        out: the index directory, written whole or not at all.
        model: digest of the model they were made with, if known.
        shard_rows: rows of a shard at most.

    Rows without url or caption, and embeddings that are zero or not finite, are left out; their number is logged.
    """
    return _write(_embedding_blocks(pairs), Path(out), model, shard_rows)


def search(index_dir: Path, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest rows by cosine.

    Args:
        index_dir: an index directory.
        queries: (q, d) float32 rows of unit length.
        k: neighbours wanted; cut to the rows there are.

    Returns:
        Scores (q, k) float32, falling, and row numbers (q, k) int64. Equal scores come in the order of the rows.
    """
    header = read_header(index_dir)
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.shape[1] != header["dimension"]:
        raise ValueError(
            f"the index in {index_dir} holds embeddings of width {header['dimension']}, the CLIP model makes "
            f"{queries.shape[1]}: name the model the embeddings were made with"
        )
    shards = [_open_vectors(Path(index_dir), shard) for shard in header["shards"]]
    heap = faiss.ResultHeap(len(queries), min(k, header["rows"]), keep_max=True)
    buffer = np.empty((BLOCK_ROWS, header["dimension"]), np.float32)
    first = 0
    for vectors in shards:
        for start in range(0, len(vectors), BLOCK_ROWS):
            half = vectors[start : start + BLOCK_ROWS]
            block = buffer[: len(half)]
            np.copyto(block, half)
            products = queries @ block.T  # (q, rows of the block)
            heap.heaps.addn(len(block), faiss.swig_ptr(products), first + start)
        first += len(vectors)
    heap.finalize()
    return heap.D, heap.I


def read_rows(index_dir: Path, rows: np.ndarray) -> pa.Table:
    """Read the urls and captions of some rows, (n,) int64, in the order given."""
    order = np.argsort(rows, kind="stable")
    wanted, found, first = rows[order], [SCHEMA.empty_table()], 0
    for shard in read_header(index_dir)["shards"]:
        with pa.memory_map(str(Path(index_dir) / f"{shard['name']}.arrow")) as file:
            reader = pa.ipc.open_file(file)
            # Batch by batch: taking from a table of many batches would first copy all of it into one.
            for batch in map(reader.get_batch, range(reader.num_record_batches)):
                start, end = np.searchsorted(wanted, [first, first + batch.num_rows])
                if end > start:
                    found.append(pa.table(batch.take(pa.array(wanted[start:end] - first))))
                first += batch.num_rows
    return pa.concat_tables(found).take(pa.array(np.argsort(order, kind="stable")))


def _open_vectors(index_dir: Path, shard: dict) -> np.ndarray:
    """Map a shard's vectors into memory, (rows, d) float16."""
    index = faiss.read_index(str(index_dir / f"{shard['name']}.faiss"), faiss.IO_FLAG_MMAP_IFC)
    codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
    return codes.view(np.float16).reshape(index.ntotal, index.d), index


def read_header(index_dir: Path) -> dict:
    """Read what an index says of itself: `rows`, `dimension`, `model` (digest or None), `shards` (name, rows)."""
    path = Path(index_dir) / "index.json"
    if not path.is_file():
        raise ValueError(f"{index_dir} is not a caption index: it has no index.json")
    return json.loads(path.read_text())


def _write(blocks: Iterable[tuple[np.ndarray, pa.RecordBatch]], out: Path, model: str | None, shard_rows: int) -> Path:
    """Write shards of the blocks, (n, d) float32 unit rows each beside its n urls and captions."""
    shards = []
    with whole_directory(out) as folder:
        bar = tqdm(desc=f"index {out.name}", unit=" captions", unit_scale=True, disable=None)
        for number, parts in itertools.groupby(_cut(blocks, shard_rows), key=lambda part: part[0]):
            rows, dimension = _write_shard(folder, f"{number:04d}", parts, bar)
            shards.append({"name": f"{number:04d}", "rows": rows})
        bar.close()
        if not shards:
            raise ValueError("the corpus holds no usable captions: every url or caption is empty")
        header = {"rows": sum(s["rows"] for s in shards), "dimension": dimension, "model": model, "shards": shards}
        (folder / "index.json").write_text(json.dumps(header, indent=2))
    return out


def _cut(
    blocks: Iterable[tuple[np.ndarray, pa.RecordBatch]], shard_rows: int
) -> Iterator[tuple[int, np.ndarray, pa.RecordBatch]]:
    """Cut blocks where a shard ends; yield them with the number of their shard."""
    done = 0
    for vectors, batch in blocks:
        while len(vectors):
            number, filled = divmod(done, shard_rows)
            room = shard_rows - filled
            yield number, vectors[:room], batch.slice(0, room)
            done += min(room, len(vectors))
            vectors, batch = vectors[room:], batch.slice(min(room, batch.num_rows))


def _write_shard(folder: Path, name: str, parts: Iterable, bar: tqdm) -> tuple[int, int]:
    index = None
    with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for _, vectors, batch in parts:
            if index is None:
                index = faiss.IndexScalarQuantizer(
                    vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
                )
            index.add(np.ascontiguousarray(vectors, np.float32))
            missing = {field: pa.nulls(batch.num_rows, field.type) for field in SCHEMA}
            found = batch.schema.names
            columns = [batch.column(field.name) if field.name in found else missing[field] for field in SCHEMA]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
            bar.update(len(vectors))
    faiss.write_index(index, str(folder / f"{name}.faiss"))
    return index.ntotal, index.d


def _embedding_blocks(pairs: list[tuple[str, str]]) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    left_out = 0
    for npy, parquet in pairs:
        vectors, start = _open_embeddings(npy), 0
        for batch in read_table(*fsspec.url_to_fs(parquet), BLOCK_ROWS):
            block = vectors[start : start + batch.num_rows].astype(np.float32)
            start += batch.num_rows
            norms = np.sqrt(np.einsum("nd,nd->n", block, block))
            good = usable(batch).to_numpy(zero_copy_only=False) & np.isfinite(norms) & (norms > 0)
            if not good.all():
                left_out += int((~good).sum())
                block, norms, batch = block[good], norms[good], batch.filter(pa.array(good))
            block /= norms[:, None]
            yield block, batch
    if left_out:
        log.warning("%d rows of the corpus were left out: no url, no caption, or a zero or broken embedding", left_out)


def _open_embeddings(npy: str) -> np.ndarray:
    filesystem, file = fsspec.url_to_fs(npy)
    if isinstance(filesystem, fsspec.implementations.local.LocalFileSystem):
        return np.load(file, mmap_mode="r", allow_pickle=False)
    with filesystem.open(file, "rb") as stream:
        return np.load(stream, allow_pickle=False)
