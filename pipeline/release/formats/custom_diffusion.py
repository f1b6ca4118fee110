"""The established diffusers Custom Diffusion file: dense W_0 + delta."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.merge.factors import MergedModel
from pipeline.release.formats.exporter import PT, Exporter, Pipeline, Snippet, quiet
from training.checkpoint import save_tensors

CUSTOM_DIFFUSION = "pytorch_custom_diffusion_weights.safetensors"


def write_custom_diffusion(merged: MergedModel, pipe: Pipeline, folder: Path, name: str) -> list[Path]:
    """Write the established diffusers Custom Diffusion file: dense W_0 + delta of every text K/V layer, float16.

    Keys are those of `unet.save_attn_procs`: `<attention>.processor.to_k_custom_diffusion.weight`. Self-attention has
    an empty tensor under its processor's name: the loader wants one entry for each attention layer, which
    diffusers' own safetensors writer leaves out, so that its files do not load (diffusers#9320).
    """
    deltas, tensors = merged.deltas, {}
    touched = {layer.rpartition(".")[0] for layer in merged.layers}
    for processor in pipe.unet.attn_processors:
        attention = processor.removesuffix(".processor")
        if attention not in touched:
            tensors[processor] = torch.empty(0, dtype=torch.float16)
            continue
        for part in ("to_k", "to_v"):
            weight = pipe.unet.get_submodule(f"{attention}.{part}").weight.detach().float().cpu()
            delta = deltas.get(f"{attention}.{part}")
            # contiguous copies: safetensors refuses tensors that share memory
            tensors[f"{processor}.{part}_custom_diffusion.weight"] = (
                weight if delta is None else weight + delta.cpu()
            ).half()
    path = folder / CUSTOM_DIFFUSION
    save_tensors(path, tensors, PT)
    _check_custom_diffusion(pipe, path, tensors)
    return [path]


@quiet()
def _check_custom_diffusion(pipe: Pipeline, path: Path, expected: dict[str, torch.Tensor]) -> None:
    before = pipe.unet.attn_processors
    try:
        # without `_pipeline` diffusers reads the file and installs nothing (diffusers#9320)
        pipe.unet.load_attn_procs(path.parent, weight_name=path.name, _pipeline=pipe)
        arrived = pipe.unet.state_dict()
    finally:
        pipe.unet.set_attn_processor(before)
    for key, tensor in expected.items():
        if tensor.numel() and (
            key not in arrived or not torch.equal(arrived[key].cpu(), tensor.to(arrived[key].dtype))
        ):
            raise RuntimeError(f"{path}: {key} did not arrive when diffusers loaded the file")


EXPORTER = Exporter(
    write_custom_diffusion,
    Snippet(
        "As Custom Diffusion weights",
        f'pipe.unet.load_attn_procs(RELEASE, weight_name="{CUSTOM_DIFFUSION}", _pipeline=pipe)',
        before="`_pipeline=pipe` is needed: without it diffusers reads the file and installs nothing\n"
        "([diffusers#9320](https://github.com/huggingface/diffusers/issues/9320)).",
    ),
)
