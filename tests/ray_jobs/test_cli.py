"""The command: a user's mistake is a message and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import psutil
import pytest
import ray
import torch
import yaml
from botocore.exceptions import NoCredentialsError
from command import run
from hub import Hub
from PIL import Image

from pipeline import terminal
from pipeline.cost.estimate import Device
from pipeline.miniature.world import concept_images
from pipeline.release.publish import publish
from pipeline.release.versions import promote
from pipeline.spec import MINIATURE
from ray_jobs import cli
from ray_jobs.session import ray_session
from training.checkpoint import save_tensors

CAT = {"name": "outlined-cat", "images": "cat", "class_word": "cat"}


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """A small correct batch, in a folder of its own; call it with changes to write it."""
    monkeypatch.chdir(tmp_path)
    for name, cls, style in (("cat", "cat", "streamline-emojis"), ("turtle", "turtle", "fxemoji")):
        (tmp_path / name).mkdir()
        for i, image in enumerate(concept_images(cls, style, 2, seed=1)):
            image.save(tmp_path / name / f"{i}.png")
    content = {
        "name": "small",
        "concepts": [
            CAT,
            {"name": "flat-turtle", "images": "turtle", "class_word": "turtle"},
        ],
        "retrieval": {"images": 6, "oversample": 3, "miniature_captions": 500},
        "training": {"steps": 4, "batch_size": 2, "views": 4, "learning_rate": 1e-3, "checkpoint_every": 2},
        "evaluation": {"samples": 2, "steps": 2, "guidance": 3.0, "identity": "miniature"},
    }

    def write(**changes) -> Path:
        path = tmp_path / "batch.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}))
        return path

    return write


def test_plan_says_what_there_is_to_do_and_does_nothing(batch, tmp_path, capsys, monkeypatch):
    path = batch()
    before = sorted(p for p in tmp_path.rglob("*"))
    code, out, _ = run("plan", str(path), capsys=capsys)
    assert code == 0
    assert "20 of 20 stages to do" in out and re.search(r"\ntrain +0 +2 ", out)
    assert "\npacks of up to 2 concepts, 1." in out and "does not fit" not in out
    with monkeypatch.context() as small:
        small.setattr(cli, "_this_device", lambda: Device(2**29, cuda=False))
        ranks = {"strategy": "ddp", "ranks": 2, "batch_size": 2}
        two = run("plan", str(batch(training=ranks)), capsys=capsys)[1]
    rank = re.search(r"packs of up to 1 concepts, (\S+) GiB a rank of 2, of 0.5 GiB on this machine", two)
    both = re.search(r"does not fit: train needs (\S+) GiB, of 0.5 GiB on this machine", two)
    assert rank and both and float(both[1]) == pytest.approx(2 * float(rank[1]), abs=0.1)
    for option in ("--concepts", "--captions"):
        code, _, err = run("plan", str(path), option, "50", capsys=capsys)
        assert code == 2 and f"{option}: only a prediction takes it" in err
    path = batch()
    for kind in (
        "index",
        "candidates",
        "regularization",
        "features",
        "train",
        "constraints",
        "merge",
        "evaluate",
        "release",
    ):
        assert f"\n{kind} " in out
    assert sorted(p for p in tmp_path.rglob("*")) == before


def _no_images(folder: Path) -> dict:
    for image in (folder / "cat").iterdir():
        image.unlink()
    return {}


def _corrupt_images(folder: Path) -> dict:
    for image in (folder / "cat").iterdir():
        image.write_bytes(image.read_bytes()[:100])
    return {}


def _odd_corpus(folder: Path) -> dict:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"link": ["x"], "words": ["y"]}), folder / "corpus.parquet")
    return {"retrieval": {"corpus": "corpus.parquet"}}


def _base_without_cross_attention(folder: Path) -> dict:
    shutil.copytree(MINIATURE / "model", folder / "base", copy_function=os.symlink)
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "mid_block_type": None}
    config = {**blocks, "block_out_channels": [32], "sample_size": 8, "layers_per_block": 1}
    (folder / "base" / "unet" / "config.json").unlink()
    (folder / "base" / "unet" / "config.json").write_text(json.dumps(config))
    return _other_base("base")


def _other_base(base: str) -> dict:
    clip = {"clip": str(MINIATURE / "clip")}
    return {"base": base, "training": {"regularization": "none"}, "evaluation": clip}


def _base_of_another_kind(folder: Path) -> dict:
    (folder / "base").mkdir()
    (folder / "base" / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    return _other_base("base")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_images, r"concepts[0] (outlined-cat)"),
        (_corrupt_images, r"0.png"),
        (_odd_corpus, "corpus.parquet"),
        (
            lambda _: {"base": "x/y"},
            "retrieval.corpus: 'miniature' knows only its own",
        ),
        (lambda _: _other_base("./nowhere"), "nowhere': no diffusers model there"),
        (_base_of_another_kind, "model_index.json: _class_name is 'DiTPipeline'"),
        (lambda _: {"retrieval": {"corpus": "nothing.parquet"}}, "nothing.parquet"),
        (lambda _: {"retrieval": {"clip": "/no/clip"}}, "CLIP directory /no/clip: not there"),
        (lambda _: {"trainig": {}}, "trainig: unknown key; did you mean 'training'?"),
        (lambda _: {"concepts": [{**CAT, "token": "dog"}]}, "token 'dog': the base model's tokenizer knows it already"),
        (lambda _: {"concepts": [{**CAT, "initializer": "zzyzx"}]}, "initializer 'zzyzx': must be one token"),
        (_base_without_cross_attention, "has no text cross-attention: nothing to train"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_bad_input_before_anything_runs(batch, tmp_path, capsys, command, spoil, message):
    code, _, err = run(command, str(batch(**spoil(tmp_path))), capsys=capsys)
    assert code == 2
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_help_of_every_command(capsys):
    for command in ("run", "plan", "sample", "merge", "publish", "report", "retrain", "preference serve"):
        code, out, _ = run(*command.split(), "--help", capsys=capsys)
        assert code == 0 and "Usage" in out


def test_full_disk_and_interrupt(batch, capsys, monkeypatch):
    path = batch()
    for error, expected in ((OSError(errno.ENOSPC, "No space left on device", "/x"), 2), (KeyboardInterrupt(), 130)):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("pipeline.batch.run", fail)
        code, _, err = run("run", str(path), capsys=capsys)
        assert code == expected
        assert "No space left" in err or "interrupted" in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ray.exceptions.OutOfMemoryError("no memory left"), "error: no memory left"),
        (NoCredentialsError(), "error: Unable to locate credentials"),
        (RuntimeError("ours"), "Traceback"),
    ],
)
def test_whatever_fails_ends_alike(batch, capsys, monkeypatch, error, message):

    def fail(*_):
        raise error

    monkeypatch.setattr("pipeline.batch.run", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(batch())])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and str(error) in err
    assert ("Traceback" in err) == isinstance(error, RuntimeError)


def test_ray_that_does_not_start(monkeypatch):
    def fail(**_):
        raise RuntimeError("no room")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(OSError, match="Ray did not start: no room"), ray_session():
        pass
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(OSError, match="the cluster at head:6379 could not be joined: no room"), ray_session():
        pass


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("merge a.safetensors b.safetensors --captions words.txt --out b.safetensors", "--out b.safetensors: is read"),
        ("merge a.safetensors --captions words.txt --out base/../a.safetensors", "a.safetensors: is read"),
        ("merge a.safetensors --captions words.txt --out linked", "--out linked: is read"),
        ("merge a.safetensors --captions words.txt --out again", "--out again: is read"),
        ("merge a.safetensors --captions words.txt --out words.txt", "--out words.txt: is read"),
        ("merge a.safetensors --captions words.txt --sums b --out b", "--out b: is read or written"),
        ("merge --remove a.safetensors --captions words.txt --sums a.safetensors", "--sums a.safetensors: is read"),
        (
            "merge a.safetensors --captions words.txt --base base --out base/x",
            "/base, which is read",
        ),
        ("sample releases prompt --out releases/v0001/samples.png", "is in releases, which is read"),
        ("sample releases/ours prompt --out releases/v0001/samples.png", "releases/v0001, which is read"),
        ("sample a.safetensors prompt --base base --out base/x.png", "/base, which is read"),
        ("publish base base", "destination base: is read or written"),
        ("publish base base/releases", "destination base/releases: is in base"),
        ("preference serve base --answers base/images.csv", "--answers base/images.csv: is read"),
        ("run summary.json --output .", "summary.json summary.json: is read"),
        ("retrain report.html --output .", "report.html report.html: is read"),
    ],
)
def test_nothing_that_is_read_is_written_over(batch, tmp_path, capsys, command, message):
    content = yaml.safe_load(batch().read_text())
    (tmp_path / "summary.json").write_text(json.dumps(content))
    del content["concepts"]
    (tmp_path / "report.html").write_text(yaml.safe_dump(content | {"catalogue": "cat"}))
    (tmp_path / "base").mkdir()
    for name in ("a.safetensors", "b.safetensors", "words.txt", "base/merged.safetensors", "base/images.csv"):
        (tmp_path / name).write_text("a cat")
    (tmp_path / "linked").symlink_to("a.safetensors")
    (tmp_path / "again").hardlink_to(tmp_path / "a.safetensors")
    publish(tmp_path / "base", str(tmp_path / "releases"))
    promote(str(tmp_path / "releases/v0001"), "ours")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = run(*command.split(), capsys=capsys)
    assert code == 2 and message in err and "give another place" in err, err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "command",
    [
        "merge a --captions a --out {}",
        "merge a --captions a --sums {}",
        "sample a.safetensors prompt --out {}",
        "publish folder {}",
        "preference serve folder --answers {}",
    ],
)
@pytest.mark.parametrize("place", ["pipe.png", "linked.png"])
def test_a_pipe_is_not_written_over(tmp_path, capsys, monkeypatch, command, place):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    os.symlink("pipe.png", "linked.png")
    (tmp_path / "folder").mkdir()
    code, _, err = run(*command.format(place).split(), capsys=capsys)
    assert code == 2 and f"{place}: a pipe or a device; give the path of a" in err, err
    assert Path("pipe.png").is_fifo() and Path("linked.png").is_symlink()
    with pytest.raises(ValueError, match="a pipe or a device"):
        save_tensors(Path(place), {"x": torch.ones(1)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "linked.png", "pipe.png"]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("sample a prompt --guidance nan", "--guidance"),
        ("sample a prompt --guidance inf", "--guidance"),
        ("run a --deadline nan", "--deadline"),
        ("submit a --deadline nan", "--deadline"),
    ],
)
def test_numbers_that_are_none(capsys, command, option):
    code, _, err = run(*command.split(), capsys=capsys)
    assert code == 2 and option in err and "Invalid value" in err, err


@pytest.mark.parametrize("command", ["merge {} --captions {}", "merge {} --captions {} --out {}", "publish {} {}"])
def test_links_to_themselves(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop.png", "loop.png")
    code, _, err = run(*command.format(*["loop.png"] * 3).split(), capsys=capsys)
    assert code == 2 and "error: " in err and "loop.png: " in err and "Traceback" not in err, err


def test_a_server_that_is_not_there_is_named(capsys):
    code, _, err = run("release", "list", "http://me:secret@127.0.0.1:9/x", capsys=capsys)
    assert code == 2 and "127.0.0.1:9" in err and "secret" not in err, err


@pytest.mark.parametrize("place", ["nothing.yaml", "cat", "bytes"])
@pytest.mark.parametrize(
    "command",
    [
        "run {}",
        "plan {}",
        "plan batch.yaml --cluster {}",
        "report {}",
        "retrain {}",
        "study {}",
        "submit {} --address http://127.0.0.1:9",
        "sample {} prompt",
        "sample {}.safetensors prompt",
        "merge {} --captions words.txt",
        "merge bytes --captions {}",
        "merge --captions words.txt --sums none --remove {}",
        "publish {} hf://owner/name",
        "release list {}",
        "release show {}",
        "release diff {} {}",
        "release promote {}",
        "release rollback {}",
        "release verify {}",
        "release gc {}",
        "preference serve {}",
        "preference report {}",
    ],
)
def test_what_cannot_be_used(batch, tmp_path, capsys, command, place):
    """Missing, a folder of images, or bytes: a message that names it, and no traceback."""
    batch()
    (tmp_path / "words.txt").write_text("a cat")
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    code, out, err = run(*command.format(place, place).split(), capsys=capsys)
    if command in ("release gc {}", "release list {}") and code == 0:
        assert out == "0 removed\n"
        return
    assert code in (1, 2) and (place in err or "bytes" in err), (out, err)


def test_names_of_others_are_shown_and_not_obeyed(capsys):
    terminal.print("\x1b[2Jred \x9b1m\r\x07 \u202eexe.jpg \udcff", "grün\tкот\n")
    assert capsys.readouterr().out == "\\x1b[2Jred \\x9b1m\\r\\x07 \\u202eexe.jpg \\udcff grün\tкот\n\n"
    code, _, err = run("plan", "\x1b[2J.yaml", capsys=capsys)
    assert code == 2 and "\\x1b[2J.yaml: no such file" in err and "\x1b" not in err


WAITING = """
import os, ray, psutil, sys
import pipeline.batch
from ray_jobs.cli import main
from ray_jobs.session import ray_session

