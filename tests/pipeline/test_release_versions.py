"""What is done with releases: listed, compared, promoted, rolled back, signed, removed; on disk and on S3."""

import hashlib
import json
import os
import posixpath
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from botocore.exceptions import EndpointConnectionError
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pipeline.release import versions as module
from pipeline.release.lease import Busy, lease
from pipeline.release.manifest import content_sum, own_sum, public
from pipeline.release.place import create
from pipeline.release.publish import keep_candidate, publish, resolve, verify
from pipeline.release.versions import diff, fetch, gc, listed, promote, read, rollback
from ray_jobs.cli import main

Make = Callable[..., Path]


@pytest.fixture(params=["local", "s3"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "releases")
    return f"{request.getfixturevalue('bucket')}/cats"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def folder(text: str) -> Path:
        path = tmp_path / f"prepared-{text}"
        (path / "comfyui").mkdir(parents=True, exist_ok=True)
        (path / "README.md").write_text(text)
        (path / "comfyui" / "<new1>.safetensors").write_bytes(text.encode() * 1000)
        return path

    return folder


def facts(**trained: str) -> dict:
    measures = {name: {"image": 0.5, "image_se": 0.1, "samples": 4} for name in trained}
    concepts = {name: {"token": f"<{name}>", "class_word": name, "training": key} for name, key in trained.items()}
    return {"concepts": concepts, "measures": {"concepts": measures}}


def test_published_listed_compared(make: Make, destination: str) -> None:
    publish(make("one"), destination, facts(cat="a", dog="b") | {"packages": {"torch": "1"}})
    publish(make("two"), destination, facts(cat="a", dog="c", hen="d") | {"packages": {"torch": "2"}})
    promote(f"{destination}/v0001", "production")
    assert [(v.name, v.aliases) for v in listed(destination)] == [("v0001", ("production",)), ("v0002", ("latest",))]
    assert resolve(f"{destination}/production") == f"{destination}/v0001"
    assert read(f"{destination}/production")["version"] == "v0001"
    assert verify(f"{destination}/production") == verify(destination) == []
    assert diff(f"{destination}/production", destination) == [
        "added     hen",
        "changed   dog                      image 0.500 -> 0.500",
        "unchanged cat                      image 0.500 -> 0.500",
        "packages.torch: '1' -> '2'",
    ]
    for alias in ("v0003", "../x", "Latest", ""):
        with pytest.raises(ValueError, match="--alias"):
            promote(f"{destination}/v0001", alias)
    with pytest.raises(ValueError, match="no release here"):
        promote(f"{destination}/v0009")


def test_rollback(make: Make, destination: str) -> None:
    for text in ("one", "two", "three"):
        publish(make(text), destination)
    assert rollback(destination) == ("v0003", "v0002")
    assert rollback(destination) == ("v0002", "v0001")
    with pytest.raises(ValueError, match="no whole version before v0001"):
        rollback(destination)
    assert rollback(destination, to="v0003") == ("v0001", "v0003")
    # what was rolled back from before is passed over
    assert rollback(destination, to="v0002") == ("v0003", "v0002")
    fs, root = fsspec.core.url_to_fs(destination)
    fs.pipe_file(f"{root}/v0001/README.md", b"One")
    with pytest.raises(ValueError, match="no whole version before"):
        rollback(destination)
    with pytest.raises(ValueError, match=r"v0001: README.md: changed(.|\n)*latest was not moved"):
        rollback(destination, to="v0001")
    with pytest.raises(ValueError, match=r"README.md: changed(.|\n)*not promoted"):
        promote(f"{destination}/v0001")
    assert resolve(destination) == f"{destination}/v0002"
    # wanted again: promoted, or something was released after it
    promote(f"{destination}/v0003")
    publish(make("four"), destination)
    assert rollback(destination) == ("v0004", "v0003")
    assert rollback(destination) == ("v0003", "v0002")
    publish(make("five"), destination)
    assert json.loads(fs.cat_file(f"{root}/latest.json")) == {"version": "v0005"}
    assert rollback(destination) == ("v0005", "v0004")


def test_promoting_an_older_version_is_a_rollback(make: Make, destination: str) -> None:
    for text in ("one", "two", "three", "four"):
        publish(make(text), destination)
    promote(f"{destination}/v0003")
    fs, root = fsspec.core.url_to_fs(destination)
    assert json.loads(fs.cat_file(f"{root}/latest.json")) == {"version": "v0003", "rolled_back": ["v0004"]}
    promote(f"{destination}/v0002")
    # what people do not want is remembered, and so it stays
    assert gc(destination, keep=1) == ["v0001"]
    promote(f"{destination}/v0003")
    assert json.loads(fs.cat_file(f"{root}/latest.json")) == {"version": "v0003", "rolled_back": ["v0004"]}
    # until something is released after it
    publish(make("five"), destination)
    assert json.loads(fs.cat_file(f"{root}/latest.json")) == {"version": "v0005"}
    assert gc(destination, keep=1) == ["v0002", "v0003", "v0004"]


def test_a_candidate_is_kept_and_may_be_promoted(make: Make, destination: str) -> None:
    publish(make("one"), destination)
    place = keep_candidate(make("two"), destination, "0a1b", {"gate": []})
    assert verify(place) == [] and resolve(destination).endswith("v0001")
    # again: it stays as it is, unless it is damaged
    before = read(place)
    assert keep_candidate(make("two"), destination, "0a1b", {"gate": ["other"]}) == place
    assert read(place) == before
    fs, root = fsspec.core.url_to_fs(place)
    fs.pipe_file(f"{root}/README.md", b"Two")
    assert keep_candidate(make("two"), destination, "0a1b", {"gate": []}) == place
    assert verify(place) == [] and read(place)["provenance"] == {"gate": []}
    assert promote(place) == "v0002"
    assert read(destination)["provenance"] == {"gate": []} and verify(destination) == []


def test_gc(make: Make, destination: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("one", "two", "three", "four", "five"):
        publish(make(text), destination)
    promote(f"{destination}/v0002", "production")
    for name in ("old", "new"):
        keep_candidate(make(name), destination, name, {})
        time.sleep(1.1)  # candidates are dated to the second
    fs, root = fsspec.core.url_to_fs(destination)
    fs.rm_file(f"{root}/v0003/manifest.json")  # as a killed publisher leaves it
    assert gc(destination, keep=1, dry_run=True) == ["v0001", "v0004", "candidates/old"]
    assert gc(destination, keep=1) == ["v0001", "v0004", "candidates/old"]
    monkeypatch.setattr(module, "GRACE", -1)
    assert gc(destination, keep=1) == ["v0003"]
    assert [v.name for v in listed(destination)] == ["v0002", "v0005"]
    assert verify(destination) == verify(f"{destination}/production") == []
    assert gc(destination, keep=1) == []
    # other JSON files lie there: they are no aliases, of which a damaged one stops it
    fs.pipe_file(f"{root}/summary.json", b'{"release": "v0005"}')
    assert gc(destination, keep=1) == [] and listed(destination)[-1].aliases == ("latest",)
    fs.pipe_file(f"{root}/staging.json", b'{"versi')
    with pytest.raises(ValueError, match=r"staging.json: damaged"):
        gc(destination, keep=1)
    fs.rm_file(f"{root}/staging.json")
    # an alias that is moved while others are removed
    publish(make("six"), destination)
    named = module._named
    promote(f"{destination}/v0006", "production")

    def moved(fs: fsspec.AbstractFileSystem, root: str) -> set[str]:
        found = named(fs, root)
        promote(f"{destination}/v0002", "production")
        return found

    monkeypatch.setattr(module, "_named", moved)
    assert gc(destination, keep=1) == ["v0005"]
    assert verify(f"{destination}/production") == []
    with pytest.raises(ValueError, match="no releases here"):
        gc(f"{destination}/elsewhere")


def test_signed_releases(make: Make, destination: str, tmp_path: Path) -> None:
    """By keys that openssl made; the signature is one that openssl accepts."""
    for name in ("ours", "other"):
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    ours, key = str(tmp_path / "ours.pub"), str(tmp_path / "ours.pem")
    url = publish(make("one"), destination, signing_key=key).url
    assert verify(url) == verify(url, ours) == []
    assert "not by this key" in verify(url, str(tmp_path / "other.pub"))[0]
    fs, root = fsspec.core.url_to_fs(url)
    for name in ("manifest.json", "manifest.json.sig"):
        fs.get_file(f"{root}/{name}", str(tmp_path / name))
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", ours, "-rawin", "-in", tmp_path / "manifest.json"]
    subprocess.run([*check, "-sigfile", tmp_path / "manifest.json.sig"], check=True)
    # a manifest that was changed, also with all its sums
    forge(url, {"provenance": {"made_by": "someone else"}, "sum": read(url)["sum"]})
    assert verify(url) == ["manifest.json: changed: it does not match its own sum"]
    forge(url, {"provenance": {"made_by": "someone else"}})
    assert verify(url) == [] and "manifest.json was changed" in verify(url, ours)[0]
    unsigned = publish(make("two"), destination).url
    assert verify(unsigned, ours) == ["manifest.json.sig: missing; the release is not signed"]
    for moved in (
        lambda: promote(unsigned, "production", public_key=ours),
        lambda: rollback(destination, to="v0001", public_key=ours),
    ):
        with pytest.raises(ValueError, match=r"not signed|not by this key"):
            moved()
    # published again with the key it is signed, where its manifest says the same
    again = publish(make("two"), destination, signing_key=key)
    assert (again.url, again.created, verify(unsigned, ours)) == (unsigned, False, [])
    fs.rm_file(fs._strip_protocol(f"{unsigned}/manifest.json.sig"))
    forge(unsigned, {"provenance": {"gate": []}})
    assert publish(make("two"), destination, signing_key=key).version == "v0003"
    assert verify(destination, ours) == [] and len(verify(unsigned, ours)) == 1
    # nor is a candidate signed by promoting it
    place = keep_candidate(make("three"), destination, "0a1b", {})
    for keys in ({"public_key": ours}, {"signing_key": key}):
        with pytest.raises(ValueError, match="the release is not signed"):
            promote(place, **keys)
    assert verify(keep_candidate(make("three"), destination, "0a1b", {}, key), ours) == []
    forge(place, {"provenance": {"gate": []}})
    with pytest.raises(ValueError, match="not by this key"):
        promote(place, signing_key=key)
    # kept again, as it was
    assert promote(keep_candidate(make("three"), destination, "0a1b", {}, key), signing_key=key) == "v0004"
    assert verify(destination, ours) == []
    with pytest.raises(ValueError, match=r"not by this key|missing"):
        promote(unsigned, signing_key=key)
    for wrong in (str(make("one") / "README.md"), str(tmp_path / "none")):
        with pytest.raises(ValueError, match="no private key"):
            publish(make("two"), destination, signing_key=wrong)
        with pytest.raises(ValueError, match="no public key"):
            verify(url, wrong)


def keys(folder: Path) -> tuple[str, str]:
    """A private and a public key (PEM)."""
    private, public = folder / "key.pem", folder / "key.pub"
    key = Ed25519PrivateKey.generate()
    form = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return str(private), str(public)


def test_latest_is_signed(make: Make, destination: str, tmp_path: Path) -> None:
    private, public = keys(tmp_path)
    fs, root = fsspec.core.url_to_fs(destination)

    def latest() -> dict:
        fs.invalidate_cache()
        return json.loads(fs.cat_file(f"{root}/latest.json"))

    publish(make("one"), destination, {"batch": "pets"}, private)
    first = latest()
    assert (first["version"], first["number"], first["project"], first["alias"]) == ("v0001", 1, "pets", "latest")
    publish(make("two"), destination, {"batch": "pets"}, private)
    assert (latest()["number"], verify(destination, public)) == (2, [])
    rollback(destination, signing_key=private)
    assert (latest()["rolled_back"], latest()["number"], verify(destination, public)) == (["v0002"], 3, [])
    # moved by who has no key
    forged = latest() | {"version": "v0002", "rolled_back": []}
    fs.pipe_file(f"{root}/latest.json", json.dumps(forged).encode())
    assert verify(destination, public) == ["latest.json: not signed by this key, or it was changed"]
    rollback(destination, to="v0001")
    assert verify(destination) == [] and "latest.json: not signed: whoever" in verify(destination, public)[0]
    assert verify(f"{destination}/v0001", public) == []  # named itself, it needs no alias
    promote(f"{destination}/v0001", signing_key=private)
    assert verify(destination, public) == []
    # an alias under the name of another
    promote(f"{destination}/v0002", "staging", signing_key=private)
    assert verify(f"{destination}/staging", public) == []
    fs.pipe_file(f"{root}/latest.json", fs.cat_file(f"{root}/staging.json"))
    assert "this is staging.json, under another name" in verify(destination, public)[0]
    # signed later, of the same content
    fs.pipe_file(f"{root}/latest.json", b'{"version": "v0002", "rolled_back": ["v0001"]}')
    assert not publish(make("two"), destination, {"batch": "pets"}, private).created
    assert (verify(destination, public), latest()["rolled_back"]) == ([], ["v0001"])


def test_another_project_s_release_under_the_same_key(make: Make, tmp_path: Path) -> None:
    private, public = keys(tmp_path)
    places = {name: str(tmp_path / name) for name in ("pets", "gates")}
    for name, place in places.items():
        for text in ("one", "two"):
            publish(make(f"{name}-{text}"), place, {"batch": name}, private)
    shutil.rmtree(f"{places['pets']}/v0002")
    shutil.copytree(f"{places['gates']}/v0002", f"{places['pets']}/v0002")
    wrong = ["manifest.json: of the project 'gates', not 'pets'"]
    assert verify(places["pets"], public) == verify(f"{places['pets']}/v0002", public) == wrong
    with pytest.raises(ValueError, match="of the project 'gates'"):
        promote(f"{places['pets']}/v0002", "production", signing_key=private)
    # with its latest.json, too: who expects a project has to say so
    shutil.copy(f"{places['gates']}/latest.json", f"{places['pets']}/latest.json")
    assert verify(places["pets"], public) == [] and verify(places["pets"], public, "pets") == wrong
    candidate = keep_candidate(make("gates-three"), places["gates"], "0a1b", {"batch": "gates"}, private)
    shutil.copytree(candidate, f"{tmp_path}/other/candidates/0a1b")
    publish(make("pets-one"), f"{tmp_path}/other", {"batch": "pets"}, private)
    with pytest.raises(ValueError, match="of the project 'gates'"):
        promote(f"{tmp_path}/other/candidates/0a1b", signing_key=private)


def test_a_candidate_that_is_exchanged_while_it_is_promoted(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, _ = keys(tmp_path)
    place = keep_candidate(make("one"), str(tmp_path / "releases"), "0a1b", {}, private)
    get = fsspec.implementations.local.LocalFileSystem.get

    def exchanged(*args: object, **kwargs: object) -> None:
        Path(place, "README.md").write_text("evil")
        get(*args, **kwargs)

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "get", exchanged)
    with pytest.raises(ValueError, match=r"README.md: changed(.|\n)*not copied"):
        promote(place, signing_key=private)
    assert listed(str(tmp_path / "releases")) == []


def forge(url: str, changed: dict) -> None:
    """Change a manifest, with its sums."""
    fs, root = fsspec.core.url_to_fs(url)
    manifest = json.loads(fs.cat_file(f"{root}/manifest.json")) | changed
    manifest["content"] = content_sum(manifest["files"])
    manifest |= {"sum": own_sum(manifest)} | changed
    fs.pipe_file(f"{root}/manifest.json", json.dumps(manifest).encode())


@pytest.mark.parametrize("destination", ["s3"], indirect=True)
@pytest.mark.parametrize("name", ["../../../out.txt", "/out.txt", "a\\..\\out.txt", "./out.txt"])
def test_names_that_lead_out_are_refused(make: Make, destination: str, tmp_path: Path, name: str) -> None:
    """Object stores take any name; a forged manifest lists it."""
    place = keep_candidate(make("one"), destination, "k1", {})
    fs, root = fsspec.core.url_to_fs(place)
    fs.pipe_file(f"{root}/{name}", b"evil")
    forge(place, {"files": read(place)["files"] | {name: {"sha256": hashlib.sha256(b"evil").hexdigest(), "size": 4}}})
    assert verify(place) == [f"{name!r}: no name for a file of a release: it may lead out of its folder"]
    with pytest.raises(ValueError, match="leads out of its folder; not copied"):
        promote(place)
    (tmp_path / "a/b").mkdir(parents=True)
    with pytest.raises(ValueError, match="leads out of its folder"):
        fetch(place, tmp_path / "a/b")
    assert not list(tmp_path.rglob("out.txt"))


@pytest.mark.parametrize(
    "damage",
    [
        "[1]",
        "{}",
        {"provenance": []},
        {"provenance": {"concepts": ["cat"]}},
        {"files": {"README.md": "sum"}},
        {"created": 1},
    ],
)
def test_a_damaged_manifest_is_none(make: Make, tmp_path: Path, damage: str | dict) -> None:
    destination = str(tmp_path / "releases")
    for text in ("one", "two"):
        publish(make(text), destination)
    path = Path(destination, "v0002/manifest.json")
    path.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(path.read_text()) | damage))
    assert [(v.name, v.manifest is None, v.is_damaged) for v in listed(destination)] == [
        ("v0001", False, False),
        ("v0002", True, True),
    ]
    assert verify(destination)[0].startswith("manifest.json: damaged: ")
    for read_it in (read, promote, lambda release: diff(f"{destination}/v0001", release)):
        with pytest.raises(ValueError, match=r"v0002: manifest.json: damaged: "):
            read_it(f"{destination}/v0002")
    assert publish(make("two"), destination).version == "v0003"


