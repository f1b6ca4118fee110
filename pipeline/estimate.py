"""What a plan will cost: seconds and memory of each stage, before anything runs.

Operations, and the bytes that a training step keeps for its backward pass, are counted by running the base model's
layers on the meta device (shapes only). Seconds are operations over the device's speed on one matrix product, times how
much of that the models reach, measured on the miniature with `make demo`. Network time is not estimated.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipeline.plan import Plan, Stage
from training.attention import training_dtype, use_attention
from training.backbone import local_model, short_name, unet_parameters
from training.methods import METHODS
from training.methods.method import UNetPart

REACHED = 0.35
"""Share of the matrix product's speed that UNet and autoencoder reach, measured on 2 CPU cores with the miniature."""


@dataclass(frozen=True)
class Estimate:
    """seconds: None where it depends on the network or the corpus. gib: peak memory of the stage's process."""

    seconds: float | None
    gib: float | None


PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
PROCESS = 0.9 * 2**30
"""Bytes of a process that has imported everything and done a step, beyond tensors; measured on the CPU."""
TRAINED_BYTES = 16
"""Of a trained number in float32: itself, its gradient and the two averages of Adam."""


@dataclass(frozen=True)
class ModelSize:
    """A base model in numbers, counted from its shapes.

    unet_flops: of one forward pass of one sample. vae_flops: of encoding one image. parameters: of all parts.
    trained: of what a method trains, without its token rows. trained_share: how much of the UNet trains.
    kept_bytes: what one sample of a training step keeps for the backward pass, float32.
    """

    unet_flops: float
    vae_flops: float
    parameters: int
    trained: int
    trained_share: float
    kept_bytes: float
    text_width: int
    latent_numbers: int
    """Of one image."""
    pixels: int
    """Side of an image."""


def estimates(plan: Plan) -> dict[str, Estimate]:
    """Stage key -> estimate, for each stage of the plan; a training's is that of a pack of its own."""
    model, speed = _size_of(plan), _device_speed()
    return {stage.key: _estimate(stage, plan, model, speed) for stage in plan}


def pack_bytes(plan: Plan, members: int) -> float:
    """Peak memory, bytes, of a process (on the CPU) or device that trains so many sets of weights as one pack."""
    return _pack_bytes(plan, _size_of(plan), members)


def stage_bytes(plan: Plan, stages: Sequence[Stage]) -> int:
    """Peak memory of the process that does a stage, or trains several as a pack; 0 where it is not estimated."""
    if stages[0].kind == "train":
        return int(pack_bytes(plan, len(stages)))
    return int((_estimate(stages[0], plan, _size_of(plan), speed=1).gib or 0) * 2**30)


