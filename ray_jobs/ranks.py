"""Train one set of weights on several ranks with Ray Train, which places them and starts lost ones again."""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from pipeline.plan import Stage, deepspeed_of
from pipeline.stages import train_pack
from pipeline.store import Store
from ray_jobs.board import Notes
from training.strategies import DDP, DeepSpeed, Single

RESTARTS = 2
"""Times that lost ranks are started again; they go on from the last checkpoint."""


def on_ranks(stage: Stage) -> bool:
    """Whether a stage is a training of several processes."""
    return stage.kind == "train" and stage.places["strategy"] != "single"


def train_on_ranks(stage: Stage, store: Store, board: Any, *, cpus: int, gpus: bool) -> dict[str, str]:
    """Train the stage on as many ranks as it says, each with so many CPU cores, or a GPU.

    Returns: key -> why, when the training diverged.
    Raises: ValueError or OSError that a rank raised; ray.train.TrainingFailedError for all else.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            _rank,
            train_loop_config={"stage": stage, "root": store.root, "board": board, "threads": None if gpus else cpus},
            scaling_config=ray.train.ScalingConfig(
                num_workers=stage.places["ranks"], use_gpu=gpus, resources_per_worker={"CPU": 1 if gpus else cpus}
            ),
            # nothing is kept there: checkpoints and results go to the store
            run_config=ray.train.RunConfig(
                name=stage.key,
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=RESTARTS),
            ),
        )
        try:
            metrics = trainer.fit().metrics or {}
        except ray.train.WorkerGroupError as error:
            for failure in error.worker_failures.values():
                if isinstance(failure, (ValueError, OSError)):
                    raise failure from None
            raise
    return metrics.get("failures", {})


def _rank(config: dict[str, Any]) -> None:
    stage, board = config["stage"], config["board"]
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    Notes.go_to(board)
    last = 0.0

    def progress(stage: Stage, what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5 or done == total:
            last = time.monotonic()
            board.put.remote(stage.key, what, done, total)

    failures = train_pack([stage], Store(config["root"]), progress, strategy_of(stage))
    ray.train.report({"failures": failures})


def strategy_of(stage: Stage) -> Single:
    """What a stage of the kind `train` asks for, in a process that torch.distributed knows as a rank."""
    if stage.places["strategy"] == "ddp":
        return DDP()
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    return DeepSpeed(deepspeed_of(stage))