def test_what_is_published_says_nothing_of_the_machine() -> None:
    assert public(
        {
            "base": "/home/anna/bases/sd15/",
            "clip": ["C:\\Users\\anna\\clip", "~/clip", "owner/clip", "./clip"],
            "corpus": "s3://KEY:SECRET@host/a.parquet",
            "url": "https://anna:pw@host:80/x@y",
            "steps": 4,
        }
    ) == {
        "base": "sd15",
        "clip": ["clip", "clip", "owner/clip", "./clip"],
        "corpus": "s3://host/a.parquet",
        "url": "https://host:80/x@y",
        "steps": 4,
    }


def test_the_command_names_what_is_wrong(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["release", *arguments])
        return "".join(capsys.readouterr())

    releases = tmp_path / "releases"
    publish(make("one"), str(releases))
    (releases / "v0001/manifest.json").write_text("[1]")
    assert said("list", str(releases)).startswith("v0001    damaged; `release verify` says how")
    assert said("show", str(releases)).startswith(f"error: {releases}/v0001: manifest.json: damaged: ")
    # what is not installed is named, and no traceback
    for place, package in (("gs://models", "gcsfs"), ("az://models", "adlfs")):
        assert said("list", place).startswith("error: ") and package in said("list", place)
        assert "Traceback" not in said("list", place)


