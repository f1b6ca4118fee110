"""Retraining, night after night: the real miniature, a folder of releases."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import command
import pytest
import yaml
from hub import Hub

from pipeline.limits import Limits
from pipeline.miniature.world import concept_images
from pipeline.release import publish
from pipeline.release.publish import verify
from pipeline.retraining import _has_results
from pipeline.runner import Local
from ray_jobs.runner import OnRay


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """What is not a process of its own runs its stages without Ray."""
    monkeypatch.setattr("ray_jobs.runner.OnRay", Local)


CONCEPTS = {"outlined-cat": ("cat", "streamline-emojis"), "flat-turtle": ("turtle", "fxemoji")}


def draw_images(folder: Path, concept: str, seed: int) -> None:
    for i, image in enumerate(concept_images(*CONCEPTS[concept], 2, seed=seed)):
        image.save(folder / concept / f"{i}.png")


@pytest.fixture
def catalogue(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "catalogue"
    for name, (class_word, _) in CONCEPTS.items():
        (folder / name).mkdir(parents=True)
        draw_images(folder, name, seed=1)
        (folder / name / "concept.yaml").write_text(f"class_word: {class_word}\n")
    settings = {
        "name": "nightly",
        "catalogue": "catalogue",
        "lease": 10,
        "training": {"steps": 3, "batch_size": 2, "views": 4, "learning_rate": 1e-4, "regularization": "none"},
        "evaluation": {"samples": 4, "steps": 4, "guidance": 3.0},
        "publish": {"license": "apache-2.0", "made_by": "tests"},
    }
    (tmp_path / "retrain.yaml").write_text(yaml.safe_dump(settings))
    return folder


def run(*arguments: str, capsys) -> tuple[int, str, list[dict], str]:
    """Exit code, stdout, the log's records, the other lines of stderr."""
    code, out, err = command.run(*arguments, capsys=capsys)
    lines = err.splitlines()
    log = [json.loads(line) for line in lines if line.startswith("{")]
    return code, out, log, "\n".join(line for line in lines if not line.startswith("{"))


def events(log: list[dict], name: str) -> list[dict]:
    return [record for record in log if record["event"] == name]


