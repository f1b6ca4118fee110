"""Nodes that go away, and nodes that come late: the batch ends as in an undisturbed run."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.miniature.world import concept_images
from pipeline.plan import Plan, make_plan
from pipeline.spec import ConceptBatch
from pipeline.stages import run_stage, train_pack
from pipeline.store import Store
from ray_jobs.concept_batch import run_stages
from training.weights import ConceptWeights


@pytest.fixture
def plan(tmp_path) -> Plan:
    """Two concepts up to their weights, trained one at a time."""
    concepts = []
    for name, style in (("cat", "streamline-emojis"), ("turtle", "fxemoji")):
        (tmp_path / name).mkdir()
        for i, image in enumerate(concept_images(name, style, 2, seed=1)):
            image.save(tmp_path / name / f"{i}.png")
        concepts.append({"name": name, "images": str(tmp_path / name), "class_word": name})
    training = {"steps": 40, "batch_size": 2, "views": 4, "learning_rate": 1e-4, "regularization": "none"}
    batch = ConceptBatch.model_validate(
        {"name": "two", "concepts": concepts, "training": training | {"pack_size": 1, "checkpoint_every": 5}}
    )
    whole = make_plan(batch)
    return Plan(batch, (*whole.of("features"), *whole.of("train")), ())


@pytest.mark.slow
def test_a_node_goes_away(plan, tmp_path, same_weights):
    alone, shared = Store(str(tmp_path / "alone")), Store(str(tmp_path / "shared"))
    for stage in plan.of("features"):
        run_stage(stage, alone, lambda *_: None)
    for stage in plan.of("train"):
        assert train_pack([stage], alone, lambda *_: None) == {}

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    lost = threading.Event()

    def lose_a_node() -> None:
        checkpoints = [shared.scratch(stage.key) / "checkpoint.safetensors" for stage in plan.of("train")]
        while not any(path.exists() for path in checkpoints):
            time.sleep(0.02)
        cluster.remove_node(nodes[1], allow_graceful=False)
        lost.set()

    try:
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        threading.Thread(target=lose_a_node, daemon=True).start()
        assert run_stages([plan], shared) == []
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert lost.is_set()
    for stage in plan.of("train"):
        made = [ConceptWeights.load(s.path("train", stage.key) / "weights.safetensors") for s in (alone, shared)]
        same_weights(*made)


@pytest.mark.slow
def test_workers_come_later(plan, tmp_path, capsys):
    """A head that computes nothing, as where an autoscaler keeps no worker without work."""
    store = Store(str(tmp_path / "store"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        with ThreadPoolExecutor() as pool:  # nodes are started by the main thread only
            outcome = pool.submit(run_stages, [Plan(plan.batch, tuple(plan.of("features")), ())], store)
            time.sleep(3)
            cluster.add_node(num_cpus=1)
            assert outcome.result(timeout=120) == []
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert all(store.has(stage.kind, stage.key) for stage in plan.of("features"))
    assert "waiting for the first" in capsys.readouterr().err
