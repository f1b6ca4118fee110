"""What a batch would take on a cluster that is not at hand: a small cost model, stage by stage.

Operations and bytes are counted (`pipeline.estimate`); how fast a cluster does them is what its file says. Each kind of
stage takes the longer of its computing and its moving of bytes; kinds follow one another, since nearly all work of one
waits for that of the one before (features for downloads, the merge for the last training).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from pipeline.estimate import Device, model_size, pack_size
from pipeline.plan import Plan
from pipeline.spec import Positive, Section, explain
from retrieval.select import HITS_AT_ONCE
from training.methods import METHODS

Quantity = Annotated[float, Field(gt=0)]
CONSTRAINT_ROWS = 7
"""Of a concept with the two default prompts."""


class Cluster(Section):
    """A cluster in numbers; `docs/scaling.md` says where the defaults come from."""

    nodes: Positive
    devices: Positive
    """GPUs a node."""
    memory_gib: Quantity
    """Of a GPU."""
    tflops: Quantity
    """That a GPU reaches in the models, in the training precision: a third of its data sheet's is usual."""
    network_gbit: Quantity = 10.0
    """Of a node, to the store and to the web."""
    captions_per_second: Quantity = 5_000.0
    """That a GPU encodes with CLIP's text tower."""
    downloads_per_second: Quantity = 100.0
    """Images that a node's img2dataset tries."""
    dead_links: float = Field(0.4, ge=0, lt=1)
    """Share of a corpus's links that give no image."""
    scan_gib_per_second: Quantity = 5.0
    """Of the caption index that a node reads."""
    cpu_gflops: Quantity = 1_000.0
    """Of a node's cores, float32."""


@dataclass(frozen=True)
class Phase:
    """One kind of stage: seconds on the whole cluster, GiB that cross the network, and what limits it."""

    kind: str
    seconds: float
    gib: float
    limit: str


def load_cluster(path: Path) -> Cluster:
    """Raises: ValueError naming the file and the key."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Cluster.model_validate(data)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {line}" for line in explain(error, Cluster))) from None


def predict(plan: Plan, cluster: Cluster, *, concepts: int, captions: int) -> tuple[list[Phase], int]:
    """The phases of a batch of so many concepts like the plan's, each of a class of its own, over a corpus of so many
    captions; and the sets of weights that a GPU trains at once."""
    batch = plan.batch
    training, retrieval, evaluation = batch.training, batch.retrieval, batch.evaluation
    method = METHODS[training.method]
    model = model_size(batch.base_path, method.name, train_text_encoder=training.train_text_encoder)
    gpus = cluster.nodes * cluster.devices
    speed = cluster.tflops * 1e12
    network = cluster.nodes * cluster.network_gbit / 8 * 1e9
    packed = pack_size(plan, Device(cluster.memory_gib * 2**30, cuda=True))
    # concepts come in whole numbers to a GPU
    rounds = math.ceil(concepts / gpus)
    regularized = training.regularization != "none"
    samples = training.batch_size * (2 if regularized else 1)
    steps = training.steps or method.steps
    phases: list[Phase] = []

    def phase(kind: str, moved: float, **seconds: float) -> None:
        """seconds: what limits it -> how long that alone would take."""
        seconds["network"] = moved / network
        limit = max(seconds, key=lambda name: seconds[name])
        phases.append(Phase(kind, seconds[limit], moved / 2**30, limit))

    if training.regularization == "real":
        width = 512  # of the index's vectors, half precision
        index = captions * width * 2
        phase("index", captions * 200 + index, GPUs=captions / (gpus * cluster.captions_per_second))
        # all the classes whose hits fit in memory are multiplied with each block that is read
        depth = 4 * round(retrieval.images * retrieval.oversample)
        scans = math.ceil(concepts / max(1, HITS_AT_ONCE // depth))
        cores = cluster.nodes * cluster.cpu_gflops * 1e9
        phase(
            "candidates",
            0,
            disks=scans * index / 2**30 / (cluster.nodes * cluster.scan_gib_per_second),
            CPUs=2 * concepts * captions * width / cores,
        )
        tried = concepts * retrieval.images / (1 - cluster.dead_links)
        phase("regularization", tried * 150_000, downloads=tried / (cluster.nodes * cluster.downloads_per_second))
    if training.regularization == "generated":
        passes = rounds * retrieval.images * evaluation.steps * 2
        moved = concepts * retrieval.images * 3 * model.pixels**2
        phase("generated", moved, GPUs=passes * model.unet_flops / speed)
    views = 5 * (training.views if training.augment else 1) + (retrieval.images if regularized else 0)
    latents = 4 * model.latent_numbers * views
    phase("features", concepts * latents, GPUs=rounds * views * model.vae_flops / speed)
    weights = 4 * model.trained
    phase(
        "train",
        concepts * (latents + weights) + gpus * 4 * model.parameters,
        GPUs=rounds * steps * samples * (2 + model.trained_share) * model.unet_flops / speed,
    )
    rows = concepts * CONSTRAINT_ROWS
    width = model.text_width
    constraint = CONSTRAINT_ROWS * (width + model.trained // width) * 4
    # sums: rows of width d against all output features; the solution: one system of size d
    merging = 2 * rows * (width**2 + model.trained) + 2 * width**3 + 2 * width * model.trained
    # float64, on one node
    phase("merge", concepts * (weights + constraint), CPUs=merging / (cluster.cpu_gflops * 1e9 / 2))
    drawn = concepts * len(evaluation.prompts) * evaluation.samples
    each = evaluation.steps * 2 * model.unet_flops + model.vae_flops
    phase("evaluate", drawn * 3 * 3 * model.pixels**2, GPUs=math.ceil(drawn / gpus) * 4 * each / speed)
    return phases, packed


def describe(phases: list[Phase], packed: int) -> list[str]:
    """The prediction as a table, with what takes longest named."""
    lines = [f"{'stage':15} {'time':>10} {'moved, GiB':>12}  limited by"]
    lines += [f"{p.kind:15} {duration(p.seconds):>10} {p.gib:12,.1f}  {p.limit}" for p in phases]
    longest = max(phases, key=lambda p: p.seconds)
    total = sum(p.seconds for p in phases)
    lines.append(f"{'all':15} {duration(total):>10} {sum(p.gib for p in phases):12,.1f}")
    lines.append(
        f"packs of up to {packed}; longest: {longest.kind} ({100 * longest.seconds / total:.0f} %, {longest.limit}). "
        "Modelled, not measured."
    )
    return lines


def duration(seconds: float) -> str:
    """Readable: "3.4 h"."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"
