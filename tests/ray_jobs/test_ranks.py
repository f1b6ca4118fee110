"""Ray Train's ranks make what one process makes, also when one of them is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray

from pipeline.miniature.world import concept_images
from pipeline.plan import Plan, make_plan
from pipeline.spec import MINIATURE, ConceptBatch
from pipeline.stages.features import Features
from pipeline.stages.stage import run_stage
from pipeline.stages.train import Train
from pipeline.store import Store
from ray_jobs import ranks
from ray_jobs.board import Board
from ray_jobs.ranks import progress_to
from ray_jobs.runner import RayWorkers, Share, _Cluster, check_devices
from ray_jobs.session import ray_session
from training.strategies import deepspeed_config

ZERO = {"zero_optimization": {"stage": 2}}


def _plan(tmp_path, base: Path, **training) -> Plan:
    """Of a batch of one concept."""
    (tmp_path / "cat").mkdir(exist_ok=True)
    for i, image in enumerate(concept_images("cat", "streamline-emojis", 2, seed=1)):
        image.save(tmp_path / "cat" / f"{i}.png")
    settings = {"regularization": "none", "batch_size": 4, "views": 4, "learning_rate": 1e-4, "checkpoint_every": 2}
    batch = ConceptBatch.model_validate(
        {
            "name": "small",
            "base": str(base),
            "concepts": [{"name": "cat", "images": str(tmp_path / "cat"), "class_word": "cat"}],
            "training": settings | training,
            "evaluation": {"clip": str(MINIATURE / "clip")},
        }
    )
    return make_plan(batch)


def _training(tmp_path, base: Path, **training) -> tuple[Features, Train]:
    plan = _plan(tmp_path, base, **training)
    return *plan.of(Features), *plan.of(Train)


def _train(stage: Train, store: Store, board) -> None:
    run_stage(stage, store, progress_to(board), RayWorkers(Share(cpus=1, gpus=False, devices=2), board))


@pytest.fixture(scope="module")
def board():
    with ray_session():
        yield ray.remote(Board).options(num_cpus=0).remote()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "own"), [("ddp", {}), ("deepspeed", {}), ("deepspeed", {"stage": 2, "reduce_bucket_size": 100_000})]
)
def test_ranks_of_ray_train(tmp_path, pico, same_weights, board, strategy, own):
    """own: `zero_optimization` of a DeepSpeed configuration that is given whole."""
    features, alone = _training(tmp_path, pico, steps=20)
    store = Store(str(tmp_path / "alone"))
    run_stage(features, store, lambda *_: None)
    run_stage(alone, store, lambda *_: None)

    (tmp_path / "config.json").write_text(json.dumps({"zero_optimization": own}))
    deepspeed = {"config": str(tmp_path / "config.json")} if own else {}
    features, stage = _training(tmp_path, pico, steps=20, strategy=strategy, ranks=2, deepspeed=deepspeed)
    assert (stage.key == alone.key) != bool(own)  # the same weights, however they are made; but who knows of the user's
    shared = Store(str(tmp_path / "shared"))
    run_stage(features, shared, lambda *_: None)
    killed = threading.Thread(target=_kill_a_rank, args=(shared.scratch(stage.key) / "checkpoint.safetensors",))
    if strategy == "ddp":
        killed.start()
    _train(stage, shared, board)
    assert ray.get(board.get.remote())[0][stage.key] == ("steps", 20, 20)
    same_weights(alone.result(store).weights(), stage.result(shared).weights())


@pytest.mark.slow
def test_what_a_rank_finds_wrong_is_said(tmp_path, pico, board, monkeypatch):
    """And not what Ray Train makes of it."""
    monkeypatch.setattr(ranks, "RESTARTS", 0)
    features, stage = _training(tmp_path, pico, steps=20, strategy="ddp", ranks=2)
    store = Store(str(tmp_path / "store"))
    path = run_stage(features, store, lambda *_: None).own
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises((ValueError, OSError), match=r"concept\.safetensors"):
        _train(stage, store, board)


def _kill_a_rank(checkpoint) -> None:
    """As soon as there is a checkpoint, one of the two processes is gone."""
    while not checkpoint.exists():
        time.sleep(0.02)
    ranks = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    os.kill(ranks[-1].pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "training.deepspeed.config: .*config.json: no such file"),
        ("{", "config.json:1: not valid JSON: Expecting"),
        ([], "expected a JSON object"),
        ({}, r"'zero_optimization' has to be an object with a 'stage' of 1, 2 or 3; found no such key among \[\]"),
        ({"zero_optimisation": {"stage": 2}}, r"found no such key among \['zero_optimisation'\]"),
        ({"zero_optimization": 3}, "'zero_optimization' has to be an object .* found 3"),
        ({"zero_optimization": {"stage": 5}}, "'stage' of 1, 2 or 3; found {'stage': 5}"),
        ({"zero_optimization": {"stage": 0}}, "'stage' of 1, 2 or 3; found {'stage': 0}"),
        ({"zero_optimization": {"stage": "auto"}}, "'stage' of 1, 2 or 3; found {'stage': 'auto'}"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket": 1}}, r"zero_optimization\.reduce_bucket: Extra inputs"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, r"offload_param\.device: Input"),
        ({"optimizer": {}}, "'optimizer' is not used: learning rates and precision are `training`'s"),
        ({"bf16": {"enabled": True}}, "'bf16' is not used"),
        (
            ZERO | {"gradient_accumulation_steps": 2},
            "'gradient_accumulation_steps' is 2; by the batch file it is 1: leave it",
        ),
        (ZERO | {"gradient_clipping": 0.5}, "'gradient_clipping' is 0.5; by the batch file it is 1.0"),
        (ZERO | {"train_batch_size": 8}, "'train_batch_size' is 8; by the batch file it is 4"),
    ],
)
def test_deepspeed_configs_that_cannot_be_used(tmp_path, pico, config, message):
    """Refused when the plan is made."""
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError, match=message):
        _training(tmp_path, pico, strategy="deepspeed", ranks=2, deepspeed={"config": str(tmp_path / "config.json")})


def test_a_deepspeed_config_is_completed_and_part_of_the_key(tmp_path, pico):
    keys = set()
    for zero in ({"stage": 2}, {"stage": 2, "zero_quantized_gradients": True}):
        (tmp_path / "config.json").write_text(json.dumps({"zero_optimization": zero, "train_batch_size": "auto"}))
        config = {"config": str(tmp_path / "config.json")}
        _, stage = _training(tmp_path, pico, strategy="deepspeed", ranks=2, max_grad_norm=0.5, deepspeed=config)
        keys.add(stage.key)
        derived = deepspeed_config(2, 0.5, zero=2, offload=False)
        assert stage.deepspeed == derived | {"zero_optimization": zero, "train_batch_size": 4}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"strategy": "ddp", "ranks": 4}, "training.ranks: 4 ranks need a CPU core each, and there are 2"),
        ({"optimizer": "adamw8bit"}, "adamw8bit needs bitsandbytes, which is not installed"),
        ({"attention": "xformers"}, "xformers needs CUDA"),
    ],
)
def test_what_there_is_not(tmp_path, pico, monkeypatch, capsys, training, message):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    plan = _plan(tmp_path, pico, **training)
    with pytest.raises(ValueError, match=message):
        check_devices([plan], plan.stages, cores=2, gpus=0)
    if "ranks" in training:  # a cluster may have an autoscaler
        monkeypatch.setenv("RAY_ADDRESS", "anywhere")
        check_devices([plan], plan.stages, cores=2, gpus=0)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cores", "gpus", "ranks", "expected"), [([4], 0, 2, 2), ([4], 0, 8, 1), ([3, 3], 0, 3, 1), ([8, 8], 2, 2, 1)]
)
def test_cores_of_a_rank(tmp_path, pico, cores, gpus, ranks, expected):
    """As many as there are for each, and all ranks find room on the nodes at once; one beside a GPU."""
    _, stage = _training(tmp_path, pico, strategy="ddp", ranks=ranks, batch_size=24)
    nodes = [{"Resources": {"CPU": count}} for count in cores]
    assert _Cluster(gpus, sum(cores), nodes).cpus_of(stage) == expected
