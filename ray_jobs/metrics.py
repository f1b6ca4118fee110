"""Figures of ours on Ray's Prometheus endpoint, beside Ray's own. There their names begin with `ray_`, and those of
counters end with `_total`. Reported by the process that drives a batch, as long as it is connected to Ray."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray.util.metrics import Counter, Histogram

from pipeline.stages.stage import Stage
from pipeline.stages.train import Train
from pipeline.store import Store

TRAINED = Counter("polyconcept_concepts_trained", "Concepts whose training ended well.", ("batch",))
FAILED = Counter("polyconcept_concepts_failed", "Concepts without weights when their training had ended.", ("batch",))
STEP_SECONDS = Histogram(
    "polyconcept_step_seconds",
    "Seconds of an optimizer step of one concept, a pack's divided by its concepts; one observation a training.",
    [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30],
    ("batch",),
)
GATE = Counter("polyconcept_gate", "Candidates of retrainings, by what the gate said.", ("batch", "result"))
"""result: `passed`, `refused`, or `not compared`: there was nothing to compare it with."""


def trainings_ended(batch: str, stages: Iterable[Stage[Any]], store: Store) -> None:
    """Count what became of trainings: those that went well are in the store. Other stages are not counted."""
    for stage in stages:
        if not isinstance(stage, Train):
            continue
        if stage.is_in(store):
            seconds = store.manifest(stage.kind, stage.key)["seconds"]
            TRAINED.inc(len(stage.concepts), {"batch": batch})
            STEP_SECONDS.observe(seconds / stage.training.steps, {"batch": batch})
        else:
            FAILED.inc(len(stage.concepts), {"batch": batch})
