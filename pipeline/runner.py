"""Who does the stages of plans: the protocol, a runner that needs no Ray, and what all runners share."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

from pipeline.cost.estimate import Device
from pipeline.failure import Failure
from pipeline.limits import Limits
from pipeline.places import masked
from pipeline.plan import Plan
from pipeline.stages import STAGES
from pipeline.stages.stage import Alone, Progress, Stage, Workers
from pipeline.store import Store
from pipeline.terminal import print


class Runner(Protocol):
    """Does stages, here or elsewhere."""

    @property
    def on_cluster(self) -> bool:
        """Whether other machines do stages, which have to reach what a batch names."""
        ...

    def session(self) -> contextlib.AbstractContextManager[None]:
        """Keeps the runner's processes up, so that several calls of `run` share them; one within another is the
        same one. Raises: OSError when they cannot be started."""
        ...

    def run(self, plans: Sequence[Plan], store: Store, limits: Limits) -> list[str]:
        """Do what there is to do, of all plans at once; returns what failed, where it failed first, a line each.

        Raises: ValueError when a plan asks for what the runner has not; OutOfTime.
        """
        ...

    def judged(self, batch: str, result: str) -> None:
        """Count what a gate said of a candidate: `passed`, `refused` or `not compared`."""
        ...


@dataclass(frozen=True)
class Local:
    """Does one stage after the other in this process, on the CPU or its first GPU."""

    on_cluster = False

    def session(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def run(self, plans: Sequence[Plan], store: Store, limits: Limits) -> list[str]:
        asked = {stage.key: stage for plan in plans for stage in plan}
        failures: dict[str, Failure] = {}
        jobs: list[tuple[Stage[Any], ...]] = []
        for kind in STAGES:  # each reads only results of those before it
            same = [stage for stage in asked.values() if type(stage) is kind and not stage.is_in(store)]
            jobs += kind.jobs(same, 1, lambda: Device(psutil.virtual_memory().available, cuda=False))
        for job in jobs:
            limits.check()
            failures |= do_job(job, store, lambda *_: None, Alone(), failures)
        return told(jobs, store, failures)

    def judged(self, batch: str, result: str) -> None:
        pass


def do_job(
    stages: Sequence[Stage[Any]], store: Store, progress: Progress, workers: Workers, broken: Iterable[str]
) -> dict[str, Failure]:
    """Do the stages of a job. broken: keys of stages that failed before.

    Returns: key -> failure. It is not raised: what does not depend on these stages goes on.
    """
    broken = set(broken)
    failures: dict[str, Failure] = {}
    runnable = list(stages)
    try:
        for stage in stages:
            # a pack that died may have finished some
            if any(source.key in broken and not source.is_in(store) for source in stage.inputs):
                failures[stage.key] = Failure("an input failed")
                runnable.remove(stage)
        if runnable:
            left = type(runnable[0]).run_job(runnable, store, progress, workers)
            failures |= {key: Failure(why) for key, why in left.items()}
    except Exception as error:
        fault = "" if isinstance(error, (ValueError, OSError)) else traceback.format_exc()
        failures |= {stage.key: Failure(str(error), fault) for stage in runnable}
    return failures


def told(jobs: Sequence[tuple[Stage[Any], ...]], store: Store, failures: dict[str, Failure]) -> list[str]:
    """What failed, where it failed first: a line each. Tracebacks are printed."""
    missing = {stage.key: stage for stages in jobs for stage in stages if not stage.is_in(store)}
    messages = []
    for key, stage in missing.items():
        if not any(source.key in missing for source in stage.inputs):
            unseen = Failure(f"done, but not in {store.root}, which all nodes have to reach")
            failure = failures.get(key, unseen)
            messages.append(f"{stage.kind} {stage.name}: {failure.message}")
            print(masked(failure.fault), file=sys.stderr, end="")  # ours, not the user's: worth having
    return messages
