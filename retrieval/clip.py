"""CLIP features by open_clip, as unit vectors."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")


@dataclass(frozen=True)
class ClipModel:
    """An open_clip model in evaluation mode, with its tokenizer and image transform."""

    name: str
    model: Any  # torch.nn.Module, of open_clip's form
    tokenize: Callable[[list[str]], torch.Tensor]
    transform: Callable[[Image.Image], torch.Tensor]
    device: torch.device

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the weights (sha256 of names, types, shapes and bytes); what a hub name stands for may change."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return total.hexdigest()

    @torch.inference_mode()
    def encode_text(self, texts: list[str], batch_size: int = 256) -> np.ndarray:
        """Encode texts as (n, d) float32 rows of unit length."""
        batches = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
        return self._unit_rows(self.model.encode_text(self.tokenize(batch).to(self.device)) for batch in batches)

    @torch.inference_mode()
    def encode_images(self, images: list[Image.Image], batch_size: int = 64) -> np.ndarray:
        """Encode images as (n, d) float32 rows of unit length."""
        batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        return self._unit_rows(
            self.model.encode_image(
                torch.stack([self.transform(image.convert("RGB")) for image in batch]).to(self.device)
            )
            for batch in batches
        )

    def _unit_rows(self, batches) -> np.ndarray:
        rows = [torch.nn.functional.normalize(batch.float(), dim=-1).cpu() for batch in batches]
        if not rows:
            raise ValueError("nothing to encode: the list is empty")
        return torch.cat(rows).numpy()


def clip_digest(model: str) -> str:
    """What a CLIP model is, without loading it: the hash of a directory's files, else the name itself.

    Raises:
        ValueError: it looks like a path, and there is no such directory.
    """
    folder = Path(model)
    if not folder.is_dir():
        if model.startswith((".", "/")):
            raise ValueError(f"CLIP directory {model}: not there")
        return model
    total = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        total.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=8)
def check_clip(model: str) -> None:
    """See that a CLIP model can be had, without loading it; what only has a name is downloaded, if need be.

    Raises:
        ValueError: the name is unknown, the weights cannot be had, or a directory lacks a file or has a broken one.
    """
    folder = Path(model)
    if folder.is_dir():
        _weights(folder)  # which are meant
        place = config = folder / "open_clip_config.json"
        try:
            described = json.loads(config.read_text(encoding="utf-8"))
            if not isinstance(described, dict) or "model_cfg" not in described:
                raise ValueError("model_cfg is missing")
            if "trust_remote_code" in json.dumps(described):  # open_clip would hand it on to the tokenizer
                raise ValueError("it asks for code of its own to be run (trust_remote_code); take that out")
            for place in sorted(folder.glob("*.safetensors")):
                safe_open(place, framework="pt")
        except (ValueError, OSError, RecursionError, SafetensorError) as error:  # a pointer of Git LFS, too
            raise ValueError(f"CLIP directory {model}: {place.name} is not whole: {error}") from None
        return
    if model.startswith((".", "/")):
        raise ValueError(f"CLIP directory {model}: not there")
    import open_clip  # takes seconds

    try:
        if model.startswith("hf-hub:"):
            open_clip.factory.download_pretrained_from_hf(model.removeprefix("hf-hub:"))
            return
        name, tag = _named(model)
        open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag))
    except (RuntimeError, OSError) as error:  # FileNotFoundError for what the hub does not give
        raise ValueError(f"CLIP model {model!r} cannot be had: {error}") from None


def _named(model: str) -> tuple[str, str]:
    """Name and pretrained tag. Raises: ValueError for what open_clip does not know."""
    import open_clip

    name, _, tag = model.partition("/")
    known = open_clip.list_pretrained_tags_by_model(name)
    if tag not in known:
        choices = f"its pretrained tags are {known}" if known else "open_clip does not know that name"
        raise ValueError(
            f"CLIP model {model!r}: {choices}. Give <name>/<pretrained tag>, hf-hub:<name>, or a local directory."
        )
    return name, tag


def load_clip(model: str) -> ClipModel:
    """Load a CLIP model, on CUDA when there is one.

    Args:
        model: an open_clip name and pretrained tag ("ViT-B-32/laion2b_s34b_b79k"), a hub name ("hf-hub:…"), or a local
            directory with `open_clip_config.json` and a .safetensors file. Of a directory no pickle is read; of a name
            open_clip takes what its publisher has, safetensors first, else a pickle of tensors only (`weights_only`).

    Raises:
        ValueError: the name is unknown, or the directory lacks one of the two files, has several it may mean, a broken
            one, or asks for code of its own to be run.
    """
    import open_clip  # takes seconds; most processes encode nothing

    weights: Path | None = None
    if Path(model).is_dir():
        check_clip(model)
        name, tag, weights = f"local-dir:{model}", None, _weights(Path(model))
    elif model.startswith("hf-hub:"):
        name, tag = model, None
    else:
        name, tag = _named(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        network, _, transform = open_clip.create_model_and_transforms(
            name,
            pretrained=tag,
            device=device,
            # from a directory open_clip itself would prefer some names of pickles to other names of .safetensors
            load_weights=weights is None,
            require_pretrained=weights is None,
            pretrained_text=weights is None,
        )
        if weights is not None:
            open_clip.load_checkpoint(network, str(weights))
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, SafetensorError) as error:  # what is raised for weights that cannot be found, fetched or fit
        raise ValueError(f"CLIP model {model!r} could not be loaded: {error}") from error
    return ClipModel(model, network.eval().requires_grad_(False), tokenizer, transform, device)


def _weights(folder: Path) -> Path:
    """The .safetensors file of a model's directory."""
    found = sorted(folder.glob("*.safetensors"))
    usual = [file for file in found if file.name in WEIGHT_NAMES]
    if not (folder / "open_clip_config.json").is_file() or not found:
        names = sorted(path.name for path in folder.iterdir())
        raise ValueError(f"CLIP directory {folder} needs open_clip_config.json and a .safetensors file; found {names}")
    if len(found) > 1 and not usual:
        names = [file.name for file in found]
        raise ValueError(f"CLIP directory {folder} has {names}; name the one that is meant {WEIGHT_NAMES[0]}")
    return min(usual, key=lambda file: WEIGHT_NAMES.index(file.name)) if usual else found[0]
