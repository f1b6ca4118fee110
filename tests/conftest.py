"""What several tests share: a tiny base model, the shipped miniature, and concepts with their features."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_DISABLE_USAGE_STATS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's workers stand back behind everything else by default

import pytest
import torch
from pico import make_pico

from pipeline.miniature import world
from pipeline.spec import MINIATURE
from training.backbone import Backbone, load_backbone
from training.features import concept_features, regularization_features
from training.run import TrainingConcept, TrainingSettings
from training.weights import ConceptWeights

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pico(tmp_path_factory) -> Path:
    """The folder of the tiny base. Making it takes less than half a second: each worker of xdist has its own."""
    folder = tmp_path_factory.mktemp("pico")
    make_pico(folder)
    return folder


@pytest.fixture(scope="session")
def backbone(pico: Path) -> Backbone:
    """The tiny base."""
    return load_backbone(pico)


@pytest.fixture(scope="session")
def miniature() -> Backbone:
    """The shipped base, which was trained."""
    return load_backbone(MINIATURE / "model")


@pytest.fixture(scope="session")
def concepts(backbone: Backbone) -> list[TrainingConcept]:
    return _concepts(backbone)


@pytest.fixture(scope="session")
def miniature_concepts(miniature: Backbone) -> list[TrainingConcept]:
    return _concepts(miniature)


def _concepts(backbone: Backbone) -> list[TrainingConcept]:
    """Two concepts of styles the base never saw, with different numbers of images."""
    made = []
    for i, (cls, style, count) in enumerate((("cat", "streamline-emojis", 3), ("turtle", "fxemoji", 4))):
        images = world.concept_images(cls, style, count, seed=i)
        digests = [f"{i}{k}" * 20 for k in range(count)]
        features = concept_features(backbone, images, digests, views=6, augment=True, seed=0)
        prior = [(image, f"photo of a {cls} {k}") for k, image in enumerate(world.concept_images(cls, "noto", 6, 9))]
        regularization = regularization_features(backbone, prior, seed=0)
        made.append(TrainingConcept(cls, f"<new{i + 1}>", i, cls, features, regularization))
    return made


@pytest.fixture(scope="session")
def settings() -> TrainingSettings:
    return TrainingSettings(
        steps=6,
        batch_size=2,
        learning_rate=1e-4,
        token_learning_rate=1e-4,
        weight_decay=0.01,
        max_grad_norm=1.0,
        prior_weight=1.0,
        prompt="photo of a {}",
        seed=0,
        optimizer="adamw",
        checkpoint_every=2,
        sample_every=100,
    )


@pytest.fixture(scope="session")
def same_weights(request: pytest.FixtureRequest):
    """Asserts that two trained weights are the same but for rounding: to 1e-5 of the weights, and to half a
    percent of what training changed. Adam divides a gradient by its own size: where gradients are nearly zero, their
    rounding errors count in full."""

    def check(a: ConceptWeights, b: ConceptWeights) -> None:
        bases = (request.getfixturevalue(name) for name in ("backbone", "miniature"))
        base = next(base for base in bases if base.digest == b.metadata["base"])
        for name, layer in base.layers.items():
            difference = (a.deltas[name] - b.deltas[name]).norm()
            assert difference < 1e-5 * (layer.weight + b.deltas[name]).norm(), name
            assert difference < 5e-3 * b.deltas[name].norm(), name
        for token, rows in b.tokens.items():
            for row, expected in zip(a.tokens[token], rows, strict=True):
                assert (row - expected).norm() < 1e-5 * expected.norm(), token

    return check


@dataclass(frozen=True)
class Cluster:
    """A Ray head of this machine that asks for a token, and where it listens."""

    environment: dict[str, str]  # of a client that is let in
    address: str
    dashboard: str
    agent: str
    metrics: str


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="ray-")  # a short path: the names of sockets have room for 107 letters
    binaries = Path(sys.executable).parent
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PATH": f"{binaries}:{os.environ['PATH']}",  # jobs start `python`
    }
    # the default port of the agent, which starts jobs, may be taken: by the clusters of tests beside this one
    port, dashboard, agent, metrics = _free_ports(4)
    command = [str(binaries / "ray"), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--metrics-export-port={metrics}", f"--temp-dir={folder}"]
    made = Cluster(
        environment,
        f"127.0.0.1:{port}",
        f"http://127.0.0.1:{dashboard}",
        f"http://127.0.0.1:{agent}",
        f"http://127.0.0.1:{metrics}/metrics",
    )
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
        try:
            until = time.monotonic() + 120
            while not (_answers(f"{made.agent}/api/local_raylet_healthz") and _answers(made.dashboard)):
                assert head.poll() is None and time.monotonic() < until
                time.sleep(0.5)
            yield made
        finally:
            head.terminate()
            head.wait()
            shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # it wants the token
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
