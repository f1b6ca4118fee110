"""The LoRA of diffusers, and what other forms of a LoRA share with it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from pipeline.merge.factors import MergedModel
from pipeline.release.formats.exporter import PT, Exporter, Pipeline, Snippet, quiet
from pipeline.release.formats.names import LORA
from training.checkpoint import save_tensors

ADAPTER = "polyconcept_check"


def write_lora(merged: MergedModel, pipe: Pipeline, folder: Path, name: str) -> list[Path]:
    """Write the LoRA that `pipe.loadlora_weights(folder)` takes: lora_B = left (out, r), lora_A = right (r, d).

    The scale is 1 and nothing but digits is lost: a merged model is a LoRA by nature. The right factor is repeated for
    each layer; float16, as of models that are float16 themselves no more would be left.
    """
    path = folder / LORA
    config = {f"unet.{key}": value for key, value in lora_config(merged).items()}
    save_tensors(
        path,
        {f"unet.{key}": tensor for key, tensor in lora_tensors(merged).items()},
        PT | {LORA_ADAPTER_METADATA_KEY: json.dumps(config, sort_keys=True)},
    )
    check_lora(merged, pipe, path)
    return [path]


def lora_tensors(merged: MergedModel) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in merged.layers:
        left, right = merged.factors(layer)
        # copies: safetensors refuses the right factor shared by all layers
        tensors[f"{layer}.lora_A.weight"] = right.detach().cpu().half().contiguous().clone()
        tensors[f"{layer}.lora_B.weight"] = left.detach().cpu().half().contiguous().clone()
    return tensors


def lora_config(merged: MergedModel) -> dict:
    """Ranks and alphas for peft: older diffusers, if it has to guess, gives a wrong scale to layers whose rank is not
    the commonest. Only settings that peft has long had: it refuses unknown ones."""
    ranks = {layer: merged.factors(layer)[0].shape[1] for layer in merged.layers}
    rank = max(ranks.values())
    others = {layer: r for layer, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
    }


@quiet()
def check_lora(merged: MergedModel, pipe: Pipeline, path: Path) -> None:
    arrived = {}
    try:
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=ADAPTER)
        for layer in merged.layers:
            module = pipe.unet.get_submodule(layer)
            if ADAPTER in getattr(module, "active_adapters", ()):
                arrived[layer] = module.get_delta_weight(ADAPTER).detach().double().cpu()
    finally:
        pipe.delete_adapters(ADAPTER)
        pipe.unload_lora_weights()
    check_arrived(merged, arrived, path, "diffusers")


def check_arrived(merged: MergedModel, arrived: dict[str, torch.Tensor], path: Path, by: str) -> None:
    for layer, delta in merged.deltas.items():
        if layer not in arrived:
            raise RuntimeError(f"{path}: {layer} did not arrive when {by} loaded the file")
        # the loader multiplies in the base's precision
        if (arrived[layer] - delta.double().cpu()).norm() > 1e-2 * delta.double().norm() + 1e-8:
            raise RuntimeError(f"{path}: {layer} arrived changed when {by} loaded the file (a wrong scale?)")


EXPORTER = Exporter(
    write_lora,
    Snippet(
        "As a LoRA",
        f'pipe.load_lora_weights(RELEASE, weight_name="{LORA}")',
        after="With peft alone: `PeftModel.from_pretrained(pipe.unet, RELEASE)`.",
    ),
)
