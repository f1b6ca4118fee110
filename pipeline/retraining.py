"""Retraining: reads the concept catalogue, trains what is new or changed since the last release, merges all, and
publishes if the gate passes.

Its log is one JSON object a line on stderr; its exit code says how it ended (`Exit`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.batch import NO_LIMITS, Exit, build, plan_usable, push_release, write_results
from pipeline.catalogue import read_catalogue
from pipeline.failure import StageFailed
from pipeline.gate import Verdict, baseline, judge, retention, scores_of
from pipeline.limits import Limits
from pipeline.places import masked
from pipeline.plan import Plan
from pipeline.provenance import provenance
from pipeline.release.lease import Busy, lease
from pipeline.release.place import open_destination, plain_destination
from pipeline.release.publish import alias_of, alias_problems, keep_candidate, manifest_of, publish, versions
from pipeline.release.sign import signer
from pipeline.release.versions import Version, changes, promote
from pipeline.runner import Runner
from pipeline.spec import Concept, Retraining
from pipeline.store import Store

log = logging.getLogger("polyconcept.retrain")


@dataclass(frozen=True)
class Outcome:
    """place: of the release that is the latest now, or of the refused candidate. left_out: why, a line a concept."""

    exit: Exit
    place: str
    left_out: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()


def retrain(asked: Retraining, runner: Runner, wait: float = 0, limits: Limits = NO_LIMITS) -> Outcome:
    """Bring the releases up to date with the catalogue, in a new version if anything changed and the gate passes.

    wait: seconds to wait for another run at the same releases to end.

    Raises: ValueError for bad input and failed stages; Busy when another run is at work or got in between; OutOfTime
        as `limits` say: what was computed by then is kept, and what was computed whole is published all the same.
    """
    if runner.on_cluster:
        asked.check_places()
    signer(asked.signing_key)  # a key that cannot be used is said now, not after the training
    with lease(asked.release_url, asked.lease, min(wait, limits.left)) as held:
        return _retrain(asked, held.check, runner, limits)


def _retrain(asked: Retraining, check_lease: Callable[[], None], runner: Runner, limits: Limits) -> Outcome:
    destination = plain_destination(asked.release_url)
    seen = _latest_alias(destination)
    _check_signature(asked, destination, seen)
    latest, rolled_back = _published(destination, seen)
    concepts, left_out = _usable(asked, latest)
    store = Store(asked.store_url)
    store.sweep()
    plan, unusable = plan_usable(asked.with_concepts(concepts))
    left_out |= unusable
    _log_comparison(plan, latest, left_out)
    known = {_release_key(version): version for version in (*rolled_back, latest) if version}

    def check() -> None:
        """Raises: Busy when another run is or was at work."""
        check_lease()
        if _latest_alias(destination) != seen:  # the gate compared with a release that is not the current one any more
            raise Busy(f"{destination}: `latest` was moved during this run; nothing released")

    def unchanged(plan: Plan) -> bool:
        """Whether this is the latest release already, or what people rolled back from and do not want."""
        return plan.release.key in known

    failed: list[str] = []
    verdicts: list[Verdict] = []
    if not unchanged(plan):
        # on a cluster also where there is nothing to do: what the gate said is counted there
        with runner.session() if runner.on_cluster or plan.todo(store) else contextlib.nullcontext():
            plan, failed = build(plan, store, runner, limits)
            if not unchanged(plan):
                wanted = {c.name for c in concepts} | set(left_out)
                verdicts = _compare(asked, plan, store, destination, latest, wanted, runner, limits)
                passed = all(verdict.passed for verdict in verdicts)
                result = "not compared" if not verdicts else "passed" if passed else "refused"
                runner.judged(asked.name, result)
    reasons = (*left_out.values(), *failed)
    current = f"{destination}/{latest.name}" if latest else ""
    if unchanged(plan) and latest:
        if not seen:
            check()
            promote(current, signing_key=asked.signing_key)
        version = known[plan.release.key]
        event, more = ("nothing changed", {}) if version is latest else ("rolled back from", {"version": version.name})
        log.info(event, extra={"latest": latest.name, **more, "left_out": reasons})
        if version is latest and not _has_results(Path(asked.output_path), current):
            _write_results(plan, store, current)
        _push(asked, current)
        return Outcome(_exit(reasons), current, reasons)
    for verdict in verdicts:
        log.info("gate", extra=dataclasses.asdict(verdict))
    if not verdicts:
        log.info("not compared", extra={"latest": latest.name if latest else None})
    facts = provenance(plan, store) | {"gate": [dataclasses.asdict(verdict) for verdict in verdicts]}
    check()
    if not all(verdict.passed for verdict in verdicts):
        place = _keep(plan, store, destination, facts)
        log.error("refused", extra={"candidate": place, "refused_by": [str(v) for v in verdicts if not v.passed]})
        _push(asked, current)
        return Outcome(Exit.REFUSED, place, reasons, tuple(verdicts))
    release = publish(plan.release.result(store).folder, destination, facts, asked.signing_key, check)
    log.info("released", extra={"release": release.url, "version": release.version, "new": release.created})
    _write_results(plan, store, release.url)
    _push(asked, release.url)
    return Outcome(_exit(reasons), release.url, reasons, tuple(verdicts))


def _has_results(output: Path, release: str) -> bool:
    """Whether report and figures of a release are there: the run that published it may have been killed before."""
    try:
        figures = json.loads((output / "summary.json").read_text())
        return figures["release"] == masked(release) and (output / "report.html").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_results(plan: Plan, store: Store, release: str) -> None:
    try:
        write_results(plan, store, release)
    except Exception as error:  # of every kind: the release is there, and its run has not failed
        log.warning("report not written", extra={"error": str(error)})


def _push(asked: Retraining, release: str) -> None:
    if place := push_release(asked, release):
        log.info("on the hub", extra={"place": place})


def _usable(asked: Retraining, latest: Version | None) -> tuple[list[Concept], dict[str, str]]:
    """The catalogue's concepts, and what is wrong with the others where they may be left out."""
    concepts, problems = read_catalogue(asked, _provenance(latest).get("concepts", ()))
    if problems and not (asked.merge.partial and concepts):
        raise ValueError("\n".join(problems.values()))
    return concepts, problems


