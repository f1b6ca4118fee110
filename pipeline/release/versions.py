"""What people do with releases that are there: list, compare, promote, roll back, remove."""

from __future__ import annotations

import os
import posixpath
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from pipeline.release.manifest import leaves_its_folder
from pipeline.release.place import open_destination, open_place
from pipeline.release.publish import (
    ALIAS,
    CANDIDATES,
    MANIFEST,
    VERSION,
    alias_of,
    files_of,
    manifest_of,
    move_alias,
    project_beside,
    publish,
    remove,
    resolve,
    verify,
    version_of,
    versions,
)
from pipeline.release.sign import signer

GRACE = 24 * 3600
"""Seconds that something half-written is left alone: a publication may be at work on it."""


@dataclass(frozen=True)
class Version:
    """manifest: None when it was not published whole, or is damaged. aliases: that name it."""

    name: str
    manifest: dict[str, Any] | None
    aliases: tuple[str, ...]
    is_damaged: bool = False


def listed(destination: str) -> list[Version]:
    """All versions of a folder or URL of releases, oldest first, half-written and damaged ones too."""
    fs, root, _ = open_place(destination)
    named = aliases(fs, root)
    found = []
    for _, name in versions(fs, root):
        manifest = manifest_of(fs, root, name)
        is_damaged = manifest is None and fs.exists(f"{root}/{name}/{MANIFEST}")
        found.append(Version(name, manifest, tuple(a for a, v in named.items() if v == name), is_damaged))
    return found


def aliases(fs: AbstractFileSystem, root: str) -> dict[str, str]:
    """Alias -> version. Raises: ValueError when one is damaged."""
    try:
        names = sorted(posixpath.basename(path) for path in fs.ls(root, detail=False))
    except FileNotFoundError:
        return {}
    found = {n[:-5]: version_of(fs, root, n[:-5]) for n in names if n.endswith(".json") and ALIAS.fullmatch(n[:-5])}
    return {alias: version for alias, version in found.items() if version}


def read(release: str) -> dict[str, Any]:
    """The manifest of a release, or of the latest or an alias.

    Raises: ValueError when there is none.
    """
    place = resolve(release)
    fs, root, _ = open_place(place)
    manifest = manifest_of(fs, posixpath.dirname(root), posixpath.basename(root))
    if manifest is None:
        raise ValueError(f"{place}: {verify(place)[0]}")
    return manifest


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[str]]:
    """Concepts `added`, `removed`, `changed` (trained anew) and `unchanged` from one manifest to another."""
    before, after = (m.get("provenance", {}).get("concepts", {}) for m in (old, new))
    both = sorted(before.keys() & after.keys())
    return {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": [name for name in both if before[name]["training"] != after[name]["training"]],
        "unchanged": [name for name in both if before[name]["training"] == after[name]["training"]],
    }


def diff(old: str, new: str) -> list[str]:
    """What differs between two releases, in lines. Raises: ValueError when one of them is not there."""
    before, after = read(old), read(new)
    lines = []
    found = changes(before, after)
    measured = [m.get("provenance", {}).get("measures", {}).get("concepts", {}) for m in (before, after)]
    for what in ("added", "removed", "changed", "unchanged"):
        for name in found[what]:
            sides = [side.get(name, {}) for side in measured]
            values = [
                f"{score} {sides[0][score]:.3f} -> {sides[1][score]:.3f}"
                for score in sides[0]
                if not score.endswith("_se")
                and score != "samples"
                and all(isinstance(side.get(score), int | float) for side in sides)
            ]
            lines.append(f"{what:9} {name:24} {', '.join(values)}".rstrip())
    flat = [_flat({k: v for k, v in m.get("provenance", {}).items() if k in _COMPARED}) for m in (before, after)]
    for key in sorted(flat[0].keys() | flat[1].keys()):
        if flat[0].get(key) != flat[1].get(key):
            lines.append(f"{key}: {flat[0].get(key)!r} -> {flat[1].get(key)!r}")
    return lines


