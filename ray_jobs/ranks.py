"""Do one thing in several processes together with Ray Train, which places them and starts lost ones again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from pipeline.stages.stage import Progress, Stage
from ray_jobs.board import Notes

RESTARTS = 2
"""Times that lost ranks are started again; they go on from the last checkpoint."""


def run_on_ranks(
    count: int, task: Callable[[Progress], dict[str, str]], name: str, board: Any, *, cpus: int, gpus: bool
) -> dict[str, str]:
    """Call a task in so many processes that torch.distributed knows as ranks, each with so many CPU cores, or a GPU.

    Returns: what it returned.
    Raises: ValueError or OSError that a rank raised; ray.train.TrainingFailedError for all else.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            _rank,
            train_loop_config={"task": task, "board": board, "threads": None if gpus else cpus},
            scaling_config=ray.train.ScalingConfig(
                num_workers=count, use_gpu=gpus, resources_per_worker={"CPU": 1 if gpus else cpus}
            ),
            # nothing is kept there: checkpoints and results go to the store
            run_config=ray.train.RunConfig(
                name=name,
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
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    Notes.go_to(config["board"])
    ray.train.report({"failures": config["task"](progress_to(config["board"]))})


def progress_to(board: Any) -> Progress:
    """Tells the board how far a stage is, but not more than twice a second."""
    last: dict[str, float] = {}

    def progress(stage: Stage[Any], what: str, done: int, total: int) -> None:
        if time.monotonic() - last.get(stage.key, 0) > 0.5 or done == total:
            last[stage.key] = time.monotonic()
            board.put.remote(stage.key, what, done, total)

    return progress
