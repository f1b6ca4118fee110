"""The LoRA as peft itself keeps one."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from pipeline.merge.factors import MergedModel
from pipeline.release.formats.exporter import PT, Exporter, Pipeline
from pipeline.release.formats.lora import check_arrived, lora_config, lora_tensors
from training.checkpoint import save_tensors


def write_peft(merged: MergedModel, pipe: Pipeline, folder: Path, name: str) -> list[Path]:
    """Write the LoRA that `PeftModel.from_pretrained(pipe.unet, folder)` takes."""
    weights, described = folder / SAFETENSORS_WEIGHTS_NAME, folder / CONFIG_NAME
    save_tensors(weights, {f"base_model.model.{key}": tensor for key, tensor in lora_tensors(merged).items()}, PT)
    config = {"peft_type": "LORA", "task_type": None, "inference_mode": True, "base_model_name_or_path": None}
    described.write_text(json.dumps(config | lora_config(merged), indent=1))
    _check_peft(merged, pipe, folder)
    return [weights, described]


def _check_peft(merged: MergedModel, pipe: Pipeline, folder: Path) -> None:
    arrived = {}
    trainable = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    model = PeftModel.from_pretrained(pipe.unet, folder)
    try:
        for layer in merged.layers:
            module = pipe.unet.get_submodule(layer)
            if getattr(module, "active_adapters", ()):
                arrived[layer] = module.get_delta_weight(module.active_adapters[0]).detach().double().cpu()
    finally:
        model.unload()
        for parameter, was in zip(pipe.unet.parameters(), trainable, strict=True):
            parameter.requires_grad_(was)
    check_arrived(merged, arrived, folder / SAFETENSORS_WEIGHTS_NAME, "peft")


EXPORTER = Exporter(write_peft)
