"""Stages on Ray. Each is one task that waits for its inputs' tasks, but that concepts train in packs, a task each."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cost.estimate import Device
from pipeline.cost.of_plan import stage_bytes
from pipeline.failure import Failure
from pipeline.limits import Limits, OutOfTime
from pipeline.plan import Plan
from pipeline.runner import do_job, told
from pipeline.stages import STAGES
from pipeline.stages.stage import Progress, Stage
from pipeline.store import Store
from pipeline.terminal import print
from ray_jobs.board import Board, Notes
from ray_jobs.captions import encoded_corpus, search_on_cluster
from ray_jobs.follow import follow
from ray_jobs.metrics import GATE, trainings_ended
from ray_jobs.ranks import progress_to, run_on_ranks
from ray_jobs.same_code import SameCode, code_here
from ray_jobs.session import ray_session
from retrieval.select import Search


@dataclass(frozen=True)
class OnRay:
    """The cluster that this process belongs to, or Ray started on this machine."""

    @property
    def on_cluster(self) -> bool:
        return bool(os.environ.get("RAY_ADDRESS"))

    def session(self) -> contextlib.AbstractContextManager[None]:
        return ray_session()

    def run(self, plans: Sequence[Plan], store: Store, limits: Limits) -> list[str]:
        return run_stages(plans, store, limits)

    def judged(self, batch: str, result: str) -> None:
        GATE.inc(tags={"batch": batch, "result": result})


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
    """Do the stages of a job, see `do_job`. Key -> failure, also of what was finished before it."""
    torch.set_num_threads(share.cpus)
    Notes.go_to(board)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # for what Ray itself starts from here
    try:
        store = Store(root)
    except (ValueError, OSError) as error:
        return {stage.key: Failure(str(error)) for stage in stages}
    broken = (key for failures in upstream for key in failures)
    return do_job(stages, store, progress_to(board), RayWorkers(share, board), broken)


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


def run_stages(plans: Sequence[Plan], store: Store, limits: Limits) -> list[str]:
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

    return told(jobs, store, follow(jobs, outcomes, board, report, check))


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
