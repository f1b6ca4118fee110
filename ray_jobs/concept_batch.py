"""Run a concept batch on Ray: what `ray job submit … -- python -m ray_jobs.concept_batch batch.yaml` starts.

Each stage is one Ray task that waits for its inputs' tasks; without a cluster, Ray is started on this machine.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from tqdm import tqdm

from pipeline.plan import Plan, Stage, make_plan
from pipeline.release.publish import publish
from pipeline.report import summary, write_report
from pipeline.spec import ConceptBatch
from pipeline.stages import run_stage
from pipeline.store import Store

ON_DEVICE = {"index", "candidates", "features", "train", "merge", "evaluate", "release"}
"""Stages that run the model, on a GPU where the cluster has any."""


class StageFailed(ValueError):
    """A stage could not be done; the message names it and says why. Finished stages stay in the store."""


@dataclass(frozen=True)
class Outcome:
    """What a run made."""

    release: str
    report: Path
    summary: dict[str, Any]


def run(batch: ConceptBatch) -> Outcome:
    """Do all stages of a batch that are not done yet, publish the release and write the report.

    Raises: ValueError for bad input; StageFailed naming every stage that failed.
    """
    if os.environ.get("RAY_ADDRESS"):
        for key, place in (("store", batch.store_url), ("publish.to", batch.release_url)):
            if "://" not in place and not os.path.isabs(place):
                raise ValueError(
                    f"{key}: {place!r} is relative; on a cluster give a URL or a path that all nodes share"
                )
    plan = make_plan(batch)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    store = Store(batch.store_url)
    store.sweep()
    if plan.todo(store):
        try:
            with ray_session():
                _run_stages(plan, store)
        finally:
            store.sweep()
    last = plan.stages[-1]
    release = publish(store.path(last.kind, last.key), batch.release_url, _provenance(plan))
    output = Path(batch.output_path)
    output.mkdir(parents=True, exist_ok=True)
    figures = summary(plan, store, release.url)
    (output / "summary.json").write_text(json.dumps(figures, indent=1))
    write_report(plan, store, release.url, output / "report.html")
    for name, concept in figures["concepts"].items():
        if shortfall := concept.get("regularization", {}).get("shortfall"):
            print(f"note: {name}: regularisation: {shortfall}", file=sys.stderr)
    return Outcome(release.url, output / "report.html", figures)


def _provenance(plan: Plan) -> dict[str, Any]:
    """Where a release came from, for its manifest."""
    packages = ("torch", "diffusers", "transformers", "open_clip_torch")
    return {
        "batch": plan.batch.name,
        "stages": {f"{stage.kind} {stage.name}": stage.key for stage in plan},
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """The cluster this process belongs to, or one started here and stopped afterwards."""
    os.environ.setdefault("RAY_DISABLE_USAGE_STATS", "1")
    if ray.is_initialized():
        yield
        return
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    options: dict[str, Any] = {} if on_cluster else {"include_dashboard": False}
    ray.init(logging_level="ERROR", log_to_driver=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


class Board:
    """How far each stage is: workers write, the driver reads."""

    def __init__(self) -> None:
        self.state: dict[str, tuple[str, int, int]] = {}

    def put(self, key: str, what: str, done: int, total: int) -> None:
        self.state[key] = (what, done, total)

    def get(self) -> dict[str, tuple[str, int, int]]:
        return self.state


def _work(stage: Stage, root: str, board: Any, *inputs: str) -> str:
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5 or done == total:
            last = time.monotonic()
            board.put.remote(stage.key, what, done, total)

    run_stage(stage, Store(root), progress)
    return stage.key


def _run_stages(plan: Plan, store: Store) -> None:
    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0)
    cpus = max(1, int(resources.get("CPU", 1) // max(1, len(plan.of("train")))))
    board = ray.remote(Board).options(num_cpus=0).remote()
    work = ray.remote(_work)
    refs: dict[str, Any] = {}
    todo = list({stage.key: stage for stage in plan.todo(store)}.values())
    keys = {stage.key for stage in todo}
    for stage in todo:
        needs = [refs[upstream.key] for upstream in stage.inputs if upstream.key in keys]
        refs[stage.key] = work.options(
            num_cpus=cpus if stage.kind in ON_DEVICE and not gpus else 1,
            num_gpus=1 if gpus and stage.kind in ON_DEVICE else 0,
            max_retries=2,
            name=f"{stage.kind} {stage.name}",
        ).remote(stage, store.root, board, *needs)
    failures = _follow(todo, refs, board)
    if failures:
        raise StageFailed("\n".join(failures))


def _follow(todo: list[Stage], refs: dict[str, Any], board: Any) -> list[str]:
    """Wait for all stages, showing how far they are; returns what failed, each once, where it failed first."""
    failures: list[str] = []
    broken: set[str] = set()
    waiting = {refs[stage.key]: stage for stage in todo}
    bars: dict[str, tqdm] = {}
    with tqdm(total=len(todo), desc="stages", unit="stage") as total:
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0.5)
            for key, (what, count, of) in ray.get(board.get.remote()).items():
                running = next((s for s in waiting.values() if s.key == key), None)
                if running is None:
                    continue
                if key not in bars:
                    bars[key] = tqdm(total=of, desc=f"{running.kind} {running.name}", unit=what, leave=False)
                bars[key].n = count
                bars[key].refresh()
            for ref in done:
                stage = waiting.pop(ref)
                if stage.key in bars:
                    bars[stage.key].close()
                total.update()
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as error:
                    if not any(upstream.key in broken for upstream in stage.inputs):
                        cause = getattr(error, "cause", None) or error
                        failures.append(f"{stage.kind} {stage.name}: {cause}")
                        if not isinstance(cause, (ValueError, OSError)):
                            print(error, file=sys.stderr)  # a fault of ours: the worker's traceback is worth having
                    broken.add(stage.key)
    return failures


if __name__ == "__main__":
    from ray_jobs.cli import main

    main(["run", *sys.argv[1:]])