@pytest.mark.slow
def test_five_nights(catalogue, tmp_path, capsys, monkeypatch):
    releases = tmp_path / "runs/nightly/releases"
    store = tmp_path / "runs/nightly/store"

    def trained() -> set[str]:
        return {p.parent.name for p in store.glob("train/*/manifest.json")}

    def latest() -> str:
        return json.loads((releases / "latest.json").read_text())["version"]

    # 1: the first release
    code, out, log, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 0, err
    assert out.endswith("releases/v0001\n")
    assert events(log, "compared")[0]["added"] == ["flat-turtle", "outlined-cat"]
    assert not events(log, "gate") and events(log, "not compared")[0]["latest"] is None
    first = trained()
    assert len(first) == 2
    manifest = json.loads((releases / "v0001/manifest.json").read_text())
    facts = manifest["provenance"]
    assert facts["concepts"]["outlined-cat"]["token"] == "<outlined-cat>"
    assert {entry["training"] for entry in facts["concepts"].values()} == first
    assert facts["made_by"] == "tests" and len(facts["base"]["digest"]) == 16 and facts["packages"]["torch"]
    assert set(facts["measures"]["concepts"]) == set(CONCEPTS) and 0 < facts["measures"]["overall"]["text"] < 1
    card = (releases / "v0001/README.md").read_text()
    assert "license: apache-2.0" in card and "samples.png" in card and "load_lora_weights" in card

    # 2: nothing changed: no processes, no release
    with monkeypatch.context() as patch:
        patch.setattr(Local, "session", lambda _: pytest.fail("processes were started"))
        start = time.monotonic()
        code, out, log, err = run("retrain", "retrain.yaml", capsys=capsys)
        assert code == 0 and events(log, "nothing changed"), err
        assert time.monotonic() - start < 10
    assert sorted(p.name for p in releases.glob("v*")) == ["v0001"]

    # 3: one concept's images changed: it alone is trained; concepts are compared on the same prompts and seeds
    draw_images(catalogue, "flat-turtle", seed=2)
    code, out, log, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 0, err
    assert out.endswith("releases/v0002\n") and latest() == "v0002"
    compared = events(log, "compared")[0]
    assert (compared["changed"], compared["unchanged"], compared["removed"]) == (["flat-turtle"], 1, [])
    third = trained()
    assert len(third - first) == 1
    assert {(r["measure"], r["concept"]) for r in events(log, "gate")} == {
        ("image", "flat-turtle"),
        ("image", "outlined-cat"),
        ("text", ""),
        ("retention", ""),
    }
    code, out, _, _ = run("release", "diff", f"{releases}/v0001", str(releases), capsys=capsys)
    assert "changed   flat-turtle" in out and "unchanged outlined-cat" in out

    # 4: a concept spoiled on purpose, under a new name and alone, so that nothing but its class can be compared: the
    # gate refuses, `latest` stays, the candidate is kept with its report
    (catalogue / "flat-turtle").rename(catalogue / "renamed")
    (catalogue / "outlined-cat").rename(tmp_path / "outlined-cat")
    (catalogue / "renamed/concept.yaml").write_text("class_word: turtle\ntraining: {learning_rate: 0.1, steps: 12}\n")
    code, out, log, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 3, (out, err, log)
    assert [(r["measure"], r["concept"]) for r in events(log, "gate")] == [("retention", ""), ("retention", "renamed")]
    assert "refused: " in err and events(log, "refused")[0]["level"] == "error"
    assert latest() == "v0002" and sorted(p.name for p in releases.glob("v*")) == ["v0001", "v0002"]
    (candidate,) = (releases / "candidates").iterdir()
    assert verify(str(candidate)) == [] and (candidate / "report.html").stat().st_size > 10_000
    gate = json.loads((candidate / "manifest.json").read_text())["provenance"]["gate"]
    assert [v["passed"] for v in gate].count(False) >= 1
    # again: refused from what is in the store, nothing is computed
    with monkeypatch.context() as patch:
        patch.setattr(Local, "session", lambda _: pytest.fail("processes were started"))
        assert run("retrain", "retrain.yaml", capsys=capsys)[0] == 3
    assert list((releases / "candidates").iterdir()) == [candidate]
    # a release that the hub has missed goes there all the same
    settings = yaml.safe_load((tmp_path / "retrain.yaml").read_text())
    settings["publish"]["hub"] = "ours/concepts"
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(settings))
    hub = Hub()
    command = [sys.executable, "-m", "ray_jobs.retrain", "hub.yaml"]
    done = subprocess.run(command, env=hub.environment, capture_output=True, text=True, timeout=120)
    hub.shutdown()
    assert done.returncode == 3 and hub.repositories["ours/concepts"].commits == ["Release v0002"], done.stderr

    # 5: the concept is mended, but people want the first release back: it stays until something changes
    (catalogue / "renamed").rename(catalogue / "flat-turtle")
    (tmp_path / "outlined-cat").rename(catalogue / "outlined-cat")
    (catalogue / "flat-turtle/concept.yaml").write_text("class_word: turtle\n")
    code, out, _, err = run("release", "rollback", str(releases), capsys=capsys)
    assert (code, out) == (0, "latest is v0001, was v0002\n"), err
    code, out, log, _ = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 0 and events(log, "rolled back from")[0]["version"] == "v0002"
    assert not events(log, "nothing changed")
    assert latest() == "v0001"
    assert run("release", "promote", f"{releases}/v0002", capsys=capsys)[1] == "latest is v0002\n"
    # after all: what the gate refused is what people want
    assert run("release", "promote", str(candidate), capsys=capsys)[1] == "latest is v0003\n"
    assert verify(str(releases)) == []
    code, out, _, _ = run("release", "list", str(releases), capsys=capsys)
    assert [line.split()[0] for line in out.splitlines()] == ["v0001", "v0002", "v0003"] and out.endswith("latest\n")


