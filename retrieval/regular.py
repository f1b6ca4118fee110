"""Opening what a user or a stranger names as a file: a pipe would block whoever opens it, a device may never end."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to read its bytes.

    Raises: ValueError, without the path, for what is no regular file; OSError for what cannot be read, folders too.
    """
    file = open(path, "rb", opener=_at_once)  # noqa: SIM115 (whoever asked closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a regular file")
    return file


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe is seen to be one without waiting for who writes to it


def open_anywhere(filesystem: fsspec.AbstractFileSystem, path: str) -> BufferedReader:
    """As `open_regular`, of a storage that fsspec knows; what object stores hold is always regular."""
    if isinstance(filesystem, LocalFileSystem):
        return open_regular(path)
    return filesystem.open(path, "rb")
