"""Models in the shapes of Stable Diffusion 1.4 with random weights, and data for them: what the other benches measure.

Run alone, it prints the numbers of parameters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])

import torch  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from pipeline.spec import MINIATURE  # noqa: E402
from training.attention import use_attention  # noqa: E402
from training.backbone import Backbone, TextFeatures  # noqa: E402
from training.features import ConceptFeatures, RegularizationFeatures  # noqa: E402
from training.run import Member, TrainingConcept, TrainingSettings  # noqa: E402


def stable_diffusion(dtype: torch.dtype = torch.float32) -> Backbone:
    """Stable Diffusion 1.4's UNet (860 M), text encoder (123 M) and autoencoder (84 M), random weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    finally:
        torch.set_default_dtype(torch.float32)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(MINIATURE / "model" / "tokenizer", model_max_length=77),
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    backbone = Backbone(pipe, "random")
    use_attention(backbone.unet, "sdpa")
    return backbone


def stable_diffusion_data(resolution: int) -> dict[str, tuple[int, ...]]:
    """Shapes of Stable Diffusion's latents and text features at a resolution in pixels, for `members`."""
    return {"latent": (4, resolution // 8, resolution // 8), "text": (77, 768)}


MINIATURE_DATA = {"latent": (32, 8, 8), "text": (32, 192)}


def members(
    count: int, scratch: Path, *, latent: tuple[int, ...], text: tuple[int, ...], batch_size: int, steps: int
) -> list[Member]:
    """Concepts of random latents (c, h, w) and text features (n, d), with 16 regularisation images each."""
    settings = TrainingSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=8e-5,
        token_learning_rate=8e-5,
        weight_decay=0.0,
        max_grad_norm=1.0,
        prior_weight=1.0,
        prompt="photo of a {}",
        seed=0,
        optimizer="adamw",
        checkpoint_every=10**9,
        sample_every=None,
    )
    prior = RegularizationFeatures(torch.randn(16, *latent), TextFeatures(torch.randn(16, *text)), [""] * 16)
    made = []
    for i in range(count):
        features = ConceptFeatures(torch.randn(8, *latent), torch.ones(8, 1, *latent[1:]), [""] * 8)
        concept = TrainingConcept(f"c{i}", f"<c{i}>", i, "cat", features, prior)
        made.append(Member([concept], settings, scratch / str(i)))
    return made


def main() -> None:
    backbone = stable_diffusion()
    parts = {"unet": backbone.unet, "text_encoder": backbone.text_encoders[0], "vae": backbone.vae}
    figures = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    print(json.dumps(figures | {"trained": sum(layer.weight.numel() for layer in backbone.layers.values())}))


if __name__ == "__main__":
    main()
