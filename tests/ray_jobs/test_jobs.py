"""A batch as a job of a real cluster, token authentication left on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.miniature.world import concept_images
from pipeline.store import MANIFEST
from ray_jobs import cli


@pytest.fixture
def polyconcept(cluster):
    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ray_jobs.cli", *arguments, "--address", cluster.dashboard]
        done = subprocess.run(command, env=cluster.environment | changes, capture_output=True, text=True, timeout=400)
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def batch(tmp_path) -> Path:
    (tmp_path / "b" / "cat").mkdir(parents=True)
    for i, image in enumerate(concept_images("cat", "streamline-emojis", 2, seed=1)):
        image.save(tmp_path / "b" / "cat" / f"{i}.png")
    (tmp_path / "b" / "prompts.txt").write_text("a {} on the beach")
    content = {
        "name": "job",
        "output": str(tmp_path / "out"),
        "concepts": [{"name": "cat", "images": "cat", "class_word": "cat"}],
        "training": {"steps": 150, "batch_size": 2, "views": 4, "regularization": "none", "checkpoint_every": 50},
        "evaluation": {"samples": 2, "steps": 2, "guidance": 3.0, "prompts": "prompts.txt"},
    }
    (tmp_path / "b" / "batch.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "b" / "batch.yaml"


@pytest.mark.slow
def test_submit_status_stop(polyconcept, batch, tmp_path):
    assert "no jobs" in polyconcept("status").stdout
    refused = polyconcept("status", RAY_AUTH_TOKEN="another")
    assert refused.returncode == 2 and "RAY_AUTH_TOKEN" in refused.stderr
    unknown = polyconcept("stop", "job-x")
    assert unknown.returncode == 2 and "no job 'job-x'" in unknown.stderr

    # beside what the batch names: more than Ray takes
    (batch.parent / "runs").mkdir()
    with (batch.parent / "runs" / "store").open("wb") as store:
        store.truncate(200 << 20)

    # stopped on the way: only whole artifacts stay
    job = polyconcept("submit", str(batch), "--no-wait").stdout.split()[-1]
    until = time.monotonic() + 200
    while "RUNNING" not in (told := polyconcept("status", job).stdout):
        assert time.monotonic() < until, told
    while not list((tmp_path / "out").glob("store/features/*")) and time.monotonic() < until:
        time.sleep(0.2)
    assert f"asked {job} to stop" in polyconcept("stop", job).stdout
    while "STOPPED" not in polyconcept("status", job).stdout and time.monotonic() < until:
        time.sleep(0.5)
    artifacts = [p for p in (tmp_path / "out" / "store").glob("[!.]*/*")]
    assert artifacts and all((p / MANIFEST).exists() for p in artifacts)
    assert not [p for p in artifacts if p.parent.name == "train"], "the training ended before it was stopped"
    features = next((tmp_path / "out" / "store" / "features").iterdir()).stat().st_mtime_ns

    # submitted again, as Ray's own command does it: it goes on from there
    done = polyconcept("submit", str(batch))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train cat: ended" in done.stdout and "made release" in done.stdout
    assert next((tmp_path / "out" / "store" / "features").iterdir()).stat().st_mtime_ns == features
    assert (tmp_path / "out" / "report.html").exists()
    assert polyconcept("status").stdout.count("job-") == 2
    assert f"{job} has ended already: STOPPED" in polyconcept("stop", job).stdout

    # what only the nodes can tell
    batch.write_text(batch.read_text().replace("images: cat", "images: /nowhere/cat"))
    assert polyconcept("submit", str(batch)).returncode == 2
    told = polyconcept("status").stdout
    assert "failed with exit code 2" in told and "no images at '/nowhere/cat'" in told.splitlines()[-1]


def test_what_is_not_sent(batch, capsys):
    """Refused before any cluster is asked. What an absolute path names is on the nodes, as far as is known here."""
    text, folder = batch.read_text(), batch.parent
    with (folder / "film.png").open("wb") as film:
        film.truncate(101 << 20)
    for name, images in (("out", "../cat"), ("in", str(folder / "cat"))):
        entry = {"instance_prompt": "photo of a <new1> cat", "class_prompt": "cat", "instance_data_dir": images}
        (folder / f"{name}.json").write_text(json.dumps([entry]))
    (folder.parent / "ours.txt").write_text("photo of a {}")
    listed = text[: text.index("concepts:")] + text[text.index("evaluation:") :]
    sent = "no Ray cluster at http://127.0.0.1:9"
    for changed, message in (
        (text.replace("images: cat", "images: ../b2/cat"), "only what is in the batch's own folder is sent along"),
        (text.replace("images: cat", "images: dog"), f"no images at '{folder}/dog'"),
        (text.replace("images: cat", f"images: {folder}/cat"), "name it relative to the batch file, 'cat'"),
        (text.replace("images: cat", "images: [cat, film.png]"), "101 MiB would be sent along, 101 of them"),
        (text.replace(f"output: {folder.parent}", "output: runs"), "is relative; on a cluster"),
        (
            text.replace("  guidance", "  clip: ../clip\n  guidance") + "base: ../sd\n",
            f"{folder.parent}/sd is not in {folder}:",
        ),
        (text + "retrieval: {block_list: ../bad.txt}\n", f"{folder.parent}/bad.txt is not in"),
        (text + "retrieval: {corpus: ../*.parquet}\n", f"{folder.parent}/*.parquet is not in"),
        (text + "publish: {signing_key: key.pem}\n", "'key.pem' is relative, and a private key is not sent along"),
        (text + "store: st\n", "store: 'st' is relative; on a cluster"),
        (text + "publish: {to: ../releases}\n", "publish.to: '../releases' is relative; on a cluster"),
        (text.replace("prompts.txt", "../ours.txt"), f"{folder.parent}/ours.txt is not in"),
        (listed + "concepts: out.json\n", f"{folder.parent}/cat is not in"),
        (listed + "concepts: in.json\n", "name it relative to the batch file, 'cat'"),
        (text + "retrieval: {block_list: bad.txt, corpus: /lists/*.parquet}\n", sent),
        (text.replace("images: cat", "images: /shared/photos/cat"), sent),
    ):
        batch.write_text(changed)
        with pytest.raises(SystemExit) as stop:
            cli.main(["submit", str(batch), "--address", "http://127.0.0.1:9"])
        assert stop.value.code == 2 and message in capsys.readouterr().err, changed
