"""Custom Diffusion (Kumari et al., CVPR 2023) and its wider forms: 250 steps, 200 real images, 1e-5 a sample.

As in the authors' trainer, keys and values of begin-of-text, the same for every prompt, are detached in all forms.
"""

from __future__ import annotations

import dataclasses

from training.methods.method import Method

CUSTOM_DIFFUSION = Method(
    name="custom_diffusion",
    title="Custom Diffusion",
    reference="https://arxiv.org/abs/2212.04488",
    unet="text_kv",
    token="new",
    regularization="real",
    augment=True,
    learning_rate=8e-5,
    steps=250,
    detached_start=True,
)

# `freeze_model: crossattn` of the authors' trainer and of diffusers' example: the queries and the output too
CUSTOM_DIFFUSION_CROSSATTN = dataclasses.replace(
    CUSTOM_DIFFUSION,
    name="custom_diffusion_crossattn",
    title="Custom Diffusion, all of cross-attention",
    unet="cross_attention",
)

# "fine-tune all" of the paper's section 4.2; the learning rate is that of DreamBooth, which trains the same weights
CUSTOM_DIFFUSION_ALL = dataclasses.replace(
    CUSTOM_DIFFUSION,
    name="custom_diffusion_all",
    title="Custom Diffusion, the whole UNet",
    unet="all",
    learning_rate=5e-6,
)
