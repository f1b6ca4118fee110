"""Run a concept batch on Ray: what `ray job submit … -- python -m ray_jobs.concept_batch batch.yaml` starts.

Each stage is one Ray task that waits for its inputs' tasks, but that concepts train in packs, a task each. Without a
cluster, Ray is started on this machine.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before the other imports, which take seconds: it says what a signal meanwhile comes to
    from ray_jobs.cli import main

    main(["run", *sys.argv[1:]])

import contextlib
import enum
import functools
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray._private import ray_constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from pipeline.checks import UnusableConcepts
from pipeline.cost.estimate import Device
from pipeline.cost.of_plan import stage_bytes
from pipeline.places import masked
from pipeline.plan import Plan, make_plan
from pipeline.ready import check_ready
from pipeline.release.hub import push
from pipeline.release.manifest import public
from pipeline.release.publish import publish
from pipeline.release.sign import signer
from pipeline.report import summary, write_report
from pipeline.spec import Concept, ConceptBatch, Settings
from pipeline.stages import STAGES
from pipeline.stages.evaluate import score_columns
from pipeline.stages.features import Features
from pipeline.stages.index import Index
from pipeline.stages.stage import Progress, Stage
from pipeline.store import Store, content_key
from ray_jobs import holds
from ray_jobs.board import Board, Failure, Notes
from ray_jobs.captions import encoded_corpus, search_on_cluster
from ray_jobs.limits import EXIT as OUT_OF_TIME
from ray_jobs.limits import Limits, OutOfTime
from ray_jobs.metrics import trainings_ended
from ray_jobs.ranks import progress_to, run_on_ranks
from ray_jobs.same_code import SameCode, code_here
from ray_jobs.terminal import print, printable
from retrieval.select import Search
from training.base import base_digest
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


class StageFailed(ValueError):
    """Stages could not be done; the message names each and says why. Finished stages stay in the store."""


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


def run(batch: ConceptBatch, limits: Limits = NO_LIMITS) -> Outcome:
    """Do all stages of a batch that are not done yet, publish the release (to the hub, too) and write the report.

    Raises: ValueError for bad input, and where the hub cannot be had; StageFailed naming every stage that failed;
        OutOfTime as `limits` say.
    """
    if os.environ.get("RAY_ADDRESS"):
        batch.check_places()
    signer(batch.signing_key)  # a key that cannot be used is said now, not after the training
    store = Store(batch.store_url)
    store.sweep()
    plan, failures = plan_usable(batch)
    plan, failed = build(plan, store, limits)
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


def build(plan: Plan, store: Store, limits: Limits) -> tuple[Plan, list[str]]:
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
        with ray_session():
            failed = run_stages([plan], store, limits)
            if failed and (rest := _trained(plan, store)) and plan.batch.merge.partial:
                plan = make_plan(plan.batch.model_copy(update={"concepts": rest}))
                left_out = failed
                failed = run_stages([plan], store, limits)
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


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """The cluster this process belongs to, or one started here and stopped afterwards. Raises: OSError when there is
    neither; ValueError in a folder that Ray's workers cannot start from."""
    if holds(Path.cwd(), "ray_jobs"):
        raise ValueError(
            f"{Path.cwd()}: has a module `ray_jobs` of its own, which Ray's workers would import in place of "
            "polyconcept's; start the command in another folder"
        )
    os.environ.setdefault("RAY_DISABLE_USAGE_STATS", "1")
    if ray.is_initialized():
        yield
        return
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if not on_cluster and os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        print(
            "note: RAY_AUTH_MODE=disabled lets other users of this machine run code in this Ray; unset it",
            file=sys.stderr,
        )
    # "local": without it Ray also takes up a cluster that someone once started on this machine
    options: dict[str, Any] = {} if on_cluster else {"address": "local", "include_dashboard": False}
    on_term = signal.getsignal(signal.SIGTERM)
    with contextlib.nullcontext() if on_cluster else _loopback_only():
        try:
            ray.init(logging_level="ERROR", log_to_driver=False, **options)
        except Exception as error:  # of every kind: the machine's limits, a cluster's other version, a wrong token
            place = (
                f"the cluster at {os.environ['RAY_ADDRESS']} could not be joined" if on_cluster else "Ray did not start"
            )
            raise OSError(f"{place}: {error}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_term)  # Ray has put one of its own there
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray that is started here listens at the loopback address only: it does so where it makes no clusters, as on
    macOS. The processes that join it have to know, too, also those that its workers start."""
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    inherited = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if inherited is None:
            del os.environ[name]
        else:
            os.environ[name] = inherited


@dataclass(frozen=True)
class Share:
    """Of the cluster, what a task may use: CPU cores, and whether GPUs; devices: how many there are in all."""

    cpus: int
    gpus: bool
    devices: int


@dataclass(frozen=True)
class RayWorkers:
    """Processes that a task has Ray start."""

    share: Share
    board: Any

    @property
    def devices(self) -> int:
        return self.share.devices

    def search(self, index: Callable[[], Path]) -> Search:
        return search_on_cluster(index)

    def encode(self, corpus: str, clip: str) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        return encoded_corpus(corpus, clip, actors=self.devices, cpus=self.share.cpus, gpus=self.share.gpus)

    def on_ranks(self, count: int, task: Callable[[Progress], dict[str, str]], name: str) -> dict[str, str]:
        return run_on_ranks(count, task, name, self.board, cpus=self.share.cpus, gpus=self.share.gpus)


def _work(
    stages: tuple[Stage[Any], ...], root: str, board: Any, share: Share, *upstream: dict[str, Failure]
) -> dict[str, Failure]:
    """Do the stages of a job. Failures are returned, not raised: what does not depend on them goes on. Key -> failure,
    also of what was finished before it."""
    torch.set_num_threads(share.cpus)
    Notes.go_to(board)
    broken = {key for failures in upstream for key in failures}
    failures: dict[str, Failure] = {}
    runnable = list(stages)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # for what Ray itself starts from here
    try:
        store = Store(root)
        for stage in stages:
            # a pack that died may have finished some
            if any(source.key in broken and not source.is_in(store) for source in stage.inputs):
                failures[stage.key] = Failure("an input failed")
                runnable.remove(stage)
        if runnable:
            left = type(runnable[0]).run_job(runnable, store, progress_to(board), RayWorkers(share, board))
            failures |= {key: Failure(why) for key, why in left.items()}
    except Exception as error:
        fault = "" if isinstance(error, (ValueError, OSError)) else traceback.format_exc()
        failures |= {stage.key: Failure(str(error), fault) for stage in runnable}
    return failures


@dataclass(frozen=True)
class _Cluster:
    """GPUs and CPU cores, and the nodes that have them."""

    gpus: int
    cores: int
    nodes: list[dict[str, Any]]

    @classmethod
    def found(cls) -> _Cluster:
        resources = ray.cluster_resources()
        return cls(int(resources.get("GPU", 0)), int(resources.get("CPU", 1)), _nodes())

    @property
    def devices(self) -> int:
        return self.gpus or len(self.nodes)

    def smallest(self, resource: str) -> int:
        """Of a node."""
        return int(min(node["Resources"].get(resource, 0) for node in self.nodes))

    def together(self, ranks: int) -> int:
        """Trainings of so many ranks that there are devices for at a time."""
        return max(1, self.devices // ranks)

    def cpus_of(self, stage: Stage[Any]) -> int:
        """Cores of the process that does a stage, or of each of its ranks."""
        most, ranks = max(1, self.smallest("CPU")), stage.ranks
        if self.gpus or not (ranks or stage.on_device):
            return 1
        if not ranks:
            return max(1, most // stage.at_once)
        cpus = max(1, min(most, self.cores // (self.together(ranks) * ranks)))
        while cpus > 1 and sum(int(node["Resources"]["CPU"]) // cpus for node in self.nodes) < ranks:
            cpus -= 1
        return cpus


def run_stages(plans: Sequence[Plan], store: Store, limits: Limits = NO_LIMITS) -> list[str]:
    """Do what there is to do, of all plans at once; returns what failed, where it failed first.

    Raises: ValueError when a plan asks for what the cluster has not; OutOfTime.
    """
    limits.check()
    _wait_for_device(limits)
    same_code = SameCode(code_here()) if os.environ.get("RAY_ADDRESS") else None  # a machine is the same as itself
    if same_code:
        same_code.check(seconds=60)
    asked = {stage.key: stage for plan in plans for stage in plan}  # each once: plans share many
    todo = [stage for stage in asked.values() if not stage.is_in(store)]
    cluster = _Cluster.found()
    jobs: list[tuple[Stage[Any], ...]] = []
    smallest_device = functools.cache(lambda: _device(cluster.nodes, limits))
    for kind in STAGES:  # each reads only results of those before it
        same = [stage for stage in todo if type(stage) is kind]
        jobs += kind.jobs(same, cluster.devices, smallest_device)
    check_devices(plans, todo, cluster.cores, cluster.gpus)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # beside this process: other nodes may go away
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": len(jobs) + 1000}
    # begun anew when its process is lost, with what waits in it: it shows how far things are, no more
    anew = {"max_restarts": -1, "max_task_retries": -1}
    board = ray.remote(Board).options(**options, **anew).remote()
    plan_of = {stage.key: plan for plan in plans for stage in plan}
    outcomes = _start(jobs, plan_of, cluster, store, board)
    report = functools.partial(trainings_ended, plans[0].batch.name, store=store)

    def check() -> None:
        limits.check()
        if same_code:
            same_code.check()

    return _told(jobs, store, _follow(jobs, outcomes, board, report, check))


def _start(
    jobs: Sequence[tuple[Stage[Any], ...]], plan_of: dict[str, Plan], cluster: _Cluster, store: Store, board: Any
) -> dict[str, Any]:
    """A task for each job, that waits for the tasks of its inputs. Returns: stage key -> reference to how it ended."""
    work = ray.remote(_work)
    # a new process for each task, as `options(num_gpus=1)` would not have it: a used one stays on the GPU it saw first
    on_gpu = ray.remote(num_gpus=1)(_work)
    outcomes: dict[str, Any] = {}
    waiting: list[Any] = []
    for stages in jobs:
        first = stages[0]
        needs = {outcomes[source.key] for stage in stages for source in stage.inputs if source.key in outcomes}
        waits, cpus, memory = first.waits(cluster.devices), cluster.cpus_of(first), 0
        if first.ranks and len(waiting) >= (at_once := cluster.together(first.ranks)):
            needs.add(waiting[-at_once])  # no more at a time than there are devices for
        if not (cluster.gpus or waits):
            memory = min(cluster.smallest("memory"), stage_bytes(plan_of[first.key], stages))
        ref = (
            (on_gpu if cluster.gpus and first.on_device and not waits else work)
            .options(
                num_cpus=0 if waits else cpus,
                memory=memory or None,
                max_retries=2,
                name=" ".join([first.kind, *(stage.name for stage in stages)]),
            )
            .remote(stages, store.root, board, Share(cpus, bool(cluster.gpus), cluster.devices), *needs)
        )
        # one that is lost is not to sink what waits for others, too
        ref = board.ended.remote([stage.key for stage in stages], [ref])
        outcomes |= {stage.key: ref for stage in stages}
        waiting += [ref] if first.ranks else []
    return outcomes


def _told(jobs: Sequence[tuple[Stage[Any], ...]], store: Store, failures: dict[str, Failure]) -> list[str]:
    """What failed, where it failed first: a line each."""
    missing = {stage.key: stage for stages in jobs for stage in stages if not stage.is_in(store)}
    messages = []
    for key, stage in missing.items():
        if not any(source.key in missing for source in stage.inputs):
            unseen = Failure(f"done, but not in {store.root}, which all nodes have to reach")
            failure = failures.get(key, unseen)
            messages.append(f"{stage.kind} {stage.name}: {failure.message}")
            print(masked(failure.fault), file=sys.stderr, end="")  # ours, not the user's: worth having
    return messages


def _wait_for_device(limits: Limits) -> None:
    """An autoscaler at rest has no workers, or none with a GPU: a first task has it start one, and shows what it is
    like. Raises: OutOfTime when none comes; ValueError when there is no autoscaler."""
    if limits.gpu and not os.environ.get("RAY_ADDRESS") and not ray.cluster_resources().get("GPU"):
        raise ValueError("--gpu: Ray finds no GPU on this machine; leave it out, or use a cluster that has some")
    if ray.cluster_resources().get("GPU") if limits.gpu else _nodes():
        return
    what = "GPU" if limits.gpu else "worker"
    print(f"no {what} yet: waiting for the first", file=sys.stderr, flush=True)
    task = ray.remote(lambda: None).options(num_cpus=1, num_gpus=int(limits.gpu), name="first worker").remote()
    seconds = min(60 * limits.device_wait, limits.left)
    if not ray.wait([task], timeout=None if seconds == math.inf else seconds)[0]:
        limits.check()
        raise OutOfTime(
            f"no {what} came within {limits.device_wait:g} minutes; what was finished before is kept. Ask the "
            f"cluster why: no machine is free, a quota is used up, or no worker group has a {what}"
        )
    ray.get(task)


def check_devices(plans: Sequence[Plan], todo: Sequence[Stage[Any]], cores: int, gpus: int) -> None:
    """Raises: ValueError when a plan asks for what the cluster, or this environment, has not."""
    settings = [plan.batch.training for plan in plans]
    if not gpus and any(training.attention == "xformers" for training in settings):
        raise ValueError("training.attention: xformers needs CUDA, and there is no GPU here; use 'auto' or 'sdpa'")
    if any(training.optimizer == "adamw8bit" for training in settings) and not find_spec("bitsandbytes"):
        raise ValueError(
            "training.optimizer: adamw8bit needs bitsandbytes, which is not installed; run "
            "`pip install 'polyconcept[gpu]'`, or use 'adamw'"
        )
    ranks = max((stage.ranks for stage in todo), default=1)
    if ranks > (gpus or cores):
        what = "GPU" if gpus else "CPU core"
        lack = f"training.ranks: {ranks} ranks need a {what} each, and there are {gpus or cores}"
        if not os.environ.get("RAY_ADDRESS"):
            raise ValueError(f"{lack}; ask for fewer, or use a larger cluster")
        # Ray does not say whether an autoscaler is there
        print(f"note: {lack}: waiting for nodes", file=sys.stderr, flush=True)


def _nodes() -> list[dict[str, Any]]:
    """Nodes of the cluster that compute (a head node may not)."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]


def _device(nodes: list[dict[str, Any]], limits: Limits) -> Device:
    """What a training task may use: of the smallest GPU, or what Ray leaves to tasks on the smallest node."""
    with_gpus = [node["NodeID"] for node in nodes if node["Resources"].get("GPU", 0) >= 1]
    if not with_gpus:
        return Device(min(node["Resources"]["memory"] for node in nodes), cuda=False)
    memory = ray.remote(lambda: torch.cuda.get_device_properties(0).total_memory)
    found = [
        memory.options(num_gpus=1, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in with_gpus
    ]
    done, waiting = ray.wait(found, num_returns=len(found), timeout=None if limits.left == math.inf else limits.left)
    if waiting:
        limits.check()
    return Device(0.9 * min(ray.get(done)), cuda=True)


def _follow(
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
                    failures |= {stage.key: Failure.lost(error) for stage in stages}
    return failures
