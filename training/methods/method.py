"""`Method`: what trains on which data, as a declaration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

UNetPart = Literal["none", "text_kv", "cross_attention", "all"]
"""Parts of a UNet, found by what they are: `training.parts.unet_parameters`."""

RARE_WORDS = ("pll", "ucd", "ktn")
"""Rarely used tokens that new rows start from, in turn, and that DreamBooth's concepts go by (the Custom Diffusion
authors' list begins ktn+pll+ucd; small vocabularies have no ktn, so it comes last)."""


@dataclass(frozen=True)
class Method:
    """What one training loop (`training.loop.train`) is told to do. The numbers are defaults that a batch may change.

    name: what a batch file calls it. title, reference: for model cards.
    unet: what of the UNet trains.
    text_encoder: whether the text encoders may train too, without their embedding tables.
    token: `new`, a token of its own for each concept, whose embedding rows train; `rare`, a word that the tokenizer
        has and people hardly use, which stays as it is.
    detached_start: whether keys and values of begin-of-text take no gradient.
    regularization, augment: what it trains on beside the concept's images, and whether these are augmented.
    learning_rate: of a step, whatever the batch. steps: for one concept.
    """

    name: str
    title: str
    reference: str
    unet: UNetPart
    token: Literal["new", "rare"]
    regularization: Literal["real", "generated", "none"]
    augment: bool
    learning_rate: float
    steps: int
    text_encoder: bool = False
    detached_start: bool = False

    @property
    def mergeable(self) -> bool:
        """Whether separately trained concepts fit into one model: by the closed form, which is one of text K/V layers
        (Custom Diffusion, equation 4), or as they are, where only tokens were made."""
        return self.unet in ("text_kv", "none")
