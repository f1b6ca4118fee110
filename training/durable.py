"""Files that outlast a power failure: what is renamed into its place is on the disk before that, and so is the rename
after it."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises: OSError when it cannot be."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` a folder with all that is in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def replace(part: Path, place: Path) -> None:
    """Rename a file or folder, so that after a power failure `place` holds all of it or what it held before.

    Raises: ValueError when a pipe, a device or the like has the name: it would be gone.
    """
    if place.exists() and not (place.is_file() or place.is_dir()):
        raise ValueError(f"{place}: a pipe or a device; give the path of a file to write")
    (sync_tree if part.is_dir() else sync)(part)
    os.replace(part, place)
    sync(place.parent)
