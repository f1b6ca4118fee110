"""Image networks whose features the measures compare: the image tower of an open_clip model, a timm model such as DINO,
the miniature's identity judge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.miniature.identity import WEIGHTS, load_identity
from pipeline.places import CLIP
from pipeline.store import file_digest
from retrieval.clip import ClipModel, check_clip, clip_digest, load_clip


@dataclass(frozen=True)
class ImageNetwork:
    """A frozen network with the image transform it was trained with."""

    name: str
    encode: Callable[[torch.Tensor], torch.Tensor]
    """(n, 3, height, width) -> (n, d)"""
    transform: Callable[[Image.Image], torch.Tensor]
    device: torch.device

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image], batch_size: int = 64) -> np.ndarray:
        """Features as the network gives them, (n, d) float32. Raises ValueError where there are no images."""
        if not images:
            raise ValueError(f"{self.name}: there are no images to encode")
        rows = []
        for start in range(0, len(images), batch_size):
            batch = [self.transform(image.convert("RGB")) for image in images[start : start + batch_size]]
            rows.append(self.encode(torch.stack(batch).to(self.device)).float().cpu())
        return torch.cat(rows).numpy()


def unit(features: np.ndarray) -> np.ndarray:
    """Rows (n, d) scaled to length 1: their products are cosines."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def clip_tower(clip: ClipModel) -> ImageNetwork:
    """The image tower of an open_clip model."""
    return ImageNetwork(clip.name, clip.model.encode_image, clip.transform, clip.device)


def identity_judge() -> ImageNetwork:
    """The miniature's identity judge."""
    from torchvision.transforms import v2  # takes seconds, as timm does

    transform = v2.Compose(
        [
            v2.Resize((64, 64), v2.InterpolationMode.LANCZOS),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    return ImageNetwork("miniature identity judge", load_identity(), transform, torch.device("cpu"))


@functools.lru_cache(maxsize=4)
def load_judge(model: str) -> ImageNetwork:
    """A judge by what a batch file calls it: `miniature`, a timm model (see `load_timm`), or the image tower of an
    open_clip model, which `clip:` stands before.

    Raises: ValueError when it cannot be had.
    """
    if model == "miniature":
        return identity_judge()
    return clip_tower(load_clip(model.removeprefix(CLIP))) if model.startswith(CLIP) else load_timm(model)


def check_judge(model: str) -> None:
    """See that a judge can be had, without loading it, as far as that is known here; see `load_judge`."""
    if model.startswith(CLIP):
        check_clip(model.removeprefix(CLIP))
    elif model != "miniature":
        _timm_name(model)


def judge_digest(model: str) -> str:
    """What a judge is, without loading it: a hash of its files, or its name."""
    if model == "miniature":
        return file_digest(WEIGHTS)
    return clip_digest(model.removeprefix(CLIP))


def load_timm(model: str) -> ImageNetwork:
    """Load a timm model without its classifier, on CUDA when there is one.

    Args:
        model: a timm name with its pretrained tag ("vit_small_patch16_224.dino" is the one of the published DINO
            columns), or a local directory with timm's `config.json` and `model.safetensors`.

    Raises:
        ValueError: the name is unknown, a file is missing, or the weights cannot be had.
    """
    name = _timm_name(model)
    import timm  # takes seconds, and few ask for it

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0).eval().requires_grad_(False).to(device)
    except (RuntimeError, OSError) as error:  # weights that do not fit; a hub that cannot be reached
        raise ValueError(f"timm model {model!r} could not be loaded: {error}") from error
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    return ImageNetwork(model, network, transform, device)


def _timm_name(model: str) -> str:
    """How timm calls a model, see `load_timm`. Raises: ValueError when there is none."""
    if Path(model).is_dir() or model.startswith((".", "/")):
        missing = [f for f in ("config.json", "model.safetensors") if not (Path(model) / f).is_file()]
        if missing:
            raise ValueError(f"timm directory {model}: no {' and no '.join(missing)} there")
        return f"local-dir:{model}"
    import timm

    if model not in timm.list_pretrained():
        raise ValueError(
            f"timm model {model!r}: give <name>.<pretrained tag> as timm.list_pretrained() has it, or a folder; an "
            "open_clip model is given as clip:<name>/<pretrained tag>"
        )
    return model
