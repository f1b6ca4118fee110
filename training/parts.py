"""Parts of a UNet, found by what they are."""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import nn

from training.methods.method import UNetPart


def text_kv_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """K and V projections that read text, by module name, in the order of the model.

    Raises: ValueError when the model has none.
    """
    layers = {}
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            layers[f"{name}.to_k"], layers[f"{name}.to_v"] = module.to_k, module.to_v
    if not layers:
        raise ValueError(f"the base model ({type(unet).__name__}) has no text cross-attention: nothing to train")
    return layers


def unet_parameters(unet: nn.Module, part: UNetPart) -> list[str]:
    """Names of the parameters of a part of a UNet, as in `Backbone.parameters`; those of `text_kv` are the layers'."""
    if part == "none":
        return []
    if part == "text_kv":
        return list(text_kv_layers(unet))
    names = [short_name(name) for name, _ in unet.named_parameters()]
    if part == "all":
        return names
    found = [n for n, m in unet.named_modules() if isinstance(m, Attention) and m.is_cross_attention]
    return [name for name in names if name.startswith(tuple(f"{n}." for n in found))]


def short_name(parameter: str) -> str:
    """`conv_in.weight` -> `conv_in`: a layer's name stands for its weight."""
    return parameter.removesuffix(".weight")
