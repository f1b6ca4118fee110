"""Caption corpora: parquet tables of web images, with or without published CLIP embeddings."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from retrieval.regular import open_anywhere

# Lower-case names, first match wins: LAION (URL, TEXT), DataComp (url, text), COYO, clip-retrieval (url, caption).
COLUMN_NAMES = {
    "url": ("url", "image_url"),
    "caption": ("caption", "text", "alt_text"),
    "nsfw": ("punsafe", "nsfw", "nsfw_score", "nsfw_score_opennsfw2"),
    "sha256": ("sha256",),
}
NSFW_WORDS = {"UNLIKELY": 0.0, "UNSURE": 0.5, "NSFW": 1.0}
"""LAION-400M has words where later corpora have a probability."""
MAX_CAPTION = 4000
"""Letters of a caption that are kept: no text encoder reads as many."""
MAX_URL = 8000
"""Bytes of a url; rows with a longer one are left out."""
BATCH_BYTES = 64_000_000
"""Text read at a time, about, however long the rows are."""


def read_corpus(path: str, *, batch_size: int = 8192) -> Iterator[pa.RecordBatch]:
    """Read the captions of a corpus.

    Args:
        path: a parquet file, a folder (searched through), a glob, or an fsspec URL of any of these.
        batch_size: rows read at a time at most.

    Yields:
        Batches with `url` and `caption` (string, never null) and, where the corpus has them, `nsfw`
        (float32, null where unknown) and `sha256` (string). Rows without url or caption, or whose text is not UTF-8,
        are left out; `corpus_rows` less the rows yielded is their number.

    Raises:
        ValueError: there is no parquet file, one cannot be read, it lacks a url or a caption column, or one of its
            columns is of another kind.
    """
    filesystem, files = _parquet_files(path)
    for file in files:
        for batch in read_table(filesystem, file, batch_size):
            yield batch.filter(usable(batch))


def corpus_files(path: str) -> list[str]:
    """The parquet files of a corpus, each a corpus of its own to `read_corpus`, in its order."""
    filesystem, files = _parquet_files(path)
    return [filesystem.unstrip_protocol(file) for file in files]


def corpus_rows(path: str) -> int:
    """Rows of a corpus, also those that cannot be used."""
    total = 0
    filesystem, files = _parquet_files(path)
    for file in files:
        with _reading(file), open_anywhere(filesystem, file) as stream:
            total += pq.read_metadata(stream).num_rows
    return total


def check_corpus(path: str, *, scores: bool) -> None:
    """Read the beginning of a corpus. ValueError as `read_corpus`, and, with `scores`, where it has no NSFW scores."""
    filesystem, (file, *_) = _parquet_files(path)
    first = next(read_table(filesystem, file, 8192), None)
    if scores and first is not None and "nsfw" not in first.schema.names:
        raise ValueError(
            f"corpus file {file} has no column of NSFW scores, named (in any case) one of {list(COLUMN_NAMES['nsfw'])}"
        )
    if scores and first is not None and first.num_rows and first.column("nsfw").null_count == first.num_rows:
        raise ValueError(
            f"corpus file {file}: none of the first {first.num_rows} rows has an NSFW score that can be read: a "
            f"number, or one of {list(NSFW_WORDS)}"
        )


def read_table(filesystem: fsspec.AbstractFileSystem, file: str, batch_size: int) -> Iterator[pa.RecordBatch]:
    """Read one parquet file under the columns' common names, every row of it, also those without url or caption."""
    with _reading(file), open_anywhere(filesystem, file) as stream:
        try:
            parquet = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise ValueError(f"corpus file {file} is not a readable parquet file: {error}") from error
        names = _column_names(file, parquet.schema_arrow.names)
        for name, original in names.items():
            _check_type(file, name, original, parquet.schema_arrow.types[parquet.schema_arrow.names.index(original)])
        # As dictionaries: one long caption that all rows have is then in memory once.
        texts = list(names.values())
        parquet = pq.ParquetFile(stream, metadata=parquet.metadata, read_dictionary=texts)
        for batch in parquet.iter_batches(_rows_at_once(parquet.metadata, texts, batch_size), columns=texts):
            columns = {name: batch.column(batch.schema.names.index(original)) for name, original in names.items()}
            yield pa.RecordBatch.from_pydict({name: _READ[name](column) for name, column in columns.items()})


