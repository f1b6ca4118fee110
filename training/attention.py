"""Which attention kernel runs: the one place where devices differ."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor2_0


def use_attention(unet: Any, backend: Literal["auto", "xformers", "sdpa"]) -> str:
    """Switch the UNet to a backend and return its name. `auto`: xformers on CUDA where it imports, else SDPA.

    Raises: ValueError for xformers where it cannot run. (The xformers path was never run on a GPU by its authors.)
    """
    on_cuda = next(unet.parameters()).device.type == "cuda"
    installed = importlib.util.find_spec("xformers") is not None
    if backend == "auto":
        backend = "xformers" if on_cuda and installed else "sdpa"
    if backend == "xformers":
        if not on_cuda:
            raise ValueError("attention: xformers needs a CUDA device and has no CPU kernels; use 'sdpa' or 'auto'")
        if not installed:
            raise ValueError(
                "attention: xformers is not installed; run `pip install 'polyconcept[gpu]'`, or use 'sdpa'"
            )
        unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(AttnProcessor2_0())
    return backend


def training_dtype(precision: Literal["auto", "fp32", "bf16"], *, cuda: bool | None = None) -> torch.dtype:
    """dtype of the frozen model. `auto`: bfloat16 on CUDA, float32 on the CPU. cuda: which it is; this machine's when
    None."""
    if precision == "auto":
        cuda = torch.cuda.is_available() if cuda is None else cuda
        return torch.bfloat16 if cuda else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
