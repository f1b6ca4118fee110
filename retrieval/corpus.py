"""Caption corpora: parquet tables of web images, with or without published CLIP embeddings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

# Lower-case names, first match wins: LAION (URL, TEXT), DataComp (url, text), COYO, clip-retrieval (url, caption).
COLUMN_NAMES = {
    "url": ("url", "image_url"),
    "caption": ("caption", "text", "alt_text"),
    "nsfw": ("punsafe", "nsfw", "nsfw_score", "nsfw_score_opennsfw2"),
    "sha256": ("sha256",),
}
NSFW_WORDS = {"UNLIKELY": 0.0, "UNSURE": 0.5, "NSFW": 1.0}
"""LAION-400M has words where later corpora have a probability."""


def read_corpus(path: str, *, batch_size: int = 8192) -> Iterator[pa.RecordBatch]:
    """Read the captions of a corpus.

    Args:
        path: a parquet file, a folder (searched through), a glob, or an fsspec URL of any of these.
        batch_size: rows read at a time.

    Yields:
        Batches with `url` and `caption` (string, never null) and, where the corpus has them, `nsfw`
        (float32, null where unknown) and `sha256` (string).

    Raises:
        ValueError: there is no parquet file, one cannot be read, or it lacks a url or a caption column.
    """
    filesystem, files = _files(path, ".parquet")
    if not files:
        raise ValueError(f"corpus {path}: no .parquet file there")
    for file in files:
        for batch in read_table(filesystem, file, batch_size):
            yield batch.filter(usable(batch))


def corpus_files(path: str) -> list[str]:
    """The parquet files of a corpus, each a corpus of its own to `read_corpus`, in its order."""
    filesystem, files = _files(path, ".parquet")
    return [filesystem.unstrip_protocol(file) for file in files]


def read_table(filesystem: fsspec.AbstractFileSystem, file: str, batch_size: int) -> Iterator[pa.RecordBatch]:
    """Read one parquet file under the columns' common names, every row of it, also those without url or caption."""
    with filesystem.open(file, "rb") as stream:
        try:
            parquet = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise ValueError(f"corpus file {file} is not a readable parquet file: {error}") from error
        names = _column_names(file, parquet.schema_arrow.names)
        for batch in parquet.iter_batches(batch_size, columns=list(names.values())):
            columns = {name: batch.column(original) for name, original in names.items()}
            for name, column in columns.items():
                columns[name] = _as_probability(column) if name == "nsfw" else column.cast(pa.string())
            yield pa.RecordBatch.from_pydict(columns)


def usable(batch: pa.RecordBatch) -> pa.BooleanArray:
    """Mark the rows that have a url and a caption."""
    present = pc.and_(pc.is_valid(batch.column("url")), pc.is_valid(batch.column("caption")))
    return pc.fill_null(pc.and_(present, pc.not_equal(pc.utf8_trim_whitespace(batch.column("caption")), "")), False)


def corpus_digest(path: str) -> str:
    """Hash what a corpus contains, over its .parquet and .npy files in their order.

    Local files by their bytes; remote ones by name, size and the store's own checksum, so that nothing is downloaded.
    """
    filesystem, files = _files(path, ".parquet", ".npy")
    if not files:
        raise ValueError(f"corpus {path}: no .parquet file there")
    total = hashlib.sha256()
    for file in files:
        if isinstance(filesystem, LocalFileSystem):
            with filesystem.open(file, "rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            total.update(f"{file} {filesystem.size(file)} {filesystem.checksum(file)}".encode())
    return total.hexdigest()


def precomputed(path: str) -> list[tuple[str, str]] | None:
    """Recognise published text embeddings: `text_emb/text_emb_0.npy` beside `metadata/metadata_0.parquet`.

    This is what clip-retrieval writes and LAION publishes, with or without leading zeros (`_0000`).

    Returns:
        Pairs (npy file, parquet file), in the order of their numbers, as fsspec URLs; None when the corpus has no
        text embeddings, so that its captions have to be encoded.

    Raises:
        ValueError: a file lacks its partner, or the two do not have the same number of rows.
    """
    filesystem, root = fsspec.url_to_fs(path)
    embeddings = _numbered(filesystem, f"{root.rstrip('/')}/text_emb", "text_emb", "npy")
    if not embeddings:
        return None
    tables = _numbered(filesystem, f"{root.rstrip('/')}/metadata", "metadata", "parquet")
    if lonely := sorted(embeddings.keys() ^ tables.keys()):
        raise ValueError(
            f"corpus {path}: text_emb/ and metadata/ must hold the same numbers; only one of them has {lonely}"
        )
    pairs = []
    for number in sorted(embeddings):
        npy, parquet = embeddings[number], tables[number]
        with filesystem.open(npy, "rb") as stream:
            shape = _npy_shape(npy, stream)
        with filesystem.open(parquet, "rb") as stream:
            rows = pq.read_metadata(stream).num_rows
        if shape[0] != rows:
            raise ValueError(
                f"corpus {path}: {PurePosixPath(npy).name} has {shape[0]} rows, {PurePosixPath(parquet).name} has "
                f"{rows}; they must be the same images in the same order"
            )
        pairs.append((filesystem.unstrip_protocol(npy), filesystem.unstrip_protocol(parquet)))
    return pairs


def _files(path: str, *suffixes: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """List the files of a corpus in a fixed order."""
    filesystem, root = fsspec.url_to_fs(path)
    if filesystem.isfile(root):
        return filesystem, [root]
    if filesystem.isdir(root):  # also one with brackets in its name
        found = filesystem.find(root)
    else:
        found = filesystem.glob(root) if fsspec.core.has_magic(root) else []
    return filesystem, sorted(file for file in found if file.endswith(suffixes))


def _column_names(file: str, found: list[str]) -> dict[str, str]:
    """Map our column names to the file's."""
    by_lower = {name.lower(): name for name in reversed(found)}
    names = {}
    for name, accepted in COLUMN_NAMES.items():
        original = next((by_lower[candidate] for candidate in accepted if candidate in by_lower), None)
        if original is not None:
            names[name] = original
        elif name in ("url", "caption"):
            raise ValueError(
                f"corpus file {file} has no {name} column: found {found}, accepted (in any case) {list(accepted)}"
            )
    return names


def _as_probability(column: pa.Array) -> pa.Array:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return pa.array([NSFW_WORDS.get(word) for word in column.to_pylist()], pa.float32())
    return column.cast(pa.float32())


def _numbered(filesystem: fsspec.AbstractFileSystem, folder: str, stem: str, suffix: str) -> dict[int, str]:
    if not filesystem.isdir(folder):
        return {}
    pattern = re.compile(rf"{stem}_(\d+)\.{suffix}$")
    matches = ((pattern.search(file), file) for file in filesystem.find(folder, maxdepth=1))
    return {int(match[1]): file for match, file in matches if match}


def _npy_shape(file: str, stream) -> tuple[int, int]:
    """Read the shape in a .npy header, without the data."""
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, column_major, dtype = read_header[version](stream)
    except (ValueError, KeyError) as error:
        raise ValueError(f"embeddings file {file} is not a readable .npy file: {error}") from error
    if len(shape) != 2 or dtype.kind != "f" or column_major:
        raise ValueError(f"embeddings file {file} must hold rows of floats; it has shape {shape}, type {dtype}")
    return shape
