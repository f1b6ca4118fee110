"""The prediction for a cluster follows what the numbers mean."""

from __future__ import annotations

import pytest

from pipeline.cost.cluster import Cluster, load_cluster
from pipeline.cost.prediction import describe, predict
from pipeline.miniature.world import concept_images
from pipeline.plan import Plan, make_plan
from pipeline.spec import ConceptBatch
from pipeline.stages.train import Train

SMALL = {"nodes": 2, "devices": 4, "memory_gib": 16, "tflops": 10}


@pytest.fixture
def planned(tmp_path):
    """The plan of a concept, or of those given as changes of it, with settings of the training."""
    concept_images("cat", "streamline-emojis", 1, seed=0)[0].save(tmp_path / "0.png")
    concept = {"name": "cat", "images": str(tmp_path), "class_word": "cat"}

    def make(*changes: dict, **training) -> Plan:
        concepts = [concept | change for change in changes or ({},)]
        return make_plan(ConceptBatch.model_validate({"name": "one", "concepts": concepts, "training": training}))

    return make


@pytest.fixture
def plan(planned) -> Plan:
    return planned()


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
    text = "\n".join(describe(phases, packed, cluster))
    assert "network" in text and f"packs of up to {packed}" in text and "does not fit" not in text


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
        assert phases["train"].device_gib == pytest.approx(plan.of(Train)[0].pack_bytes(members, cuda=True) / 2**30)
        assert phases["evaluate"].device_gib < cluster.memory_gib and phases["merge"].device_gib is None


def test_several_concepts_are_summed(plan):
    kinds = {count: list(_seconds(plan, count)) for count in (1, 10, 1000)}
    assert not {"sums", "merge"} & set(kinds[1])
    assert all(kinds[count].index("sums") < kinds[count].index("merge") for count in (10, 1000))
    assert all(found[-2:] == ["evaluate", "release"] for found in kinds.values())


def test_joint_training_is_one_training_of_all_steps_and_no_merge(planned):
    joint, alone = (_seconds(planned(composition=how), 16, tflops=1e-3) for how in ("joint", "merged"))
    assert joint["train"] == pytest.approx(8 * alone["train"])  # on one of 8 GPUs, and not two turns of all
    assert "merge" in alone and not {"constraints", "sums", "merge"} & set(joint)


def test_ranks_take_a_gpu_each_and_share_a_step(planned):
    """As many GPUs do the same work; what a batch of one concept gains is time."""
    single, ddp = planned(), planned(strategy="ddp", ranks=4)
    for concepts, times in ((1, 1 / 4), (2, 1 / 4), (4, 1 / 2), (8, 1), (80, 1)):
        found = _seconds(ddp, concepts, tflops=1e-3)["train"]
        assert found == pytest.approx(times * _seconds(single, concepts, tflops=1e-3)["train"]), concepts
    with pytest.raises(ValueError, match="16 ranks need a GPU each, and the cluster has 8"):
        _seconds(planned(strategy="ddp", ranks=16, batch_size=16))


def test_ranks_on_several_nodes_exchange_over_the_network(planned):
    """In each step, and ZeRO-3 the whole model; ranks on one node cross none."""
    thin = {"network_gbit": 1e-6}
    within = _seconds(planned(strategy="ddp", ranks=4), 1, **thin)["train"]
    across = {}
    for stage in (2, 3):
        plan = planned(strategy="deepspeed", ranks=8, batch_size=8, deepspeed={"stage": stage}, steps=1000)
        across[stage] = _seconds(plan, 1, **thin)["train"]
        assert across[stage] == pytest.approx(1000 * plan.of(Train)[0].exchanged_bytes() * 8 / 1e3, rel=0.1)
    assert within < across[2] < across[3]


def test_steps_and_prompts_of_concepts_are_counted(planned):
    own = planned({"name": "a", "training": {"steps": 750}, "prompts": ["a {}", "the {}", "one {}"]}, {"name": "b"})
    plain, found = (_seconds(p, 10, tflops=1e-3) for p in (planned(), own))
    for kind in ("train", "evaluate"):  # three times as many of one, half of all
        assert found[kind] == pytest.approx(2 * plain[kind])


def test_what_does_not_fit_a_gpu_is_said(plan):
    cluster = Cluster.model_validate(SMALL | {"memory_gib": 0.05})
    lines = describe(*predict(plan, cluster, concepts=10, captions=10**6), cluster)
    assert [line.split()[3] for line in lines if line.startswith("does not fit")] == ["features", "train", "evaluate"]
    assert lines[-1].endswith("GiB of a GPU, which has 0.05")


def test_cluster_files_that_cannot_be_used(tmp_path):
    file = tmp_path / "cluster.yaml"
    for text, message in (
        ("nodes: 1\ndevices: 8\nmemory_gib: 80\ntflop: 3", ":4: tflop: unknown key; did you mean 'tflops'?"),
        ("nodes: 0\ndevices: 8\nmemory_gib: 80\ntflops: 3", ":1: nodes: .* found 0"),
        ("nodes: [", ":1: not valid YAML"),
        ("", ": expected a mapping with the key 'nodes', found nothing"),
        ("nodes: 1\ndevices: true\nmemory_gib: 80\ntflops: 3", ":2: devices: expected a number, found true"),
        ("nodes: 1\ndevices: 8\nmemory_gib: 1e300\ntflops: 3", ":3: memory_gib: .* found '1e300'"),
        ("nodes: 1\ndevices: 8\nmemory_gib: 80\ntflops: 1.0e-320", ":4: tflops: .* found 1.0e-320"),
        ("nodes: 1\ndevices: 8\nmemory_gib: 80\ntflops: .nan", ":4: tflops: .* found .nan"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"cluster\.yaml{message}"):
            load_cluster(file)
    with pytest.raises(ValueError, match=r"none\.yaml: no such file"):
        load_cluster(tmp_path / "none.yaml")