@pytest.mark.slow
def test_concepts_that_break_and_go(catalogue, tmp_path, capsys, monkeypatch):
    """Where concepts may be left out: a new one that fails is, a released one is missed by the gate, and one that is
    removed is dropped. `latest.json` gets lost, and is moved by another run."""
    releases = tmp_path / "runs/nightly/releases"
    path = tmp_path / "retrain.yaml"
    settings = yaml.safe_load(path.read_text()) | {"merge": {"partial": True}, "lease": 600}
    path.write_text(yaml.safe_dump(settings | {"evaluation": {"samples": 2, "steps": 2, "guidance": 3.0}}))

    def latest() -> dict:
        return json.loads((releases / "latest.json").read_text())

    # new concepts: one with the token of another, one with a word of the base's, one without a usable image
    for name, token in (("twin", "<outlined-cat>"), ("word", "cat")):
        shutil.copytree(catalogue / "outlined-cat", catalogue / name)
        (catalogue / name / "concept.yaml").write_text(f"class_word: cat\ntoken: {token}\n")
    (catalogue / "new").mkdir()
    (catalogue / "new/concept.yaml").write_text("class_word: cat\n")
    (catalogue / "new/1.png").write_text("no image")
    code, out, log, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 5 and out.endswith("releases/v0001\n"), err
    assert "left out: concepts[1] (new): " in err and events(log, "end")[0]["exit"] == 5
    assert "left out: " + str(catalogue / "twin/concept.yaml") + ": the token '<outlined-cat>' is that of" in err
    assert "left out: concepts[3] (word): token 'cat': the base model's tokenizer knows it already" in err
    assert events(log, "compared")[0]["left_out"] == ["new", "twin", "word"]
    for broken in ("twin", "word"):
        shutil.rmtree(catalogue / broken)

    # a released one breaks: broken is not removed, and without `latest.json` the gate is no more open than with it
    for image in (catalogue / "flat-turtle").glob("*.png"):
        image.write_text("no image")
    (releases / "latest.json").unlink()
    code, out, log, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 3, (out, err)
    assert "refused: flat-turtle: in the current release and the catalogue, but it could not be made again" in err
    compared = events(log, "compared")[0]
    assert (compared["removed"], compared["left_out"]) == ([], ["flat-turtle", "new"])
    assert events(log, "latest.json is missing")[0]["taken"] == "v0001"
    assert [r["measure"] for r in events(log, "gate") if not r["passed"]] == ["presence"]

    # nothing changed: `latest` names it again
    shutil.rmtree(catalogue / "new")
    draw_images(catalogue, "flat-turtle", seed=1)
    code, out, log, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 0 and events(log, "nothing changed") and latest() == {"version": "v0001"}, err

    # it is removed; all that this takes is there from the night it was broken
    shutil.rmtree(catalogue / "flat-turtle")
    monkeypatch.setattr(Local, "session", lambda _: pytest.fail("processes were started"))
    with monkeypatch.context() as patch:
        write = publish._write_local

        def moved_meanwhile(*args):
            (releases / "latest.json").write_text('{"version": "v0001", "by": "another run"}')
            return write(*args)

        patch.setattr(publish, "_write_local", moved_meanwhile)
        code, _, log, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 4 and "`latest` was moved during this run; nothing released" in err
    assert latest()["version"] == "v0001" and verify(f"{releases}/v0002") == []
    code, out, log, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 0 and out.endswith("releases/v0002\n") and latest() == {"version": "v0002"}, err
    assert events(log, "compared")[0]["removed"] == ["flat-turtle"] and not events(log, "released")[0]["new"]
    assert set(json.loads((releases / "v0002/manifest.json").read_text())["provenance"]["concepts"]) == {"outlined-cat"}

    # what was rolled back from is not released again, until something newer is
    assert run("release", "rollback", str(releases), capsys=capsys)[1] == "latest is v0001, was v0002\n"
    code, out, log, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 0 and out.endswith("releases/v0001\n") and events(log, "rolled back from"), err
    shutil.copytree(releases / "v0001", tmp_path / "newer")  # as a night would, whose training this saves
    (tmp_path / "newer/README.md").write_text("newer")
    run("publish", str(tmp_path / "newer"), str(releases), capsys=capsys)
    assert latest()["version"] == "v0003"
    code, out, log, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 0 and out.endswith("releases/v0004\n") and events(log, "released")[0]["new"], err


KILLED = """
import os, signal, sys
from pipeline.release import publish
from ray_jobs.cli import main

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

where = sys.argv[1]
if where == "files":
    copied = publish._changed  # the files are there, the manifest is not
    publish._changed = killed
else:
    publish.move_alias = killed  # the version is there, `latest` has not moved
main(["retrain", "retrain.yaml", *sys.argv[2:]])
"""


@pytest.mark.slow
def test_killed_while_publishing(catalogue, tmp_path, capsys):
    """SIGKILL at both ends of a publication: the store is whole, and the next run, once the dead one's lease has run
    out, publishes what was made, as version 1."""
    releases = tmp_path / "runs/nightly/releases"
    (catalogue / "outlined-cat/concept.yaml").unlink()  # no concept yet

    def killed_at(where: str, *options: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, where, *options], capture_output=True, text=True, timeout=240
        )
        assert done.returncode == -signal.SIGKILL, done.stderr

    killed_at("files")
    assert not list(releases.glob("v*")) and not (releases / "latest.json").exists()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/nightly/store").rglob("manifest.json")}
    # the dead run's lease still stands
    code, _, _, err = run("retrain", "retrain.yaml", capsys=capsys)
    if code != 4:
        pytest.fail(err)
    assert "is at work here" in err
    killed_at("alias", "--wait", "1")
    assert verify(f"{releases}/v0001") == [] and not (releases / "latest.json").exists()
    code, out, _, err = run("retrain", "retrain.yaml", "--wait", "1", capsys=capsys)
    assert code == 0 and out.endswith("v0001\n"), err
    assert sorted(p.name for p in releases.glob("v*")) == ["v0001"]
    assert json.loads((releases / "latest.json").read_text()) == {"version": "v0001"}
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/nightly/store").rglob("manifest.json")} == made
    # nothing changed, but the run that published it had no time for the results
    results = tmp_path / "runs/nightly"
    assert json.loads((results / "summary.json").read_text())["release"] == "runs/nightly/releases/v0001"
    assert (results / "report.html").exists()


