"""What the frozen parts make of the data, computed once and kept: latents of views, and regularisation captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from training.augment import View, mirrored, plain_view, random_view
from training.backbone import Backbone, TextFeatures
from training.checkpoint import load_tensors, save_tensors
from training.seeds import generator

ENCODE_BATCH = 16


@dataclass(frozen=True)
class ConceptFeatures:
    """Latents of one concept's augmented views.

    latents: (V, c, h, w) float32. masks: (V, 1, h, w) float32. words: V size words, mostly empty.
    """

    latents: torch.Tensor
    masks: torch.Tensor
    words: list[str]

    def save(self, path: Path) -> None:
        save_tensors(path, {"latents": self.latents, "masks": self.masks}, {"words": json.dumps(self.words)})

    @classmethod
    def load(cls, path: Path) -> ConceptFeatures:
        tensors, metadata = load_tensors(path)
        return cls(tensors["latents"], tensors["masks"], json.loads(metadata["words"]))


@dataclass(frozen=True)
class RegularizationFeatures:
    """Latents (R, c, h, w) float32 of regularisation images, their R captions, and the text features of these."""

    latents: torch.Tensor
    text: TextFeatures
    captions: list[str]

    def save(self, path: Path) -> None:
        pooled = {} if self.text.pooled is None else {"pooled": self.text.pooled}
        tensors = {"latents": self.latents, "hidden": self.text.hidden, **pooled}
        save_tensors(path, tensors, {"captions": json.dumps(self.captions)})

    @classmethod
    def load(cls, path: Path) -> RegularizationFeatures:
        tensors, metadata = load_tensors(path)
        text = TextFeatures(tensors["hidden"], tensors.get("pooled"))
        return cls(tensors["latents"], text, json.loads(metadata["captions"]))


def concept_features(
    backbone: Backbone,
    images: Sequence[Image.Image],
    digests: Sequence[str],
    *,
    views: int,
    augment: bool,
    seed: int,
    flip: bool = False,
) -> ConceptFeatures:
    """Encode `views` augmented views of each image (one plain view when not augmenting).

    flip: half of the views show the image mirrored; not augmenting, one plain view of each kind is made.

    A view depends on the image's own content hash, its number and the seed, not on its neighbours: adding an image
    to a concept changes no other image's views.
    """
    made: list[View] = []
    for image, digest in zip(images, digests, strict=True):
        if not augment:
            shown = [image, ImageOps.mirror(image)] if flip else [image]
            made += [plain_view(each, backbone.resolution, backbone.factor) for each in shown]
            continue
        for number in range(views):
            rng = np.random.default_rng([seed, number, int(digest[:15], 16)])
            view = random_view(image, backbone.resolution, backbone.factor, rng)
            made.append(mirrored(view) if flip and rng.random() < 0.5 else view)
    key = hashlib.sha256("".join(digests).encode()).hexdigest()
    latents = _encode(backbone, [v.pixels for v in made], int(key[:15], 16) ^ seed)
    return ConceptFeatures(latents, torch.stack([v.mask for v in made]), [v.words for v in made])


def regularization_features(
    backbone: Backbone, samples: Iterable[tuple[Image.Image, str]], *, seed: int, flip: bool = False
) -> RegularizationFeatures:
    """Encode regularisation images (RGB, cut to the centre square) and their captions. flip: mirror half of them."""
    pixels, captions = [], []
    rng = np.random.default_rng(seed)
    for image, caption in samples:
        shown = ImageOps.mirror(image) if flip and rng.random() < 0.5 else image
        pixels.append(plain_view(shown, backbone.resolution, backbone.factor).pixels)
        captions.append(caption)
    return RegularizationFeatures(_encode(backbone, pixels, seed), text_features(backbone, captions), captions)


def _encode(backbone: Backbone, pixels: list[torch.Tensor], seed: int) -> torch.Tensor:
    random = generator(seed)
    batches = [torch.stack(pixels[i : i + ENCODE_BATCH]) for i in range(0, len(pixels), ENCODE_BATCH)]
    return torch.cat([backbone.encode_images(batch, random).float().cpu() for batch in batches])


@torch.no_grad()
def text_features(backbone: Backbone, captions: Sequence[str], batch_size: int = 64) -> TextFeatures:
    """Text features of many captions (see `TextFeatures`), kept on the CPU."""
    parts = []
    for start in range(0, len(captions), batch_size):
        text = backbone.encode_text(captions[start : start + batch_size])
        pooled = None if text.pooled is None else text.pooled.cpu()
        parts.append(TextFeatures(text.hidden.cpu(), pooled))
    return TextFeatures.cat(parts)
