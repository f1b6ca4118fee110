"""Directories that are there whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Give a temporary directory beside `out`, renamed to `out` if the block ends well and removed if it does not.

    Raises:
        ValueError: `out` is there already and not an empty directory.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; remove it, or choose another place")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(out)  # POSIX: replaces an empty directory, fails on any other
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
