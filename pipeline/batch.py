"""A concept batch from its file to a published release and a report."""

from __future__ import annotations

import enum
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checks import UnusableConcepts
from pipeline.failure import StageFailed
from pipeline.limits import EXIT as OUT_OF_TIME
from pipeline.limits import Limits
from pipeline.places import masked
from pipeline.plan import Plan, make_plan
from pipeline.provenance import provenance
from pipeline.ready import check_ready
from pipeline.release.hub import push
from pipeline.release.publish import publish
from pipeline.release.sign import signer
from pipeline.report import summary, write_report
from pipeline.runner import Runner
from pipeline.spec import Concept, ConceptBatch, Settings
from pipeline.store import Store
from pipeline.terminal import print
from training.durable import replace


class Exit(enum.IntEnum):
    """How a run or a retraining ended. Never 1, with which Python and Ray end a process that they give up."""

    DONE = 0
    """Released; or, of a retraining, nothing changed, or the catalogue asks for what people rolled back from."""
    BAD_INPUT = 2
    """Bad input, or something failed; the message says what."""
    REFUSED = 3
    """The gate refused; the candidate is kept."""
    BUSY = 4
    """Another run holds the lease, or took it over, or moved `latest` meanwhile: nothing was released."""
    PARTIAL = 5
    """As DONE, but concepts that failed were left out, as `merge.partial` allows."""
    OUT_OF_TIME = OUT_OF_TIME
    """The deadline passed, or no device came in time: nothing was released, what was finished is kept."""


@dataclass(frozen=True)
class Outcome:
    """What a run made. report: None, and no summary, when they could not be written. failures: what went wrong with the
    concepts that were left out (`merge.partial`); hub: the release's place there, where `publish.hub` asks for it."""

    release: str
    report: Path | None
    summary: dict[str, Any]
    failures: tuple[str, ...] = ()
    hub: str = ""


NO_LIMITS = Limits()


def run(batch: ConceptBatch, runner: Runner, limits: Limits = NO_LIMITS) -> Outcome:
    """Do all stages of a batch that are not done yet, publish the release (to the hub, too) and write the report.

    Raises: ValueError for bad input, and where the hub cannot be had; StageFailed naming every stage that failed;
        OutOfTime as `limits` say.
    """
    if runner.on_cluster:
        batch.check_places()
    signer(batch.signing_key)  # a key that cannot be used is said now, not after the training
    store = Store(batch.store_url)
    store.sweep()
    plan, failures = plan_usable(batch)
    plan, failed = build(plan, store, runner, limits)
    release = publish(plan.release.result(store).folder, batch.release_url, provenance(plan, store), batch.signing_key)
    report: Path | None = None
    figures: dict[str, Any] = {}
    try:
        report, figures = write_results(plan, store, release.url)
    except Exception as error:  # of every kind: the release is there, and its run has not failed
        print(f"note: released, but the report was not written: {masked(str(error))}", file=sys.stderr)
        print("note: `polyconcept report` writes it again", file=sys.stderr)
    hub = push_release(batch, release.url)
    return Outcome(release.url, report, figures, (*failures.values(), *failed), hub)


def push_release(settings: Settings, release: str) -> str:
    """Copy a release to the hub that the settings name, also when it is not new: that may have failed last time.
    Returns its place there, empty when they name none. Raises: ValueError when the hub cannot be had or refuses."""
    if not settings.publish.hub:
        return ""
    try:
        return push(release, settings.publish.hub)
    except ValueError as error:
        raise ValueError(f"{release} is released, but not on the hub; run again to copy it: {error}") from None


def build(plan: Plan, store: Store, runner: Runner, limits: Limits) -> tuple[Plan, list[str]]:
    """Do the stages of a plan that are not done yet.

    Returns: the plan that was carried out, and what failed where `merge.partial` allows to go on with the rest.
    Raises: StageFailed naming every stage that failed, where it does not; ValueError as `check_ready`; OutOfTime.
    """
    for note in (*plan.notes, *check_ready(plan, store)):
        print(f"note: {note}", file=sys.stderr)
    if not plan.todo(store):
        return plan, []
    left_out: list[str] = []
    try:
        with runner.session():
            failed = runner.run([plan], store, limits)
            if failed and (rest := _trained(plan, store)) and plan.batch.merge.partial:
                plan = make_plan(plan.batch.model_copy(update={"concepts": rest}))
                left_out = failed
                failed = runner.run([plan], store, limits)
            if failed:
                raise StageFailed("\n".join(left_out + failed))
    finally:
        store.sweep()
    return plan, left_out


def write_results(plan: Plan, store: Store, release: str) -> tuple[Path, dict[str, Any]]:
    """Write report and figures of a finished plan to its output folder, the figures last and at once: where they name a
    release, both are there. Returns the report and the figures."""
    output = Path(plan.batch.output_path)
    output.mkdir(parents=True, exist_ok=True)
    figures = summary(plan, store, release)
    write_report(plan, store, release, output / "report.html")
    part = output / f".summary.json.{os.getpid()}.part"
    part.write_text(json.dumps(figures, indent=1))
    replace(part, output / "summary.json")
    for name, concept in figures["concepts"].items():
        regularization = concept.get("regularization", {})
        if shortfall := regularization.get("shortfall"):
            print(f"note: {name}: regularisation: {shortfall}", file=sys.stderr)
    for line in figures["left_out"]:
        print(f"note: {line}", file=sys.stderr)
    return output / "report.html", figures


def plan_usable(batch: ConceptBatch) -> tuple[Plan, dict[str, str]]:
    """The plan of the concepts whose images and words can be used, and what is wrong with the others where they may be
    left out: name -> why.

    Raises: ValueError as `make_plan`, where they may not.
    """
    try:
        return make_plan(batch), {}
    except UnusableConcepts as error:
        rest = tuple(c for c in batch.concepts if c.name not in error.concepts)
        if not (rest and batch.merge.partial):
            raise
        return make_plan(batch.model_copy(update={"concepts": rest})), error.concepts


def _trained(plan: Plan, store: Store) -> tuple[Concept, ...]:
    """The concepts whose weights are there, when they are not all."""
    done = {name for name, training in plan.trainings().items() if training.is_in(store)}
    return tuple(c for c in plan.batch.concepts if c.name in done) if len(done) < len(plan.batch.concepts) else ()
