import contextlib
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.release import publish as module
from pipeline.release.place import plain_destination, plain_place
from pipeline.release.publish import publish, resolve, verify
from pipeline.release.versions import gc, listed
from pipeline.spec import ConceptBatch

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A folder to publish, with given text in one of its files."""

    def folder(text: str = "one") -> Path:
        path = tmp_path / f"prepared-{text}"
        (path / "comfyui").mkdir(parents=True, exist_ok=True)
        (path / "README.md").write_text(text)
        (path / "comfyui" / "<new1>.safetensors").write_bytes(b"weights" * 1000)
        return path

    return folder


@pytest.fixture(params=["local", "memory"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "releases")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return "memory://models/cats"


def names(destination: str) -> list[str]:
    fs, root = fsspec.core.url_to_fs(destination)
    found = sorted(Path(p).name for p in fs.ls(root, detail=False)) if fs.exists(root) else []
    return [name for name in found if name != ".publish"]  # the publishers' lease


def test_versions_are_numbered_and_latest_follows(make: Make, destination: str) -> None:
    folder = make("one")
    (folder / "manifest.json").write_text("an artifact's own")
    first = publish(folder, destination, {"batch": "cats"})
    assert (first.version, first.url, first.created) == ("v0001", f"{destination}/v0001", True)
    second = publish(make("two"), destination + "/")
    assert second.url == f"{destination}/v0002"
    assert resolve(destination) == second.url
    assert resolve(first.url) == first.url
    assert names(destination) == ["latest.json", "v0001", "v0002"]
    assert verify(destination) == verify(first.url) == verify(second.url) == []
    fs, root = fsspec.core.url_to_fs(first.url)
    manifest = json.loads(fs.cat_file(f"{root}/manifest.json"))
    assert manifest == first.manifest
    assert manifest["provenance"] == {"batch": "cats"}
    assert manifest["files"]["README.md"]["size"] == 3
    assert set(manifest["files"]) == {"README.md", "comfyui/<new1>.safetensors"}
    assert fs.cat_file(f"{root}/comfyui/<new1>.safetensors") == b"weights" * 1000


def test_a_downloaded_version_is_verified_where_it_is(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = publish(make(), str(tmp_path / "releases")).url
    shutil.copytree(url, tmp_path / "downloaded")
    monkeypatch.chdir(tmp_path / "downloaded")
    assert verify(".") == []
    Path("README.md").unlink()
    assert verify(".") == ["README.md: missing"]


def test_same_content_adds_no_version(make: Make, destination: str, caplog: pytest.LogCaptureFixture) -> None:
    publish(make("one"), destination)
    caplog.set_level("INFO")
    again = publish(make("one"), destination, {"other": "provenance"})
    assert (again.version, again.created, again.manifest["provenance"]) == ("v0001", False, {})
    assert "no new version" in caplog.text
    publish(make("two"), destination)
    # an older version's content is new again: versions stay in the order they were published in
    assert publish(make("one"), destination).version == "v0003"


def test_same_content_as_a_damaged_version_is_published_again(make: Make, destination: str) -> None:
    first = publish(make("one"), destination)
    fs, root = fsspec.core.url_to_fs(first.url)
    fs.pipe_file(f"{root}/README.md", b"two")
    assert publish(make("one"), destination).version == "v0002"
    assert verify(destination) == []


def test_a_release_that_is_published_elsewhere_keeps_its_provenance(make: Make, destination: str) -> None:
    url = publish(make("one"), destination, {"batch": "cats"}).url
    fs, root = fsspec.core.url_to_fs(url)
    copied = make("copied")
    fs.get_file(f"{root}/manifest.json", str(copied / "manifest.json"))
    assert publish(copied, f"{destination}-elsewhere").manifest["provenance"] == {"batch": "cats"}
    # an artifact of the store has another manifest
    (copied / "manifest.json").write_text('{"kind": "release"}')
    assert publish(copied, f"{destination}-third").manifest["provenance"] == {}


def test_the_last_check_before_latest_moves(make: Make, destination: str) -> None:
    publish(make("one"), destination)
    seen = []

    def too_late() -> None:
        seen.append(verify(f"{destination}/v0002"))
        raise TimeoutError

    with pytest.raises(TimeoutError):
        publish(make("two"), destination, check=too_late)
    assert seen == [[]]  # by then the version is whole, and it stays
    assert resolve(destination) == f"{destination}/v0001" and verify(f"{destination}/v0002") == []
    assert publish(make("two"), destination).url == resolve(destination) == f"{destination}/v0002"
    publish(make("two"), destination, check=too_late)  # nothing moves


def test_verify_finds_what_is_wrong(make: Make, destination: str) -> None:
    url = publish(make("one"), destination).url
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/README.md", b"One")
    assert verify(url) == ["README.md: changed: its sha256 sum is another"]
    fs.pipe_file(f"{root}/README.md", b"longer")
    assert verify(destination) == ["README.md: changed: 6 bytes instead of 3"]
    fs.pipe_file(f"{root}/added.txt", b"")
    fs.rm_file(f"{root}/comfyui/<new1>.safetensors")
    assert verify(url)[:2] == ["comfyui/<new1>.safetensors: missing", "added.txt: extra, not in the manifest"]
    manifest = fs.cat_file(f"{root}/manifest.json")
    fs.pipe_file(f"{root}/manifest.json", manifest.replace(b'"size": 3', b'"size": 6'))
    assert "does not match its own sum" in verify(url)[0]
    fs.pipe_file(f"{root}/manifest.json", manifest.replace(b"v0001", b"v0002"))
    assert verify(url)[0] == "manifest.json: of v0002, in the folder of v0001"
    fs.pipe_file(f"{root}/manifest.json", manifest[:50])
    assert "damaged" in verify(url)[0]
    fs.rm_file(f"{root}/manifest.json")
    assert verify(url) == ["manifest.json: missing; this version was not published whole"]


def test_manifests_that_are_none_or_not_known_yet(make: Make, destination: str) -> None:
    url = publish(make("one"), destination).url
    fs, root = fsspec.core.url_to_fs(url)
    manifest = fs.cat_file(f"{root}/manifest.json")
    for written, message in (
        (b'"format": -1', "manifest.json: damaged: format: Input should be greater"),
        (b'"format": 1, "format": 2', "manifest.json: damaged: the key 'format' is given twice"),
        (b'"format": 99', "manifest.json: a later polyconcept wrote it (format 99); upgrade"),
    ):
        fs.pipe_file(f"{root}/manifest.json", manifest.replace(b'"format": 2', written))
        assert verify(url)[0].startswith(message)
    fs.pipe_file(f"{destination.removeprefix('memory:/')}/latest.json", b'{"version": "v0009"}')
    assert verify(destination) == ["v0009: no such version, but latest.json names it"]
    for use in (listed, lambda place: publish(make("two"), place), lambda place: gc(place, 1)):
        with pytest.raises(ValueError, match=r"v0001/manifest.json: a later polyconcept"):  # not taken for half-written
            use(destination)


def test_pipes_and_links_that_lead_nowhere(make: Make, tmp_path: Path) -> None:
    """None of these waits for somebody to write to the pipe."""
    url, pipe = publish(make("one"), str(tmp_path / "rel")).url, tmp_path / "pipe"
    os.mkfifo(pipe)
    for name in ("README.md", "manifest.json"):
        (Path(url) / name).unlink()
        (Path(url) / name).symlink_to(pipe)
        assert any(problem.startswith(f"{name}: ") and "not a regular file" in problem for problem in verify(url))
    (tmp_path / "rel/latest.json").unlink()
    os.mkfifo(tmp_path / "rel/latest.json")
    with pytest.raises(ValueError, match=r"latest.json: damaged: .*not a regular file"):
        resolve(str(tmp_path / "rel"))
    folder = make("two")
    for place in ("gone", pipe):
        (folder / "link").symlink_to(place)
        with pytest.raises(ValueError, match=r"link: a link that leads nowhere, a pipe"):
            publish(folder, str(tmp_path / "new"))
        (folder / "link").unlink()


def test_bad_input(make: Make, destination: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to publish"):
        publish(tmp_path / "absent", destination)
    with pytest.raises(ValueError, match="not JSON"):
        publish(make(), destination, {"path": tmp_path})
    with pytest.raises(ValueError, match=r"provenance\.concepts"):
        publish(make(), destination, {"concepts": ["cat"]})
    folder = make()
    (folder / "a\\b").write_text("")
    with pytest.raises(ValueError, match=r"no name for a file of a release"):
        publish(folder, destination)
    (folder / "a\\b").unlink()
    bytes_name = os.fsdecode(os.fsencode(folder) + b"/\xff.txt")
    Path(bytes_name).write_text("")
    with pytest.raises(ValueError, match=r"udcff.txt': no name for a file of a release"):
        publish(folder, destination)
    Path(bytes_name).unlink()
    (folder / "latest.json").write_text("{}")
    with pytest.raises(ValueError, match="rename it"):
        publish(folder, destination)
    with pytest.raises(ValueError, match="no release here"):
        resolve(destination)
    with pytest.raises(ValueError, match="no release here"):
        verify(f"{destination}/v0007")
    assert names(destination) == []
    (folder / "latest.json").unlink()
    publish(folder, destination)
    fs, root = fsspec.core.url_to_fs(destination)
    fs.pipe_file(f"{root}/latest.json", b'{"version": "../../etc"}')
    with pytest.raises(ValueError, match="names no version"):
        resolve(destination)


# --- stopped at every step -----------------------------------------------------------------------------

CHANGES = ("mkdir", "makedirs", "put_file", "pipe_file", "rm_file", "rm")
STEPS = {
    LocalFileSystem: CHANGES,
    MemoryFileSystem: CHANGES,
    os: ("rename", "replace", "fsync"),
}


class Killed(BaseException):
    """What no code gets to see: the process is gone."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException, *, dead: bool) -> list[str]:
    """Let the `step`-th change to a file system fail, a copy half done; every later one too if `dead`."""
    calls: list[str] = []
    inside = False

    def wrap(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal inside
            if inside:  # one step calls others
                return original(*args, **kwargs)
            calls.append(name)
            inside = True
            try:
                # object stores write an object whole or not at all; a disk does not
                writes = ("put_file", "pipe_file") if owner is LocalFileSystem else ("put_file",)
                if len(calls) == step + 1 and name in writes:
                    target = str(args[2] if name == "put_file" else args[1])
                    args[0].pipe_file(target, b"ha")  # type: ignore[attr-defined]
                if len(calls) == step + 1 or (dead and len(calls) > step):
                    raise error
                return original(*args, **kwargs)
            finally:
                inside = False

        monkeypatch.setattr(owner, name, wrapped)

    for owner, methods in STEPS.items():
        for name in methods:
            wrap(owner, name)
    return calls


@pytest.mark.parametrize("kind", ["killed", "disk full", "ctrl-c"])
def test_stopped_between_any_two_steps(
    make: Make, destination: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make("one"), make("two")
    error = {"killed": Killed(), "disk full": OSError(errno.ENOSPC, "No space"), "ctrl-c": KeyboardInterrupt()}[kind]
    fs, root = fsspec.core.url_to_fs(destination)
    step = 0
    while True:
        if fs.exists(root):
            fs.rm(root, recursive=True)
        publish(old, destination)
        with monkeypatch.context() as patch:
            calls = stop_at(patch, step, error, dead=kind == "killed")
            try:
                publish(new, destination)
            except type(error) as raised:
                assert raised is error
            else:
                break
        # latest names a whole version, and whatever looks like a version to a reader is one
        latest = resolve(destination)
        assert verify(latest) == []
        complete = [n for n in names(destination) if n[0] == "v" and fs.exists(f"{root}/{n}/manifest.json")]
        for version in complete:
            assert verify(f"{destination}/{version}") == []
        if kind != "killed":
            assert set(names(destination)) <= {"latest.json", *complete}, f"left behind after step {step} {calls}"
        # and publishing again ends well, in one version more, when the lease of the dead one has run out
        if fs.exists(f"{root}/.publish"):
            fs.rm(f"{root}/.publish", recursive=True)
        again = publish(new, destination)
        assert resolve(destination) == again.url
        assert verify(destination) == []
        step += 1
    # a lease that cannot be given back stops nobody: it runs out
    assert len(calls) >= 6 and step in (len(calls) - 1, len(calls)), calls


def test_killed_while_a_version_is_signed(make: Make, destination: str, tmp_path: Path, monkeypatch) -> None:
    """The same content, published again with the key, is signed where it is, also where half a signature stands."""
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    place = f"{publish(make('one'), destination).url}/manifest.json.sig"
    fs, path = fsspec.core.url_to_fs(place)
    step, stopped = 0, True
    while stopped:
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path)
        with monkeypatch.context() as patch:
            stop_at(patch, step, Killed(), dead=True)
            try:
                publish(make("one"), destination, signing_key=str(key))
                stopped = False
            except Killed:
                step += 1
        assert not fs.exists(path) or not verify(f"{destination}/v0001", str(key))
        if fs.exists(lease := f"{Path(path).parents[1]}/.publish"):
            fs.rm(lease, recursive=True)
    assert step >= 3 and verify(destination, str(key)) == []
    whole = fs.cat_file(path)
    for broken in (b"", whole[:10]):
        fs.pipe_file(path, broken)
        again = publish(make("one"), destination, signing_key=str(key))
        assert (again.version, again.created, fs.cat_file(path)) == ("v0001", False, whole)
    fs.pipe_file(path, b"another's")
    assert publish(make("one"), destination, signing_key=str(key)).version == "v0002"
    assert fs.cat_file(path) == b"another's"


@pytest.mark.parametrize(("text", "version"), [("two", "v0002"), ("one", "v0001")])
def test_another_publisher_on_a_disk(
    make: Make, tmp_path: Path, text: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another publisher takes v0001 after this one has looked; of the same content that is this one's, too."""
    destination, number, raced = str(tmp_path / "releases"), module._next_version, []

    def next_version(fs: fsspec.AbstractFileSystem, root: str) -> int:
        found = number(fs, root)
        if not raced:
            raced.append(True)
            assert publish(make("one"), destination).version == "v0001"
        return found

    monkeypatch.setattr(module, "_next_version", next_version)
    info = publish(make(text), destination)
    assert (info.version, info.created, resolve(destination)) == (version, text == "two", f"{destination}/{version}")
    assert names(destination) == ["latest.json", "v0001", "v0002"][: 2 + (text == "two")]
    assert verify(destination) == verify(f"{destination}/v0001") == []


def test_latest_does_not_move_back_from_what_others_released_meanwhile(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination, write = str(tmp_path / "releases"), module._write_local

    def overtaken(*args: object) -> object:
        written = write(*args)  # type: ignore[arg-type]
        monkeypatch.setattr(module, "_write_local", write)
        publish(make("two"), destination)
        return written

    monkeypatch.setattr(module, "_write_local", overtaken)
    assert publish(make("one"), destination).version == "v0001"
    assert resolve(destination) == f"{destination}/v0002"


@pytest.mark.parametrize(
    "place",
    ["", " ", "s3://", "s3:", "s3:/bucket/x", "s3:///x", "file:", "s3://bucket/../x", "simplecache::s3://bucket/x"],
)
def test_what_names_no_place_is_refused(place: str) -> None:
    for check in (plain_place, plain_destination):
        with pytest.raises(ValueError, match=r"is named|names no|no bucket|is no URL|leave them out|chained"):
            check(place)


def test_places_that_cannot_be_written_to(make: Make, tmp_path: Path) -> None:
    for place in ("http://models.example/cats", "https://models.example", "s3://bucket/st[1]", "memory://a/b*"):
        assert plain_place(place) == place
        for attempt in (lambda to: publish(make(), to), lambda to: ConceptBatch.model_validate({"store": to})):
            with pytest.raises(ValueError, match=r"over HTTP|as patterns"):
                attempt(place)
    assert publish(make(), f"{tmp_path}/st[1]").version == "v0001"  # a folder may have any name


def test_needless_slashes_are_left_out(make: Make) -> None:
    assert plain_destination("s3://bucket//x///y//") == "s3://bucket/x/y"
    assert (plain_place("/"), plain_place("a//b/"), plain_place("..")) == ("/", "a/b", "..")
    info = publish(make(), "memory://models//cats//")
    assert info.url == f"memory://models/cats/{info.version}" and verify("memory://models/cats") == []


def test_only_western_digits_number_versions(make: Make, tmp_path: Path) -> None:
    (tmp_path / "releases/v٠٠٠٧").mkdir(parents=True)
    assert publish(make(), str(tmp_path / "releases")).version == "v0001"


def test_a_file_that_changes_while_it_is_published(
    make: Make, destination: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copy = make("one"), module._copy

    def changed(*args: object) -> None:
        (folder / "README.md").write_text("two")
        copy(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_copy", changed)
    with pytest.raises(RuntimeError, match=r"README.md: changed"):
        publish(folder, destination)
    assert names(destination) == []
