"""Concept packs: P members train at once over one resident backbone.

Members differ in K/V weights and token rows only. A step's samples are grouped by member, so the K (or V) of a layer
is one batched matrix product over stacked weights; all else is shared, and each sample goes through it alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from training.backbone import Backbone


class StackedLinear(nn.Module):
    """P linear layers of one shape, over a batch that is grouped by member.

    weight: (P, out, d) float32. only: the member that all samples belong to, when it is not None.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().float()[None])
        self.bias = layer.bias
        self.only: int | None = None

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """(B, n, d) -> (B, n, out), B a multiple of P: samples i * B/P … (i + 1) * B/P go through weight i.

        Keys and values of position 0, begin-of-text, the same for every prompt, take no gradient (authors'
        `CustomDiffusion`).
        """
        if len(self.weight) == 1 or self.only is not None:
            made = F.linear(text, self.weight[self.only or 0], self.bias)
        else:
            grouped = text.reshape(len(self.weight), -1, text.shape[-1])
            made = torch.bmm(grouped, self.weight.mT).reshape(*text.shape[:-1], -1)
            made = made if self.bias is None else made + self.bias
        return torch.cat([made[:, :1].detach(), made[:, 1:]], 1)

    def bind(self, members: Sequence[nn.Parameter]) -> None:
        """Stack the members' weights, each (out, d), and make each a view of its slice: what an optimizer does to a
        member happens to the stack."""
        self.weight = nn.Parameter(torch.stack([weight.data for weight in members]))
        for weight, slice_ in zip(members, self.weight.data, strict=True):
            weight.data = slice_


@contextlib.contextmanager
def stacked_layers(backbone: Backbone) -> Iterator[dict[str, StackedLinear]]:
    """Inside the block, the text K/V layers of the UNet are `StackedLinear`s, by the names of `backbone.layers`."""
    layers = {name: StackedLinear(layer) for name, layer in backbone.layers.items()}
    try:
        for name, layer in layers.items():
            backbone.unet.set_submodule(name, layer)
        yield layers
    finally:
        for name, original in backbone.layers.items():
            backbone.unet.set_submodule(name, original)


@contextlib.contextmanager
def only(layers: dict[str, StackedLinear], member: int) -> Iterator[None]:
    """Inside the block all samples belong to one member of the pack."""
    try:
        for layer in layers.values():
            layer.only = member
        yield
    finally:
        for layer in layers.values():
            layer.only = None
