from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a miniature model with random weights, in the diffusers layout, float32."""
    from diffusers import StableDiffusionPipeline

    from pipeline.miniature import pretrain

    folder = tmp_path_factory.mktemp("tiny_base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = pretrain.make_tokenizer(folder / "work")
        pipe = StableDiffusionPipeline(
            vae=pretrain.build_autoencoder(),
            text_encoder=pretrain.text_encoder_from(pretrain.build_clip(tokenizer), tokenizer),
            tokenizer=tokenizer,
            unet=pretrain.build_unet(),
            scheduler=pretrain.build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder / "model")
    return folder / "model"
