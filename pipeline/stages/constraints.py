"""What the merge needs of a training, small beside its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.merge.constraints import Constraint, constraint_of, load_constraints, save_constraints, unseen_of
from pipeline.stages.resident import resident_base
from pipeline.stages.stage import Artifact, Context, Stage
from pipeline.stages.train import Train
from training.checkpoint import load_tensors, save_tensors
from training.weights import token_tensors, tokens_from

if TYPE_CHECKING:
    from pipeline.cost.cluster import Forecast, Phase

MERGED_ROWS, JUDGED_ROWS = 20, 40
"""Of a concept, about: those of the merge (17 on the miniature), float64, and those that it is judged by on unseen
prompts, float32."""


class ConstraintFiles(Artifact):
    @property
    def file(self) -> Path:
        return self.folder / "constraints.safetensors"

    @property
    def unseen_file(self) -> Path:
        return self.folder / "unseen.safetensors"

    @property
    def token_file(self) -> Path:
        return self.folder / "tokens.safetensors"

    @property
    def facts(self) -> Path:
        return self.folder / "trained.json"

    def load(self) -> Iterator[Constraint]:
        yield from load_constraints(self.file)

    def unseen(self) -> Iterator[tuple[Constraint, Constraint]]:
        """Of each concept what `unseen_of` made."""
        loaded = [constraint.to(torch.float64) for constraint in load_constraints(self.unseen_file)]
        half = len(loaded) // 2
        yield from zip(loaded[:half], loaded[half:], strict=True)

    def tokens(self) -> dict[str, list[torch.Tensor]]:
        return tokens_from(load_tensors(self.token_file)[0], self.token_file)

    def trained(self) -> dict[str, Any]:
        """Of the weights: `concepts` (name, token, class word), `nbytes` of the tensors, bytes of the `file`."""
        return json.loads(self.facts.read_text())


@dataclass(frozen=True, kw_only=True)
class Constraints(Stage[ConstraintFiles]):
    kind, version, on_device, at_once, artifact = "constraints", 2, True, 4, ConstraintFiles

    @dataclass(frozen=True)
    class Places:
        base: str

    prompts: tuple[str, ...]
    exact: bool
    places: Places

    def run(self, context: Context) -> None:
        backbone = resident_base(self.places.base)
        (training,) = self.inputs_of(Train)
        trained, made = training.result(context.store), ConstraintFiles(context.out)
        weights = trained.weights()
        save_constraints(made.file, constraint_of(backbone, weights, self.prompts, exact=self.exact))
        words, padding = zip(*unseen_of(backbone, weights), strict=True)
        save_constraints(made.unseen_file, [each.to(torch.float32) for each in (*words, *padding)])
        save_tensors(made.token_file, token_tensors(weights.tokens))
        size = trained.file.stat().st_size
        described = {"concepts": weights.metadata["concepts"], "nbytes": weights.nbytes, "file": size}
        made.facts.write_text(json.dumps(described))

    @classmethod
    def phase(cls, forecast: Forecast) -> Phase | None:
        if not forecast.merges:
            return None
        moved = forecast.concepts * forecast.weights_bytes + merged_bytes(forecast) + judged_bytes(forecast)
        nodes = forecast.cluster.nodes
        operations = 2 * forecast.concepts * (MERGED_ROWS + JUDGED_ROWS) * forecast.model.trained
        return forecast.phase(cls.kind, (moved, nodes), CPUs=operations / (nodes * forecast.float64))


def merged_bytes(forecast: Forecast) -> int:
    """What the merge reads, of all concepts."""
    return 8 * forecast.concepts * MERGED_ROWS * _numbers(forecast)


def judged_bytes(forecast: Forecast) -> int:
    """What the merge is judged by, of all concepts."""
    return 4 * forecast.concepts * JUDGED_ROWS * _numbers(forecast)


def _numbers(forecast: Forecast) -> int:
    """Of a row: its text features, and what each layer is to make of them."""
    width = forecast.model.text_width
    return width + forecast.model.trained // width


def read_all(constraints: list[Constraints], context: Context) -> Iterator[Constraint]:
    """Of all these stages, one file in memory at a time."""
    for stage in constraints:
        yield from stage.result(context.store).load()
