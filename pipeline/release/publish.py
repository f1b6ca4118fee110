"""Releases under version numbers: `destination/v0001`, `v0002`, … and `latest.json`, which names one of them.

A version is what has a `manifest.json`. Locally its folder is filled under a temporary name and renamed; where there is
no renaming of folders (object stores, which write an object whole or not at all), the manifest is written last.
`latest.json` moves after that. So whatever stops a publication, no version looks complete that is not, and
`latest.json` names a whole one. Other aliases (`production.json`) are like it, but move by hand only.

Several may publish at once. A folder's renaming fails where its number was taken meanwhile, and then all is looked at
again; on object stores they wait for each other. So none of the same content adds a second version.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from pipeline.reading import parse_written, shown
from pipeline.release.lease import lease
from pipeline.release.manifest import FORMAT, Described, Newer, content_sum, leaves_its_folder, own_sum, parse
from pipeline.release.place import Place, create, make_folder, open_destination, open_place, read
from pipeline.release.sign import Sign, has_signature, is_signed, signer, with_signature
from retrieval.regular import open_anywhere
from training.durable import replace, sync_tree

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
LATEST = "latest.json"
CLAIM = ".publishing"
CANDIDATES = "candidates"
VERSION = re.compile(r"v([0-9]{4,})")
ALIAS = re.compile(r"(?!v[0-9]+$)[a-z][a-z0-9_-]*")
PUBLISHING = 60
"""Seconds after which others go on, on object stores, when a publisher died."""
PATIENCE = 3600
"""Seconds that one waits for another publisher."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReleaseInfo:
    """A published version.

    version: `v0001`.
    url: its place, destination and version.
    manifest: what `manifest.json` says: version, created, content, files, provenance, sum.
    created: False when this content was published already and no version was added.
    """

    version: str
    url: str
    manifest: dict[str, Any]
    created: bool


def publish(
    folder: Path,
    destination: str,
    provenance: dict[str, Any] | None = None,
    signing_key: str = "",
    check: Callable[[], None] = lambda: None,
) -> ReleaseInfo:
    """Publish a prepared folder as the next version under `destination`, whole or not at all.

    Content that the latest version (or the newest) has already adds no version: `latest.json` is made to name that one.
    What `latest` was rolled back from is forgotten when it moves: something was released after it. It does not move
    back from a newer version that somebody else released meanwhile.

    Args:
        folder: what to publish, with its sub-folders; without its own `manifest.json` if it has one, as artifacts of
            the store do: the release gets another.
        destination: local folder or fsspec URL (`s3://bucket/models/cats`).
        provenance: JSON values kept in the manifest: where the content came from; when None, what the folder's own
            manifest says, as that of a release does.
        signing_key: PEM file of an Ed25519 private key for the manifest and `latest.json`; none, no signature. A
            version that has this content already, unsigned, gets its signature if its manifest says what is said here;
            else it does not count as published: nothing is signed that somebody else may have written.
        check: called right before `latest.json` moves. Where it raises, the version stays, whole, and `latest.json`
            names another: published again, it is the newest and not written a second time.

    Raises:
        ValueError: no such folder, nothing in it, a file in it has a name that cannot be used, provenance is not JSON
            or of another form, the key cannot be used, no such bucket, a destination that cannot be written to.
        OSError: what the file system says (a full disk); what was half-written is removed.
        RuntimeError: what was written is not what was to be.
    """
    manifest = _described(folder, provenance)
    sign = signer(signing_key)
    place = open_destination(destination)
    make_folder(place.fs, place.root)

    def same() -> dict[str, Any] | None:
        return _published(place, manifest, sign, signing_key)

    alone = contextlib.nullcontext() if place.is_local else lease(place.url, PUBLISHING, PATIENCE, ".publish")
    with alone:
        found, created = same(), False
        if not found:
            write = _write_local if place.is_local else _write_remote
            found, created = write(place.fs, place.root, folder, manifest, sign, same)
        if not created:
            log.info("%s has this content already, as %s: no new version", place.url, found["version"])
        latest = alias_of(place.fs, place.root)
        if not latest or int(latest["version"][1:]) < int(found["version"][1:]):
            check()
            move_alias(place.fs, place.root, "latest", found, sign=sign)
        elif sign and latest["version"] == found["version"] and not has_signature(latest, signing_key):
            move_alias(place.fs, place.root, "latest", found, latest.get("rolled_back", ()), sign)
    return ReleaseInfo(found["version"], f"{place.url}/{found['version']}", found, created)


