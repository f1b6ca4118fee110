"""Ray Train's ranks make what one process makes, also when one of them is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import psutil
import pytest
import ray

from pipeline.miniature.world import concept_images
from pipeline.plan import make_plan
from pipeline.spec import ConceptBatch
from pipeline.stages import run_stage, train_pack
from pipeline.store import Store
from ray_jobs.concept_batch import Board, ray_session
from ray_jobs.ranks import read_deepspeed_config, train_on_ranks
from training.weights import ConceptWeights


def _training(tmp_path, **training):
    """The training stage of a batch of one concept, and its store with all that it needs."""
    (tmp_path / "cat").mkdir(exist_ok=True)
    for i, image in enumerate(concept_images("cat", "streamline-emojis", 2, seed=1)):
        image.save(tmp_path / "cat" / f"{i}.png")
    settings = {"regularization": "none", "batch_size": 4, "views": 4, "learning_rate": 1e-4, "checkpoint_every": 2}
    batch = ConceptBatch.model_validate(
        {
            "name": "small",
            "concepts": [{"name": "cat", "images": str(tmp_path / "cat"), "class_word": "cat"}],
            "training": settings | training,
        }
    )
    plan = make_plan(batch)
    (stage,) = plan.of("train")
    return plan.of("features")[0], stage


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed"])
def test_ranks_of_ray_train(tmp_path, same_weights, strategy):
    features, alone = _training(tmp_path, steps=6)
    store = Store(str(tmp_path / "alone"))
    run_stage(features, store, lambda *_: None)
    assert train_pack([alone], store, lambda *_: None) == {}

    features, stage = _training(tmp_path, steps=6, strategy=strategy, ranks=2)
    assert stage.key == alone.key  # the same weights, however they are made
    shared = Store(str(tmp_path / "shared"))
    run_stage(features, shared, lambda *_: None)
    with ray_session():
        board = ray.remote(Board).options(num_cpus=0).remote()
        killed = threading.Thread(target=_kill_a_rank, args=(shared.scratch(stage.key) / "checkpoint.safetensors",))
        if strategy == "ddp":
            killed.start()
        assert train_on_ranks(stage, shared, board, cpus=1, gpus=False) == {}
        assert ray.get(board.get.remote())[stage.key] == ("steps", 6, 6)
    made = [ConceptWeights.load(s.path("train", stage.key) / "weights.safetensors") for s in (store, shared)]
    same_weights(*made)


def _kill_a_rank(checkpoint) -> None:
    """As soon as there is a checkpoint, one of the two processes is gone."""
    while not checkpoint.exists():
        time.sleep(0.02)
    ranks = [p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]
    os.kill(ranks[-1].pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: Expecting"),
        ("[]", "expected a JSON object"),
        (json.dumps({"optimizer": {}}), "'optimizer' is not used: learning rates are `training`'s"),
    ],
)
def test_deepspeed_configs_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_deepspeed_config(str(tmp_path / "config.json"))
