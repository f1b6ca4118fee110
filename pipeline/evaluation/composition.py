"""Composition: whether two concepts both appear in one image, by a judge network.

An image shows a concept when one of its windows is more like the concept's real images than 95 % of the images that the
*base* model drew of the same prompts with the bare class words. Those hold the right class, but not the concept: what
passes is the concept, not merely its class.

Two concepts of similar categories are known to come out badly together (Custom Diffusion, arXiv 2212.04488, section 5);
`composition` puts each pair's likeness of class words beside its shares, most alike first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.evaluation.intervals import share
from pipeline.evaluation.networks import ImageNetwork, unit
from retrieval.clip import ClipModel


def windows(image: Image.Image) -> list[Image.Image]:
    """The image and nine windows of half its sides, in steps of a quarter: one of two objects fills a window."""
    width, height = image.size
    corners = [(x * width // 4, y * height // 4) for y in range(3) for x in range(3)]
    return [image, *(image.crop((x, y, x + width // 2, y + height // 2)) for x, y in corners)]


def appearance(
    judge: ImageNetwork, images: Sequence[Image.Image], concepts: Sequence[Sequence[Image.Image]]
) -> tuple[np.ndarray, ...]:
    """How much each concept appears in each of n images.

    Args:
        concepts: the real images of each concept.

    Returns:
        Per concept, (n,): the mean cosine to its real images of that window of the image where it is largest.
    """
    parts = [windows(image) for image in images]
    found = unit(judge.features([part for each in parts for part in each]))
    cosines = ((found @ unit(judge.features(real)).T).mean(1) for real in concepts)
    return tuple(each.reshape(len(images), -1).max(1) for each in cosines)


@dataclass(frozen=True)
class Composed:
    """What one method drew of one pair of concepts, by `appearance`."""

    method: str
    concepts: tuple[str, str]
    class_words: tuple[str, str]
    drawn: tuple[np.ndarray, ...]
    """Appearance of the first and of the second concept in the method's n images, (n,) each."""
    base: tuple[np.ndarray, ...]
    """The same in m images of the base, drawn of the same prompts with the bare class words, (m,) each."""


def composition(pairs: Sequence[Composed], clip: ClipModel, *, false_positives: float = 0.05) -> pd.DataFrame:
    """How often each concept, and both, appear.

    Args:
        false_positives: share of the base's images that would pass for the concept.

    Returns:
        A row per method and pair, pairs of the most similar class words first: `method`, `first`, `second` (names),
        `class_similarity` (CLIP text cosine of the class words), and of each of `first_appears`, `second_appears` and
        `both_appear` the share with `_low`, `_high` (Wilson 95 %); `samples`.

    Raises:
        ValueError: the appearances of two concepts are not of the same images.
    """
    rows = []
    for pair in pairs:
        if pair.drawn[0].shape != pair.drawn[1].shape or pair.base[0].shape != pair.base[1].shape:
            raise ValueError(f"{pair.method}, {' and '.join(pair.concepts)}: appearances are not of the same images")
        words = clip.encode_text([f"photo of a {word}" for word in pair.class_words])
        thresholds = [np.quantile(base, 1 - false_positives) for base in pair.base]
        first, second = (drawn > threshold for drawn, threshold in zip(pair.drawn, thresholds, strict=True))
        row = {
            "method": pair.method,
            "first": pair.concepts[0],
            "second": pair.concepts[1],
            "class_similarity": float(words[0] @ words[1]),
        }
        for name, seen in (("first_appears", first), ("second_appears", second), ("both_appear", first & second)):
            estimate = share(int(seen.sum()), len(seen))
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        rows.append(row | {"samples": len(first)})
    return pd.DataFrame(rows).sort_values(
        ["class_similarity", "first", "second", "method"], ascending=[False, True, True, True], ignore_index=True
    )