def keep_candidate(folder: Path, destination: str, name: str, provenance: dict[str, Any], signing_key: str = "") -> str:
    """Keep what is not to be released at `destination/candidates/name`, in the form of a release but for the number.
    One of this name that is there already, undamaged and signed if it is to be, stays as it is.

    Raises: as `publish`.
    """
    sign = signer(signing_key)
    at = open_destination(destination)
    fs, root, url = at
    url, place = f"{url}/{CANDIDATES}/{name}", f"{root}/{CANDIDATES}/{name}"
    if manifest_of(fs, f"{root}/{CANDIDATES}", name) and not verify(url, signing_key):
        return url
    manifest = _summed({"created": _now()} | _described(folder, provenance))
    if fs.exists(place):
        remove(fs, place)
    # a local one is whole when it has its name, also after a power failure
    part = f"{root}/.part-{uuid.uuid4().hex}" if at.is_local else place
    with _removed_on_failure(fs, part):
        _copy(fs, folder, part, manifest["files"])
        _write_manifest(fs, part, manifest, sign)
        if at.is_local:
            make_folder(fs, posixpath.dirname(place))
            replace(Path(part), Path(place))
    return url


def _described(folder: Path, provenance: dict[str, Any] | None) -> dict[str, Any]:
    """Manifest of a folder that is to be published, without number and date."""
    own = (folder / MANIFEST, folder / SIGNATURE)
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p not in own)
    if odd := [p for p in sorted(folder.rglob("*")) if not p.is_file() and not p.is_dir()]:
        raise ValueError(f"{odd[0]}: a link that leads nowhere, a pipe or the like; remove it")
    if not paths:
        raise ValueError(f"{folder}: no folder with files in it; nothing to publish")
    for name in (LATEST, CLAIM):
        if (folder / name).exists():
            raise ValueError(f"{folder / name}: publishing writes a file of this name itself; rename it")
    if provenance is None:
        known = manifest_of(LocalFileSystem(), str(folder.parent), folder.name)
        provenance = known["provenance"] if known else {}
    files = {p.relative_to(folder).as_posix(): {"sha256": _sha256(p), "size": p.stat().st_size} for p in paths}
    # surrogates stand for bytes that are no UTF-8: neither JSON nor storages have a form for them
    if bad := [name for name in files if leaves_its_folder(name) or re.search("[\ud800-\udfff]", name)]:
        raise ValueError(f"{folder}: {bad[0]!r}: no name for a file of a release; rename it")
    manifest = {"format": FORMAT, "content": content_sum(files), "files": files, "provenance": provenance}
    try:
        text = json.dumps(manifest, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance: not JSON values: {error}") from None
    return parse(text, Described)


def resolve(destination: str) -> str:
    """Place of the version that `destination/latest.json` names, or an alias (`destination/production`); the place of
    a version or candidate is returned as it is.

    Raises:
        ValueError: nothing was published there, or `latest.json` is damaged.
    """
    return _resolved(destination)[0]


def _resolved(destination: str) -> tuple[str, str]:
    """As `resolve`, and the alias that said so; empty when it was named itself."""
    fs, root, url = open_place(destination)
    if not fs.exists(f"{root}/{LATEST}"):
        # a version, also one that was downloaded to a folder of another name, or that lost its manifest
        named = VERSION.fullmatch(posixpath.basename(root)) and fs.exists(root)
        if named or fs.exists(f"{root}/{MANIFEST}"):
            return url, ""
        above, _, alias = url.rpartition("/")
        if above and ALIAS.fullmatch(alias) and (version := version_of(fs, posixpath.dirname(root), alias)):
            return f"{above}/{version}", alias
    version = version_of(fs, root)
    if version is None:
        raise ValueError(f"{url}: no release here (no {LATEST})")
    return f"{url}/{version}", "latest"


def verify(release: str, public_key: str = "", project: str = "") -> list[str]:
    """What is wrong with a release: files missing, changed or extra, or no manifest; an empty list if nothing is.

    Args:
        release: local path or URL of a version, or of a destination (then its latest version).
        public_key: PEM file of an Ed25519 public key; then the manifest's signature by it is asked for, too, and that
            of the alias by which the release was named. One key may sign the releases of several projects: a signed
            `latest.json` beside the version says which project's they are.
        project: name of the batch or retraining that has to have made it.

    Raises:
        ValueError: there is no release, or the key cannot be used.
    """
    place, alias = _resolved(release)
    fs, root, _ = open_place(place)
    try:
        text = read(fs, f"{root}/{MANIFEST}")
        manifest = parse(text)
    except FileNotFoundError:
        if not fs.exists(root):
            return [f"{posixpath.basename(root)}: no such version{f', but {alias}.json names it' if alias else ''}"]
        return [f"{MANIFEST}: missing; this version was not published whole"]
    except Newer as error:
        return [f"{MANIFEST}: {error}"]
    except ValueError as error:
        return [f"{MANIFEST}: damaged: {error}"]
    problems = []
    found = files_of(fs, root) - {MANIFEST}
    if public_key:
        if SIGNATURE not in found:
            problems.append(f"{SIGNATURE}: missing; the release is not signed")
        elif not is_signed(text, read(fs, f"{root}/{SIGNATURE}"), public_key):
            problems.append(f"{SIGNATURE}: not by this key, or {MANIFEST} was changed")
        if alias:
            problems += alias_problems(fs, posixpath.dirname(root), alias, public_key)
        project = project or project_beside(fs, root, public_key, alias or "latest")
    if project and project_of(manifest) != project:
        problems.append(f"{MANIFEST}: of the project {project_of(manifest)!r}, not {project!r}")
    found -= {SIGNATURE}
    name = posixpath.basename(root)
    if VERSION.fullmatch(name) and manifest.get("version") != name:
        problems.append(f"{MANIFEST}: of {manifest.get('version')}, in the folder of {name}")
    if content_sum(manifest["files"]) != manifest["content"]:
        problems.append(f"{MANIFEST}: changed: its list of files does not match its own sum")
    elif manifest["format"] >= FORMAT and own_sum(manifest) != manifest.get("sum"):
        problems.append(f"{MANIFEST}: changed: it does not match its own sum")
    files = {name: (entry["sha256"], entry["size"]) for name, entry in manifest["files"].items()}
    outside = {name for name in files.keys() | found if leaves_its_folder(name)}
    problems += [
        f"{name!r}: no name for a file of a release: it may lead out of its folder" for name in sorted(outside)
    ]
    problems += [f"{name}: missing" for name in sorted(files.keys() - found - outside)]
    problems += [f"{name}: extra, not in the manifest" for name in sorted(found - files.keys() - outside)]
    return problems + _changed(fs, root, {name: files[name] for name in sorted((files.keys() & found) - outside)})


# --- writing -------------------------------------------------------------------------------------------


Same = Callable[[], dict[str, Any] | None]
"""Finds the manifest of a version that has the content already."""


def _write_local(
    fs: AbstractFileSystem, root: str, folder: Path, manifest: dict[str, Any], sign: Sign | None, same: Same
) -> tuple[dict[str, Any], bool]:
    """Fill a folder under a temporary name and rename it to the next free version. Returns: the manifest; False with
    that of a version of the same content that came meanwhile."""
    part = f"{root}/.part-{uuid.uuid4().hex}"
    with _removed_on_failure(fs, part):
        fs.mkdir(part)
        _copy(fs, folder, part, manifest["files"])
        while True:
            manifest = _numbered(manifest, _next_version(fs, root))
            _write_manifest(fs, part, manifest, sign)
            sync_tree(Path(part))
            # after the number was chosen: whoever comes later takes that number, and the renaming fails
            if known := same():
                fs.rm(part, recursive=True)
                return known, False
            try:
                os.rename(part, f"{root}/{manifest['version']}")
            except OSError:
                if not fs.exists(f"{root}/{manifest['version']}"):
                    raise
                continue  # another publisher took the number
            return manifest, True


def _write_remote(
    fs: AbstractFileSystem, root: str, folder: Path, manifest: dict[str, Any], sign: Sign | None, same: Same
) -> tuple[dict[str, Any], bool]:
    """Claim the next free version, write its files, the manifest last. Returns: the manifest, and True: nobody else
    publishes meanwhile, but who slept through the end of a lease, and has another number."""
    while True:
        manifest = _numbered(manifest, _next_version(fs, root))
        place = f"{root}/{manifest['version']}"
        with contextlib.suppress(FileExistsError):  # another publisher is at this number
            create(fs, f"{place}/{CLAIM}", b"")
            if files_of(fs, place) == {CLAIM}:
                break
            fs.rm_file(f"{place}/{CLAIM}")  # another publisher was there since we looked
        fs.invalidate_cache()
    with _removed_on_failure(fs, place):
        _copy(fs, folder, place, manifest["files"])
        fs.rm_file(f"{place}/{CLAIM}")
        _write_manifest(fs, place, manifest, sign)
    return manifest, True


def _copy(fs: AbstractFileSystem, folder: Path, place: str, files: dict[str, dict[str, Any]]) -> None:
    total = sum(entry["size"] for entry in files.values())
    with tqdm(total=total, desc="publish", unit="B", unit_scale=True, disable=None) as bar:
        for name, entry in files.items():
            make_folder(fs, posixpath.dirname(f"{place}/{name}"))
            fs.put_file(str(folder / name), f"{place}/{name}")
            bar.update(entry["size"])
    # read back, so that neither a short write nor a file that changed meanwhile is published
    changed = _changed(fs, place, {name: (e["sha256"], e["size"]) for name, e in files.items()})
    if changed:
        raise RuntimeError(f"written to {place}, but not as it was read: {'; '.join(changed)}")


@contextlib.contextmanager
def _removed_on_failure(fs: AbstractFileSystem, place: str) -> Iterator[None]:
    try:
        yield
    except BaseException:  # also Ctrl-C
        # what stopped the publication is the news, not what stopped the cleaning
        with contextlib.suppress(OSError):
            if fs.exists(place):
                remove(fs, place)
        raise


def remove(fs: AbstractFileSystem, place: str) -> None:
    """Remove a version or candidate; the manifest goes first, so that what is half removed never looks whole."""
    if fs.exists(f"{place}/{MANIFEST}"):
        fs.rm_file(f"{place}/{MANIFEST}")
    # but for local folders, brackets in a name would be a pattern
    fs.rm(place if isinstance(fs, LocalFileSystem) else glob.escape(place), recursive=True)


def move_alias(
    fs: AbstractFileSystem,
    root: str,
    alias: str,
    manifest: dict[str, Any],
    rolled_back: Iterable[str] = (),
    sign: Sign | None = None,
) -> None:
    """Let an alias (`latest`, `production`) name another version, at once.

    Args:
        manifest: of the version.
        rolled_back: versions that it was taken away from, which this one is removed from.
        sign: then it also says when it moved, how often it did since it is signed, and what it is; who keeps an old one
            and puts it back is found out by that.
    """
    version = manifest["version"]
    left = [name for name in dict.fromkeys(rolled_back) if name != version]
    content: dict[str, Any] = {"version": version} | ({"rolled_back": left} if left else {})
    if sign:
        try:
            number = alias_of(fs, root, alias).get("number", 0)
        except ValueError:  # damaged: this mends it
            number = 0
        content |= {"alias": alias, "project": project_of(manifest), "number": number + 1, "time": _now()}
        content = with_signature(content, sign)
    _write_at_once(fs, root, f"{alias}.json", _json(content))


def _write_at_once(fs: AbstractFileSystem, root: str, name: str, content: bytes) -> None:
    """Write a file below `root`: whatever stops that, it is there whole, or is what it was."""
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(f"{root}/{name}", content)  # one object, replaced as a whole
        return
    part = f"{root}/.part-{uuid.uuid4().hex}"  # not beside it: in a version it would be an extra file
    with _removed_on_failure(fs, part):
        fs.pipe_file(part, content)
        replace(Path(part), Path(root, name))


def _write_manifest(fs: AbstractFileSystem, place: str, manifest: dict[str, Any], sign: Sign | None) -> None:
    text = _json(manifest)
    if sign:
        fs.pipe_file(f"{place}/{SIGNATURE}", sign(text))
    fs.pipe_file(f"{place}/{MANIFEST}", text)  # last: then the version is whole


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _numbered(manifest: dict[str, Any], number: int) -> dict[str, Any]:
    return _summed({"version": f"v{number:04d}", "created": _now()} | _unnumbered(manifest))


def _unnumbered(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key not in ("version", "created", "sum")}


def _summed(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest | {"sum": own_sum(manifest)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- reading -------------------------------------------------------------------------------------------


def versions(fs: AbstractFileSystem, root: str) -> list[tuple[int, str]]:
    """Number and name of every version, whole or not, oldest first."""
    try:
        names = [posixpath.basename(path.rstrip("/")) for path in fs.ls(root, detail=False)]
    except FileNotFoundError:
        return []
    return sorted((int(match[1]), name) for name in names if (match := VERSION.fullmatch(name)))


def _next_version(fs: AbstractFileSystem, root: str) -> int:
    return max((number for number, _ in versions(fs, root)), default=0) + 1


def alias_of(fs: AbstractFileSystem, root: str, alias: str = "latest") -> dict[str, Any]:
    """What an alias says (`version`, …); empty when there is none: other JSON files may lie there, without `version`.

    Raises: ValueError when it is damaged.
    """
    path = f"{root}/{alias}.json"
    try:
        content = parse_written(read(fs, path), f"{alias}.json", is_json=True).value
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if alias != "latest" and not (isinstance(content, dict) and "version" in content):
        return {}
    if not isinstance(content, dict) or not isinstance(content.get("rolled_back", []), list):
        raise ValueError(f"{path}: damaged: it says {shown(content)}")
    for version in (content.get("version"), *content.get("rolled_back", [])):
        if not isinstance(version, str) or not VERSION.fullmatch(version):
            raise ValueError(f"{path}: damaged: names no version: {shown(version)}")
    if not isinstance(content.get("number", 0), int):
        raise ValueError(f"{path}: damaged: its number is {shown(content['number'])}")
    return content


def alias_problems(fs: AbstractFileSystem, root: str, alias: str, public_key: str) -> list[str]:
    """What is wrong with the signature of an alias. Raises: ValueError when it is damaged, or the key is none."""
    content = alias_of(fs, root, alias)
    if "signature" not in content:
        return [
            f"{alias}.json: not signed: whoever can write there may have moved it; `polyconcept release promote "
            f"RELEASES/{content.get('version')} --alias {alias} --signing-key KEY` signs it"
        ]
    if not has_signature(content, public_key):
        return [f"{alias}.json: not signed by this key, or it was changed"]
    if content.get("alias") != alias:
        return [f"{alias}.json: this is {content.get('alias')}.json, under another name"]
    return []


def signed_alias(release: str) -> dict[str, Any] | None:
    """What the alias says by which a release was named, if it is signed; a version that is named itself has none."""
    place, alias = _resolved(release)
    fs, root, _ = open_place(place)
    content = alias_of(fs, posixpath.dirname(root), alias) if alias else {}
    return content if "signature" in content else None


def project_of(manifest: dict[str, Any]) -> str:
    """Name of the batch or retraining that made a release; empty when its manifest does not say."""
    return str(manifest["provenance"].get("batch", ""))


def project_beside(fs: AbstractFileSystem, root: str, public_key: str, alias: str = "latest") -> str:
    """The project that an alias beside a version or candidate is signed for; empty when none is."""
    above = posixpath.dirname(root)
    above = posixpath.dirname(above) if posixpath.basename(above) == CANDIDATES else above
    try:
        content = alias_of(fs, above, alias)
    except ValueError:
        return ""
    return str(content.get("project", "")) if has_signature(content, public_key) else ""


def version_of(fs: AbstractFileSystem, root: str, alias: str = "latest") -> str | None:
    """The version that an alias names; None when there is no such alias. Raises: ValueError when it is damaged."""
    return alias_of(fs, root, alias).get("version")


def manifest_of(fs: AbstractFileSystem, root: str, version: str) -> dict[str, Any] | None:
    """Manifest of a version; None if it was not published whole, or its manifest is damaged.

    Raises: Newer when a later polyconcept wrote it.
    """
    path = f"{root}/{version}/{MANIFEST}"
    try:
        return parse(read(fs, path))
    except Newer as error:
        raise Newer(f"{path}: {error}") from None
    except (FileNotFoundError, ValueError):
        return None


def _published(place: Place, manifest: dict[str, Any], sign: Sign | None, signing_key: str) -> dict[str, Any] | None:
    """Manifest of the version that has this content already, undamaged: the latest one, or the newest one whole (a
    publication may have been stopped before `latest.json` moved). Signed, if it is to be."""
    fs, root, url = place
    fs.invalidate_cache()
    names = [name for _, name in reversed(versions(fs, root))]
    newest = next((name for name in names if manifest_of(fs, root, name)), None)
    for version in dict.fromkeys((version_of(fs, root), newest)):
        known = manifest_of(fs, root, version) if version else None
        if not known or known["content"] != manifest["content"] or verify(f"{url}/{version}"):
            continue
        if sign and not _sign_known(fs, root, str(version), manifest, sign, signing_key):
            continue
        return known
    return None


def _sign_known(
    fs: AbstractFileSystem, root: str, version: str, manifest: dict[str, Any], sign: Sign, signing_key: str
) -> bool:
    """Whether a version is signed by the key now. A missing signature, or the beginning of ours (a process was killed
    while it wrote it), is made only where the manifest says the same as the one that would be written: whoever can
    write there may have changed it."""
    text, place = read(fs, f"{root}/{version}/{MANIFEST}"), f"{root}/{version}/{SIGNATURE}"
    found = read(fs, place) if fs.exists(place) else b""
    if is_signed(text, found, signing_key):
        return True
    if _unnumbered(parse(text)) != manifest or not (signature := sign(text)).startswith(found):
        return False
    _write_at_once(fs, root, f"{version}/{SIGNATURE}", signature)
    return True


def files_of(fs: AbstractFileSystem, root: str) -> set[str]:
    """Names of all files of a version, relative to it, as the store has them: see `leaves_its_folder`."""
    fs.invalidate_cache()
    return {path[len(root) + 1 :] for path in fs.find(root)}


def _changed(fs: AbstractFileSystem, root: str, files: dict[str, tuple[str, int]]) -> list[str]:
    problems = []
    with tqdm(files.items(), desc="verify", unit="file", disable=None) as bar:
        for name, (sha256, size) in bar:
            path = f"{root}/{name}"
            try:
                stream = open_anywhere(fs, path)
            except (ValueError, IsADirectoryError):
                problems.append(f"{name}: not a regular file")
                continue
            with stream as f:
                if (found := fs.info(path)["size"]) != size:
                    problems.append(f"{name}: changed: {found} bytes instead of {size}")
                elif hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                    problems.append(f"{name}: changed: its sha256 sum is another")
    return problems


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
