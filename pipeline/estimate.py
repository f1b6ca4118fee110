"""What a plan will cost: seconds and memory of each stage, before anything runs.

Operations, and the bytes that are alive in a training step, are counted by running the base model's layers on tensors
that have shapes only. Seconds are operations over the device's speed on one matrix product, times how much of that the
models reach, measured on the miniature with `make demo`. Network time is not estimated.
"""

from __future__ import annotations

import functools
import json
import math
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipeline.plan import Plan, Stage, deepspeed_of
from pipeline.spec import Training
from training.attention import training_dtype, use_attention
from training.base import Base, check_base
from training.methods import METHODS
from training.methods.method import UNetPart
from training.parts import short_name, unet_parameters

REACHED = 0.35
"""Share of the matrix product's speed that UNet and autoencoder reach, measured on 2 CPU cores with the miniature."""


@dataclass(frozen=True)
class Estimate:
    """seconds: None where it depends on the network or the corpus. gib: peak memory of the stage's process."""

    seconds: float | None
    gib: float | None


@dataclass(frozen=True)
class Device:
    """What a pack trains on. memory: bytes that it may take. cuda: a GPU, else a process on a machine's cores."""

    memory: float
    cuda: bool


PROCESS = 0.9 * 2**30
"""Bytes of a process that has imported everything and done a step, beyond tensors; measured on the CPU."""
AVERAGES = {"adamw": 8, "adamw8bit": 2}
"""Bytes of the optimizer's two averages of a trained number. The number and its gradient take 4 each."""
GAPS = 1.4
"""Resident bytes of activations on the CPU over the tensors' own: its allocator leaves gaps between small ones.
Measured on the miniature."""


@dataclass(frozen=True)
class ModelSize:
    """A base model in numbers, counted from its shapes.

    unet_flops: of one forward pass of one sample. vae_flops: of encoding one image. parameters: of all parts.
    vae_parameters: of them, the autoencoder's. trained: of what a method trains, without its token rows.
    trained_share: how much of the UNet trains.
    step_bytes: most that is alive of one sample in a training step, float32, beside what trains and its gradients.
    """

    unet_flops: float
    vae_flops: float
    parameters: int
    vae_parameters: int
    trained: int
    trained_share: float
    step_bytes: float
    text_width: int
    latent_numbers: int
    """Of one image."""
    text_numbers: int
    """Of the text features of one caption."""
    pixels: int
    """Side of an image."""


def estimates(plan: Plan, *, cuda: bool) -> dict[str, Estimate]:
    """Stage key -> estimate, for each stage of the plan, on this machine's GPU or cores; a training's is that of a pack
    of its own."""
    model, speed = _size_of(plan), _device_speed(cuda)
    return {stage.key: _estimate(stage, plan, model, speed, cuda) for stage in plan}


def pack_bytes(plan: Plan, members: int, *, cuda: bool = False) -> float:
    """Peak memory, bytes, of a GPU, or of a process on the CPU, that trains so many sets of weights as one pack; of
    one rank where several train a set together."""
    settings, model, zero = plan.batch.training, _size_of(plan), _zero(plan)
    width = training_dtype(settings.precision, cuda=cuda).itemsize
    # a rank's share of the optimizer's averages, of the gradients and of the weights
    averages, gradients, weights = (1 / settings.ranks if zero["stage"] >= stage else 1.0 for stage in (1, 2, 3))
    buffer = 0.0
    # on the CPU what is offloaded stays where it is, and a buffer takes memory only where something is in it
    if cuda and zero["stage"]:
        averages = 0.0 if _offloads(zero, "offload_optimizer") else averages
        weights = 0.0 if zero["stage"] == 3 and _offloads(zero, "offload_param") else weights
        buffer = 4 * float(zero.get("reduce_bucket_size", 5e8))  # DeepSpeed's default
    step = rank_samples(settings) * model.step_bytes * width / 4
    trained = model.trained * (4 * weights + 4 * gradients + AVERAGES[settings.optimizer] * averages)
    # the autoencoder is not a part of what the ranks run
    base = width * (model.vae_parameters + weights * (model.parameters - model.vae_parameters))
    return (buffer if cuda else PROCESS) + base + members * (trained + (step if cuda else GAPS * step))


