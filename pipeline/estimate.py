"""What a plan will cost: seconds and memory of each stage, before anything runs.

Operations are counted by running the base model's layers on the meta device (shapes only). Seconds are operations over
the device's speed on one matrix product, times how much of that the models reach, measured on the miniature with
`make demo`. Network time is not estimated.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.plan import Plan, Stage
from training.backbone import local_model, text_kv_layers

REACHED = 0.35
"""Share of the matrix product's speed that UNet and autoencoder reach, measured on 2 CPU cores with the miniature."""


@dataclass(frozen=True)
class Estimate:
    """seconds: None where it depends on the network or the corpus. gib: peak memory of the stage's process."""

    seconds: float | None
    gib: float | None


@dataclass(frozen=True)
class _Model:
    unet_flops: float
    vae_flops: float
    parameters: int
    trained: int


def estimates(plan: Plan) -> dict[str, Estimate]:
    """Stage key -> estimate, for each stage of the plan."""
    model, speed = _measure(local_model(plan.batch.base_path)), _device_speed()
    return {stage.key: _estimate(stage, plan, model, speed) for stage in plan}


def _estimate(stage: Stage, plan: Plan, model: _Model, speed: float) -> Estimate:
    resident = model.parameters * 4 / 2**30
    if stage.kind == "features":
        views = len(stage.params["images"]) * max(1, stage.params["views"]) + plan.batch.retrieval.images
        return Estimate(views * model.vae_flops / speed, resident)
    if stage.kind == "train":
        settings = stage.params["training"]
        samples = settings["batch_size"] * (2 if settings["regularization"] == "real" else 1)
        # forward, and backward for the activations; K/V gradients are small beside
        seconds = settings["steps"] * samples * 2 * model.unet_flops / speed
        return Estimate(seconds, resident + model.trained * 16 / 2**30 + samples * model.unet_flops / 4e11)
    if stage.kind == "evaluate":
        settings = stage.params["evaluation"]
        images = 4 * len(stage.params["prompts"]) * settings["samples"]
        return Estimate(images * settings["steps"] * 2 * model.unet_flops / speed, resident)
    if stage.kind == "merge":
        return Estimate(None, resident + len(plan.batch.concepts) * model.trained * 4 / 2**30)
    return Estimate(None, None)


def _measure(folder: Path) -> _Model:
    def config(part: str) -> dict[str, Any]:
        return json.loads((folder / part / "config.json").read_text())

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config("unet"))
        vae = AutoencoderKL.from_config(config("vae"))
        side, width = unet.config.sample_size, unet.config.cross_attention_dim
        latents = torch.empty(1, unet.config.in_channels, side, side)
        added = None
        if unet.config.addition_embed_type == "text_time":
            added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        with FlopCounterMode(display=False) as unet_count, torch.no_grad():
            unet(latents, torch.ones(1), torch.empty(1, 77, width), added_cond_kwargs=added)
        pixels = side * 2 ** (len(vae.config.block_out_channels) - 1)
        with FlopCounterMode(display=False) as vae_count, torch.no_grad():
            vae.encode(torch.empty(1, 3, pixels, pixels))
    return _Model(
        unet_count.get_total_flops(),
        vae_count.get_total_flops(),
        sum(p.numel() for module in (unet, vae) for p in module.parameters()),
        sum(layer.weight.numel() for layer in text_kv_layers(unet).values()),
    )


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