def test_results_are_of_the_release_that_they_name(tmp_path):
    def figures(text: str) -> None:
        (tmp_path / "summary.json").write_text(text)

    assert not _has_results(tmp_path, "releases/v0002")
    figures('{"release": "releases/v0002"}')
    assert not _has_results(tmp_path, "releases/v0002")
    (tmp_path / "report.html").write_text("made")
    assert _has_results(tmp_path, "releases/v0002")
    for other in ('{"release": "releases/v0001"}', '{"release": "rel', "", "[]", "{}"):
        figures(other)
        assert not _has_results(tmp_path, "releases/v0002"), other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"catalogue": "nowhere"}, "nowhere: no such folder"),
        ({"catalog": "x"}, "catalog: unknown key; did you mean 'catalogue'?"),
        ({"concepts": []}, "a retraining has its concepts in the folders of its `catalogue`"),
        ({"gate": {"text": -1}}, "gate.text: Input should be greater than or equal to 0"),
        ({"evaluation": {"samples": 1}}, "at least 2 images a prompt"),
        ({"publish": {"signing_key": "none.pem"}}, "none.pem: no private key that can be read"),
        ({"publish": {"to": "hf://ours/concepts"}}, "publish.to: the hub gets copies of releases, by `publish.hub:"),
    ],
)
def test_bad_input(catalogue, tmp_path, capsys, change, message):
    path = tmp_path / "retrain.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    code, _, log, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 2 and message in err
    assert [record["event"] for record in log] == ["failed", "end"]
    assert message in log[0]["error"] and log[1]["exit"] == 2


def test_a_bad_concept_is_named(catalogue, tmp_path, capsys):
    (catalogue / "flat-turtle/concept.yaml").write_text("class_wrod: turtle\n")
    code, _, _, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 2 and "flat-turtle/concept.yaml:1: class_wrod: unknown key; did you mean 'class_word'?" in err
    (catalogue / "flat-turtle/concept.yaml").write_text("class_word: turtle\nname: turtle\n")
    assert "name: given by the folder" in run("retrain", "retrain.yaml", capsys=capsys)[3]
    for name in CONCEPTS:
        (catalogue / name / "concept.yaml").unlink()
    assert "no concept in it" in run("retrain", "retrain.yaml", capsys=capsys)[3]


@pytest.mark.slow
def test_the_deadline(catalogue, tmp_path, capsys, monkeypatch):
    """On Ray: it passes when a concept's features are there and its training, which would take days, is at work: what
    was finished is kept, the lease is given back, and there is no release."""
    monkeypatch.setattr("ray_jobs.runner.OnRay", OnRay)
    runs = tmp_path / "runs/nightly"
    path = tmp_path / "retrain.yaml"
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(settings | {"training": settings["training"] | {"steps": 10**6}}))
    passed = property(lambda _: 0.0 if list(runs.glob("store/features/*/manifest.json")) else 60.0)
    monkeypatch.setattr(Limits, "left", passed)
    code, out, log, err = run("retrain", "retrain.yaml", "--deadline", "1140", capsys=capsys)
    assert (code, out) == (124, "") and "the deadline of 1140 minutes has passed" in err
    assert [record["event"] for record in log] == ["compared", "failed", "end"] and log[-1]["exit"] == 124
    assert not list(runs.glob("releases/v*")) and not list(runs.glob("store/train/*/manifest.json"))
    (lease,) = runs.glob("releases/.lease/*.json")
    assert json.loads(lease.read_text())["until"] <= time.time()


def test_two_runs_at_once(catalogue, tmp_path, capsys):
    """A living run renews its lease, so that the second leaves however long the first takes."""
    from pipeline.release.lease import lease

    with lease(str(tmp_path / "runs/nightly/releases"), seconds=5):
        code, _, log, err = run("retrain", "retrain.yaml", capsys=capsys)
    assert code == 4 and f"process {os.getpid()} is at work here" in err
    assert [record["event"] for record in log] == ["failed", "end"] and log[1]["exit"] == 4
