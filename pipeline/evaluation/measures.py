"""What each generated image is measured by (method.md section 3): the registry of measures, and the judges."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.evaluation.columns import NOT_MEASURED
from pipeline.evaluation.networks import ImageNetwork, unit
from retrieval.clip import ClipModel


@dataclass(frozen=True)
class Judged:
    """Images that a model drew of a concept, and what they are compared with.

    texts: the prompt of each image, without the concept's token. references: the concept's real images.
    judges: image networks beside CLIP, by name.
    """

    images: Sequence[Image.Image]
    texts: Sequence[str]
    references: Sequence[Image.Image]
    clip: ClipModel
    judges: Mapping[str, ImageNetwork]

    @functools.cached_property
    def features(self) -> np.ndarray:
        """CLIP's, (n, d), unit rows."""
        return self.clip.encode_images(list(self.images))


@dataclass(frozen=True)
class Measure:
    """A number for each image; more is better.

    scope: what a retraining's gate compares: the mean of each concept, or of all images together.
    tolerance: the setting of `gate` that says how far it may fall.
    values: Judged -> (n,)
    """

    name: str
    title: str
    scope: Literal["concept", "overall"]
    tolerance: str
    values: Callable[[Judged], np.ndarray]


def _text(judged: Judged) -> np.ndarray:
    """CLIP cosine of each image with its prompt."""
    unique = sorted(set(judged.texts))
    written = judged.clip.encode_text(unique)[[unique.index(text) for text in judged.texts]]
    return (judged.features * written).sum(1)


def _image(judged: Judged) -> np.ndarray:
    """Mean CLIP cosine of each image with the concept's real images."""
    return (judged.features @ judged.clip.encode_images(list(judged.references)).T).mean(1)


MEASURES = (
    Measure("text", "text alignment", "overall", "text", _text),
    Measure("image", "image alignment", "concept", "image", _image),
)
"""Those of every evaluation. Each judge adds one of its own: `of_judge`."""


def of_judge(name: str) -> Measure:
    """The mean cosine with the concept's real images in the features of a judge."""

    def values(judged: Judged) -> np.ndarray:
        network = judged.judges[name]
        own, real = unit(network.features(judged.images)), unit(network.features(judged.references))
        return (own @ real.T).mean(1)

    title = "identity" if name == "identity" else f"{name} alignment"
    return Measure(name, title, "concept", "identity", values)


def measures_of(judges: Iterable[str]) -> list[Measure]:
    """All measures of an evaluation with these judges."""
    return [*MEASURES, *map(of_judge, judges)]


def measures_in(columns: Iterable[object]) -> list[Measure]:
    """The measures whose values a table of scores has, or an entry of `pipeline.stages.evaluate.measures`."""
    names = [str(column) for column in columns if not str(column).endswith("_se")]
    known = [measure for measure in MEASURES if measure.name in names]
    return known + [of_judge(name) for name in names if name not in NOT_MEASURED | {each.name for each in known}]


def scores(judged: Judged) -> dict[str, np.ndarray]:
    """Measure -> its value for each image."""
    return {measure.name: measure.values(judged) for measure in measures_of(judged.judges)}
