"""Artifacts are whole or not there, on a disk and on an object store."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import pytest

from pipeline.release.publish import remove
from pipeline.store import Store, checksums


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


def test_two_makers_of_one_artifact(store):
    with store.create("train", "k4", {}) as out:
        (out / "w").write_text("same")
        with store.create("train", "k4", {}) as other:
            (other / "w").write_text("same")
    assert (store.path("train", "k4") / "w").read_text() == "same"


def test_sweep_removes_what_a_killed_process_left(tmp_path):
    """At once, of this machine; of others, whose processes cannot be asked for, after a day without a change."""
    root = tmp_path / "store"
    code = (
        "import os, sys; from pipeline.store import Store\n"
        "with Store(sys.argv[1]).create('train', 'k', {}) as out:\n"
        "    (out / 'half').write_text('x'); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(root)], check=False).returncode == 9
    store = Store(str(root))
    with store.create("train", "mine", {}) as out:
        (out / "w").write_text("x")
        assert len(os.listdir(root / ".building")) == 2
        for name, age in (("elsewhere.1.old", 90_000), ("elsewhere.1.new", 80_000)):
            (root / ".building" / name).mkdir()
            (root / ".building" / name / "half").write_text("x")
            for path in (root / ".building" / name / "half", root / ".building" / name):
                os.utime(path, (time.time() - age,) * 2)
        store.sweep()
        assert len(os.listdir(root / ".building")) == 2
        assert (root / ".building" / "elsewhere.1.new").exists()
    assert store.has("train", "mine") and not store.has("train", "k")
