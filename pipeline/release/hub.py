"""Releases as repositories of the Hugging Face hub: a release is one commit there, tagged with its version."""

from __future__ import annotations

import tempfile
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from pipeline.release.publish import resolve, verify
from pipeline.release.versions import fetch, read

SCHEME = "hf://"


def push(release: str, repository: str) -> str:
    """Copy a release, whose sums are recomputed first, to a repository; it is made, private, when it is not there.
    A version whose tag is there already is not copied again.

    All files go there in one commit, and what a release before had and this one has not is removed by it. HF_TOKEN (or
    what `hf auth login` stored) gives the right to, HF_ENDPOINT another hub.

    Args:
        release: folder or URL of a release, or of releases (then the latest).
        repository: `owner/name`.
    Returns: its place with the version's tag.
    Raises: ValueError when the release is not whole or unchanged, or the hub refuses.
    """
    place = resolve(release)
    version = read(place).get("version")
    if not version:
        raise ValueError(f"{place}: a candidate, not a release; promote it first")
    api = HfApi()
    try:
        repo = api.create_repo(repository, private=True, exist_ok=True).repo_id
        if version not in {tag.name for tag in api.list_repo_refs(repo).tags}:
            if problems := verify(place):
                raise ValueError("\n".join(f"{place}: {problem}" for problem in problems) + "\nnot pushed")
            with tempfile.TemporaryDirectory() as scratch:
                folder = fetch(place, Path(scratch))
                message = f"Release {version}"
                api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns="*")
            api.create_tag(repo, tag=version)
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError) as error:
        raise ValueError(f"{SCHEME}{repository}: {str(error).strip()}") from None
    return f"{SCHEME}{repo}@{version}"
