"""Text and image alignment (method.md section 3), image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pipeline.miniature.identity import load_identity
from retrieval.clip import ClipModel


@dataclass(frozen=True)
class Judges:
    """CLIP, and the miniature's identity network where it is asked for."""

    clip: ClipModel
    identity: torch.nn.Module | None = None

    @classmethod
    def load(cls, clip: ClipModel, identity: str) -> Judges:
        return cls(clip, load_identity() if identity == "miniature" else None)


def scores(
    judges: Judges, images: Sequence[Image.Image], texts: Sequence[str], references: Sequence[Image.Image]
) -> dict[str, np.ndarray]:
    """Scores of each generated image, arrays of len(images):

    text: CLIP cosine with its prompt (given without the modifier token).
    image: mean CLIP cosine with the concept's real images.
    identity: mean cosine with them in the identity judge's features, where there is one.
    """
    features, real = judges.clip.encode_images(list(images)), judges.clip.encode_images(list(references))
    unique = sorted(set(texts))
    written = judges.clip.encode_text(unique)[[unique.index(t) for t in texts]]
    result = {"text": (features * written).sum(1), "image": (features @ real.T).mean(1)}
    if judges.identity is not None:
        result["identity"] = (_identity(judges.identity, images) @ _identity(judges.identity, references).T).mean(1)
    return result


@torch.no_grad()
def _identity(net: torch.nn.Module, images: Sequence[Image.Image]) -> np.ndarray:
    resized = [np.asarray(i.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS), np.float32) for i in images]
    return net(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 127.5 - 1).numpy()
