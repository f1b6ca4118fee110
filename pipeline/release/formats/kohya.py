"""The LoRA for ComfyUI, the A1111 family and kohya's scripts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pipeline.merge.factors import MergedModel
from pipeline.release.formats.exporter import PT, Exporter, Pipeline
from pipeline.release.formats.lora import check_lora, lora_tensors
from pipeline.release.formats.names import COMFYUI, file_stem
from training.checkpoint import save_tensors


def write_kohya(merged: MergedModel, pipe: Pipeline, folder: Path, name: str) -> list[Path]:
    """Write `comfyui/<name>.safetensors`, the LoRA that ComfyUI, the A1111 family and kohya's scripts read, in kohya's
    names (`lora_unet_…_to_k.lora_down.weight`), with the metadata by which A1111 shows it beside its base.
    """
    stem = file_stem(name)
    path = folder / COMFYUI / f"{stem}.safetensors"
    # one alpha for all layers: diffusers drops alphas that differ and then loads some layers at a wrong scale
    rank = max(left.shape[1] for left in merged.left.values())
    factors = lora_tensors(merged)
    tensors = {}
    for layer in merged.layers:
        down, up = factors[f"{layer}.lora_A.weight"], factors[f"{layer}.lora_B.weight"]
        key = kohya_name(layer, pipe.unet.config)
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = (up.float() * (down.shape[0] / rank)).to(up.dtype)
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_tensors(path, tensors, PT | kohya_metadata(pipe, stem, rank))
    check_lora(merged, pipe, path)
    return [path]


def kohya_name(layer: str, unet: Any) -> str:
    """A UNet's layer as kohya's scripts name it: diffusers' name, but of SDXL that of Stability's own code, which
    counts blocks and the layers in them in one: `down_blocks.1.attentions.0.…` -> `lora_unet_input_blocks_4_1_…`.

    unet: its configuration.
    """
    if unet.addition_embed_type == "text_time":
        each = unet.layers_per_block + 1
        layer = re.sub(
            r"^down_blocks\.(\d+)\.attentions\.(\d+)",
            lambda m: f"input_blocks.{each * int(m[1]) + int(m[2]) + 1}.1",
            layer,
        )
        layer = re.sub(r"^mid_block\.attentions\.0", "middle_block.1", layer)
        layer = re.sub(
            r"^up_blocks\.(\d+)\.attentions\.(\d+)",
            lambda m: f"output_blocks.{each * int(m[1]) + int(m[2])}.1",
            layer,
        )
    return f"lora_unet_{layer.replace('.', '_')}"


def kohya_metadata(pipe: Pipeline, name: str, rank: int) -> dict[str, str]:
    """What kohya's scripts write beside a LoRA's tensors, as far as programs act on it. Without `ss_base_model_version`
    and `ss_v2` A1111 takes every file for one of Stable Diffusion 1 and hides it beside other bases."""
    is_xl = pipe.unet.config.addition_embed_type == "text_time"
    is_v2 = not is_xl and pipe.unet.config.cross_attention_dim == 1024
    is_v = pipe.scheduler.config.prediction_type == "v_prediction"
    if is_xl:
        version, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    elif is_v2:
        version, architecture = (
            ("sd_v2_v", "stable-diffusion-v2-768-v") if is_v else ("sd_v2", "stable-diffusion-v2-512")
        )
    else:
        version, architecture = "sd_v1_v" if is_v else "sd_v1", "stable-diffusion-v1"
    return {
        "ss_base_model_version": version,
        "ss_v2": str(is_v2),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if is_xl else "diffusers",
        "modelspec.title": name,
        "modelspec.prediction_type": "v" if is_v else "epsilon",
    }


EXPORTER = Exporter(write_kohya)
