"""A vector index of captions on disk, searched exactly.

An index is a directory: `index.json`, and per shard a .faiss file (unit vectors in half precision, inner product)
beside an .arrow file (their urls and captions). Both are memory-mapped, so a search needs no more memory than its hits,
and of the table only the rows that were hit are read; that is why the table is an Arrow file and not parquet.

Half precision, not IndexFlatIP: half the disk and 0.9996 of the neighbours the same. The scan reads FAISS's vectors and
keeps FAISS's heaps, but multiplies with NumPy's BLAS: `index.search` of faiss-cpu 1.15 took twice to four times the
processor time for 100 queries, since neither its half-precision kernel nor the BLAS it brings uses AVX-512 (measured at
1 M rows of 512; `bench/retrieval.py`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import fsspec
import fsspec.implementations.local
import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from retrieval.clip import ClipModel
from retrieval.corpus import read_table, usable
from retrieval.whole import whole_directory

SHARD_ROWS = 250_000
BUILD_THREADS = 2
"""Files of published embeddings read at a time; each holds one shard in memory."""
BLOCK_ROWS = 8192
"""Rows handled at a time: 16 MB of 512 float32, which the allocator gives back again and again without new pages."""
CHECKED_ROWS = 16
"""Captions of a file of published embeddings that are encoded again."""
SAME_MODEL = 0.9
"""Cosine of a caption's embedding to the same caption encoded again: of one model nearly 1, also in half precision; of
two models near 0; where the rows are not in the captions' order, what any two captions have."""
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

    def encoded(batch: pa.RecordBatch) -> np.ndarray:
        captions = batch.column("caption").dictionary_encode()  # what many rows have is encoded once
        return encode(captions.dictionary.to_pylist())[captions.indices.to_numpy()]

    blocks = ((encoded(batch), batch) for batch in batches if batch.num_rows)
    return build_index_from_blocks(blocks, out, model=model, shard_rows=shard_rows)


def build_index_from_blocks(
    blocks: Iterable[tuple[np.ndarray, pa.RecordBatch]],
    out: Path,
    *,
    model: str | None = None,
    shard_rows: int = SHARD_ROWS,
) -> Path:
    """As `build_index`, of captions encoded already: (n, d) float32 rows of unit length beside their n rows."""
    return _write([blocks], Path(out), model, shard_rows)


def build_index_from_embeddings(
    pairs: list[tuple[str, str]], out: Path, *, clip: ClipModel | None = None, shard_rows: int = SHARD_ROWS
) -> Path:
    """Write the index of published embeddings, brought to unit length.

    Args:
        pairs: what `precomputed` returned.
        out: the index directory, written whole or not at all.
        clip: the model they were made with; a few captions of each file are encoded again to see whether they were.
            Its digest is kept, as by `build_index`.
        shard_rows: rows of a shard at most.

    Rows without url or caption, and embeddings that are zero or not finite, are left out.

    Raises:
        ValueError: there are no usable rows, the files differ in width, a file's embeddings are not those of `clip`, or
            `out` is there already.
    """
    return _write(
        [_embedding_blocks(*pair, clip) for pair in pairs], Path(out), clip.digest if clip else None, shard_rows
    )


def check_model(clip: ClipModel, captions: list[str], cosines: Callable[[np.ndarray], np.ndarray], where: str) -> None:
    """Encode captions again, and compare.

    cosines: (n, d) float32 unit rows of the n captions -> (n,), each one's cosine to what was stored for it.

    Raises:
        ValueError: they are too far apart; it says how far.
    """
    middle = float(np.median(cosines(clip.encode_text(captions))))
    if middle < SAME_MODEL:
        raise ValueError(
            f"{where}: these embeddings are not of the CLIP model {clip.name}, or not of the captions beside them: "
            f"{len(captions)} captions encoded again have a similarity of {middle:.2f} to what is stored for them "
            f"(the median; at least {SAME_MODEL} is wanted). Set retrieval.clip to the model they were made with"
        )


Hits = tuple[np.ndarray, np.ndarray]
"""Scores (q, k) float32, falling, and row numbers (q, k) int64. Equal scores come in the order of the rows."""


def search(index_dir: Path, queries: np.ndarray, k: int, shards: range | None = None) -> Hits:
    """Find the nearest rows by cosine.

    Args:
        index_dir: an index directory.
        queries: (q, d) float32 rows of unit length.
        k: neighbours wanted; cut to the rows there are.
        shards: those to look in, by number, all when None; `merge_hits` puts the hits of several parts together.
    """
    header = read_header(index_dir)
    shards = range(len(header["shards"])) if shards is None else shards
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.shape[1] != header["dimension"]:
        raise ValueError(
            f"the index in {index_dir} holds embeddings of width {header['dimension']}, the CLIP model makes "
            f"{queries.shape[1]}: name the model the embeddings were made with"
        )
    k = min(k, sum(header["shards"][number]["rows"] for number in shards))
    heap = faiss.ResultHeap(len(queries), k, keep_max=True)
    block = np.zeros((BLOCK_ROWS, header["dimension"]), np.float32)
    for number in shards:
        shard = header["shards"][number]
        first = sum(before["rows"] for before in header["shards"][:number])
        index: Any = faiss.read_index(str(Path(index_dir) / f"{shard['name']}.faiss"), faiss.IO_FLAG_MMAP_IFC)
        codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
        vectors = codes.view(np.float16).reshape(index.ntotal, index.d)
        for start in range(0, len(vectors), BLOCK_ROWS):
            half = vectors[start : start + BLOCK_ROWS]
            torch.from_numpy(block)[: len(half)].copy_(torch.from_numpy(half))  # ten times as quick as NumPy's
            # Always the whole block, also where the last one is short: products of one shape sum each row in one and
            # the same order, so that equal captions score equally wherever they lie.
            products = np.ascontiguousarray((queries @ block.T)[:, : len(half)])
            heap.heaps.addn(len(half), faiss.swig_ptr(products), first)
            first += len(half)
    heap.finalize()
    return _in_order(heap.D, heap.I)


