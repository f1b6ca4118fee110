"""The command, and the Ray tasks that a batch is made of.

Imported before the other packages of this project wherever it starts: by the command, by `python -m`, by Ray's workers.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The folder that this project is imported from."""


def holds(folder: Path, *names: str) -> bool:
    """Whether a folder that is not `ROOT` has modules or packages of one of these names."""
    return folder.resolve() != ROOT and any(PathFinder.find_spec(name, [str(folder)]) for name in names)


def _put_own_first() -> None:
    """Search folders with a `training` (or `pipeline`, `retrieval`) of their own after `ROOT`.

    `python -m` and Ray put the current folder first, and it is the user's."""
    foreign = [entry for entry in sys.path if holds(Path(entry), "pipeline", "retrieval", "training")]
    if foreign:
        own = [entry for entry in sys.path if entry not in foreign]
        sys.path[:] = [*own, *([] if str(ROOT) in own else [str(ROOT)]), *foreign]


_put_own_first()
