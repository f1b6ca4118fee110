"""Textual Inversion (Gal et al., ICLR 2023): the embedding of a new token, and nothing else."""

from __future__ import annotations

from training.methods.method import Method

# diffusers' examples/textual_inversion: 5e-4 a sample, scaled by its batch of 4
TEXTUAL_INVERSION = Method(
    name="textual_inversion",
    title="Textual Inversion",
    reference="https://arxiv.org/abs/2208.01618",
    unet="none",
    token="new",
    regularization="none",
    augment=False,
    learning_rate=2e-3,
    steps=3000,
)
