"""The files of a release, ready to be published: weights in all formats, spec, measures, sample grid, card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from pipeline.merge.factors import MergedModel
from pipeline.release.card import CardConcept, write_card
from pipeline.release.formats import write_formats, write_whole
from pipeline.release.manifest import public
from pipeline.stages.evaluate import Evaluate, Scores, drawn_bytes, measures, score_columns
from pipeline.stages.merge import Merge
from pipeline.stages.resident import resident_base
from pipeline.stages.stage import Artifact, Context, Stage

if TYPE_CHECKING:
    from pipeline.cost.cluster import Forecast, Phase

SAMPLES = "samples.png"


class ReleaseFiles(Artifact):
    @property
    def measures_file(self) -> Path:
        return self.folder / "measures.json"

    def measures(self) -> dict[str, dict[str, dict[str, float]]]:
        """Concept -> model -> `pipeline.stages.evaluate.measures`."""
        return json.loads(self.measures_file.read_text())


@dataclass(frozen=True)
class License:
    """See `pipeline.spec.Publish`."""

    license: str
    license_name: str
    license_link: str


@dataclass(frozen=True, kw_only=True)
class Release(Stage[ReleaseFiles]):
    """Its name, the batch's, is hashed, too: the files have it."""

    kind, version, on_device, artifact = "release", 4, True, ReleaseFiles

    @dataclass(frozen=True)
    class Places:
        base: str
        base_name: str

    license: License
    spec: dict[str, Any]
    """What was asked for, as the release says it."""
    places: Places

    def hashed(self) -> dict[str, Any]:
        return super().hashed() | {"name": self.name}

    def run(self, context: Context) -> None:
        (merge,) = self.inputs_of(Merge)
        merged, backbone = merge.result(context.store), resident_base(self.places.base)
        model, merge_report = merged.model(), merged.report()
        if isinstance(model, MergedModel):
            write_formats(model, backbone.pipe, context.out, self.name)
        else:
            write_whole(model, backbone, context.out, self.name)
        made = [(stage, stage.result(context.store)) for stage in self.inputs_of(Evaluate)]
        _stacked([scores for stage, scores in made if stage.model == "merged"]).save(context.out / SAMPLES)
        tables: dict[str, list[pd.DataFrame]] = {}
        for stage, scores in made:
            tables.setdefault(stage.concept, []).append(scores.table())
        evaluated = {concept: measures(parts) for concept, parts in tables.items()}
        for name, content in (("spec", public(self.spec)), ("measures", evaluated), ("merge", merge_report)):
            (context.out / f"{name}.json").write_text(json.dumps(content, indent=1))
        cards = [
            CardConcept(
                concept["name"],
                concept["token"],
                concept["class_word"],
                merge_report["compressed"]["residuals"].get(concept["name"]),
                {f"{s} alignment": value for s, value in score_columns(evaluated[concept["name"]]["merged"]).items()},
            )
            for concept in model.metadata["concepts"]
        ]
        write_card(
            context.out,
            cards,
            name=self.name,
            base_model=self.places.base_name,
            base_digest=backbone.digest,
            **asdict(self.license),
            method=self.spec["training"]["method"],
            grid=SAMPLES,
            two_encoders=len(backbone.text_encoders) == 2,
        )

    @classmethod
    def phase(cls, forecast: Forecast) -> Phase | None:
        return forecast.phase(cls.kind, (drawn_bytes(forecast), 1))


def _stacked(made: Sequence[Scores]) -> Image.Image:
    """The grids of several evaluations, one under the other."""
    strips = [scores.grid() for scores in made]
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet
