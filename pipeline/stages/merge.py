"""All concepts in one model: the closed-form merge, or, where there is nothing to merge, the weights as they are."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.cost.estimate import PROCESS, Device, Estimate
from pipeline.cost.model_size import ModelSize
from pipeline.merge.compress import rounded, shared_factors, truncated_factors, weighted_factors
from pipeline.merge.constraints import captions_beside, held_out_rows, regularization_rows
from pipeline.merge.factors import SHARED, MergedModel
from pipeline.merge.files import load_weights
from pipeline.merge.solve import Form, MergeReport, damped_gram, merge, merge_sums, missed, moved, report
from pipeline.stages.constraints import JUDGED_ROWS, MERGED_ROWS, Constraints, judged_bytes, merged_bytes, read_all
from pipeline.stages.regularization import Regularization
from pipeline.stages.resident import resident_base
from pipeline.stages.stage import Artifact, Context, Stage
from pipeline.stages.sums import AddUp, sum_bytes
from pipeline.stages.train import Train
from training.backbone import Backbone
from training.weights import ConceptWeights

if TYPE_CHECKING:
    from pipeline.cost.cluster import Forecast, Phase

POSITIONS = 10
"""Words of a caption."""


class MergedFiles(Artifact):
    @property
    def file(self) -> Path:
        """Rounded, within the budget; what is released."""
        return self.folder / "merged.safetensors"

    @property
    def full_file(self) -> Path:
        """The exact factors; not there where the weights were kept as they are."""
        return self.folder / "full.safetensors"

    @property
    def report_file(self) -> Path:
        return self.folder / "report.json"

    def model(self) -> ConceptWeights | MergedModel:
        return load_weights(self.file)

    def full(self) -> ConceptWeights | MergedModel:
        return load_weights(self.full_file)

    def report(self) -> dict[str, Any]:
        return json.loads(self.report_file.read_text())


@dataclass(frozen=True)
class MergeSettings:
    """See `pipeline.spec.Merge`."""

    form: Form
    max_drift: float
    penalty: float | None
    captions: int
    damping: float


@dataclass(frozen=True)
class Budget:
    """See `pipeline.spec.Compress`."""

    max_bytes: int | None
    max_rank: int | None
    spectrum: float | None


@dataclass(frozen=True, kw_only=True)
class Merge(Stage[MergedFiles]):
    kind, version, on_device, artifact = "merge", 5, True, MergedFiles

    @dataclass(frozen=True)
    class Places:
        base: str

    merge: MergeSettings | None = None
    """None, as the rest, where changes are of more than text K/V layers, or of tokens only: the weights are kept as
    they are, in float16."""
    compress: Budget | None = None
    places: Places | None = None

    @property
    def concept_count(self) -> int:
        trainings = self.inputs_of(Train) or [t for c in self.inputs_of(Constraints) for t in c.inputs_of(Train)]
        return sum(len(training.concepts) for training in trainings)

    def run(self, context: Context) -> None:
        made = MergedFiles(context.out)
        if self.merge is None or self.compress is None or self.places is None:
            summary = self._keep(made, context)
        else:
            summary = self._merge(made, context, resident_base(self.places.base), self.merge, self.compress)
        made.report_file.write_text(json.dumps(summary, indent=1))

    def _merge(
        self, made: MergedFiles, context: Context, backbone: Backbone, settings: MergeSettings, budget: Budget
    ) -> dict[str, Any]:
        sources = [stage.result(context.store) for stage in self.inputs_of(Constraints)]
        described = [source.trained() for source in sources]
        concepts = [concept for entry in described for concept in entry["concepts"]]
        tokens: dict[str, list[torch.Tensor]] = {}
        for source in sources:
            tokens |= source.tokens()
        captions, exact = self._captions(context, settings.captions, concepts), settings.form == "paper"
        captions = captions if exact else captions_beside(captions, concepts)
        rows = regularization_rows(backbone, captions, exact=exact)
        base = {name: layer.weight.data for name, layer in backbone.layers.items()}
        gram, _ = damped_gram(rows, settings.damping)
        full, solved = self._solved(context, settings, rows, base, gram)
        metadata = {"base": backbone.digest, "concepts": concepts}
        full = dataclasses.replace(full, tokens=tokens, metadata=metadata)
        small, error = _compressed(full, gram, budget, solved.rows, described[0]["nbytes"])
        small = rounded(dataclasses.replace(small, tokens=tokens, metadata=metadata))
        final = report(small, read_all(self.inputs_of(Constraints), context), rows, base)
        full.save(made.full_file)
        small.save(made.file)
        return {
            "form": solved.form,
            "rows": solved.rows,
            "regularization_captions": len(captions),
            "condition": solved.condition if math.isfinite(solved.condition) else None,
            "penalty": solved.penalty,
            "drift": solved.drift,
            "residuals": solved.residuals,
            "compressed": {"error": error, "drift": final.drift, "residuals": final.residuals},
            "unseen": {
                words.name: {"words": missed(small, words), "padding": missed(small, padding)}
                for source in sources
                for words, padding in source.unseen()
            },
            "moved": {where: moved(small, rows, base) for where, rows in held_out_rows(backbone).items()},
            "bytes": {
                "concepts": sum(entry["nbytes"] for entry in described),
                "concept_files": sum(entry["file"] for entry in described),
                "merged_dense": described[0]["nbytes"],
                "merged": made.file.stat().st_size,
            },
        }

    def _solved(
        self,
        context: Context,
        settings: MergeSettings,
        rows: torch.Tensor,
        base: dict[str, torch.Tensor],
        gram: torch.Tensor,
    ) -> tuple[MergedModel, MergeReport]:
        """The exact factors of what the constraints ask for. rows: (n, d) text features of regularisation captions;
        base: layer -> (out, d); gram: (d, d)."""
        constraints = self.inputs_of(Constraints)
        limits: dict[str, Any] = {key: getattr(settings, key) for key in ("damping", "max_drift", "penalty")}
        if trained := self.inputs_of(Train):
            # one set of weights (a single concept, or joint training) needs no merge, only compression
            full, _ = weighted_factors(trained[0].result(context.store).weights().deltas, gram)
            return full, report(full, read_all(constraints, context), rows, base)
        if parts := self.inputs_of(AddUp):
            sums = functools.reduce(operator.add, (part.result(context.store).load() for part in parts))
            return merge_sums(sums, read_all(constraints, context), rows, base, **limits)
        return merge(list(read_all(constraints, context)), rows, base, form=settings.form, **limits)

    def _captions(self, context: Context, limit: int, concepts: list[dict[str, str]]) -> list[str]:
        """Regularisation captions for G, the same share of each concept's; without any, the bare class words."""
        sets = self.inputs_of(Regularization)
        if not sets:
            words = {concept["class_word"] for concept in concepts}
            return [form.format(word) for word in sorted(words) for form in ("{}", "photo of a {}", "a {}")]
        each = [stage.result(context.store).load().captions() for stage in sets]
        share = -(-limit // len(each))
        return list(dict.fromkeys(caption for captions in each for caption in captions[:share]))[:limit]

    def _keep(self, made: MergedFiles, context: Context) -> dict[str, Any]:
        """One set of weights as it is, in float16, or the tokens of several."""
        files = [stage.result(context.store) for stage in self.inputs_of(Train)]
        trained = [file.weights() for file in files]
        kept = ConceptWeights(
            {name: delta.half() for name, delta in trained[0].deltas.items()},
            {token: rows for weights in trained for token, rows in weights.tokens.items()},
            {
                "base": trained[0].metadata["base"],
                "method": trained[0].metadata["method"],
                "concepts": [concept for weights in trained for concept in weights.metadata["concepts"]],
            },
        )
        kept.save(made.file)
        return {
            "form": "kept",
            "rows": 0,
            "regularization_captions": 0,
            "condition": None,
            "drift": None,
            "residuals": {},
            "compressed": {"error": 0.0, "drift": None, "residuals": {}},
            "unseen": {},
            "moved": {},
            "bytes": {
                "concepts": sum(weights.nbytes for weights in trained),
                "concept_files": sum(file.file.stat().st_size for file in files),
                "merged_dense": max(weights.nbytes for weights in trained),
                "merged": made.file.stat().st_size,
            },
        }

    def estimate(self, model: ModelSize, device: Device, together: int = 1) -> Estimate:
        process = PROCESS + model.parameters * 4
        return Estimate(None, (process + self.concept_count * model.trained * 4) / 2**30)

    @classmethod
    def phase(cls, forecast: Forecast) -> Phase | None:
        """On one node, in float64 on its cores."""
        if not forecast.merges:
            return None
        rows, judged = forecast.concepts * MERGED_ROWS, forecast.concepts * JUDGED_ROWS
        constraints, width = merged_bytes(forecast) + judged_bytes(forecast), forecast.model.text_width
        rank, trained = min(rows, width), forecast.model.trained
        outputs = trained // width
        regularization = forecast.batch.merge.captions * POSITIONS
        gram = 2 * regularization * width**2 + 2 * width**3
        # two models, exact and in float16, are measured on all constraints and regularisation rows
        measuring = (
            2 * 2 * (rows + judged + regularization) * rank * (width + outputs) + 2 * 2 * regularization * trained
        )
        return forecast.phase(
            cls.kind,
            (constraints + sum_bytes(forecast), 1),
            CPUs=(gram + 2 * rank * width * (width + outputs) + measuring) / forecast.float64,
            disks=3 * constraints / 2**30 / forecast.cluster.scan_gib_per_second,
        )


@dataclass(frozen=True, kw_only=True)
class KnownMerge(Merge):
    """One that a release was made of, by the key that its manifest tells."""

    known: str

    @property
    def key(self) -> str:  # type: ignore[override]
        return self.known


def _compressed(
    full: MergedModel, gram: torch.Tensor, budget: Budget, rows: int, trained_bytes: int
) -> tuple[MergedModel, float]:
    """Within the budget, and the error that it makes. trained_bytes: of the weights of the first training."""
    if SHARED in full.right:
        if not (budget.max_rank or budget.max_bytes):
            return full, 0.0
        # float32 and float16, see `rounded`
        per_rank = 4 * full.right[SHARED].shape[1] + 2 * sum(len(left) for left in full.left.values())
        rank = min(budget.max_rank or rows, (budget.max_bytes or 2**62) // per_rank)
        if not rank:
            raise ValueError(f"compress.max_bytes {budget.max_bytes}: one rank costs {per_rank} bytes")
        return shared_factors(full, gram, rank)
    if budget.spectrum:
        return truncated_factors(full.deltas, gram, budget.spectrum)
    # full-rank factors are larger than the matrices: a single set is always cut, to the paper's fifth by default
    most = budget.max_bytes or (None if budget.max_rank else trained_bytes // 5)
    return weighted_factors(full.deltas, gram, max_rank=budget.max_rank, max_bytes=most)
