"""The prediction for a cluster follows what the numbers mean."""

from __future__ import annotations

import pytest

from pipeline.miniature.world import concept_images
from pipeline.plan import Plan, make_plan
from pipeline.scaling import Cluster, describe, load_cluster, predict
from pipeline.spec import ConceptBatch

SMALL = {"nodes": 2, "devices": 4, "memory_gib": 16, "tflops": 10}


@pytest.fixture
def plan(tmp_path) -> Plan:
    concept_images("cat", "streamline-emojis", 1, seed=0)[0].save(tmp_path / "0.png")
    concept = {"name": "cat", "images": str(tmp_path), "class_word": "cat"}
    return make_plan(ConceptBatch.model_validate({"name": "one", "concepts": [concept]}))


def _seconds(plan: Plan, concepts: int = 1000, **changes) -> dict[str, float]:
    cluster = Cluster.model_validate(SMALL | changes)
    return {p.kind: p.seconds for p in predict(plan, cluster, concepts=concepts, captions=10**6)[0]}


def test_training_takes_devices_and_concepts_in_proportion(plan):
    assert _seconds(plan, 800)["train"] == pytest.approx(2 * _seconds(plan, 400)["train"])
    assert _seconds(plan, 800, nodes=4)["train"] == pytest.approx(_seconds(plan, 400)["train"])
    assert _seconds(plan, 8)["train"] == pytest.approx(_seconds(plan, 1)["train"])  # a GPU each


def test_a_thin_network_is_named_as_the_limit(plan):
    cluster = Cluster.model_validate(SMALL | {"network_gbit": 1e-6})
    phases, packed = predict(plan, cluster, concepts=10, captions=10**6)
    assert {p.limit for p in phases if p.gib} == {"network"}
    text = "\n".join(describe(phases, packed))
    assert "network" in text and f"packs of up to {packed}" in text


def test_cluster_files_that_cannot_be_used(tmp_path):
    file = tmp_path / "cluster.yaml"
    for text, message in (
        ("nodes: 1\ndevices: 8\nmemory_gib: 80\ntflop: 3", "tflop: unknown key; did you mean 'tflops'?"),
        ("nodes: 0\ndevices: 8\nmemory_gib: 80\ntflops: 3", "nodes: .* found 0"),
        ("nodes: [", "not valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_cluster(file)
    with pytest.raises(ValueError, match="No such file"):
        load_cluster(tmp_path / "none.yaml")
