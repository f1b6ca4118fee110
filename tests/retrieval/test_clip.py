from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrieval.clip import ClipModel, load_clip


def test_features_are_unit_rows(clip: ClipModel) -> None:
    text = clip.encode_text(["a cat", "a dog", "a cat"], batch_size=2)
    images = clip.encode_images([Image.new("L", (50, 40)), Image.new("RGBA", (20, 90), "red")])
    assert text.shape == (3, 16) and images.shape == (2, 16)
    assert text.dtype == images.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([text, images]), axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(text[0], text[2], atol=1e-6)
    assert abs(text[0] - text[1]).max() > 1e-3


def test_digest_is_of_the_weights(clip: ClipModel, clip_directory: Path) -> None:
    again = load_clip(str(clip_directory))
    assert again.digest == clip.digest
    again.model.logit_scale.data += 1
    assert ClipModel(again.name, again.model, again.tokenize, again.transform, again.device).digest != clip.digest


def test_directories_without_the_files(clip_directory: Path, tmp_path: Path) -> None:
    shutil.copy(clip_directory / "open_clip_config.json", tmp_path)
    (tmp_path / "open_clip_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"needs open_clip_config.json and a .safetensors file; found .*model\.bin"):
        load_clip(str(tmp_path))


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.pth", "pytorch_model.bin"])
def test_no_pickle_of_a_directory_is_read(clip: ClipModel, clip_directory: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(clip_directory / "open_clip_config.json", tmp_path)
    shutil.copy(clip_directory / "open_clip_model.safetensors", tmp_path / "mine.safetensors")
    (tmp_path / name).write_bytes(b"a pickle")
    assert load_clip(str(tmp_path)).digest == clip.digest
    shutil.copy(tmp_path / "mine.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"\['mine\.safetensors', 'other\.safetensors'\]; name the one"):
        load_clip(str(tmp_path))


def test_weights_that_are_none(clip_directory: Path, tmp_path: Path) -> None:
    shutil.copy(clip_directory / "open_clip_config.json", tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors is not whole"):
        load_clip(str(tmp_path))


def test_code_of_a_directory_is_not_run(clip_directory: Path, tmp_path: Path) -> None:
    shutil.copy(clip_directory / "open_clip_model.safetensors", tmp_path)
    described = json.loads((clip_directory / "open_clip_config.json").read_text())
    described["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="asks for code of its own to be run"):
        load_clip(str(tmp_path))


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"its pretrained tags are .*laion2b_s34b_b79k"):
        load_clip("ViT-B-32/laion")
    with pytest.raises(ValueError, match="open_clip does not know that name"):
        load_clip("ViT-B-31/laion2b_s34b_b79k")
