"""What a plan will cost: seconds, memory and disk of each stage, before anything runs.

Seconds are operations over the device's speed on one matrix product, times how much of that the models reach, measured
on the miniature with `make demo`. Network time is not estimated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from pipeline.cost.estimate import Device, Estimate
from pipeline.cost.model_size import ModelSize, model_size
from pipeline.plan import Plan
from pipeline.stages.stage import Stage

REACHED = 0.35
"""Share of the matrix product's speed that UNet and autoencoder reach, measured on 2 CPU cores with the miniature."""
UNKNOWN = Device(math.inf, cuda=False)
"""A process on a CPU whose speed does not matter."""


def estimates(plan: Plan, *, cuda: bool) -> dict[str, Estimate]:
    """Stage key -> estimate, for each stage of the plan, on this machine's GPU or cores; a training's is that of a pack
    of its own."""
    model, device = size_of(plan), Device(math.inf, cuda, _device_speed(cuda))
    return {stage.key: stage.estimate(model, device) for stage in plan}


def stage_bytes(plan: Plan, stages: Sequence[Stage]) -> int:
    """Peak memory of the process on a CPU that does a stage, or several as one job; 0 where it is not estimated."""
    return int((stages[0].estimate(size_of(plan), UNKNOWN, len(stages)).gib or 0) * 2**30)


def disk_bytes(plan: Plan, stages: Sequence[Stage]) -> float:
    """What stages leave in the store, at least: latents, text features, weights, and the checkpoint of a training."""
    found = [stage.estimate(size_of(plan), UNKNOWN) for stage in stages]
    return sum(each.disk for each in found) + max((each.scratch for each in found), default=0.0)


def size_of(plan: Plan) -> ModelSize:
    """The plan's base in the hands of its method."""
    training = plan.batch.training
    return model_size(
        plan.batch.base_path,
        training.method,
        train_text_encoder=training.train_text_encoder,
        gradient_checkpointing=training.gradient_checkpointing,
    )


def _device_speed(cuda: bool) -> float:
    """Operations a second that the models reach on this machine's GPU or cores."""
    device = "cuda" if cuda else "cpu"
    a = torch.randn(1024, 1024, device=device)
    (a @ a).sum().item()
    start = time.perf_counter()
    for _ in range(4):
        a = a @ a / 1024
    a.sum().item()
    return REACHED * 4 * 2 * 1024**3 / (time.perf_counter() - start)