def run(*_):
    with ray_session():
        started = [process for process in psutil.Process().children(recursive=True)]
        own = [connection for process in started for connection in process.net_connections("inet")]
        print("listening", *{c.laddr.ip for c in own if c.status == psutil.CONN_LISTEN}, flush=True)
        ray.get(ray.remote(lambda: __import__("time").sleep(600)).remote())

pipeline.batch.run = run
main(["run", sys.argv[1]])
"""


@pytest.mark.slow
def test_told_to_end_while_ray_runs(batch):
    """As after Ctrl-C. A Ray of our own is not for other machines."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, str(batch())],
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stderr
        _, *addresses = process.stdout.readline().split()
        process.terminate()
        told = process.stderr.read()
        assert process.wait() == 143
    assert addresses and all(a.removeprefix("::ffff:").startswith("127.") for a in addresses)
    assert told.splitlines()[-2:] == [
        "note: RAY_AUTH_MODE=disabled lets other users of this machine run code in this Ray; unset it",
        "interrupted; what was finished is kept, run the same command to go on",
    ]


def test_told_to_end_within_ray(batch, capsys, monkeypatch):
    """Its core makes of the exit that a signal is answered by one of its own."""

    def wait(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            raise SystemExit(1) from None

    monkeypatch.setattr("pipeline.batch.run", wait)
    code, _, err = run("run", str(batch()), capsys=capsys)
    assert code == 143 and err.endswith("interrupted; what was finished is kept, run the same command to go on\n")


STARTING = """
import os, signal, sys
from ray._private.node import Node
from ray_jobs.cli import main

start = Node.start_ray_processes

def stopped(self):
    os.kill(os.getpid(), signal.SIGTERM)
    start(self)

Node.start_ray_processes = stopped
main(["run", sys.argv[1]])
"""


@pytest.mark.slow
def test_told_to_end_while_ray_starts(batch):
    """Ray's own handlers of signals know nothing of our exit codes."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", STARTING, str(batch())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("interrupted; what was finished is kept")


IMPORTING = """
import os, runpy, signal, sys
from importlib.abc import MetaPathFinder

stop = getattr(signal, sys.argv.pop())

class Stopping(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "ray":
            os.kill(os.getpid(), stop)

sys.meta_path.insert(0, Stopping())
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "stop", "code"), [("concept_batch", "SIGINT", 130), ("retrain", "SIGTERM", 128 + signal.SIGTERM)]
)
def test_told_to_end_while_it_imports(module, stop, code):
    command = [sys.executable, "-c", IMPORTING, f"ray_jobs.{module}", "batch.yaml", stop]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert done.stderr.splitlines()[-1].startswith("interrupted; what was finished is kept")


