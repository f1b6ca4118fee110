"""Releases as repositories of the Hugging Face hub: a release is one commit there, tagged with its version."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session, validate_repo_id

from pipeline.reading import read_written
from pipeline.release.publish import MANIFEST, resolve
from pipeline.release.versions import fetch_whole, read

SCHEME = "hf://"
ANSWER = 120
"""Seconds to wait for the hub's next byte: its client would wait for ever."""


def push(release: str, repository: str) -> str:
    """Copy a release, whose sums are recomputed first, to a repository; it is made, private, when it is not there.
    A version whose tag is there already, with the same content, is not copied again.

    All files go there in one commit, and what a release before had and this one has not is removed by it. HF_TOKEN (or
    what `hf auth login` stored) gives the right to, HF_ENDPOINT another hub.

    Args:
        release: folder or URL of a release, or of releases (then the latest).
        repository: `owner/name`.
    Returns: its place with the version's tag.
    Raises: ValueError when the release is not whole or unchanged, its tag is there with another content, or the hub
        refuses.
    """
    place = resolve(release)
    manifest = read(place)
    version = manifest.get("version")
    if not version:
        raise ValueError(f"{place}: a candidate, not a release; promote it first")
    api = _api()
    try:
        repo = api.create_repo(repository, private=True, exist_ok=True).repo_id
        if version in {tag.name for tag in api.list_repo_refs(repo).tags}:
            if _content(api, repo, version) != manifest["content"]:
                raise ValueError(
                    f"{SCHEME}{repo}: has a {version} with another content than {place}: of other releases? Give these "
                    "a repository of their own, or delete that tag"
                )
        else:
            with tempfile.TemporaryDirectory() as scratch:
                _commit(api, repo, fetch_whole(place, Path(scratch)), f"Release {version}")
            api.create_tag(repo, tag=version)
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError) as error:
        raise ValueError(f"{SCHEME}{repository}: {str(error).strip()}") from None
    return f"{SCHEME}{repo}@{version}"


def check_access(repository: str) -> str:
    """Whether `push` would be let in, asked before there is something to push.

    Returns: what could not be found out, and why; empty when all is well.
    Raises: ValueError for what is no name of a repository, and when the hub refuses.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"publish.hub: {error}") from None
    if repository.count("/") != 1:
        raise ValueError(f"publish.hub: expected owner/name, found {repository!r}")
    if not get_token():
        return "publish.hub: no token here; whoever runs this needs one that may write (HF_TOKEN, or `hf auth login`)"
    api, place = _api(), f"publish.hub: {SCHEME}{repository}"
    try:
        try:
            api.auth_check(repository, write=True)
        except RepositoryNotFoundError:  # it would be made
            _check_owner(api.whoami(), repository)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise ValueError(f"{place}: {str(error).strip()}") from None
        return f"{place}: could not be asked: {str(error).strip()}"
    except (OfflineModeIsEnabled, httpx2.HTTPError) as error:
        return f"{place}: could not be asked: {error}"
    return ""


def _api() -> HfApi:
    get_session().timeout = httpx2.Timeout(ANSWER)
    return HfApi()


def _check_owner(user: dict[str, Any], repository: str) -> None:
    """Raises: ValueError where a token may not make a repository."""
    owners = [user["name"], *(entry["name"] for entry in user.get("orgs", ()))]
    if repository.split("/")[0] not in owners:
        raise ValueError(
            f"publish.hub: {repository} is not there, and the token's user cannot make it: the owner would be one of "
            f"{', '.join(owners)}"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"publish.hub: {repository} is not there, and the token may only read; use one that may write")


def _content(api: HfApi, repository: str, revision: str) -> str:
    """What a revision's manifest says its content is; empty when it has no such manifest."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            file = api.hf_hub_download(repository, MANIFEST, revision=revision, local_dir=scratch)
            return str(read_written(Path(file), "manifest").value["content"])
        except (RemoteEntryNotFoundError, ValueError, KeyError, TypeError):  # someone else's tag
            return ""


def _commit(api: HfApi, repository: str, folder: Path, message: str) -> None:
    """Make a repository hold a folder's files and no others, by one commit (`upload_folder` makes several of many)."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    gone = [f for f in api.list_repo_files(repository) if f not in files and f != ".gitattributes"]
    operations: list[Any] = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=p) for name, p in files.items()]
    operations += [CommitOperationDelete(path_in_repo=name) for name in gone]
    api.create_commit(repository, operations, commit_message=message)
