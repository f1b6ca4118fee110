"""What one model draws of two concepts in one image, and how much each appears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pandas as pd

from pipeline.evaluation.composition import appearance
from pipeline.evaluation.networks import clip_tower, identity_judge
from pipeline.stages.drawn import Draw, Drawn, DrawPlaces, Phrase
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.resident import planned_images
from pipeline.stages.stage import Context, part_of
from retrieval.clip import load_clip


class Appearance(Drawn):
    @property
    def file(self) -> Path:
        return self.folder / "appearance.parquet"

    def table(self) -> pd.DataFrame:
        """A row per image: `model`, `prompt`, `seed`, and how much the `first` and the `second` concept appear."""
        return pd.read_parquet(self.file)


@dataclass(frozen=True)
class ComposePlaces(DrawPlaces):
    images: tuple[tuple[str, ...], ...]
    """Of each concept."""


@dataclass(frozen=True, kw_only=True)
class Compose(Draw[Appearance]):
    """Prompts have `{0}` and `{1}`."""

    kind, version, on_device, at_once, artifact = "compose", 1, True, 4, Appearance

    concepts: tuple[str, str]
    phrases: tuple[Phrase, Phrase]
    images: tuple[tuple[str, ...], tuple[str, ...]]
    """Digests of the concepts' own."""
    places: ComposePlaces

    @classmethod
    def of(cls, first: Evaluate, second: Evaluate, prompts: Sequence[str]) -> Self:
        """The model of two concepts' evaluations asked for both in one image."""
        return part_of(
            cls,
            first,
            name=f"{first.concept} and {second.concept}: {first.model}",
            prompts=tuple(prompts),
            concepts=(first.concept, second.concept),
            phrases=(first.phrase, second.phrase),
            images=(first.images, second.images),
            places=part_of(ComposePlaces, first.places, images=(first.places.images, second.places.images)),
        )

    def run(self, context: Context) -> None:
        judge = identity_judge() if self.evaluation.identity else clip_tower(load_clip(self.places.clip))
        own = [planned_images(*each).images for each in zip(self.places.images, self.images, strict=True)]
        drawn, images = self.draw(context, self.phrases)
        first, second = appearance(judge, images, own)
        table = drawn.drop(columns="plain").assign(first=first, second=second)
        table.to_parquet(Appearance(context.out).file)