def _latest_alias(destination: str) -> dict[str, Any]:
    """What `latest.json` says now; empty when it is not there."""
    fs, root, _ = open_destination(destination)
    return alias_of(fs, root)


def _check_signature(asked: Retraining, destination: str, alias: dict[str, Any]) -> None:
    """Raises: ValueError when whoever named the latest release, which the gate compares with, had not the key."""
    key = asked.signing_key
    if not (key and alias):
        return
    if "signature" not in alias:  # of a time before aliases were signed, or moved without the key
        log.warning("latest.json is not signed", extra={"version": alias["version"]})
        return
    fs, root, _ = open_destination(destination)
    if problems := alias_problems(fs, root, "latest", key):
        raise ValueError(f"{destination}: {problems[0]}; `polyconcept release promote` the right version")


def _published(destination: str, alias: dict[str, Any]) -> tuple[Version | None, list[Version]]:
    """The latest release, and those that it was rolled back from. Where `latest.json` is missing, the newest
    whole version counts as the latest: its loss (or a first run that was killed before writing it) must not open the
    gate."""
    fs, root, _ = open_destination(destination)
    if not alias:
        newest = next((name for _, name in reversed(versions(fs, root)) if manifest_of(fs, root, name)), None)
        if not newest:
            return None, []
        log.warning("latest.json is missing", extra={"taken": newest})
        alias = {"version": newest}
    names = (alias["version"], *alias.get("rolled_back", ()))
    latest, *rolled_back = (Version(name, manifest_of(fs, root, name), ()) for name in names)
    if not latest.manifest:
        raise ValueError(
            f"{destination}: latest.json names {latest.name}, which is not there whole; "
            "`polyconcept release promote` another"
        )
    return latest, [version for version in rolled_back if version.manifest]


def _provenance(version: Version | None) -> dict[str, Any]:
    return version.manifest["provenance"] if version and version.manifest else {}


def _release_key(version: Version) -> str:
    stages = _provenance(version).get("stages", {})
    return next((key for name, key in stages.items() if name.startswith("release ")), "")


def _log_comparison(plan: Plan, latest: Version | None, left_out: Iterable[str]) -> None:
    """left_out: concepts that the catalogue has, broken."""
    trained = {name: {"training": stage.key} for name, stage in plan.trainings().items()}
    found = changes((latest and latest.manifest) or {}, {"provenance": {"concepts": trained}})
    broken = sorted(left_out)
    removed = [name for name in found["removed"] if name not in broken]
    counted = found | {"removed": removed, "unchanged": len(found["unchanged"]), "left_out": broken}
    log.info("compared", extra={"latest": latest.name if latest else None, **counted})


def _compare(
    asked: Retraining,
    plan: Plan,
    store: Store,
    destination: str,
    latest: Version | None,
    catalogue: set[str],
    runner: Runner,
    limits: Limits,
) -> list[Verdict]:
    if not latest or not latest.manifest:
        return []
    current = baseline(plan, latest.manifest, f"{destination}/{latest.name}", store)
    own = retention(plan)
    measuring = Plan(plan.batch, current.stages + own.stages, ())
    if measuring.todo(store):
        with runner.session():
            if failed := runner.run([measuring], store, limits):
                raise StageFailed("\n".join(failed))
    released = set(latest.manifest["provenance"]["concepts"])
    missing = sorted((released & catalogue) - {c.name for c in plan.batch.concepts})
    return judge(asked.gate, scores_of(own, store), scores_of(current, store), missing)


def _keep(plan: Plan, store: Store, destination: str, facts: dict[str, Any]) -> str:
    """Keep a refused candidate with its report beside the releases, under the key of its content."""
    release = plan.release
    report, _ = write_results(plan, store, f"{destination}/candidates/{release.key}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "candidate"
        shutil.copytree(release.result(store).folder, folder)
        shutil.copy(report, folder / "report.html")
        return keep_candidate(folder, destination, release.key, facts, plan.batch.signing_key)


def _exit(left_out: Sequence[str]) -> Exit:
    return Exit.PARTIAL if left_out else Exit.DONE


class JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, event, and what was given as `extra`."""

    STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        extra = {key: value for key, value in vars(record).items() if key not in self.STANDARD}
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        line = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage(), **extra}
        return masked(json.dumps(line, default=str))
