"""What can be said of a base model before its weights are loaded, and what is loaded then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.spec import MINIATURE
from training.backbone import load_backbone
from training.base import base_digest, check_base

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 123\n"
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The miniature's files, by links."""
    folder = tmp_path / "base"
    shutil.copytree(MINIATURE / "model", folder, copy_function=lambda source, place: Path(place).symlink_to(source))
    return folder


def put(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    file.write_text(text)


def change(file: Path, **values) -> None:
    put(file, json.dumps(json.loads(file.read_text()) | values))


def rename(file: Path, name: str) -> None:
    file.rename(file.with_name(name))


def no_words(tokenizer: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tokenizer / name).unlink(missing_ok=True)


def cut(file: Path) -> None:
    content = file.read_bytes()[:-100]
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda b: change(b / "unet/config.json", in_channels=9),
            "in_channels is 9, .*: a model for inpainting",
        ),
        (lambda b: change(b / "unet/config.json", in_channels=8), "in_channels is 8, .*; name the text-to-image model"),
        (
            lambda b: rename(b / UNET, "diffusion_pytorch_model.bin"),
            r"unet/: has diffusion_pytorch_model.bin, but no",
        ),
        (lambda b: rename(b / TEXT, "pytorch_model.bin"), r"text_encoder/: has pytorch_model.bin, but no safetensors"),
        (lambda b: (b / UNET).unlink(), "unet/: no weights there"),
        (lambda b: put(b / UNET, POINTER), r"unet/diffusion_pytorch_model.safetensors: a pointer of Git LFS.*lfs pull"),
        (lambda b: put(b / "tokenizer/tokenizer.json", POINTER), "tokenizer/tokenizer.json: a pointer of Git LFS"),
        (lambda b: put(b / "vae/config.json", POINTER), "vae/config.json: a pointer of Git LFS"),
        (lambda b: cut(b / TEXT), "text_encoder/model.safetensors: not a whole safetensors file"),
        (lambda b: (b / "scheduler/scheduler_config.json").unlink(), "scheduler/scheduler_config.json: missing"),
        (lambda b: put(b / "vae/config.json", "{"), "vae/config.json: cannot be read"),
        (lambda b: no_words(b / "tokenizer"), "tokenizer/: neither tokenizer.json nor vocab.json and"),
        (lambda b: change(b / "text_encoder/config.json", vocab_size=9), "knows 4575 words, .* has rows for 9"),
        (lambda b: change(b / "text_encoder/config.json", hidden_size=64), "192 wide, but text_encoder make 64"),
        (lambda b: put(b / "model_index.json", "[" * 100_000), "model_index.json: cannot be read"),
        (lambda b: change(b / "model_index.json", unet=["diffusers", ["x"]]), "names no unet"),
        (lambda b: change(b / "model_index.json", _class_name="DiTPipeline"), "_class_name is 'DiTPipeline': only mod"),
        (lambda b: change(b / "model_index.json", _class_name=None), "_class_name is None: only models of"),
        *(
            (
                lambda b, side=side: change(b / "unet/config.json", sample_size=side),
                "unet/.*: sample_size is .*, exp",
            )
            for side in (None, "8", 0, 10**9, [8, 8])
        ),
        (lambda b: change(b / "unet/config.json", layers_per_block=10**6), "unet/.*: layers_per_block is 1000000, exp"),
        (
            lambda b: change(b / "unet/config.json", transformer_layers_per_block=[1, [10**6]]),
            "unet/.*: transformer_layers_per_block is 1000000",
        ),
        (
            lambda b: change(b / "text_encoder/config.json", num_hidden_layers=10**6),
            "text_encoder/.*: num_hid",
        ),
        (
            lambda b: change(b / "text_encoder/config.json", model_type="t5"),
            "text_encoder/.*: model_type is 't5'",
        ),
        (
            lambda b: change(b / "scheduler/scheduler_config.json", prediction_type="flow"),
            "prediction_type is 'flow', expected one of epsilon",
        ),
        (lambda b: change(b / "unet/config.json", layers_per_block=3), "is missing in the weights, expected"),
        (lambda b: change(b / "model_index.json", text_encoder=[None, None]), "names no text_encoder"),
        (
            lambda b: change(b / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
            "text_encoder is transformers.T5EncoderModel, expected transformers.CLIPTextModel",
        ),
        (lambda b: change(b / "model_index.json", unet=["evil", "UNet2DConditionModel"]), "unet is evil.UNet2D"),
        (
            lambda b: (
                put(b / "unet/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": "b"}}')
                or (b / UNET).unlink()
            ),
            "unet/b: missing, though the index of the weights names it",
        ),
    ],
)
def test_what_cannot_be_taught_is_named(base: Path, spoil: Callable[[Path], None], message: str):
    check_base(base)
    spoil(base)
    with pytest.raises(ValueError, match=f"base '{base}': .*{message}"):
        check_base(base)


def test_weights_of_half_precision_alone(base: Path):
    """They are read, and are what the base is known by; beside plain ones they are not."""
    plain = base_digest(MINIATURE / "model")
    assert base_digest(base) == plain
    (base / "unet/diffusion_pytorch_model.fp16.safetensors").symlink_to(MINIATURE / "model" / UNET)
    assert base_digest(base) == plain and not check_base(base).variant
    (base / UNET).unlink()
    rename(base / TEXT, "model.fp16.safetensors")
    half = check_base(base)
    assert half.variant == "fp16" and base_digest(base) != plain
    assert [file.name for file in half.weights["text_encoder"]] == ["model.fp16.safetensors"]
    assert [file.name for file in half.weights["vae"]] == ["diffusion_pytorch_model.safetensors"]
    loaded, expected = (load_backbone(place).parameters for place in (base, MINIATURE / "model"))
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_no_code_of_a_base_is_run_or_asked_about(base: Path, tmp_path: Path, capsys):
    for part in ("tokenizer", "unet"):
        (base / part / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    config = base / "tokenizer/tokenizer_config.json"
    change(config, tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    change(base / "unet/config.json", auto_map={"AutoModel": "evil.Evil"})
    load_backbone(base)
    assert not (tmp_path / "ran").exists() and "y/N" not in capsys.readouterr().out


def test_the_safety_checker_is_left_out(base: Path):
    """Its files are not even asked for."""
    assert not check_base(base).has_safety_checker
    checker, extractor = ["stable_diffusion", "StableDiffusionSafetyChecker"], ["transformers", "CLIPImageProcessor"]
    change(base / "model_index.json", safety_checker=checker, feature_extractor=extractor, requires_safety_checker=True)
    assert check_base(base).has_safety_checker
    pipe = load_backbone(base).pipe
    assert pipe.safety_checker is None and pipe.feature_extractor is None


def test_a_tokenizer_without_a_length_has_its_text_encoders(base: Path):
    change(base / "tokenizer/tokenizer_config.json", model_max_length=10**30)
    with pytest.raises(ValueError, match="40 tokens, but the base model's text encoder takes 30"):
        check_base(base).words.check_fits(["cow " * 40])
    assert load_backbone(base).encode_text(["a cow"]).hidden.shape == (1, 32, 192)
