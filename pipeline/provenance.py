"""Where a release came from, as its manifest says it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.plan import Plan
from pipeline.release.manifest import public
from pipeline.stages.evaluate import score_columns
from pipeline.stages.features import Features
from pipeline.stages.index import Index
from pipeline.store import Store, content_key
from training.base import base_digest


def provenance(plan: Plan, store: Store) -> dict[str, Any]:
    """Where the release of a finished plan came from, for its manifest.

    `concepts` has a hash of each one's pictures and the key of its training, which is the hash of all that determined
    its weights.
    """
    batch, spec, trained = plan.batch, plan.release.spec, plan.trainings()
    pictures = {stage.name: content_key(stage.images) for stage in plan.of(Features)}
    merged = {name: models["merged"] for name, models in plan.release.result(store).measures().items()}
    packages = ("polyconcept", "torch", "diffusers", "transformers", "open_clip_torch", "ray")
    facts = {
        "batch": batch.name,
        "made_by": batch.publish.made_by,
        "base": {"name": spec["base"], "digest": base_digest(batch.base_path)},
        "corpus": next((index.corpus for index in plan.of(Index)), None),
        "concepts": {
            c.name: {
                "token": c.token,
                "class_word": c.class_word,
                "images": pictures[c.name],
                "training": trained[c.name].key,
            }
            for c in batch.concepts
        },
        "measures": {"concepts": merged, "overall": _means(list(merged.values()))},
        "seeds": {"training": batch.training.seed, "evaluation": batch.evaluation.seed},
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "spec": spec,
        "stages": {f"{stage.kind} {stage.name}": stage.key for stage in plan},
    }
    return public(facts)


def _means(entries: list[dict[str, float]]) -> dict[str, float]:
    return {score: float(np.mean([e[score] for e in entries])) for score in score_columns(entries[0])}


def _commit() -> str | None:
    """The commit of this project's code; GIT_COMMIT where it was installed without its history, as in an image."""
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
    project = Path(__file__).parents[1]
    if not (project / ".git").exists():  # installed: a repository further up is another project's
        return None
    command = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
