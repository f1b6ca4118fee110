"""Where trained weights stand in the backbone while they train.

Concept packs: P members train at once over one resident backbone. They differ in K/V weights and token rows only. A
step's samples are grouped by member, so the K (or V) of a layer is one batched matrix product over stacked weights; all
else is shared, and each sample goes through it alone. Methods that train other parameters have them in place, and packs
of one member.
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

    def gradient(self, place: int) -> torch.Tensor | None:
        """Of one member, (out, d)."""
        return None if self.weight.grad is None else self.weight.grad[place]

    def value_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The only member's part of a tensor shaped like `weight`."""
        return tensor[0]


class InPlace:
    """A parameter of any kind and shape that the only member of a pack trains where it stands.

    weight: the parameter that stands there now.
    """

    def __init__(self, module: nn.Module, attribute: str) -> None:
        self.module, self.attribute = module, attribute
        self.weight: nn.Parameter = getattr(module, attribute)

    def bind(self, members: Sequence[nn.Parameter]) -> None:
        """Put the member's own parameter there."""
        (self.weight,) = members
        setattr(self.module, self.attribute, self.weight)

    def gradient(self, place: int) -> torch.Tensor | None:
        return self.weight.grad

    def value_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


Layers = dict[str, StackedLinear | InPlace]
"""What trains, by the names of `Backbone.parameters`."""


@contextlib.contextmanager
def trained_layers(backbone: Backbone, names: Sequence[str], *, detached_start: bool) -> Iterator[Layers]:
    """Inside the block, what trains stands in the backbone: the text K/V layers among `names` as `StackedLinear`s when
    begin-of-text is detached, everything else in place. Afterwards the backbone has its own parameters again."""
    stackable = [name for name in names if detached_start and name in backbone.layers]
    stacked = {name: StackedLinear(backbone.layers[name]) for name in stackable}
    in_place: dict[str, InPlace] = {}
    try:
        for name, layer in stacked.items():
            backbone.unet.set_submodule(name, layer)
        in_place = {name: InPlace(*backbone.place(name)) for name in names if name not in stacked}
        yield {name: stacked.get(name) or in_place[name] for name in names}
    finally:
        for name, place in in_place.items():
            place.bind([backbone.parameters[name]])
        for name in stacked:
            backbone.unet.set_submodule(name, backbone.layers[name])


@contextlib.contextmanager
def only(layers: Layers, member: int) -> Iterator[None]:
    """Inside the block all samples belong to one member of the pack."""
    stacked = [layer for layer in layers.values() if isinstance(layer, StackedLinear)]
    try:
        for layer in stacked:
            layer.only = member
        yield
    finally:
        for layer in stacked:
            layer.only = None