def test_a_storage_without_a_key(tmp_path, capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(fsspec.config, "conf", {"s3": {"skip_instance_cache": True}})
    code, _, err = run("release", "list", "s3://ours/releases", capsys=capsys)
    assert code == 2 and "Unable to locate credentials" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("plan", "batch.yaml", "--output", "s3://b/x"), "--output: report and summary go to a local folder"),
        (("run", "batch.yaml", "--output", ""), "--output: report and summary go to a local folder"),
        (("report", "batch.yaml", "--output=s3:"), "--output: 's3:' is no URL; write s3://"),
        (("publish", "cat", "s3://"), "'s3://' names no bucket or host; is a variable empty?"),
        (("publish", "cat", ""), "no folder or URL is named; is a variable empty?"),
        (("release", "list", "s3:///releases"), "'s3:///releases' names no bucket or host"),
        (("release", "verify", "s4://me:pw@b"), "'s4://***@b' is on no storage that is known: 's4'"),
    ],
)
def test_options_are_checked_like_the_file(batch, tmp_path, capsys, options, message):
    batch()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*options, capsys=capsys)
    assert code == 2 and message in err and "pw" not in out + err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_signing_key_is_looked_at_first(batch, tmp_path, capsys):
    code, _, err = run("run", str(batch(publish={"signing_key": "none.pem"})), capsys=capsys)
    assert code == 2 and "none.pem: no private key that can be read" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_main_job_and_its_commands(batch, tmp_path, capsys):
    """Real Ray, real img2dataset over loopback HTTP, the real miniature; then everything made of it."""
    path = batch()
    code, out, err = run("run", str(path), capsys=capsys)
    assert code == 0, err
    assert "made release" in out
    figures = json.loads((tmp_path / "runs/small/summary.json").read_text())
    assert set(figures["concepts"]) == {"outlined-cat", "flat-turtle"}
    for concept in figures["concepts"].values():
        assert concept["regularization"]["got"] == 6
        assert {"base", "single", "merged"} <= set(concept)
    assert figures["merge"]["form"] == "soft" and figures["drift"]["before"] <= 0.1 + 1e-9
    assert set(figures["unseen"]) == set(figures["concepts"]) and set(figures["moved"]) == {"words", "padding", "empty"}
    assert (tmp_path / "runs/small/report.html").stat().st_size > 10_000
    releases = str(tmp_path / "runs/small/releases")
    store = tmp_path / "runs/small/store"
    stamps = {p: p.stat().st_mtime_ns for p in store.rglob("manifest.json")}
    assert len(stamps) == 20 and not any((store / ".building").iterdir())

    # again: nothing is repeated, no second release
    code, _, err = run("run", str(path), capsys=capsys)
    assert code == 0, err
    assert {p: p.stat().st_mtime_ns for p in store.rglob("manifest.json")} == stamps
    assert [p.name for p in Path(releases).glob("v*")] == ["v0001"]

    # one concept more trains one concept and merges again
    assert run("plan", str(path), capsys=capsys)[1].endswith("about 0 s of computing on one device of this machine\n")
    more = yaml.safe_load(path.read_text())
    more["concepts"].append({"name": "cat-again", "images": "cat", "class_word": "cat"})
    _, out, _ = run("plan", str(batch(concepts=more["concepts"])), "--stages", capsys=capsys)
    todo = [line.split()[:2] for line in out.splitlines() if " to do " in line]
    # the same pictures of a cat: their regularisation set and features are there already; the other concepts are
    # drawn again by the merged model only
    assert [kind for kind, _ in todo] == ["train", "constraints", "sums", "merge", *["evaluate"] * 5, "release"]

    code, out, _ = run("release", "verify", releases, capsys=capsys)
    assert code == 0 and "all sums agree" in out
    weights = sorted(str(p) for p in store.rglob("weights.safetensors"))
    (tmp_path / "captions.txt").write_text("\n".join(f"photo of a {c}" for c in ("cat", "turtle", "dog", "house")))
    code, out, err = run("merge", *weights, "--captions", "captions.txt", "--out", "m.safetensors", capsys=capsys)
    assert code == 0, err
    assert re.search(r"2 concepts, \d+ constraint rows, soft form, ", out)
    for place in (releases, "m.safetensors", weights[0]):
        prompt = "photo of a cat"
        code, out, err = run("sample", place, prompt, "--count", "1", "--steps", "2", "--out", "s.png", capsys=capsys)
        assert code == 0, err
        assert Image.open("s.png").size[0] > 0
    code, out, _ = run("report", str(batch()), capsys=capsys)
    assert code == 0 and "made runs/small/report.html" in out

    spoiled = Path(releases) / "v0001" / "merged.safetensors"
    spoiled.write_bytes(spoiled.read_bytes() + b"x")
    code, _, err = run("release", "verify", releases, capsys=capsys)
    assert code == 1 and "merged.safetensors" in err


