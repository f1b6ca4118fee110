"""Shows how far the tasks of a batch are, and waits for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import ray
from tqdm import tqdm

from pipeline.failure import Failure
from pipeline.stages.stage import Stage
from pipeline.terminal import print, printable
from ray_jobs.board import lost


def follow(
    jobs: list[tuple[Stage[Any], ...]],
    refs: dict[str, Any],
    board: Any,
    report: Callable[[tuple[Stage[Any], ...]], None],
    check: Callable[[], None],
) -> dict[str, Failure]:
    """Wait for all jobs, showing how far they are; returns what their tasks say failed.

    Raises: what `check` does, that is called all the while; tasks that still run end with the session.
    """
    failures: dict[str, Failure] = {}
    waiting = {refs[stages[0].key]: stages for stages in jobs}
    by_key = {stage.key: stage for stages in jobs for stage in stages}
    bars: dict[str, tqdm] = {}
    quarters: dict[str, int] = {}
    on_terminal = sys.stderr.isatty()  # else lines, as a job's log wants them
    with tqdm(total=len(by_key), desc="stages", unit="stage", disable=not on_terminal) as total:
        ended = noted = 0
        while waiting:
            check()
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0.5)
            running = {stage.key for stages in waiting.values() for stage in stages}
            state, notes = ray.get(board.get.remote())
            for note in notes[noted if noted <= len(notes) else 0 :]:  # fewer than before: of a board begun anew
                tqdm.write(printable(f"note: {note}"), file=sys.stderr)
            noted = len(notes)
            for key, (what, count, of) in state.items():
                if key not in running:
                    continue
                title = printable(f"{by_key[key].kind} {by_key[key].name}")
                if key not in bars:
                    bars[key] = tqdm(total=of, desc=title, unit=what, leave=False, disable=not on_terminal)
                bars[key].n = count
                bars[key].refresh()
                if not on_terminal and quarters.get(key, 0) < 4 * count // of:
                    quarters[key] = 4 * count // of
                    print(f"{title}: {count} of {of} {what}", file=sys.stderr, flush=True)
            for ref in done:
                stages = waiting.pop(ref)
                report(stages)
                for stage in stages:
                    if stage.key in bars:
                        bars[stage.key].close()
                total.update(len(stages))
                ended += len(stages)
                if not on_terminal:
                    names = ", ".join(stage.name for stage in stages)
                    print(f"{stages[0].kind} {names}: ended, {ended} of {len(by_key)}", file=sys.stderr, flush=True)
                try:
                    failures |= ray.get(ref)
                except ray.exceptions.RayError as error:
                    failures |= {stage.key: lost(error) for stage in stages}
    return failures
