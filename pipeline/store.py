"""The artifact store: a folder per stage result, named by the hash of all that determined it.

    <root>/<kind>/<key>/…files… + manifest.json      whole artifacts; the manifest is written last
    <root>/.scratch/<key>/                           a stage's checkpoints, local, gone when it is finished
    <root>/.building/<machine>.<pid>.<start>.…/      artifacts being built, by whom

The root is a local path or an fsspec URL. On a local root an artifact is built in a temporary folder beside its place
and renamed; on a URL it is built locally, uploaded, and is whole once its manifest is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from training.durable import replace

MANIFEST = "manifest.json"
DAY = 86_400
"""Seconds."""

BEAT = 600
"""Seconds between two signs of life of what is being built."""


def file_digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def content_key(description: Any) -> str:
    """Hash of a JSON-able description, 20 hexadecimal digits."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:20]


def checksums(folder: Path) -> dict[str, str]:
    """Relative file name -> sha256, of all files but the manifest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): file_digest(p) for p in files}


class Store:
    """See the module. `cache` is where artifacts of a remote root are kept locally."""

    def __init__(self, root: str, cache: str | Path | None = None) -> None:
        self.fs, self.base = fsspec.core.url_to_fs(root)
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))
        self.root = self.base if self.is_local else root  # absolute: workers stand elsewhere
        self.local = Path(self.base) if self.is_local else Path(cache or _cache_of(root))

    def has(self, kind: str, key: str) -> bool:
        """Whether the artifact is there, whole."""
        return self.fs.exists(f"{self.base}/{kind}/{key}/{MANIFEST}")

    def path(self, kind: str, key: str) -> Path:
        """Local folder of a finished artifact, brought from a remote root when it is not here yet."""
        folder = self.local / kind / key
        if (folder / MANIFEST).exists():
            return folder
        if self.is_local or not self.has(kind, key):
            raise FileNotFoundError(f"{self.root}: no artifact {kind}/{key}")
        with self._building(folder) as part:
            place = f"{self.base}/{kind}/{key}"
            # a list of files, since a folder's name with brackets would be a pattern
            names = [path.removeprefix(f"{place}/") for path in self.fs.find(place)]
            self.fs.get([f"{place}/{name}" for name in names], [f"{part}/{name}" for name in names])
        return folder

    def manifest(self, kind: str, key: str) -> dict[str, Any]:
        """Raises: FileNotFoundError when there is none; ValueError when it is damaged."""
        place = f"{self.base}/{kind}/{key}"
        try:
            found = json.loads(self.fs.cat_file(f"{place}/{MANIFEST}"))
            if not isinstance(found, dict):
                raise ValueError(f"expected an object, found {type(found).__name__}")
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise ValueError(f"{place}/{MANIFEST}: damaged: {why}; remove its folder, and it is made again") from None
        return found

    def scratch(self, key: str) -> Path:
        """Local folder for a stage's checkpoints, kept when the stage is cut off."""
        folder = self.local / ".scratch" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def create(self, kind: str, key: str, description: dict[str, Any]) -> Iterator[Path]:
        """Build an artifact: the block fills the folder it is given; on leaving, it is made whole or not at all."""
        folder, start = self.local / kind / key, time.time()
        with self._building(folder) as part:
            yield part
            manifest = {"kind": kind, "key": key, "seconds": round(time.time() - start, 3), **description}
            manifest["files"] = checksums(part)
            (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
        if not self.is_local:
            target = f"{self.base}/{kind}/{key}"
            for name in manifest["files"]:
                # without a folder first: object stores have none, and s3fs would make a bucket
                self.fs.put_file(str(folder / name), f"{target}/{name}")
            self.fs.put_file(str(folder / MANIFEST), f"{target}/{MANIFEST}")
        shutil.rmtree(self.local / ".scratch" / key, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed processes left: checkpoints of what is finished, and what is half-built; of processes that
        this one could see, at once; of others, on another machine or in another container, what showed no sign of life
        for a day."""
        for scratch in (self.local / ".scratch").glob("*"):
            made = self.local.glob(f"*/{scratch.name}/{MANIFEST}")
            if any(self.has(manifest.parts[-3], scratch.name) for manifest in made):
                shutil.rmtree(scratch, ignore_errors=True)
        for part in (self.local / ".building").glob("*"):
            machine, _, process = part.name.rpartition(".")[0].partition(".")
            if machine == _machine():
                dead = process != _process(process.partition(".")[0])
            else:
                dead = time.time() - _last_written(part) > DAY
            if dead and part.is_symlink():
                part.unlink(missing_ok=True)
            elif dead:
                shutil.rmtree(part, ignore_errors=True)

    @contextlib.contextmanager
    def _building(self, folder: Path) -> Iterator[Path]:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = self.local / ".building"
        building.mkdir(exist_ok=True)
        owner = f"{_machine() or socket.gethostname()}.{_process(str(os.getpid())) or os.getpid()}"
        part = Path(tempfile.mkdtemp(prefix=f"{owner}.", dir=building))
        try:
            with _beating(part):
                yield part
            try:
                replace(part, folder)
            except OSError:
                if not (folder / MANIFEST).exists():  # else another process was first with the same artifact
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _beating(part: Path) -> Iterator[None]:
    """Inside the block, a folder's time shows that it is being worked on, also while nothing is written there."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(part)

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()


def _last_written(folder: Path) -> float:
    """Seconds since the epoch; now, where it has gone meanwhile. Of links themselves, wherever they lead."""
    try:
        inner = folder.rglob("*") if folder.is_dir() and not folder.is_symlink() else ()
        return max(path.lstat().st_mtime for path in (folder, *inner))
    except OSError:
        return time.time()


def _machine() -> str:
    """What the processes have in common that see each other, and no others: one start of a machine, and on it one
    container. Not the host's name, which several may have. Empty where it cannot be told (no Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return content_key([boot, os.readlink("/proc/self/ns/pid")])
    except OSError:
        return ""


def _process(pid: str) -> str:
    """Number and start of a process of this `_machine`, as the number alone comes again; empty when it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *values = stat.rpartition(")")[2].split()  # after its name, which may hold anything
    return "" if state in "ZX" else f"{pid}.{values[18]}"


def _cache_of(root: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return home / "polyconcept" / content_key(root)