def usable(batch: pa.RecordBatch) -> pa.BooleanArray:
    """Mark the rows that have a url and a caption."""
    present = pc.and_(pc.is_valid(batch.column("url")), pc.is_valid(batch.column("caption")))
    return pc.fill_null(pc.and_(present, pc.not_equal(pc.utf8_trim_whitespace(batch.column("caption")), "")), False)


def corpus_digest(path: str) -> str:
    """Hash what a corpus contains, over its .parquet and .npy files in their order.

    Local files by their bytes; remote ones by name, size and the store's own checksum, so that nothing is downloaded.
    """
    filesystem, files = _files(path, ".parquet", ".npy")
    total = hashlib.sha256()
    for file in files:
        with _reading(file):
            if isinstance(filesystem, LocalFileSystem):
                with open_anywhere(filesystem, file) as stream:
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
    with _reading(path):
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
        with _reading(npy), open_anywhere(filesystem, npy) as stream:
            shape = _npy_shape(npy, stream, filesystem.size(npy))
        with _reading(parquet), open_anywhere(filesystem, parquet) as stream:
            rows = pq.read_metadata(stream).num_rows
        if shape[0] != rows:
            raise ValueError(
                f"corpus {path}: {PurePosixPath(npy).name} has {shape[0]} rows, {PurePosixPath(parquet).name} has "
                f"{rows}; they must be the same images in the same order"
            )
        pairs.append((filesystem.unstrip_protocol(npy), filesystem.unstrip_protocol(parquet)))
    return pairs


@contextlib.contextmanager
def _reading(place: str) -> Iterator[None]:
    """Give what a storage or a parser raises the name of the file; storages have errors of their own kinds."""
    try:
        yield
    except (ImportError, MemoryError):  # ours to say elsewhere
        raise
    except FileNotFoundError as error:
        raise ValueError(f"corpus {place}: not there") from error
    except Exception as error:
        if isinstance(error, ValueError) and place in str(error):
            raise
        status = getattr(error, "status", None)  # aiohttp's, of a server
        why = f"the server answers {status} {getattr(error, 'message', '')}" if status else str(error) or repr(error)
        raise ValueError(f"corpus {place} cannot be read: {why}") from error


