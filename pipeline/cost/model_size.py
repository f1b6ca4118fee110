"""A base model in numbers: operations, weights, and the bytes that are alive in a training step.

They are counted by running the base model's layers on tensors that have shapes only.
"""

from __future__ import annotations

import functools
import json
import math
import weakref
from collections.abc import Iterable
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

from training.attention import use_attention
from training.base import Base, check_base
from training.methods import METHODS
from training.methods.method import UNetPart
from training.parts import short_name, unet_parameters


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
