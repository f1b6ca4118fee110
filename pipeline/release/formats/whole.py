"""Whole parts of a model, where more than text K/V layers changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from pipeline.release.formats.exporter import PT
from training.backbone import Backbone
from training.checkpoint import save_tensors
from training.weights import ConceptWeights


def write_parts(weights: ConceptWeights, backbone: Backbone, folder: Path) -> list[Path]:
    """Write the parts of the model that changed, whole (`unet/`, `text_encoder/`, float16), each loaded back."""
    paths: list[Path] = []
    with backbone.changed(weights.deltas, {}):
        for part in sorted({_part_of(name) for name in weights.deltas}):
            module = copy.deepcopy(getattr(backbone.pipe, part)).half()
            if not all(p.isfinite().all() for p in module.parameters()):
                raise ValueError(f"{part}: the weights hold NaN or infinity; nothing was written")
            if part == "unet":
                module.register_to_config(_name_or_path="")  # where the base lay on this machine is nobody's business
                module.save_pretrained(folder / part)
            else:
                save_text_encoder(module, folder / part)
            _check_part(module, folder / part)
            paths += sorted((folder / part).iterdir())
    return paths


def _part_of(parameter: str) -> str:
    """Which part of a pipeline has a parameter (`Backbone.parameters`)."""
    part = parameter.partition(".")[0]
    return part if part in ("text_encoder", "text_encoder_2") else "unet"


def save_text_encoder(encoder: Any, folder: Path) -> None:
    """Write a CLIP text encoder as versions 4 and 5 of transformers both load it.

    5 writes `CLIPTextModel`'s weights without the prefix `text_model.`. 4 finds none of them by these names, and fills
    the model with random numbers; it only warns. 5 takes both.
    """
    encoder.save_pretrained(folder)
    tensors = {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": tensor
        for key, tensor in encoder.state_dict().items()
    }
    save_tensors(folder / "model.safetensors", tensors, PT)


def _check_part(module: Any, path: Path) -> None:
    arrived = type(module).from_pretrained(path).state_dict()
    for key, tensor in module.state_dict().items():
        if key not in arrived or not torch.equal(arrived[key].half().cpu(), tensor.cpu()):
            raise RuntimeError(f"{path}: {key} did not arrive when it was loaded")