def _parquet_files(path: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    return _files(path, ".parquet")


def _files(path: str, *suffixes: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """List the files of a corpus in a fixed order; ValueError when there are none."""
    with _reading(path):
        filesystem, root = fsspec.url_to_fs(path)
        if filesystem.isfile(root):
            return filesystem, [root]
        if filesystem.isdir(root):  # also one with brackets in its name
            found = filesystem.find(root)
        else:
            found = filesystem.glob(root) if fsspec.core.has_magic(root) else []
    files = sorted(file for file in found if file.endswith(suffixes))
    if not files:
        raise ValueError(f"corpus {path}: no .parquet file there")
    return filesystem, files


def _column_names(file: str, found: list[str]) -> dict[str, str]:
    """Map our column names to the file's."""
    by_lower = {name.lower(): name for name in reversed(found)}
    names = {}
    for name, accepted in COLUMN_NAMES.items():
        original = next((by_lower[candidate] for candidate in accepted if candidate in by_lower), None)
        if original is not None:
            if found.count(original) > 1:
                raise ValueError(f"corpus file {file} has {found.count(original)} columns named {original!r}; keep one")
            names[name] = original
        elif name in ("url", "caption"):
            raise ValueError(
                f"corpus file {file} has no {name} column: found {found}, accepted (in any case) {list(accepted)}"
            )
    return names


def _check_type(file: str, name: str, original: str, kind: pa.DataType) -> None:
    """Refuse a column that holds something else than its name says."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = any(is_kind(value) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
    raw = any(is_kind(value) for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))
    number = pa.types.is_floating(value) or pa.types.is_integer(value) or pa.types.is_boolean(value)
    good = {
        "nsfw": text or raw or number or pa.types.is_decimal(value),
        "sha256": text or raw or value == pa.binary(32),
    }
    if not (good.get(name, text or raw) or pa.types.is_null(value)):
        wanted = {"nsfw": "numbers or words", "sha256": "hexadecimal text or 32 bytes"}.get(name, "text")
        raise ValueError(f"corpus file {file}: the column {original!r} has the type {kind}; {wanted} is needed")


def _rows_at_once(metadata: pq.FileMetaData, columns: list[str], most: int) -> int:
    """Rows that hold about BATCH_BYTES of text where a file has most of it a row."""
    largest = 0.0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = map(group.column, range(group.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)
        largest = max(largest, size / max(1, group.num_rows))
    return max(1, min(most, int(BATCH_BYTES // max(1.0, largest))))


def _text(column: pa.Array) -> pa.Array:
    """Any column of text as strings; null where its bytes are not UTF-8."""
    raw = column.cast(pa.large_binary())
    try:
        return raw.cast(pa.large_string())
    except pa.ArrowInvalid:
        return pa.array([_utf8(value) for value in raw.to_pylist()], pa.large_string())


def _utf8(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _each_once(read: Callable[[pa.Array], pa.Array]) -> Callable[[pa.Array], pa.Array]:
    """Read a dictionary's values once, not once for each row that has them."""

    def rows(column: pa.Array) -> pa.Array:
        if pa.types.is_dictionary(column.type):
            return rows(column.dictionary).take(column.indices)
        return read(column)

    return rows


@_each_once
def _caption(column: pa.Array) -> pa.Array:
    return pc.utf8_slice_codeunits(_text(column), 0, MAX_CAPTION).cast(pa.string())


@_each_once
def _url(column: pa.Array) -> pa.Array:
    text = _text(column)
    return pc.if_else(pc.less_equal(pc.binary_length(text), MAX_URL), text, None).cast(pa.string())


@_each_once
def _score(column: pa.Array) -> pa.Array:
    """float32, null where there is no number."""
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        scores = column.cast(pa.float32(), safe=False)
    elif pa.types.is_decimal(column.type):
        scores = column.cast(pa.float64()).cast(pa.float32())
    elif pa.types.is_null(column.type):
        scores = column.cast(pa.float32())
    else:
        scores = pa.array([_probability(word) for word in _text(column).to_pylist()], pa.float32())
    return pc.if_else(pc.is_nan(scores), None, scores)  # is not above any bound


def _probability(word: str | None) -> float | None:
    word = (word or "").strip().upper()
    try:
        return NSFW_WORDS[word] if word in NSFW_WORDS else float(word)
    except ValueError:
        return None


@_each_once
def _sha256(column: pa.Array) -> pa.Array:
    """In lower-case hexadecimal."""
    if pa.types.is_fixed_size_binary(column.type):
        return pa.array([value and value.hex() for value in column.to_pylist()], pa.string())
    return pc.utf8_lower(pc.utf8_slice_codeunits(pc.utf8_trim_whitespace(_text(column)), 0, 64)).cast(pa.string())


_READ = {"url": _url, "caption": _caption, "nsfw": _score, "sha256": _sha256}


def _numbered(filesystem: fsspec.AbstractFileSystem, folder: str, stem: str, suffix: str) -> dict[int, str]:
    if not filesystem.isdir(folder):
        return {}
    files = [file for file in filesystem.find(folder, maxdepth=1) if file.endswith(f".{suffix}")]
    numbers = [re.search(rf"/{stem}_([0-9]+)\.{suffix}$", file) for file in files]
    if strange := [file for file, number in zip(files, numbers, strict=True) if not number]:
        raise ValueError(f"corpus {strange[0]}: expected a name like {stem}_0.{suffix} in this folder")
    return {int(number[1]): file for file, number in zip(files, numbers, strict=True) if number}


def _npy_shape(file: str, stream, size: int | None) -> tuple[int, int]:
    """Read the shape in a .npy header, without the data, and check that a file of so many bytes holds them."""
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, column_major, dtype = read_header[version](stream)
    except (ValueError, KeyError, EOFError) as error:
        raise ValueError(f"embeddings file {file} is not a readable .npy file: {error}") from error
    if len(shape) != 2 or min(shape) < 0 or dtype.kind != "f" or column_major:
        raise ValueError(f"embeddings file {file} must hold rows of floats; it has shape {shape}, type {dtype}")
    wanted = stream.tell() + shape[0] * shape[1] * dtype.itemsize
    if size is not None and size < wanted:
        raise ValueError(f"embeddings file {file} is cut short: it has {size} of {wanted} bytes")
    return shape
