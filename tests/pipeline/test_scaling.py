"""The prediction for a cluster follows what the numbers mean."""

from __future__ import annotations

import pytest

from pipeline.estimate import pack_bytes
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


def test_one_process_has_one_nodes_network(plan):
    """More nodes do not help what writes the index, merges or releases; they help what each does by itself."""
    few, many = (_seconds(plan, network_gbit=1e-6, nodes=nodes) for nodes in (2, 20))
    for kind in ("merge", "release"):
        assert few[kind] == pytest.approx(many[kind])
    assert many["index"] > 0.8 * few["index"]
    for kind in ("regularization", "constraints"):
        assert few[kind] == pytest.approx(10 * many[kind])
    assert few["candidates"] == pytest.approx(many["candidates"])  # each node reads the index


def test_all_but_training_is_in_float32(plan):
    slow, fast = (_seconds(plan, tflops=1e-3, float32_tflops=tflops) for tflops in (1e-4, 2e-4))
    for kind in ("features", "evaluate"):
        assert slow[kind] == pytest.approx(2 * fast[kind])
        assert _seconds(plan, tflops=1e-3)[kind] == pytest.approx(0.8 * slow[kind])  # an eighth, by itself
    assert slow["train"] == fast["train"]


def test_memory_of_a_gpu_is_that_of_the_pack(plan):
    cluster = Cluster.model_validate(SMALL)
    for concepts, members in ((8, 1), (20, 3)):
        phases = {p.kind: p for p in predict(plan, cluster, concepts=concepts, captions=10**6)[0]}
        assert phases["train"].device_gib == pytest.approx(pack_bytes(plan, members, cuda=True) / 2**30)
        assert phases["evaluate"].device_gib < cluster.memory_gib and phases["merge"].device_gib is None


def test_many_concepts_are_summed(plan):
    kinds = {rows: list(_seconds(plan, rows)) for rows in (1, 10, 1000)}
    assert (
        "merge" not in kinds[1] and "sums" not in kinds[10] and kinds[1000].index("sums") < kinds[1000].index("merge")
    )
    assert all(found[-2:] == ["evaluate", "release"] for found in kinds.values())


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