_COMPARED = {"base", "corpus", "packages", "commit", "spec"}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, its keys joined by dots; lists count as values."""
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, entry in value.items() for k, v in _flat(entry, f"{key}.{name}" if key else name).items()}


def promote(release: str, alias: str = "latest", *, public_key: str = "", signing_key: str = "") -> str:
    """Let an alias name a version, or publish a candidate after all; its sums are recomputed first. When it is an older
    version than the alias named, that one is remembered as rolled back from, as by `rollback`.

    Args:
        public_key: PEM file; the version or candidate must be signed by it.
        signing_key: PEM file that the alias is signed by, and the release made of a candidate. The version or candidate
            must be, too, unless it is by `public_key`: what lies unsigned in a store, anybody may have written.
    Returns: the version.
    Raises: ValueError when there is no such version, it is not whole or unchanged, not signed so, or the alias cannot
        be a name.
    """
    if not ALIAS.fullmatch(alias):
        raise ValueError(f"--alias {alias!r}: lower-case letters, digits, `-` and `_`, and not a version's name")
    place = resolve(release)
    place = place if "://" in place else os.path.abspath(place)
    above, _, version = place.rpartition("/")
    destination, _, folder = above.rpartition("/")
    key = public_key or signing_key
    if folder == CANDIDATES:
        if alias != "latest":
            raise ValueError(f"--alias {alias!r}: a candidate becomes the latest release first")
        with tempfile.TemporaryDirectory() as scratch:
            return publish(fetch_whole(place, Path(scratch), key), destination, signing_key=signing_key).version
    if not VERSION.fullmatch(version):
        raise ValueError(f"{release}: not a version; name one like RELEASES/v0002")
    sign = signer(signing_key)
    fs, root, _ = open_destination(above)
    manifest = _checked(place, key, "not promoted")
    try:
        before = alias_of(fs, root, alias)
    except ValueError:  # damaged: this mends it
        before = {}
    gone, left = before.get("rolled_back", []), before.get("version", version)
    move_alias(fs, root, alias, manifest, [*gone, left] if int(version[1:]) < int(left[1:]) else gone, sign)
    return version


def _checked(place: str, key: str, outcome: str) -> dict[str, Any]:
    """The manifest of a version whose sums, and signature if there is a key, agree. Raises: ValueError, with the
    `outcome`, when they do not."""
    if problems := verify(place, key):
        raise ValueError("\n".join(f"{place}: {problem}" for problem in problems) + f"\n{outcome}")
    return read(place)


def fetch_whole(place: str, into: Path, key: str = "") -> Path:
    """As `fetch`; what was copied is checked, not what lies there: that may change meanwhile.

    key: PEM file that it must be signed by. Raises: ValueError also when its sums or signature do not agree.
    """
    fs, root, _ = open_place(place)
    project = project_beside(fs, root, key) if key else ""
    folder = fetch(place, into)
    if problems := verify(str(folder), key, project):
        raise ValueError("\n".join(f"{place}: {problem}" for problem in problems) + "\nnot copied")
    return folder


def fetch(place: str, into: Path) -> Path:
    """Copy a version or candidate to a local folder of its name in `into`; returns that.

    Raises: ValueError when a file's name leads out of that folder.
    """
    fs, root, _ = open_place(place)
    folder = into / posixpath.basename(root)
    names = sorted(files_of(fs, root))
    if bad := [name for name in names if leaves_its_folder(name)]:
        raise ValueError(f"{place}: {bad[0]!r}: leads out of its folder; not copied")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    fs.get([f"{root}/{name}" for name in names], [str(folder / name) for name in names])
    return folder


def rollback(
    destination: str, alias: str = "latest", to: str = "", *, public_key: str = "", signing_key: str = ""
) -> tuple[str, str]:
    """Let an alias name the version before the one it names, or `to`, whose sums are recomputed first.

    What is rolled back from is remembered in the alias, so that the same content is not released again by itself, nor
    rolled back to, until it is promoted or something is released after it.

    Args:
        public_key: PEM file; the version that is moved to must be signed by it.
        signing_key: PEM file that the alias is signed by; without `public_key` the version must be signed by it, too.
    Returns: the versions from and to which it moved.
    Raises: ValueError when there is no such alias or no whole version before, its files have changed, or it is not
        signed so.
    """
    sign = signer(signing_key)
    fs, root, destination = open_destination(destination)
    content = alias_of(fs, root, alias)
    if not content:
        raise ValueError(f"{destination}: no {alias}.json; nothing to roll back")
    left = content["version"]
    gone = [*content.get("rolled_back", []), left]
    names = [name for _, name in versions(fs, root)]
    before = [n for n in names if n not in gone and int(n[1:]) < int(left[1:]) and manifest_of(fs, root, n)]
    target = to or (before[-1] if before else "")
    if not target:
        raise ValueError(f"{destination}: no whole version before {left}, which {alias} names")
    if target not in names or target == left:
        raise ValueError(f"{destination}: no other version {target!r}; there are {', '.join(names)}")
    outcome = f"{alias} was not moved; try another by --to"
    move_alias(fs, root, alias, _checked(f"{destination}/{target}", public_key or signing_key, outcome), gone, sign)
    return left, target


def gc(destination: str, keep: int = 10, *, dry_run: bool = False) -> list[str]:
    """Remove all but the newest whole versions and candidates, and what was left half-written. Versions that an alias
    names, or was rolled back from, stay.

    Half-written things are removed when nothing in them changed for a day. Returns what was (or is to be) removed.

    Raises: ValueError when nothing was published there.
    """
    fs, root, _ = open_destination(destination)
    names = [name for _, name in versions(fs, root)]
    if not names:
        raise ValueError(f"{destination}: no releases here")
    whole = [name for name in names if manifest_of(fs, root, name)]
    kept = {*whole[-keep:], *_named(fs, root)}
    # numbers only grow: the newest folder stays, whole or not, or its number would be given again
    removed = [n for n in whole if n not in kept]
    removed += [n for n in names[:-1] if n not in whole and n not in kept and _is_old(fs, f"{root}/{n}")]
    removed += [n for n in _children(fs, root) if n.startswith(".part-") and _is_old(fs, f"{root}/{n}")]
    candidates = _children(fs, f"{root}/{CANDIDATES}")
    dated = {c: manifest_of(fs, f"{root}/{CANDIDATES}", c) for c in candidates}
    recent = sorted((c for c in candidates if dated[c]), key=lambda c: (dated[c] or {})["created"])[-keep:]
    removed += [
        f"{CANDIDATES}/{c}"
        for c in candidates
        if c not in recent and (dated[c] or _is_old(fs, f"{root}/{CANDIDATES}/{c}"))
    ]
    if dry_run:
        return removed
    done = []
    for name in removed:
        if name not in _named(fs, root):  # again: an alias may have moved meanwhile
            remove(fs, f"{root}/{name}")
            done.append(name)
    return done


def _named(fs: AbstractFileSystem, root: str) -> set[str]:
    """The versions that aliases name, or remember as rolled back from."""
    fs.invalidate_cache()
    contents = [alias_of(fs, root, alias) for alias in aliases(fs, root)]
    return {name for content in contents for name in (content["version"], *content.get("rolled_back", ()))}


def _children(fs: AbstractFileSystem, folder: str) -> list[str]:
    try:
        return sorted(posixpath.basename(path.rstrip("/")) for path in fs.ls(folder, detail=False))
    except FileNotFoundError:
        return []


def _is_old(fs: AbstractFileSystem, place: str) -> bool:
    """Whether no file in it changed within the grace."""
    files = fs.find(place) or [place]  # an empty folder
    return all(time.time() - fs.modified(path).timestamp() > GRACE for path in files)
