"""Artifacts are whole or not there, on a disk and on an object store."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.release.publish import remove
from pipeline.store import MANIFEST, Store, checksums


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    return Store(f"memory://{tmp_path.name}", cache=tmp_path / "cache")


def test_whole_or_not_there(store):
    assert not store.has("train", "k1")
    with pytest.raises(FileNotFoundError):
        store.path("train", "k1")
    with store.create("train", "k1", {"name": "cat"}) as out:
        (out / "sub").mkdir()
        (out / "sub" / "a.txt").write_text("hello")
        assert not store.has("train", "k1")
    assert store.has("train", "k1")
    manifest = store.manifest("train", "k1")
    assert manifest["name"] == "cat" and manifest["files"] == checksums(store.path("train", "k1"))
    assert (store.path("train", "k1") / "sub" / "a.txt").read_text() == "hello"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")]
)
def test_failure_leaves_nothing(store, error):
    with pytest.raises(type(error)), store.create("train", "k2", {}) as out:
        (out / "half").write_text("x")
        raise error
    assert not store.has("train", "k2")
    left = [p for p in store.local.rglob("*") if p.is_file()]
    assert left == []


def test_remote_artifact_comes_to_another_machine(tmp_path):
    url = f"memory://{tmp_path.name}-shared"
    with Store(url, cache=tmp_path / "one").create("merge", "k", {}) as out:
        (out / "m.bin").write_bytes(b"123")
    other = Store(url, cache=tmp_path / "two")
    assert (other.path("merge", "k") / "m.bin").read_bytes() == b"123"


def test_brackets_in_a_name_are_no_pattern(bucket, tmp_path):
    """Neither is what a pattern would find touched."""
    for name in ("st[1]", "st1"):
        with Store(f"{bucket}/{name}", cache=tmp_path / f"{name} one").create("merge", "k", {}) as out:
            (out / "sub").mkdir()
            (out / "sub" / "m.bin").write_bytes(name.encode())
    other = Store(f"{bucket}/st[1]", cache=tmp_path / "two")
    assert (other.path("merge", "k") / "sub" / "m.bin").read_bytes() == b"st[1]"
    assert checksums(other.path("merge", "k")) == other.manifest("merge", "k")["files"]
    remove(other.fs, f"{other.base}/merge/k")
    other.fs.invalidate_cache()
    assert not other.has("merge", "k") and Store(f"{bucket}/st1", cache=tmp_path / "three").has("merge", "k")


def test_scratch_outlives_a_failure_and_goes_with_success(store):
    (store.scratch("k3") / "checkpoint").write_text("1")
    with pytest.raises(ValueError), store.create("train", "k3", {}):
        raise ValueError("cut off")
    assert (store.scratch("k3") / "checkpoint").exists()
    with store.create("train", "k3", {}) as out:
        (out / "w").write_text("2")
    assert not (store.local / ".scratch" / "k3").exists()


def test_sweep_removes_checkpoints_of_what_is_finished(store):
    with store.create("train", "finished", {}) as out:
        (out / "w").write_text("1")
    for key in ("finished", "cut-off", "not-uploaded"):
        (store.scratch(key) / "checkpoint").write_text("1")  # a process was killed before it removed its own
    if not store.is_local:
        (store.local / "train/not-uploaded").mkdir()
        (store.local / "train/not-uploaded/manifest.json").write_text("{}")
    store.sweep()
    assert sorted(os.listdir(store.local / ".scratch")) == ["cut-off", "not-uploaded"]
    assert (store.scratch("cut-off") / "checkpoint").exists()


def test_two_makers_of_one_artifact(store):
    with store.create("train", "k4", {}) as out:
        (out / "w").write_text("same")
        with store.create("train", "k4", {}) as other:
            (other / "w").write_text("same")
    assert (store.path("train", "k4") / "w").read_text() == "same"


HALF_BUILT = """
import sys, time
from pipeline.store import Store
with Store(sys.argv[1]).create("train", "k", {}) as out:
    (out / "half").write_text("x")
    print("building", flush=True)
    time.sleep(600)
"""


def half_built(root: Path) -> subprocess.Popen:
    """A process that builds, and does not end by itself."""
    process = subprocess.Popen([sys.executable, "-c", HALF_BUILT, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "building\n"
    return process


def swept(store: Store) -> list[str]:
    store.sweep()
    return sorted(os.listdir(store.local / ".building"))


def test_sweep_removes_what_killed_processes_left(tmp_path):
    """What a living one builds stays, and so does what is built where processes cannot be seen: another machine, or a
    container of the same name on this one. After a day without a sign of life that goes, too."""
    store = Store(str(tmp_path))
    process = half_built(tmp_path)
    try:
        (alive,) = swept(store)
        machine, pid, start, _ = alive.split(".")
        assert int(pid) == process.pid
        process.kill()
        while not Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z"):
            time.sleep(0.01)
        assert swept(store) == []  # though it has its number until its parent asks for it
    finally:
        process.kill()
        process.wait()
    own = f"{machine}.{os.getpid()}"
    for name, age in (
        (f"{own}.1.the-number-of-another", 0),
        (f"{'0' * len(machine)}.{pid}.{start}.elsewhere", 80_000),
        (f"{'0' * len(machine)}.{pid}.{start}.lost", 90_000),
        (f"{socket.gethostname()}.{pid}.of-an-older-version", 80_000),
    ):
        (tmp_path / ".building" / name).mkdir()
        (tmp_path / ".building" / name / "half").write_text("x")
        for path in (tmp_path / ".building" / name / "half", tmp_path / ".building" / name):
            os.utime(path, (time.time() - age,) * 2)
    assert [name.rpartition(".")[2] for name in swept(store)] == ["elsewhere", "of-an-older-version"]


def test_a_long_build_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.store.BEAT", 0.01)
    store = Store(str(tmp_path))
    with store.create("train", "k", {}) as out:
        os.utime(out, (0, 0))
        until = time.monotonic() + 10
        while time.time() - out.stat().st_mtime > 60:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert store.has("train", "k")


def test_an_artifact_is_on_the_disk_before_it_is_in_its_place(tmp_path, monkeypatch):
    synced: list[str] = []
    real, place = os.fsync, tmp_path / "train" / "k"

    def fsync(descriptor: int) -> None:
        synced.append(("placed " if place.exists() else "") + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with Store(str(tmp_path)).create("train", "k", {}) as out:
        (out / "sub").mkdir()
        (out / "sub" / "a.txt").write_text("hello")
        name = out.name
    assert sorted(synced[:-1]) == sorted(["sub", "a.txt", MANIFEST, name]) and synced[-1] == "placed train"
