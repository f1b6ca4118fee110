"""Where releases lie: a folder, or a place on a storage that fsspec knows."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.places import check_named, masked
from retrieval.regular import open_regular

READ_ONLY = ("http", "https")
"""Whose servers list no folders, take no files, and may answer anything to a question for what is not there."""


class Place(NamedTuple):
    """fs: file system. root: path there. url: the place as people write it, without needless slashes."""

    fs: AbstractFileSystem
    root: str
    url: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)


def plain_place(place: str) -> str:
    """A folder or URL without needless slashes.

    Raises: ValueError when it names no place.
    """
    check_named(place)
    scheme, is_url, path = place.rpartition("://")
    # doubled slashes make keys of object stores with empty names in them, which no listing finds again
    path = re.sub("/+", "/", path)
    path = path.rstrip("/") or path
    if not is_url:
        return os.path.expanduser(path)
    if "::" in scheme:
        raise ValueError(f"{masked(place)}: chained URLs are not read; give the last one alone")
    if scheme not in ("file", "local"):
        if path.startswith("/") and scheme != "memory":
            raise ValueError(f"{masked(place)}: no bucket or host after {scheme}:// (was a variable not set?)")
        if any(part in (".", "..") for part in path.split("/")):
            raise ValueError(f"{masked(place)}: '.' and '..' are names like others there; leave them out")
    return f"{scheme}://{path}"


def plain_destination(place: str) -> str:
    """A folder or URL to write to, without needless slashes.

    Raises: ValueError when it names no place, or one that cannot be written to.
    """
    place = plain_place(place)
    scheme, is_url, path = place.rpartition("://")
    if scheme in READ_ONLY:
        raise ValueError(f"{masked(place)}: nothing is written over HTTP; give a folder or a bucket (s3://…)")
    if is_url and scheme not in ("file", "local") and re.search(r"[*?\[\]]", path):
        raise ValueError(f"{masked(place)}: storages read *, ?, [ and ] as patterns; give a place without them")
    return place


def open_place(place: str) -> Place:
    """A folder or URL that is read; what was listed of it before is forgotten. Raises: as `plain_place`."""
    return _opened(plain_place(place))


def open_destination(place: str) -> Place:
    """A folder or URL that is written to. Raises: as `plain_destination`."""
    return _opened(plain_destination(place))


def _opened(url: str) -> Place:
    fs, root = url_to_fs(url)
    fs.invalidate_cache()
    return Place(fs, root, url)


def read(fs: AbstractFileSystem, path: str) -> bytes:
    """A file or object, whole.

    Raises: FileNotFoundError when there is none; ValueError when it is no regular file: a pipe would block.
    """
    if not isinstance(fs, LocalFileSystem):
        return fs.cat_file(path)
    try:
        with open_regular(path) as file:
            return file.read()
    except (ValueError, IsADirectoryError):
        raise ValueError(f"{path}: not a regular file") from None


def make_folder(fs: AbstractFileSystem, folder: str) -> None:
    """Make a folder where there are folders; object stores have none, and s3fs would make a bucket."""
    if isinstance(fs, LocalFileSystem):
        fs.makedirs(folder, exist_ok=True)


def create(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a file or object, whole, that is not there yet.

    Raises: FileExistsError when it is; ValueError when its bucket is not.
    """
    if isinstance(fs, LocalFileSystem):
        with open(path, "xb") as f:
            try:
                f.write(content)
                f.flush()
            except OSError:  # a full disk
                Path(path).unlink()
                raise
        return
    try:
        fs.pipe_file(path, content, mode="create")
    except FileNotFoundError:
        bucket = fs.unstrip_protocol(path.partition("/")[0])
        raise ValueError(f"{bucket}: no such bucket; make it first, or correct the name") from None
