"""Sums over the constraints of many concepts, which the soft merge is solved from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.merge.solve import Sums
from pipeline.stages.constraints import MERGED_ROWS, Constraints, merged_bytes, read_all
from pipeline.stages.stage import Artifact, Context, Stage

if TYPE_CHECKING:
    from pipeline.cost.cluster import Forecast, Phase

SUMMED = 512
"""Concepts whose sums one task adds up."""


class SumsFile(Artifact):
    @property
    def file(self) -> Path:
        return self.folder / "sums.safetensors"

    def load(self) -> Sums:
        return Sums.load(self.file)


@dataclass(frozen=True, kw_only=True)
class AddUp(Stage[SumsFile]):
    kind, version, artifact = "sums", 1, SumsFile

    def run(self, context: Context) -> None:
        Sums.over(read_all(self.inputs_of(Constraints), context)).save(SumsFile(context.out).file)

    @classmethod
    def phase(cls, forecast: Forecast) -> Phase | None:
        parts = sum_count(forecast)
        if not parts:
            return None
        busy, width = min(parts, forecast.cluster.nodes), forecast.model.text_width
        rows = forecast.concepts * MERGED_ROWS
        return forecast.phase(
            cls.kind,
            (merged_bytes(forecast) + sum_bytes(forecast), busy),
            CPUs=2 * rows * (width**2 + forecast.model.trained) / (busy * forecast.float64),
        )


def sum_count(forecast: Forecast) -> int:
    soft = forecast.batch.merge.form == "soft"
    return math.ceil(forecast.concepts / SUMMED) if forecast.merges and soft else 0


def sum_bytes(forecast: Forecast) -> int:
    """Of all of them, float64."""
    return sum_count(forecast) * 8 * (forecast.model.text_width**2 + forecast.model.trained)
