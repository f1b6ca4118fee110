"""Text and image alignment (method.md section 3), image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.evaluation.networks import ImageNetwork, identity_judge, load_timm, unit
from retrieval.clip import ClipModel


@dataclass(frozen=True)
class Judges:
    """CLIP, and the miniature's identity network and a timm model of DINO's kind where they are asked for."""

    clip: ClipModel
    identity: ImageNetwork | None = None
    dino: ImageNetwork | None = None

    @classmethod
    def load(cls, clip: ClipModel, identity: str = "", dino: str = "") -> Judges:
        """identity: `miniature` or empty; dino: a timm model by name or folder, or empty."""
        return cls(clip, identity_judge() if identity == "miniature" else None, load_timm(dino) if dino else None)


def scores(
    judges: Judges, images: Sequence[Image.Image], texts: Sequence[str], references: Sequence[Image.Image]
) -> dict[str, np.ndarray]:
    """Scores of each generated image, arrays of len(images):

    text: CLIP cosine with its prompt (given without the modifier token).
    image: mean CLIP cosine with the concept's real images.
    identity, dino: mean cosine with them in the features of these judges, where there are.
    """
    features, real = judges.clip.encode_images(list(images)), judges.clip.encode_images(list(references))
    unique = sorted(set(texts))
    written = judges.clip.encode_text(unique)[[unique.index(t) for t in texts]]
    result = {"text": (features * written).sum(1), "image": (features @ real.T).mean(1)}
    for name, judge in (("identity", judges.identity), ("dino", judges.dino)):
        if judge is not None:
            result[name] = (unit(judge.features(images)) @ unit(judge.features(references)).T).mean(1)
    return result
