"""Releases on the Hugging Face hub, by the real client against a local stand-in for its HTTP API."""

import subprocess
import sys
from pathlib import Path

import pytest
from hub import Hub, Repository

from pipeline.release.hub import check_access
from pipeline.release.publish import publish

PUSH = ["-m", "ray_jobs.cli", "publish"]


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()


def push(release: str, repository: str, hub: Hub, token: str = Hub.token) -> tuple[int, str]:
    """The command, in a process of its own."""
    command = [sys.executable, *PUSH, release, f"hf://{repository}"]
    done = subprocess.run(command, capture_output=True, text=True, env=hub.environment | {"HF_TOKEN": token})
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_release_is_one_commit_and_a_tag(tmp_path: Path, hub: Hub) -> None:
    releases = tmp_path / "releases"
    for text in ("one", "two"):
        folder = tmp_path / text
        (folder / "comfyui").mkdir(parents=True)
        (folder / "README.md").write_text(f"---\nlicense: other\n---\n{text}")
        (folder / f"{text}.safetensors").write_bytes(text.encode() * 1000)
        (folder / "comfyui" / "<new1>.safetensors").write_bytes(b"same")
        publish(folder, str(releases))
        code, said = push(str(releases), "ours/concepts", hub)
        assert code == 0, said
    repo = hub.repositories["ours/concepts"]
    assert repo.commits == ["Release v0001", "Release v0002"]
    for version, text in (("v0001", "one"), ("v0002", "two")):
        expected = {
            p.relative_to(releases / version).as_posix() for p in (releases / version).rglob("*") if p.is_file()
        }
        assert set(repo.tags[version]) == expected
        assert repo.tags[version][f"{text}.safetensors"] == text.encode() * 1000
    # again: it is there
    code, said = push(str(releases / "v0001"), "ours/concepts", hub)
    assert code == 0 and said == "it is at hf://ours/concepts@v0001\n"
    assert len(repo.commits) == 2
    # a version of other releases under the same number
    (tmp_path / "three").mkdir()
    (tmp_path / "three/README.md").write_text("three")
    other = publish(tmp_path / "three", str(tmp_path / "others")).url
    code, said = push(other, "ours/concepts", hub)
    assert code == 2 and f"has a v0001 with another content than {other}" in said
    repo.tags["v0001"] = {"README.md": b"someone's"}
    code, said = push(str(releases / "v0001"), "ours/concepts", hub)
    assert code == 2 and "has a v0001 with another content" in said
    assert len(repo.commits) == 2


def test_access_is_asked_for_before_there_is_a_release(hub: Hub, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.repositories["ours/old"] = Repository()
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    for repository in ("ours/old", "ours/new", "me/new"):
        assert check_access(repository) == ""
    with pytest.raises(ValueError, match=r"theirs/new is not there, and the token's user cannot make it: .*me, ours"):
        check_access("theirs/new")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    for repository in ("ours/old", "ours/new"):
        with pytest.raises(ValueError, match=f"publish.hub: hf://{repository}: .*"):
            check_access(repository)
    for name in ("concepts", "a/b/c", "a/--"):
        with pytest.raises(ValueError, match=r"publish\.hub: "):
            check_access(name)
    hub.server_close()
    hub.shutdown()
    assert "could not be asked" in check_access("ours/old")
    monkeypatch.setattr("pipeline.release.hub.get_token", lambda: None)
    assert "no token here" in check_access("ours/old")


@pytest.mark.slow
def test_what_is_refused(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/README.md").write_text("one")
    url = publish(tmp_path / "one", str(tmp_path / "releases")).url
    code, said = push(url, "ours/concepts", hub, token="hf_other")
    assert code == 2 and "Invalid credentials" in said
    Path(url, "README.md").write_text("two")
    code, said = push(url, "ours/concepts", hub)
    assert code == 2 and "README.md: changed" in said and "not copied" in said
    assert not hub.repositories["ours/concepts"].commits