def pack_size(plan: Plan, memory: float) -> int:
    """How many sets of weights fit in so many bytes at once, at least 1; a tenth of the memory is left free. Always 1
    where the method does not train in packs."""
    if not METHODS[plan.batch.training.method].mergeable:
        return 1
    model = _size_of(plan)
    alone, each = _pack_bytes(plan, model, 1), _pack_bytes(plan, model, 2) - _pack_bytes(plan, model, 1)
    return max(1, 1 + int((0.9 * memory - alone) // each))


def _pack_bytes(plan: Plan, model: ModelSize, members: int) -> float:
    settings = plan.batch.training
    width = 2 if training_dtype(settings.precision) == torch.bfloat16 else 4
    samples = settings.batch_size * (1 if settings.regularization == "none" else 2)
    each = model.trained * TRAINED_BYTES + samples * model.kept_bytes * width / 4
    process = 0 if torch.cuda.is_available() else PROCESS
    return process + model.parameters * width + members * each


def _estimate(stage: Stage, plan: Plan, model: ModelSize, speed: float) -> Estimate:
    resident = (PROCESS + model.parameters * 4) / 2**30
    if stage.kind == "features":
        views = len(stage.params["images"]) * max(1, stage.params["views"]) + plan.batch.retrieval.images
        return Estimate(views * model.vae_flops / speed, resident)
    if stage.kind == "train":
        settings = stage.params["training"]
        samples = settings["batch_size"] * (1 if settings["regularization"] == "none" else 2)
        # forward, backward for the activations, and for what trains
        passes = 2 + model.trained_share
        seconds = settings["steps"] * samples * passes * model.unet_flops / speed
        return Estimate(seconds, _pack_bytes(plan, model, 1) / 2**30)
    if stage.kind == "generated":
        drawn = stage.params["images"] * stage.params["steps"]
        return Estimate(drawn * 2 * model.unet_flops / speed, resident)
    if stage.kind == "evaluate":
        settings = stage.params["evaluation"]
        images = len(stage.params["prompts"]) * settings["samples"]
        return Estimate(images * settings["steps"] * 2 * model.unet_flops / speed, resident)
    if stage.kind == "merge":
        return Estimate(None, resident + len(plan.batch.concepts) * model.trained * 4 / 2**30)
    return Estimate(None, None)


@functools.cache  # else a hub's model is looked up there each time
def model_size(base: str, method: str = "custom_diffusion", *, train_text_encoder: bool = False) -> ModelSize:
    """Count a base model (a diffusers folder or hub name) in the hands of a method.

    Raises: ValueError when there is no such model.
    """
    return _measure(local_model(base), METHODS[method].unet, train_text_encoder)


def _size_of(plan: Plan) -> ModelSize:
    training = plan.batch.training
    return model_size(plan.batch.base_path, training.method, train_text_encoder=training.train_text_encoder)


def _measure(folder: Path, part: UNetPart, train_text_encoder: bool) -> ModelSize:
    def config(part: str) -> dict[str, Any]:
        return json.loads((folder / part / "config.json").read_text())

    # not on the meta device: there attention takes the form that keeps its whole matrix, which no kernel in use does
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    fused_attention = {kernel: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FakeTensorMode():
        unet = UNet2DConditionModel.from_config(config("unet")).requires_grad_(False)
        vae = AutoencoderKL.from_config(config("vae"))
        use_attention(unet, "sdpa")
        side, width = unet.config.sample_size, unet.config.cross_attention_dim
        latents = torch.empty(1, unet.config.in_channels, side, side)
        added = None
        if unet.config.addition_embed_type == "text_time":
            added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        names = set(unet_parameters(unet, part))
        trained = [p.requires_grad_() for name, p in unet.named_parameters() if short_name(name) in names]
        text = torch.empty(1, 77, width, requires_grad=not trained)  # else they keep more than its gradient needs
        weights = {p.untyped_storage()._cdata for p in unet.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with (
            FlopCounterMode(display=False, custom_mapping=fused_attention) as unet_count,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            prediction = unet(latents, torch.ones(1), text, added_cond_kwargs=added).sample
        del prediction
        pixels = side * 2 ** (len(vae.config.block_out_channels) - 1)
        with FlopCounterMode(display=False, custom_mapping=fused_attention) as vae_count, torch.no_grad():
            vae.encode(torch.empty(1, 3, pixels, pixels))
    matrices = sum(p.numel() for p in trained)
    encoders = [file for name in PARTS[2:] for file in (folder / name).glob("*.safetensors")]
    return ModelSize(
        unet_count.get_total_flops(),
        vae_count.get_total_flops(),
        sum(_numbers(file) for name in PARTS for file in (folder / name).glob("*.safetensors")),
        matrices + (sum(_numbers(file, tables=False) for file in encoders) if train_text_encoder else 0),
        matrices / sum(p.numel() for p in unet.parameters()),
        sum(kept.values()),
        width,
        latents.numel(),
        pixels,
    )


def _numbers(file: Path, *, tables: bool = True) -> int:
    """How many a file holds; without those of embedding tables, which no method trains."""
    with safe_open(file, framework="pt") as weights:
        names = [name for name in weights.keys() if tables or "_embedding" not in name]  # noqa: SIM118 (a file)
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)


def _device_speed() -> float:
    """Operations a second that the models reach on this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024, 1024, device=device)
    (a @ a).sum().item()
    start = time.perf_counter()
    for _ in range(4):
        a = a @ a / 1024
    a.sum().item()
    return REACHED * 4 * 2 * 1024**3 / (time.perf_counter() - start)
