"""What one model draws of one concept, and its scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, get_args

import numpy as np
import pandas as pd

from pipeline.cost.estimate import Device, Estimate
from pipeline.cost.model_size import ModelSize
from pipeline.evaluation.measures import Judged, measures_in, scores
from pipeline.evaluation.networks import load_judge
from pipeline.stages.drawn import Draw, Drawn, DrawPlaces, Model, Phrase
from pipeline.stages.resident import planned_images
from pipeline.stages.stage import Context
from retrieval.clip import load_clip

if TYPE_CHECKING:
    from pipeline.cost.cluster import Forecast, Phase


class Scores(Drawn):
    @property
    def file(self) -> Path:
        return self.folder / "scores.parquet"

    def table(self) -> pd.DataFrame:
        """A row per image: `model`, `prompt`, `seed`, `plain`, the scores."""
        return pd.read_parquet(self.file)


@dataclass(frozen=True)
class EvaluatePlaces(DrawPlaces):
    images: tuple[str, ...]
    judges: dict[str, str]
    """Name -> model, the identity judge among them."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Draw[Scores]):
    kind, version, on_device, at_once, artifact = "evaluate", 3, True, 4, Scores

    concept: str
    phrase: Phrase
    images: tuple[str, ...]
    """Digests of the concept's own."""
    judges: dict[str, str] | None = None
    """Name -> digest of each that `judge` is not."""
    places: EvaluatePlaces

    def of_bare_class(self) -> Evaluate:
        """The same model asked for the class word alone, from the same prompts and seeds: what it kept of what the base
        knew."""
        return dataclasses.replace(self, name=f"{self.name}, bare class", phrase=Phrase("", self.phrase.class_word))

    def run(self, context: Context) -> None:
        clip, judges = load_clip(self.places.clip), {n: load_judge(model) for n, model in self.places.judges.items()}
        own = planned_images(self.places.images, self.images)
        drawn, images = self.draw(context, [self.phrase])
        values = scores(Judged(images, drawn["plain"].tolist(), own.images, clip, judges))
        drawn.drop(columns="plain").assign(**values).to_parquet(Scores(context.out).file)

    def estimate(self, model: ModelSize, device: Device, together: int = 1) -> Estimate:
        images = len(self.prompts) * self.evaluation.samples
        operations = images * self.evaluation.steps * 2 * model.unet_flops
        return Estimate(operations / device.speed, device.resident_gib(model))

    @classmethod
    def phase(cls, forecast: Forecast) -> Phase | None:
        f, tasks = forecast, forecast.concepts * MODELS
        # a task for each concept and model; its own weights, and on each node the merged model
        moved = tasks * _drawn(f) * f.image_bytes + (f.concepts + f.cluster.nodes) * f.weights_bytes
        return f.phase(
            cls.kind,
            (moved, f.cluster.nodes),
            memory=f.whole_bytes,
            GPUs=math.ceil(tasks / f.gpus) * _drawn(f) * f.drawing_flops / f.float32,
        )


MODELS = len(get_args(Model))


def _drawn(forecast: Forecast) -> float:
    """Images that a model draws of a concept."""
    batch = forecast.batch
    return fmean(len(batch.prompts_of(concept)) for concept in batch.concepts) * batch.evaluation.samples


def drawn_bytes(forecast: Forecast) -> float:
    """Of all images."""
    return forecast.concepts * MODELS * _drawn(forecast) * forecast.image_bytes


def measures(tables: Iterable[pd.DataFrame]) -> dict[str, dict[str, float]]:
    """Mean and standard error of each score per model: {"merged": {"image": …, "image_se": …, "samples": …}}."""
    result = {}
    for model, rows in pd.concat(tables).groupby("model", sort=False):
        entry: dict[str, float] = {"samples": len(rows)}
        for score in (measure.name for measure in measures_in(rows)):
            entry[score] = float(rows[score].mean())
            entry[f"{score}_se"] = float(rows[score].std(ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else 0.0
        result[str(model)] = entry
    return result


def score_columns(entry: dict[str, float]) -> dict[str, float]:
    """Of one model's measures, the scores alone."""
    return {measure.name: entry[measure.name] for measure in measures_in(entry)}
