"""Images that a model draws of prompts, which `evaluate` and `compose` measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

import pandas as pd
from PIL import Image

from pipeline.merge.factors import MergedModel
from pipeline.sampling import draw, grid
from pipeline.stages.merge import Merge
from pipeline.stages.released import Released
from pipeline.stages.resident import resident_base
from pipeline.stages.stage import Artifact, Context, Stage
from pipeline.stages.train import Train
from training.attention import use_attention
from training.weights import ConceptWeights

Model = Literal["base", "single", "merged"]
"""`single` is a concept by itself, `merged` what is released."""


class Phrase(NamedTuple):
    token: str
    class_word: str

    def __str__(self) -> str:
        return " ".join(self).strip()


@dataclass(frozen=True)
class DrawSettings:
    """See `pipeline.spec.Evaluation`."""

    samples: int
    steps: int
    guidance: float
    seed: int
    identity: str


@dataclass(frozen=True)
class DrawPlaces:
    base: str
    clip: str
    attention: Literal["auto", "xformers", "sdpa"]


class Drawn(Artifact):
    @property
    def image_folder(self) -> Path:
        return self.folder / "images"

    @property
    def grid_file(self) -> Path:
        return self.folder / "images.png"

    def images(self) -> list[Image.Image]:
        """In the order of the table's rows."""
        return [Image.open(file) for file in sorted(self.image_folder.iterdir())]

    def grid(self) -> Image.Image:
        """Some of them, a row per prompt."""
        return Image.open(self.grid_file)


MadeDrawn = TypeVar("MadeDrawn", bound=Drawn, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Draw(Stage[MadeDrawn], Generic[MadeDrawn]):
    """What stages have in common that draw; none of them is only this."""

    base: str
    clip: str
    judge: str
    """Digest of the identity judge; empty for none."""
    model: Model
    evaluation: DrawSettings
    prompts: tuple[str, ...]
    safety_checker: bool | None = None
    """False where the base has one: it is not used."""
    places: DrawPlaces

    def _weights(self, context: Context) -> ConceptWeights | MergedModel | None:
        if self.model == "base":
            return None
        if self.model == "single":
            (training,) = self.inputs_of(Train)
            return training.result(context.store).weights()
        sources: list[Released | Merge] = [*self.inputs_of(Released), *self.inputs_of(Merge)]
        (source,) = sources
        return source.result(context.store).model()

    def draw(self, context: Context, phrases: Sequence[Phrase]) -> tuple[pd.DataFrame, list[Image.Image]]:
        """Draw the prompts, and keep the images. phrases: of each concept in a prompt.

        Returns: a row per image with `model`, `prompt`, `seed` and `plain`, the text without tokens; and the images.
        """
        settings, made = self.evaluation, Drawn(context.out)
        backbone = resident_base(self.places.base)
        use_attention(backbone.unet, self.places.attention)
        change = self._weights(context)
        # the same prompts and seeds for every model: the differences are the models'
        prompts = [p for p in self.prompts for _ in range(settings.samples)]
        seeds = [settings.seed + i for i in range(len(prompts))]
        plain = [p.format(*(phrase.class_word for phrase in phrases)) for p in prompts]
        named = [p.format(*map(str, phrases)) for p in prompts]
        with backbone.changed(*((change.deltas, change.tokens) if change else ({}, {}))):
            images = draw(
                backbone,
                named if change else plain,
                seeds=seeds,
                steps=settings.steps,
                guidance=settings.guidance,
                progress=lambda done: context.progress("images", done, len(prompts)),
            )
        made.image_folder.mkdir()
        for i, image in enumerate(images):
            image.save(made.image_folder / f"{i:05d}.png")
        shown = min(settings.samples, 6)
        rows = [images[i * settings.samples : i * settings.samples + shown] for i in range(len(self.prompts))]
        grid(rows, side=96).save(made.grid_file)
        return pd.DataFrame({"model": self.model, "prompt": prompts, "seed": seeds, "plain": plain}), images
