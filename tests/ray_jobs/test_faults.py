"""Processes, nodes and drivers that are killed, nodes that come late, a bad web: the batch ends as in an undisturbed
run, or without the one concept that cannot be had."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from loopback import serve
from ray.cluster_utils import Cluster

from pipeline.batch import run
from pipeline.limits import Limits, OutOfTime
from pipeline.miniature.world import concept_images
from pipeline.plan import Plan, make_plan
from pipeline.spec import ConceptBatch
from pipeline.stages.features import Features
from pipeline.stages.regularization import Regularization
from pipeline.stages.stage import run_stage
from pipeline.stages.train import Train
from pipeline.store import Store
from ray_jobs.runner import OnRay, run_stages
from ray_jobs.same_code import OtherCode, SameCode, code_here

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> dict:
    """A batch of two concepts, trained one at a time; the second takes longer."""
    folder = tmp_path_factory.mktemp("images")
    concepts = []
    for name, style, steps in (("cat", "streamline-emojis", 20), ("turtle", "fxemoji", 80)):
        (folder / name).mkdir()
        for i, image in enumerate(concept_images(name, style, 2, seed=1)):
            image.save(folder / name / f"{i}.png")
        images = {"images": str(folder / name), "class_word": name}
        concepts.append({"name": name, "training": {"steps": steps}, **images})
    training = {"batch_size": 2, "views": 4, "learning_rate": 1e-4, "regularization": "none", "pack_size": 1}
    return {
        "name": "two",
        "concepts": concepts,
        "training": training | {"checkpoint_every": 5},
        "evaluation": {"samples": 1, "steps": 1},
    }


@pytest.fixture(scope="module")
def plan(content) -> Plan:
    """Up to the weights."""
    batch = ConceptBatch.model_validate(content)
    whole = make_plan(batch)
    return Plan(batch, (*whole.of(Features), *whole.of(Train)), ())


@pytest.fixture(scope="module")
def undisturbed(plan, tmp_path_factory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("undisturbed")))
    for stage in plan:
        run_stage(stage, store, lambda *_: None)
    return store


@contextlib.contextmanager
def started(nodes: int) -> Iterator[Cluster]:
    """A cluster of a head that computes nothing, and nodes of one core each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started(nodes=2) as cluster:
        yield cluster


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """This process is its driver."""
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def wait_for(what: Callable[[], object]) -> None:
    until = time.monotonic() + 300
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def kill(task: str, times: int) -> None:
    """Kill the process of a task of this process's clusters, as often as it comes back."""
    killed: set[int] = set()

    def enough() -> bool:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.pid not in killed and " ".join(process.cmdline()).startswith(f"ray::{task}"):
                    process.kill()
                    killed.add(process.pid)
        return len(killed) >= times

    wait_for(enough)


def checkpoint(store: Store, stage) -> Path:
    return store.local / ".scratch" / stage.key / "checkpoint.safetensors"


def the_same(plan: Plan, same_weights, *stores: Store) -> None:
    for stage in plan.of(Train):
        same_weights(*[stage.result(store).weights() for store in stores])


@pytest.mark.parametrize("lost", ["process", "board", "node"])
def test_a_process_or_a_node_goes_away(cluster, plan, undisturbed, tmp_path, same_weights, lost):
    """In the middle of a training."""
    store, (_, turtle) = Store(str(tmp_path / "store")), plan.of(Train)

    def lose() -> None:
        wait_for(checkpoint(store, turtle).exists)
        if lost == "process":
            kill("train turtle", 1)
        elif lost == "board":  # which only shows how far things are
            kill("Board", 1)
        else:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    with connected(cluster), ThreadPoolExecutor() as pool:
        losing = pool.submit(lose)
        assert run_stages([plan], store, Limits()) == []
        losing.result(timeout=0)  # it was lost
    if lost == "node":
        cluster.add_node(num_cpus=1)
    the_same(plan, same_weights, store, undisturbed)


def test_the_driver_is_killed(cluster, content, plan, undisturbed, tmp_path, same_weights):
    """The cluster lives on; the batch, started again, does only what is missing."""
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content | {"output": str(tmp_path)}))
    store, (cat, turtle) = Store(str(tmp_path / "store")), plan.of(Train)
    command = [sys.executable, "-m", "ray_jobs.concept_batch", str(tmp_path / "two.yaml")]
    driver = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": cluster.address})
    wait_for(lambda: cat.is_in(store) and checkpoint(store, turtle).exists())
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not turtle.is_in(store)
    stamps = {path: path.stat().st_mtime_ns for path in store.local.glob("*/*/manifest.json")}
    with connected(cluster):
        assert run_stages([plan], store, Limits()) == []
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    the_same(plan, same_weights, store, undisturbed)


