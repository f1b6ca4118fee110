"""What a plan will cost: seconds, memory and disk of each stage, before anything runs.

Seconds are operations over the device's speed on one matrix product, times how much of that the models reach, measured
on the miniature with `make demo`. Network time is not estimated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from pipeline.cost.estimate import Device, Estimate
from pipeline.cost.model_size import ModelSize, model_size
from pipeline.plan import Plan
from pipeline.stages.merge import Merge
from pipeline.stages.stage import Stage
from pipeline.stages.train import Train
from pipeline.store import Store

REACHED = 0.35
"""Share of the matrix product's speed that UNet and autoencoder reach, measured on 2 CPU cores with the miniature."""
UNKNOWN = Device(math.inf, cuda=False)
"""A process on a CPU whose speed does not matter."""


def estimates(plan: Plan, *, cuda: bool) -> dict[str, Estimate]:
    """Stage key -> estimate, for each stage of the plan, on this machine's GPU or cores; a training's is that of a pack
    of its own."""
    model, device = size_of(plan), Device(math.inf, cuda, _device_speed(cuda))
    return {stage.key: stage.estimate(model, device) for stage in plan}


def describe_here(plan: Plan, store: Store, device: Device, *, every: bool = False) -> list[str]:
    """What a plan has to do on this machine and what that costs, a line for each kind of stages (every: for each
    stage), then what does not fit, and the sum. device: what a training may use here."""
    cost = estimates(plan, cuda=device.cuda)
    done = {stage.key for stage in plan if stage.is_in(store)}
    todo = [stage for stage in plan if stage.key not in done]
    needs: dict[str, float] = {}  # kind -> GiB of what is to do
    for stage in todo:
        needs[stage.kind] = max(needs.get(stage.kind, 0), cost[stage.key].gib or 0)
    lines = list(_each(plan, done, cost) if every else _by_kind(plan, done, cost))
    ranks, has = plan.batch.training.ranks, device.memory / 2**30
    if trainings := [stage for stage in todo if isinstance(stage, Train)]:
        packs = -(-len(trainings) // trainings[0].pack_size(device))
        largest = -(-len(trainings) // packs)
        gib = trainings[0].pack_bytes(largest, cuda=device.cuda) / 2**30
        # ranks have a GPU each, but share the memory of a machine
        needs[Train.kind] = gib if device.cuda else gib * ranks
        rank = f" a rank of {ranks}" if ranks > 1 else ""
        lines.append(f"packs of up to {largest} concepts, {gib:.2f} GiB{rank}, of {has:.1f} GiB on this machine")
    if device.cuda:
        needs.pop(Merge.kind, None)  # not of the GPU's memory
    lines += [
        f"does not fit: {kind} needs {gib:.1f} GiB, of {has:.1f} GiB on this machine"
        for kind, gib in needs.items()
        if gib > has
    ]
    seconds = sum(cost[stage.key].seconds or 0 for stage in todo)
    shared = f", trainings on {ranks}" if device.cuda and ranks > 1 else ""
    lines.append(
        f"{len(todo)} of {len(plan.stages)} stages to do, about {seconds:.0f} s of computing on one device of this "
        f"machine{shared}"
    )
    return lines


def _by_kind(plan: Plan, done: Collection[str], cost: Mapping[str, Estimate]) -> Iterator[str]:
    yield f"{'stages':15} {'done':>6} {'to do':>6} {'seconds':>9} {'GiB each':>9}"
    for kind in dict.fromkeys(stage.kind for stage in plan):
        same = [stage for stage in plan if stage.kind == kind]
        todo = [cost[stage.key] for stage in same if stage.key not in done]
        seconds = [each.seconds for each in todo if each.seconds is not None]
        gib = [each.gib for each in todo if each.gib is not None]
        yield (
            f"{kind:15} {len(same) - len(todo):6} {len(todo):6} {f'{sum(seconds):.0f}' if seconds else '':>9} "
            f"{f'{max(gib):.2f}' if gib else '':>9}"
        ).rstrip()


def _each(plan: Plan, done: Collection[str], cost: Mapping[str, Estimate]) -> Iterator[str]:
    yield f"{'stage':15} {'of':24} {'state':6} {'seconds':>9} {'GiB':>7}  key"
    for stage in plan:
        seconds, gib = cost[stage.key].seconds, cost[stage.key].gib
        yield (
            f"{stage.kind:15} {stage.name[:24]:24} {'done' if stage.key in done else 'to do':6} "
            f"{'' if seconds is None else f'{seconds:.0f}':>9} {'' if gib is None else f'{gib:.2f}':>7}  {stage.key}"
        )


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
    seconds = []
    for _ in range(4):  # the fastest: others may use the machine meanwhile, and will not for as long as a batch takes
        start = time.perf_counter()
        a = a @ a / 1024
        a.sum().item()
        seconds.append(time.perf_counter() - start)
    return REACHED * 2 * 1024**3 / min(seconds)
