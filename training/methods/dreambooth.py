"""DreamBooth (Ruiz et al., CVPR 2023): the whole UNet learns a rare word, held back by images the base itself drew."""

from __future__ import annotations

from training.methods.method import Method

# learning rate and steps of diffusers' examples/dreambooth with prior preservation
DREAMBOOTH = Method(
    name="dreambooth",
    title="DreamBooth",
    reference="https://arxiv.org/abs/2208.12242",
    unet="all",
    text_encoder=True,
    token="rare",
    regularization="generated",
    augment=False,
    learning_rate=5e-6,
    steps=800,
)
