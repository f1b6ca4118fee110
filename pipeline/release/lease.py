"""A lease on the releases of a place: who holds it is the only one to retrain there, until it ends or dies.

    <destination>/.lease/000007.json    {"holder": …, "seconds": …, "until": …}

Leases are numbered, and a number is created by one process only (local file systems and object stores both can). The
highest number counts: who finds it expired creates the next one. Numbers only grow, so that a run which slept through
the end of its lease finds a higher one and knows. A lease is renewed when a quarter of it is over, and one that ends
more than twice its length from now is not believed: machines' clocks may differ by half of a lease.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import posixpath
import re
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.reading import parse_written
from pipeline.release.place import create, make_folder, open_destination, read

LONGEST = 86_400
"""Seconds that a lease may last; what says that it lasts longer is none, and must not keep others out for years."""

LONGEST_NAME = 300
"""Letters of a holder's name that are shown."""

log = logging.getLogger(__name__)


class Busy(ValueError):
    """Another run holds the lease, or has taken it over."""


class Lease:
    """A lease that is held; see `lease`."""

    def __init__(self, fs: AbstractFileSystem, folder: str, number: int, seconds: float, until: float) -> None:
        self.fs, self.folder, self.number, self.seconds, self.until = fs, folder, number, seconds, until

    def check(self) -> None:
        """Raises: Busy when it is not held any more: another run may be at work."""
        if time.time() >= self.until or _numbers(self.fs, self.folder)[-1:] != [self.number]:
            raise Busy("the lease ran out while this run was stopped or could not reach the store; nothing released")

    def renew(self) -> None:
        self._end(time.time() + self.seconds)

    def give_back(self) -> None:
        self._end(time.time())  # not removed: numbers must not come again

    def _end(self, until: float) -> None:
        _write(self.fs, _path(self.folder, self.number), self.seconds, until)
        self.until = until


@contextlib.contextmanager
def lease(destination: str, seconds: float, wait: float = 0, name: str = ".lease") -> Iterator[Lease]:
    """Hold the lease of a folder or URL of releases; it is renewed in the background.

    Args:
        seconds: after which it is anybody's, when this process dies; up to a day.
        wait: seconds to wait for another run to end.
        name: of the folder it is in; those of other names are other leases.
    Raises: Busy when another run holds it; ValueError when it would be too long, or the destination cannot be written
        to, or there is no such bucket.
    """
    if not 0 < seconds <= LONGEST:
        raise ValueError(f"lease: {seconds:g} seconds; a lease lasts up to {LONGEST} (a day), and is renewed")
    fs, root, _ = open_destination(destination)
    folder = f"{root}/{name}"
    make_folder(fs, folder)
    held = _acquire(fs, folder, seconds, wait)
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(seconds / 4):
            try:
                held.check()
                held.renew()
            except Busy:
                return
            except Exception as error:  # storages have exceptions of their own; tried again, `check` says when too late
                log.warning("lease not renewed, trying again: %s", error)

    renewing = threading.Thread(target=keep, daemon=True)
    renewing.start()
    try:
        yield held
    finally:
        ended.set()
        renewing.join()
        try:
            held.check()
            held.give_back()
        except Busy:
            pass
        except Exception as error:  # how the run ended is the news
            log.warning("lease not given back, others wait until it runs out: %s", error)


def _acquire(fs: AbstractFileSystem, folder: str, seconds: float, wait: float) -> Lease:
    deadline = time.monotonic() + wait
    while True:
        numbers = _numbers(fs, folder)
        until, holder = _read(fs, _path(folder, numbers[-1]), seconds) if numbers else (0.0, "")
        if time.time() >= until:
            number, until = (numbers[-1] if numbers else 0) + 1, time.time() + seconds
            # created, but with a higher number beside it: one that had been taken, given back and removed meanwhile
            if _create(fs, _path(folder, number), seconds, until) and _numbers(fs, folder)[-1] == number:
                for old in numbers:
                    # first what a process left that was killed while it renewed its lease
                    for path in (_part(_path(folder, old)), _path(folder, old)):
                        with contextlib.suppress(FileNotFoundError):
                            fs.rm_file(path)
                return Lease(fs, folder, number, seconds, until)
            continue  # another was first: see how long it is that one's
        if time.monotonic() >= deadline:
            path = _path(folder, numbers[-1])
            path = path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)
            end = datetime.fromtimestamp(until, UTC).isoformat(timespec="seconds")
            raise Busy(f"{path}: {holder or 'another run'} is at work here; its lease ends at {end} if not renewed")
        time.sleep(min(5.0, max(0.1, until - time.time()), max(0.1, deadline - time.monotonic())))


def _path(folder: str, number: int) -> str:
    return f"{folder}/{number:06d}.json"


def _part(path: str) -> str:
    """Where a lease on a disk is written before it is renamed."""
    return f"{path}.part"


def _numbers(fs: AbstractFileSystem, folder: str) -> list[int]:
    fs.invalidate_cache()
    try:
        names = [posixpath.basename(path) for path in fs.ls(folder, detail=False)]
    except FileNotFoundError:
        return []
    return sorted(int(name[:-5]) for name in names if re.fullmatch(r"[0-9]+\.json", name))


def _read(fs: AbstractFileSystem, path: str, seconds: float) -> tuple[float, str]:
    """Until when it is held, and by whom. seconds: length of a lease that does not say its own."""
    try:
        try:
            value = parse_written(read(fs, path), path, is_json=True).value
            length, until, holder = float(value["seconds"]), float(value["until"]), str(value["holder"])[:LONGEST_NAME]
            if not (0 < length <= LONGEST and math.isfinite(until)):
                raise ValueError(value)
            seconds = length
        except (ValueError, KeyError, TypeError, OverflowError):
            # its process died (or is) between creating and writing it, or it is none
            until, holder = fs.modified(path).timestamp() + seconds, ""
    except FileNotFoundError:  # a later one has come
        return 0.0, ""
    if until > time.time() + 2 * seconds:  # by a clock that is, or was, wrong
        return 0.0, holder
    return until, holder


def _content(seconds: float, until: float) -> bytes:
    value = {"holder": f"{socket.gethostname()}, process {os.getpid()}", "seconds": seconds, "until": until}
    return json.dumps(value).encode()


def _create(fs: AbstractFileSystem, path: str, seconds: float, until: float) -> bool:
    """Whether this process created it: at most one does."""
    try:
        create(fs, path, _content(seconds, until))
    except FileExistsError:
        return False
    return True


def _write(fs: AbstractFileSystem, path: str, seconds: float, until: float) -> None:
    if isinstance(fs, LocalFileSystem):
        part = _part(path)
        with open(part, "wb") as f:
            f.write(_content(seconds, until))
        os.replace(part, path)
    else:
        fs.pipe_file(path, _content(seconds, until))