@pytest.mark.slow
def test_killed_and_started_again(batch, tmp_path):
    """Killed in the middle of training, with a damaged checkpoint: what was finished is not repeated, and weights and
    images are, bit for bit, the undisturbed ones. The release goes to the hub, when it can be had."""
    training = {"steps": 12, "batch_size": 2, "views": 4, "learning_rate": 1e-3, "regularization": "none"}
    path = batch(
        training=training | {"checkpoint_every": 2},
        evaluation={"samples": 1, "steps": 1, "identity": ""},
        publish={"hub": "ours/concepts"},
    )
    command = [sys.executable, "-m", "ray_jobs.concept_batch", str(path)]
    first = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
    store = tmp_path / "runs/small/store"
    deadline = time.monotonic() + 300
    while not list(store.glob(".scratch/*/checkpoint.safetensors")) and first.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    # all of it, as when the machine is lost: left alone, its workers go on for a moment, and write over the damage
    for process in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    first.wait()
    stamps = {p: p.stat().st_mtime_ns for p in store.rglob("manifest.json")}
    assert 0 < len(stamps) < 16
    damaged = next(store.glob(".scratch/*/checkpoint.safetensors"))
    damaged.write_bytes(b"")
    hub = Hub()
    resumed = subprocess.run(command, env=hub.environment, capture_output=True, text=True)
    hub.shutdown()
    hub.server_close()  # or it would be waited for
    assert resumed.returncode == 0, resumed.stderr
    assert f"{damaged} cannot be used, going on without it" in resumed.stderr
    assert hub.repositories["ours/concepts"].commits == ["Release v0001"]
    assert "it is at hf://ours/concepts@v0001" in resumed.stdout
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())

    whole = subprocess.run(
        [*command, "--output", str(tmp_path / "whole")], env=hub.environment, capture_output=True, text=True
    )
    assert whole.returncode == 2, whole.stderr
    assert "whole/releases/v0001 is released, but not on the hub; run again to copy it" in whole.stderr
    for results in ("train/*/weights.safetensors", "evaluate/*/images/*.png"):
        a, b = ({p.relative_to(s): p.read_bytes() for p in s.glob(results)} for s in (store, tmp_path / "whole/store"))
        assert len(a) >= 2 and a == b