def exchanged_bytes(plan: Plan) -> float:
    """What a rank on a GPU sends in a step, and as much arrives: gradients, averaged in two rounds of a ring; with
    ZeRO-3 the model, put together in the forward and again in the backward pass, and gradients in one round."""
    settings, model = plan.batch.training, _size_of(plan)
    if settings.ranks == 1:
        return 0.0
    gradients = 4.0 * model.trained
    if _zero(plan)["stage"] < 3:
        return 2 * gradients
    width = training_dtype(settings.precision, cuda=True).itemsize
    return 2 * width * (model.parameters - model.vae_parameters) + gradients


def rank_samples(settings: Training) -> int:
    """Samples that one rank has in a step."""
    return settings.batch_size // settings.ranks * (1 if settings.regularization == "none" else 2)


def _zero(plan: Plan) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`; stage 0, nothing is shared out, for other strategies."""
    if plan.batch.training.strategy != "deepspeed":
        return {"stage": 0}
    return deepspeed_of(plan.of("train")[0])["zero_optimization"]


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return (zero.get(what) or {}).get("device", "none") != "none"


def stage_bytes(plan: Plan, stages: Sequence[Stage]) -> int:
    """Peak memory of the process that does a stage, or trains several as a pack; 0 where it is not estimated."""
    if stages[0].kind == "train":
        return int(pack_bytes(plan, len(stages)))
    return int((_estimate(stages[0], plan, _size_of(plan), speed=1).gib or 0) * 2**30)


def pack_size(plan: Plan, device: Device) -> int:
    """How many sets of weights train at once, at least 1: as `training.pack_size` says, or as fit in nine tenths of the
    memory. Always 1 where the method or the strategy does not train in packs."""
    settings = plan.batch.training
    if not METHODS[settings.method].mergeable or settings.strategy != "single":
        return 1
    if settings.pack_size != "auto":
        return settings.pack_size
    alone, two = (pack_bytes(plan, members, cuda=device.cuda) for members in (1, 2))
    return max(1, 1 + int((0.9 * device.memory - alone) // (two - alone)))


def _estimate(stage: Stage, plan: Plan, model: ModelSize, speed: float, cuda: bool = False) -> Estimate:
    process = (PROCESS + model.parameters * 4) / 2**30
    resident = model.parameters * 4 / 2**30 if cuda else process
    if stage.kind == "features":
        views = len(stage.params["images"]) * max(1, stage.params["views"])
        views += sum(source.params["images"] for source in stage.inputs)  # of the regularisation, where there is any
        return Estimate(views * model.vae_flops / speed, resident)
    if stage.kind == "train":
        settings = stage.params["training"]
        # ranks have a GPU each, but share the cores of a machine
        samples = rank_samples(plan.batch.training) * (1 if cuda else plan.batch.training.ranks)
        # forward, backward for the activations, and for what trains
        passes = 2 + model.trained_share
        seconds = settings["steps"] * samples * passes * model.unet_flops / speed
        return Estimate(seconds, pack_bytes(plan, 1, cuda=cuda) / 2**30)
    if stage.kind == "generated":
        drawn = stage.params["images"] * stage.params["steps"]
        return Estimate(drawn * 2 * model.unet_flops / speed, resident)
    if stage.kind == "evaluate":
        settings = stage.params["evaluation"]
        images = len(stage.params["prompts"]) * settings["samples"]
        return Estimate(images * settings["steps"] * 2 * model.unet_flops / speed, resident)
    if stage.kind == "merge":
        return Estimate(None, process + len(plan.batch.concepts) * model.trained * 4 / 2**30)
    return Estimate(None, None)


def disk_bytes(plan: Plan, stages: Sequence[Stage]) -> float:
    """What stages leave in the store, at least: latents, text features, weights, and the checkpoint of a training."""
    model, settings = _size_of(plan), plan.batch.training
    view = 4.0 * model.latent_numbers
    regularization = view + 4.0 * model.text_numbers
    total = 0.0
    for stage in stages:
        if stage.kind == "features":
            total += len(stage.params["images"]) * max(1, stage.params["views"]) * view
            total += sum(source.params["images"] for source in stage.inputs) * regularization
        elif stage.kind == "train":
            total += 4.0 * model.trained
    if any(stage.kind == "train" for stage in stages):
        total += (4 + AVERAGES[settings.optimizer]) * model.trained
    return total


@functools.cache  # else a hub's model is looked up there each time
def model_size(
    base: str,
    method: str = "custom_diffusion",
    *,
    train_text_encoder: bool = False,
    gradient_checkpointing: bool = False,
) -> ModelSize:
    """Count a base model (a diffusers folder or hub name) in the hands of a method.

    Raises: ValueError when there is no such model.
    """
    return _measure(check_base(base), METHODS[method].unet, train_text_encoder, gradient_checkpointing)


def _size_of(plan: Plan) -> ModelSize:
    training = plan.batch.training
    return model_size(
        plan.batch.base_path,
        training.method,
        train_text_encoder=training.train_text_encoder,
        gradient_checkpointing=training.gradient_checkpointing,
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside the block: those alive (`now`), and the most there were (`peak`).

    known: tensors that were there before.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, storage: int, size: int) -> None:
        self.seen.discard(storage)
        self.now -= size


def _measure(base: Base, part: UNetPart, train_text_encoder: bool, gradient_checkpointing: bool) -> ModelSize:
    def config(part: str) -> dict[str, Any]:
        return json.loads((base.folder / part / "config.json").read_text())

    # not on the meta device: there attention takes the form that keeps its whole matrix, which no kernel in use does
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    fused_attention = {kernel: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FakeTensorMode():
        unet = UNet2DConditionModel.from_config(config("unet")).requires_grad_(False)
        vae = AutoencoderKL.from_config(config("vae"))
        use_attention(unet, "sdpa")
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        side, width = unet.config.sample_size, unet.config.cross_attention_dim
        latents = torch.empty(1, unet.config.in_channels, side, side)
        added = None
        if unet.config.addition_embed_type == "text_time":
            added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        names = set(unet_parameters(unet, part))
        trained = [p.requires_grad_() for name, p in unet.named_parameters() if short_name(name) in names]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(_forget_gradient)  # counted with what trains
        text = torch.empty(1, base.words.tokenizers[0].model_max_length, width, requires_grad=True)
        with LiveBytes(unet.parameters()) as live:
            with FlopCounterMode(display=False, custom_mapping=fused_attention) as unet_count:
                prediction = unet(latents, torch.ones(1), text, added_cond_kwargs=added).sample
            prediction.sum().backward()
        pixels = side * 2 ** (len(vae.config.block_out_channels) - 1)
        with FlopCounterMode(display=False, custom_mapping=fused_attention) as vae_count, torch.no_grad():
            vae.encode(torch.empty(1, 3, pixels, pixels))
    matrices = sum(p.numel() for p in trained)
    numbers = {name: sum(map(_numbers, files)) for name, files in base.weights.items()}
    encoders = [file for name, files in base.weights.items() if name.startswith("text_encoder") for file in files]
    return ModelSize(
        unet_count.get_total_flops(),
        vae_count.get_total_flops(),
        sum(numbers.values()),
        numbers["vae"],
        matrices + (sum(_numbers(file, tables=False) for file in encoders) if train_text_encoder else 0),
        matrices / sum(p.numel() for p in unet.parameters()),
        live.peak,
        width,
        latents.numel(),
        text.numel(),
        pixels,
    )


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _numbers(file: Path, *, tables: bool = True) -> int:
    """How many a file holds; without those of embedding tables, which no method trains."""
    with safe_open(file, framework="pt") as weights:
        names = [name for name in weights.keys() if tables or "_embedding" not in name]  # noqa: SIM118 (a file)
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)


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
