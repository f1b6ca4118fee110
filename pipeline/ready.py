"""What a batch needs outside of itself: places that can be written, room on the disk, a hub that lets it in.

Looked at before anything runs; nothing is left behind.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pipeline.cost.of_plan import disk_bytes
from pipeline.plan import Plan
from pipeline.release.hub import check_access
from pipeline.spec import Settings
from pipeline.store import Store


def check_ready(plan: Plan, store: Store) -> list[str]:
    """Returns: what cannot be told from here, as notes.

    Raises: ValueError naming a place that cannot be written, a disk that is too small for what is to do, or a hub that
        refuses.
    """
    batch = plan.batch
    _check_places(batch)
    if store.is_local and (todo := plan.todo(store)):
        needed, free = disk_bytes(plan, todo), shutil.disk_usage(_existing(store.local)).free
        if needed > free:
            raise ValueError(
                f"store: {store.root}: what is to do leaves {needed / 1e9:.1f} GB or more there, but "
                f"{free / 1e9:.1f} GB are free; name a larger disk"
            )
    return [note for note in [check_access(batch.publish.hub) if batch.publish.hub else ""] if note]


def _check_places(settings: Settings) -> None:
    places = {"output": settings.output_path, "store": settings.store_url, "publish.to": settings.release_url}
    for key, place in places.items():
        if "://" in place:  # only writing there would tell
            continue
        folder = _existing(Path(place).expanduser())
        if not folder.is_dir():
            raise ValueError(f"{key}: {place}: {folder} is a file; name a folder")
        try:  # asked for its rights, root always has them
            tempfile.TemporaryDirectory(dir=folder).cleanup()
        except OSError as error:
            raise ValueError(
                f"{key}: {place}: {folder} cannot be written: {error.strerror}; name another folder"
            ) from None


def _existing(path: Path) -> Path:
    """The path, or of what it lies in the innermost that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())