@pytest.mark.slow
def test_one_failing_concept_does_not_sink_the_others(batch, tmp_path, capsys):
    """One without usable images, one that diverges: the rest is trained; it is released only where that is allowed."""
    (tmp_path / "empty").mkdir()
    concepts = [
        CAT,
        {"name": "wild", "images": "turtle", "class_word": "turtle", "training": {"learning_rate": 1e30}},
    ]
    small = {"evaluation": {"samples": 1, "steps": 1, "identity": ""}}
    code, _, err = run("run", str(batch(concepts=concepts, **small)), capsys=capsys)
    assert code == 2 and "train wild: wild: the " in err and "lower training.learning_rate" in err
    store = tmp_path / "runs/small/store"
    trained = {p: p.stat().st_mtime_ns for p in store.glob("train/*/weights.safetensors")}
    assert len(trained) == 1 and not (store / "merge").exists()

    code, _, err = run("run", str(batch(training={"attention": "xformers"}, **small)), capsys=capsys)
    assert code == 2 and "xformers needs CUDA" in err

    concepts.append({"name": "nothing", "images": "empty", "class_word": "cat"})
    path = batch(concepts=concepts, **small)
    code, _, err = run("run", str(path), capsys=capsys)
    assert code == 2 and "concepts[2] (nothing)" in err

    code, out, err = run("run", str(batch(concepts=concepts, merge={"partial": True}, **small)), capsys=capsys)
    assert code == 5 and "made release" in out
    row = next(line for line in out.splitlines() if line.startswith("outlined-cat"))
    assert row.split()[4] == "–"  # of one image there is no interval
    assert "left out: concepts[2] (nothing)" in err and "left out: train wild" in err
    assert {p: p.stat().st_mtime_ns for p in trained} == trained
    assert list(json.loads((tmp_path / "runs/small/summary.json").read_text())["concepts"]) == ["outlined-cat"]
