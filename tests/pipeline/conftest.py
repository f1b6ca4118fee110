import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
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


@pytest.fixture(scope="session")
def s3() -> Iterator[None]:
    """A server on loopback that speaks S3, conditional writes included."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"ENDPOINT_URL": f"http://{host}:{port}", "DEFAULT_REGION": "us-east-1"}
    names |= {"ACCESS_KEY_ID": "tests", "SECRET_ACCESS_KEY": "tests"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(f"AWS_{name}", value)
        yield
    server.stop()


@pytest.fixture
def bucket(s3: None) -> str:
    """URL of an empty bucket."""
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    name = f"models-{os.urandom(4).hex()}"
    fs.mkdir(name)
    return f"s3://{name}"
