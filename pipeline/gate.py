"""The gate: a new release against the current one, on the same prompts and seeds.

Both are drawn with today's prompts, seeds and judges, and compared image by image, so that the differences are the
weights'. What the current release was measured by when it was made does not matter. A concept is measured against the
pictures the catalogue has of it now.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.measures import Measure, measures_in
from pipeline.plan import Plan
from pipeline.spec import Gate, base_path
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.merge import KnownMerge
from pipeline.stages.released import Released
from pipeline.stages.stage import Stage
from pipeline.store import Store
from training.base import base_digest

RETENTION = Measure("retention", "text alignment of the bare class", "overall", "retention", lambda _: np.zeros(0))
"""The text alignment of the released model asked for the bare class, which language drift lowers: drawn apart."""


@dataclass(frozen=True)
class Verdict:
    """On one measure. concept: empty for all. change: mean of new - current; error: its standard error. A concept that
    was released and is missing now has the measure `presence`."""

    measure: str
    concept: str
    change: float
    error: float
    tolerance: float
    passed: bool
    title: str = ""

    def __str__(self) -> str:
        where = self.concept or "overall"
        if self.measure == "presence":
            return f"{where}: in the current release and the catalogue, but it could not be made again"
        return (
            f"{where}: {self.title} changed by {self.change:+.4f} (standard error {self.error:.4f}), "
            f"{'within' if self.passed else 'beyond'} the tolerance of {self.tolerance}"
        )


def baseline(plan: Plan, current: dict[str, Any], release: str, store: Store) -> Plan:
    """The stages that measure the current release as the plan measures its own: concept by concept where both have it,
    and all bare classes of the plan, which any model can draw.

    Those the store has from when the current release was new are the same stages: nothing is drawn twice.

    Args:
        current: its manifest. release: its place.
    Raises: ValueError when the manifest does not say what is needed, or its base model is not to be had.
    """
    provenance = current["provenance"]
    try:
        made, base, concepts = provenance["stages"], provenance["base"], provenance["concepts"]
        weights = current["files"]["merged.safetensors"]["sha256"]
    except KeyError as error:
        raise ValueError(
            f"{release}: its manifest does not say {error}: not made by a batch, nothing to compare with"
        ) from None
    stages = plan.evaluations()
    own = next(iter(stages.values()))["merged"]
    base_place = own.places.base
    if base["digest"] != own.base:
        base_place = base_path(base["name"], plan.batch.folder)
        # a folder's name without where it lay: nothing to ask the hub for
        is_unknown = base["name"] != "miniature" and "/" not in base["name"]
        if is_unknown or base_digest(base_place) != base["digest"]:
            raise ValueError(
                f"{release}: its base model {base['name']!r} is another by now; to go on without a comparison, publish "
                "to another place, or by `polyconcept run`"
            )
    merge: Stage[Any] = KnownMerge(name="current", known=made.get("merge all concepts", ""))
    before: list[Stage[Any]] = []
    if not merge.is_in(store):
        merge = Released(name=current["version"], sha256=weights, places=Released.Places(release))
        before = [merge]
    measured = [
        dataclasses.replace(
            models["merged"],
            name=f"{name}: current",
            base=base["digest"],
            inputs=(merge,),
            places=dataclasses.replace(models["merged"].places, base=base_place),
        )
        for name, models in stages.items()
    ]
    released = {name: (entry["token"], entry["class_word"]) for name, entry in concepts.items()}
    # one that is new, or another thing under an old name, has nothing to be compared with but its class
    both = [stage for stage in measured if released.get(stage.concept) == stage.phrase]
    return Plan(plan.batch, (*before, *both, *_of_bare_classes(measured)), ())


def retention(plan: Plan) -> Plan:
    """The stages that a finished plan's own retention is measured by."""
    measured = [models["merged"] for models in plan.evaluations().values()]
    return Plan(plan.batch, (*measured, *_of_bare_classes(measured)), ())


def _of_bare_classes(evaluations: Sequence[Evaluate]) -> list[Evaluate]:
    """Of a new category, whose class word is the concept, none."""
    return [stage.of_bare_class() for stage in evaluations if stage.phrase.token]


def judge(
    gate: Gate, new: Mapping[str, pd.DataFrame], current: Mapping[str, pd.DataFrame], missing: list[str]
) -> list[Verdict]:
    """Compare scores image by image.

    Args:
        new, current: concept -> its scores, a row per image; what only one of them has is not compared.
        missing: concepts that should be in the new release and are not.
    Returns: none when they have nothing in common.
    """
    verdicts = [Verdict("presence", name, 0.0, 0.0, 0.0, False) for name in missing]
    pairs = {
        name: new[name].merge(table, on=["prompt", "seed"], suffixes=("_new", "_current"), validate="1:1")
        for name, table in current.items()
        if name in new
    }
    if not pairs:
        return verdicts
    columns = {name.removesuffix("_new") for table in pairs.values() for name in table if name.endswith("_new")}
    for measure in (*measures_in(sorted(columns - {"retention"})), RETENTION):
        tables = pairs if measure.scope == "concept" else {"": pd.concat(pairs.values())}
        if measure is RETENTION:  # all that there is to see of a new concept, and lost in the mean of many
            tables |= {name: table for name, table in pairs.items() if "image_new" not in table}
        for name, table in tables.items():
            if f"{measure.name}_new" in table:
                difference = (table[f"{measure.name}_new"] - table[f"{measure.name}_current"]).dropna().to_numpy()
                verdicts.append(_verdict(measure, name, difference, gate))
    return verdicts


def _verdict(measure: Measure, concept: str, difference: np.ndarray, gate: Gate) -> Verdict:
    change, error = float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))
    tolerance: float = getattr(gate, measure.tolerance)
    # fails only when even the upper end of the interval has fallen farther than is tolerated
    passed = change + gate.standard_errors * error >= -tolerance
    return Verdict(measure.name, concept, change, error, tolerance, passed, measure.title)


def scores_of(plan: Plan, store: Store) -> dict[str, pd.DataFrame]:
    """Concept -> scores of the merged model, by the finished stages of `retention` or `baseline`: all, or `retention`
    alone where the model does not have the concept."""
    tokens = {concept.name: concept.token for concept in plan.batch.concepts}
    tables: dict[str, pd.DataFrame] = {}
    for stage in plan.of(Evaluate):
        name, scores = stage.concept, stage.result(store).table()
        if stage.phrase.token == tokens[name]:
            scores = scores.drop(columns="model")
        else:  # of the bare class, which comes after
            scores = scores[["prompt", "seed", "text"]].rename(columns={"text": "retention"})
        tables[name] = tables[name].merge(scores, on=["prompt", "seed"]) if name in tables else scores
    return tables
