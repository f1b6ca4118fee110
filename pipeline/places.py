"""Where things are that a file names: paths relative to the file, `~`, patterns, and URLs of storages."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

import fsspec

USER = re.compile(r"""(?<=://)(?:[^\s/:'"]*:[^\s'"]*|[^\s/'"?#]+)(?=@)""")
# as storages repeat an address in their errors: without its `s3://`
BARE = re.compile(r"""(?<![^\s'"`(=])[^\s/:@'"]+:(?!/)[^\s@'"]+(?=@)""")
SECRET = re.compile(
    r"""([?&][^=&\s'"]*(?:token|key|secret|sig|password|credential)[^=&\s'"]*=)[^&\s'"#]+""", re.IGNORECASE
)
BUCKETS = ("s3", "s3a", "gs", "gcs")
"""Storages whose addresses begin with a bucket, which has no user."""


def masked(text: str) -> str:
    """A text that shows no passwords: neither before an `@` nor in a query."""
    return SECRET.sub(r"\1***", BARE.sub("***", USER.sub("***", text)))


def check_place(place: str) -> str:
    """The place, if it can be one. Raises: ValueError for a URL without a bucket or host, of no known storage, or
    with keys before a bucket."""
    storage, mark, rest = place.partition("://")
    storage = storage.rpartition("::")[2]
    if mark and storage not in fsspec.available_protocols():
        raise ValueError(f"{masked(place)!r} is on no storage that is known: {storage!r}")
    if mark and storage not in ("file", "local", "memory") and not rest.partition("/")[0].strip():
        raise ValueError(f"{masked(place)!r} names no bucket or host; is a variable empty?")
    if storage in BUCKETS and re.match("[^/@]*:.*@", rest):
        raise ValueError(f"{masked(place)!r}: keys are not read from an address; set them in the environment")
    begin, colon, rest = place.partition(":")
    if not mark and colon and rest[:1] in ("", "/") and begin in fsspec.available_protocols():
        raise ValueError(f"{masked(place)!r} is no URL; write {begin}://…")
    return place


def check_named(place: str) -> str:
    """As `check_place`, of a place that has to be named. Raises: ValueError also for nothing."""
    if not place.strip():
        raise ValueError("no folder or URL is named; is a variable empty?")
    return check_place(place)


def located(place: str, folder: str | Path) -> str:
    """Absolute path of what a file in a folder names; URLs, and an empty place, as they are."""
    if not place or "://" in place:
        return place
    path = os.path.abspath(os.path.join(folder, os.path.expanduser(place)))
    if glob.has_magic(place) and not os.path.exists(path):  # a pattern: brackets of the folder's name are none
        path = os.path.abspath(os.path.join(glob.escape(os.path.abspath(folder)), os.path.expanduser(place)))
    return path


def is_path(name: str, folder: str | Path) -> bool:
    """Whether a model's name is that of a file or folder, not of a hub's repository."""
    return name.startswith((".", "/", "~")) or os.path.exists(os.path.join(folder, name))


CLIP = "clip:"
"""What stands before an open_clip model where timm's are named, too."""