def test_a_concept_kills_its_process(content, tmp_path):
    """Each time: it is left out; the other, of the same pack as there is one node, is trained and released."""
    training = content["training"] | {"pack_size": 2}
    batch = ConceptBatch.model_validate(
        content | {"output": str(tmp_path), "training": training, "merge": {"partial": True}}
    )
    with started(nodes=1) as cluster, connected(cluster), ThreadPoolExecutor() as pool:
        killing = pool.submit(kill, "features turtle", 3)
        outcome = run(batch, OnRay())
        killing.result(timeout=0)
    (failure,) = outcome.failures
    assert failure.startswith("features turtle: WorkerCrashedError")
    assert list(outcome.summary["concepts"]) == ["cat"]


def test_a_bad_web(cluster, content, tmp_path):
    """Two in five links are dead, and one server never answers: what there is is used, and the shortfall said."""
    with socket.create_server(("127.0.0.1", 0)) as silent, serve() as web, connected(cluster):
        urls = [f"{web.address}/image/{i}.png" for i in range(11)] + [f"{web.address}/missing/{i}" for i in range(8)]
        urls.append(f"http://127.0.0.1:{silent.getsockname()[1]}/image.png")
        captions = [f"photo of a cat {i}" for i in range(len(urls))]
        pq.write_table(pa.table({"url": urls, "caption": captions}), tmp_path / "corpus.parquet")
        retrieval = {"corpus": str(tmp_path / "corpus.parquet"), "local": True, "images": 14}
        changes = {"concepts": content["concepts"][:1], "retrieval": retrieval, "training": {"views": 4}}
        whole = make_plan(ConceptBatch.model_validate(content | changes))
        kinds = ("index", "candidates", "regularization", "features")
        store = Store(str(tmp_path / "store"))
        assert run_stages([Plan(whole.batch, tuple(s for s in whole if s.kind in kinds), ())], store, Limits()) == []
    (stage,) = whole.of(Regularization)
    found = stage.result(store).load()
    assert found.shortfall == "11 of 14 images; all 20 candidates are used up (9 failed_to_download)"


def test_nodes_run_the_same_code(cluster, plan, tmp_path, monkeypatch):
    """One that does not is named, however good its results look, and nothing is left out because of it."""
    store, features = Store(str(tmp_path / "store")), Plan(plan.batch, tuple(plan.of(Features)), ())
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    there = code_here()
    with connected(cluster):
        SameCode(there).check(seconds=60)
        SameCode(there | {"commit": "another", "host": "another"}).check(seconds=60)
        monkeypatch.setattr("ray_jobs.runner.code_here", lambda: there | {"torch": "1.0", "code": "0123"})
        message = f"{there['host']} runs another image .*: code 0123, torch 1.0 here, code {there['code']}, torch"
        with pytest.raises(OtherCode, match=message):
            run_stages([features], store, Limits())
    assert not any(stage.is_in(store) for stage in features)


def test_workers_come_later(plan, tmp_path, capsys, monkeypatch):
    """A head that computes nothing, as where an autoscaler keeps no worker without work. Where GPUs are asked for, a
    worker without one is none."""
    store, features = Store(str(tmp_path / "store")), Plan(plan.batch, tuple(plan.of(Features)), ())
    with started(nodes=0) as cluster, connected(cluster), ThreadPoolExecutor() as pool:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with pytest.raises(OutOfTime, match=r"no worker came within 0\.01 minutes"):
            run_stages([features], store, Limits(device_wait=0.01))
        # nodes are started by the main thread only
        outcome = pool.submit(run_stages, [features], store, Limits(gpu=True))
        cluster.add_node(num_cpus=1)
        time.sleep(2)
        assert not any(stage.is_in(store) for stage in features)
        cluster.add_node(num_cpus=1, num_gpus=1)
        assert outcome.result(timeout=120) == []
    assert all(stage.is_in(store) for stage in features)
    assert "no GPU yet: waiting for the first" in capsys.readouterr().err