@pytest.mark.parametrize("destination", ["s3"], indirect=True)
def test_no_bucket_is_made(make: Make, destination: str) -> None:
    fs = fsspec.filesystem("s3")
    for attempt in (lambda to: publish(make("one"), to), lambda to: lease(to, 30).__enter__()):
        for to in ("s3://typo-bucket", "s3://typo-bucket/cats"):
            with pytest.raises(ValueError, match="s3://typo-bucket: no such bucket"):
                attempt(to)
    fs.invalidate_cache()
    assert not fs.exists("typo-bucket")


def test_promote_where_one_stands(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("one", "two"):
        publish(make(text), str(tmp_path / "releases"))
    keep_candidate(make("three"), str(tmp_path / "releases"), "0a1b", {})
    monkeypatch.chdir(tmp_path / "releases")
    assert promote("v0001") == "v0001"
    assert promote("candidates/0a1b") == "v0003"
    monkeypatch.chdir("v0002")
    assert promote(".") == "v0002"
    assert resolve("..") == "../v0002"


def test_a_lease_is_one_process_s(destination: str) -> None:
    with lease(destination, 30) as held:
        there = r"\.lease/000001.json: .* is at work here; its lease ends at \d{4}-"
        with pytest.raises(Busy, match=destination + "/" + there), lease(destination, 30):
            pass
        held.check()
    fs, root = fsspec.core.url_to_fs(destination)
    fs.pipe_file(f"{root}/.lease/000001.json.part", b"")  # as one leaves it that is killed while it renews
    with lease(destination, 30) as again:  # given back: at once
        again.check()
    assert again.number == held.number + 1
    fs.invalidate_cache()
    assert [posixpath.basename(path) for path in fs.ls(f"{root}/.lease", detail=False)] == ["000002.json"]


def written(left: float) -> bytes:
    return json.dumps({"holder": "a", "seconds": 30, "until": time.time() + left}).encode()


def test_a_long_name_of_a_holder_is_cut(tmp_path: Path) -> None:
    (tmp_path / ".lease").mkdir()
    (tmp_path / ".lease/000001.json").write_bytes(written(20).replace(b'"a"', b'"%s"' % (b"x" * 10**6)))
    with pytest.raises(Busy) as busy, lease(str(tmp_path), 30):
        pass
    assert len(str(busy.value)) < 1000


def test_a_lease_that_lasts_for_years_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lasts up to 86400"), lease(str(tmp_path), 1e9):
        pass
    path = tmp_path / ".lease/000004.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"holder": "a", "seconds": 1e9, "until": time.time() + 1e9}))
    os.utime(path, times=(time.time() - 60,) * 2)
    with lease(str(tmp_path), 30) as held:
        assert held.number == 5


def test_a_file_that_the_disk_has_no_room_for_is_not_there(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as a full disk: the file is made, nothing written
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="too large"):
            create(fsspec.filesystem("file"), str(tmp_path / "new"), b"content")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("left", [365 * 86_400, float("inf"), float("nan")])
def test_a_wrong_clock_s_lease_does_not_count(tmp_path: Path, left: float) -> None:
    path = tmp_path / ".lease/000004.json"
    path.parent.mkdir()
    path.write_bytes(written(left))
    os.utime(path, times=(time.time() + 365 * 86_400,) * 2)  # the file's date is by that clock, too
    with lease(str(tmp_path), 30) as held:
        assert held.number == 5
    # clocks may differ by less than the lease
    (tmp_path / ".lease/000006.json").write_bytes(written(50))
    with pytest.raises(Busy, match="a is at work"), lease(str(tmp_path), 5):
        pass


def test_a_dead_run_s_lease_runs_out(destination: str) -> None:
    fs, root = fsspec.core.url_to_fs(destination)
    fs.makedirs(f"{root}/.lease", exist_ok=True)
    fs.pipe_file(f"{root}/.lease/000004.json", written(2))
    with pytest.raises(Busy, match="a is at work"), lease(destination, 30):
        pass
    with lease(destination, 30, wait=10) as held:
        assert held.number == 5
        # another took over while this one slept
        fs.pipe_file(f"{root}/.lease/000006.json", b"")
        with pytest.raises(Busy, match="nothing released"):
            held.check()
    with pytest.raises(Busy), lease(destination, 30):  # empty: its process died, or is about to write
        pass


def test_a_living_run_keeps_its_lease(destination: str) -> None:
    with lease(destination, 2) as held:
        time.sleep(3)
        held.check()


def test_a_storage_that_fails_for_a_moment_costs_no_lease(destination: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.release import lease as leases

    write, failed = leases._write, []

    def fails_once(fs: fsspec.AbstractFileSystem, path: str, *content: float) -> None:
        if not failed:
            failed.append(True)
            raise EndpointConnectionError(endpoint_url="http://s3")  # no OSError
        write(fs, path, *content)

    with lease(destination, 2) as held:
        monkeypatch.setattr(leases, "_write", fails_once)
        time.sleep(3)
        held.check()
        failed.clear()
    # not given back, as that failed, and the run ended well all the same
    with pytest.raises(Busy), lease(destination, 2):
        pass


def test_two_runs_find_an_expired_lease_at_once(destination: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another takes it between this one's look and its claim."""
    from pipeline.release import lease as leases

    create, raced = leases._create, []

    def claimed_first(fs: fsspec.AbstractFileSystem, path: str, *content: float) -> bool:
        if not raced:
            raced.append(True)
            assert create(fs, path, *content)
        return create(fs, path, *content)

    monkeypatch.setattr(leases, "_create", claimed_first)
    with pytest.raises(Busy), lease(destination, 30):
        pass


@pytest.mark.parametrize("texts", [("one",) * 3, ("one", "two")])
def test_publishers_at_once(make: Make, destination: str, texts: tuple[str, ...]) -> None:
    """On a disk, and on a server that takes an object only once."""
    folders = [make(text) for text in texts]
    with ThreadPoolExecutor(len(folders)) as pool:
        made = list(pool.map(lambda folder: publish(folder, destination), folders))
    versions = {info.version for info in made}
    assert len(versions) == len(set(texts)) == sum(info.created for info in made)
    assert [version.name for version in listed(destination)] == sorted(versions)
    assert resolve(destination) == f"{destination}/{max(versions)}"
    assert all(verify(info.url) == [] for info in made)