def merge_hits(parts: Sequence[Hits], k: int) -> Hits:
    """The nearest rows of all, from those of parts of an index, as one search of all of it finds them."""
    scores, rows = _in_order(np.hstack([scores for scores, _ in parts]), np.hstack([rows for _, rows in parts]))
    return scores[:, :k], rows[:, :k]


def _in_order(scores: np.ndarray, rows: np.ndarray) -> Hits:
    order = np.lexsort((rows, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


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


def read_header(index_dir: Path) -> dict:
    """Read what an index says of itself: `rows`, `dimension`, `model` (digest or None), `shards` (name, rows)."""
    path = Path(index_dir) / "index.json"
    if not path.is_file():
        raise ValueError(f"{index_dir} is not a caption index: it has no index.json")
    return json.loads(path.read_text())


def _write(
    sources: list[Iterable[tuple[np.ndarray, pa.RecordBatch]]], out: Path, model: str | None, shard_rows: int
) -> Path:
    """Write shards of each source's blocks, (n, d) float32 unit rows beside their n urls and captions."""
    with whole_directory(out) as folder, tqdm(desc=f"index {out.name}", unit=" captions", disable=None) as bar:

        def write_source(number: int) -> list[dict]:
            parts = itertools.groupby(_cut(sources[number], shard_rows), key=lambda part: part[0])
            return [_write_shard(folder, f"{number:04d}-{shard:04d}", group, bar) for shard, group in parts]

        if len(sources) == 1:  # in this thread, where Ctrl-C ends it at once
            shards = write_source(0)
        else:
            # One OpenMP thread in each of ours, or the two kinds would fight over the cores.
            with ThreadPoolExecutor(BUILD_THREADS, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
                shards = list(itertools.chain.from_iterable(pool.map(write_source, range(len(sources)))))
        if not shards:
            raise ValueError("the corpus holds no usable captions: every url, caption or embedding is empty")
        widths = {shard.pop("dimension") for shard in shards}
        if len(widths) > 1:
            raise ValueError(f"the embeddings have different widths, {sorted(widths)}: they are of different models")
        header = {
            "rows": sum(shard["rows"] for shard in shards),
            "dimension": widths.pop(),
            "model": model,
            "shards": shards,
        }
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


def _write_shard(folder: Path, name: str, parts: Iterable, bar: tqdm) -> dict:
    index: Any = None
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
    return {"name": name, "rows": index.ntotal, "dimension": index.d}


def _embedding_blocks(npy: str, parquet: str, clip: ClipModel | None) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    vectors, start, checked = _open_embeddings(npy), 0, clip is None
    filesystem, file = fsspec.url_to_fs(parquet)
    for batch in read_table(filesystem, file, BLOCK_ROWS):
        block = torch.from_numpy(vectors[start : start + batch.num_rows]).to(torch.float32, copy=True).numpy()
        start += batch.num_rows
        norms = np.sqrt(np.einsum("nd,nd->n", block, block))
        good = usable(batch).to_numpy(zero_copy_only=False) & np.isfinite(norms) & (norms > 0)
        if not good.all():
            block, norms, batch = block[good], norms[good], batch.filter(pa.array(good))
        block /= norms[:, None]
        if clip and not checked and len(block):
            some = np.unique(np.linspace(0, len(block) - 1, CHECKED_ROWS).astype(int))
            captions = batch.column("caption").take(pa.array(some)).to_pylist()
            _check_block(clip, captions, block[some], npy)
            checked = True
        yield block, batch


def _check_block(clip: ClipModel, captions: list[str], stored: np.ndarray, npy: str) -> None:
    def cosines(encoded: np.ndarray) -> np.ndarray:
        if encoded.shape[1] != stored.shape[1]:
            raise ValueError(
                f"{npy}: these embeddings have a width of {stored.shape[1]}, those of the CLIP model {clip.name} "
                f"{encoded.shape[1]}. Set retrieval.clip to the model they were made with"
            )
        return np.einsum("nd,nd->n", encoded, stored)

    check_model(clip, captions, cosines, npy)


def _open_embeddings(npy: str) -> np.ndarray:
    filesystem, file = fsspec.url_to_fs(npy)
    try:
        if isinstance(filesystem, fsspec.implementations.local.LocalFileSystem):
            # torch wants writable memory; nothing is written
            vectors = np.load(file, mmap_mode="c", allow_pickle=False)
        else:
            with filesystem.open(file, "rb") as stream:
                vectors = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"embeddings file {npy} is not a readable .npy file: {error}") from error
    native = vectors.dtype.isnative and vectors.dtype.itemsize in (2, 4, 8)  # what torch knows
    return vectors if native else vectors.astype(np.float32)
