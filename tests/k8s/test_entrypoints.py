"""What the manifests start, started for real on a Ray cluster of this machine; and what Prometheus would read there."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import ROOT, objects, walk
from prometheus_client.parser import text_string_to_metric_families

from pipeline.miniature.world import concept_images


def test_probes(cluster):
    """The path that the manifests ask answers on a head that KubeRay would start so."""
    (path,) = {n["httpGet"]["path"] for o in objects("dev") for n in walk(o) if "httpGet" in n}
    with urllib.request.urlopen(cluster.agent + path, timeout=10) as answer:
        assert answer.status == 200


def small(batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch on the miniature, with as little of everything as there can be."""
    training = {"steps": 4, "batch_size": 2, "views": 4, "regularization": "none", "learning_rate": 1e-4}
    batch = {key: value for key, value in batch.items() if key != "retrieval"}
    return batch | {"base": "miniature", "training": training, "evaluation": {"samples": 2, "steps": 2}}


def start(overlay: str, folder: Path, cluster: Any, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run an overlay's entrypoint on the file of its ConfigMap, cut `small`; /store and /jobs are in `folder`."""
    catalogue = folder / "store" / "catalogue" / "our-cat"
    catalogue.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(concept_images("cat", "streamline-emojis", 2, seed=1)):
        image.save(catalogue / f"{i}.png")
    (catalogue / "concept.yaml").write_text("class_word: cat\n")
    (entrypoint,) = {node["entrypoint"] for o in objects(overlay) for node in walk(o) if "entrypoint" in node}
    python, option, module, file, *options = shlex.split(entrypoint)
    files = {k: v for o in objects(overlay) if o["kind"] == "ConfigMap" for k, v in o["data"].items()}
    text = files[Path(file).name].replace("/store", f"{folder}/store").replace("/opt/polyconcept", str(ROOT))
    (folder / Path(file).name).write_text(yaml.safe_dump(small(yaml.safe_load(text)) | changes))
    command = [python, option, module, str(folder / Path(file).name), *options]
    environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=400)


def released(overlay: str, folder: Path, cluster: Any) -> Path:
    """Folder of the releases, of which an overlay's entrypoint made the first."""
    done = start(overlay, folder, cluster)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    (weights,) = (folder / "store").rglob("v0001/merged.safetensors")
    return weights.parents[1]


@pytest.mark.slow
def test_batch(cluster, tmp_path):
    released("batch", tmp_path, cluster)


@pytest.mark.slow
def test_nights_are_counted(cluster, tmp_path):
    """What the gate said can still be read when its process has ended; a night may have nothing to compute. A first
    release is compared with nothing."""
    shutil.rmtree(released("cron", tmp_path, cluster))  # lost: the next night publishes from the artifacts
    released("cron", tmp_path, cluster)
    seen = [s for s in _samples(cluster.metrics) if s.name == "ray_polyconcept_gate_total" and _of(s, "nightly")]
    assert sum(s.value for s in seen) >= 1 and {s.labels["result"] for s in seen} == {"not compared"}


@pytest.mark.slow
def test_dev_batch_is_counted(cluster, tmp_path):
    """Two concepts of the dev overlay's batch, of which one diverges: the other is released, and Prometheus is told."""
    concepts = yaml.safe_load((ROOT / "k8s/overlays/dev/batch.yaml").read_text().replace("/opt/polyconcept", str(ROOT)))
    concepts = concepts["concepts"][:2]
    concepts[0]["training"] = {"learning_rate": 1e30}
    done = start("dev", tmp_path, cluster, concepts=concepts, merge={"partial": True})
    assert done.returncode == 5 and "left out: train outlined-bus" in done.stderr, done.stdout + done.stderr
    assert len(list((tmp_path / "store").rglob("v0001/merged.safetensors"))) == 1

    names = {"concepts_trained_total", "concepts_failed_total", "step_seconds_count", "step_seconds_sum"}
    until, seen = time.monotonic() + 60, dict[str, float]()
    while not set(seen) >= names and time.monotonic() < until:
        time.sleep(1)
        seen = {
            s.name.removeprefix("ray_polyconcept_"): s.value for s in _samples(cluster.metrics) if _of(s, "miniature")
        }
    assert seen["concepts_trained_total"] == 1 and seen["concepts_failed_total"] == 1
    assert seen["step_seconds_count"] == 1 and 0.01 < seen["step_seconds_sum"] < 100
    states = {s.labels["State"] for s in _samples(cluster.metrics) if s.name == "ray_tasks"}
    assert states & {"RUNNING", "FINISHED", "PENDING_NODE_ASSIGNMENT"}, states


def _samples(endpoint: str) -> list[Any]:
    with urllib.request.urlopen(endpoint, timeout=10) as answer:
        return [s for family in text_string_to_metric_families(answer.read().decode()) for s in family.samples]


def _of(sample: Any, batch: str) -> bool:
    return sample.name.startswith("ray_polyconcept_") and sample.labels.get("batch") == batch
