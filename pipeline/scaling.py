"""What a batch would take on a cluster that is not at hand: a small cost model, stage by stage.

Operations and bytes are counted (`pipeline.estimate`); how fast a cluster does them is what its file says. Each kind of
stage takes the longer of its computing and its moving of bytes, over the network of all nodes or, where one process
reads or writes everything, of one; kinds follow one another, since nearly all work of one waits for that of the one
before (features for downloads, the merge for the last training). The store is a URL: what a node reads, crosses the
network, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
from pydantic import Field

from pipeline.estimate import Device, exchanged_bytes, model_size, pack_bytes, pack_size, rank_samples
from pipeline.plan import SUMMED, Plan
from pipeline.spec import Section, read_mapping, validated
from retrieval.select import HITS_AT_ONCE
from training.attention import training_dtype
from training.methods import METHODS

Quantity = Annotated[float, Field(ge=1e-6, le=1e6)]
Count = Annotated[int, Field(ge=1, le=100_000)]
CONSTRAINT_ROWS = 7
"""Of a concept with the two default prompts."""
IMAGE, ROW, VECTOR, POSITIONS = 150_000, 200, 512, 10
"""Bytes of an image on the web; bytes of a caption with its URL; numbers of its CLIP vector; words of a caption."""


class Cluster(Section):
    """A cluster in numbers; `docs/scaling.md` says where the defaults come from."""

    nodes: Count
    devices: Count
    """GPUs a node."""
    memory_gib: Quantity
    """Of a GPU."""
    tflops: Quantity
    """That a GPU reaches in the models, in the training precision: a third of its data sheet's is usual."""
    float32_tflops: Quantity | None = None
    """The same in float32, in which all but training runs; when empty, an eighth of those in bf16."""
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
    """One kind of stage: seconds on the whole cluster, GiB that cross the network, what limits it, and the GiB that it
    takes of a GPU (None: it needs none, or they are not counted)."""

    kind: str
    seconds: float
    gib: float
    limit: str
    device_gib: float | None


def load_cluster(path: Path) -> Cluster:
    """Raises: ValueError naming the file and the key."""
    written = read_mapping(path, "cluster file (.yaml)", "nodes")
    return validated(Cluster, written.value, path, written)


def predict(plan: Plan, cluster: Cluster, *, concepts: int, captions: int) -> tuple[list[Phase], int]:
    """The phases of a batch of so many concepts like the plan's, each of a class of its own, over a corpus of so many
    captions; and the sets of weights that a GPU trains at once. Steps and prompts are the mean of the plan's concepts.

    Raises: ValueError when a training has more ranks than there are GPUs.
    """
    batch = plan.batch
    training, retrieval, evaluation = batch.training, batch.retrieval, batch.evaluation
    method = METHODS[training.method]
    model = model_size(
        batch.base_path,
        method.name,
        train_text_encoder=training.train_text_encoder,
        gradient_checkpointing=training.gradient_checkpointing,
    )
    nodes = cluster.nodes
    gpus = nodes * cluster.devices
    speed = cluster.tflops * 1e12
    half = training_dtype(training.precision, cuda=True) == torch.bfloat16
    float32 = (cluster.float32_tflops or cluster.tflops / (8 if half else 1)) * 1e12
    node = cluster.network_gbit / 8 * 1e9
    cores = cluster.cpu_gflops * 1e9
    if training.ranks > gpus:
        raise ValueError(f"training.ranks: {training.ranks} ranks need a GPU each, and the cluster has {gpus}")
    joint = training.composition == "joint"
    trainings = 1 if joint else concepts
    at_once = min(trainings, gpus // training.ranks)
    # concepts come in whole numbers to a GPU, trainings to their ranks
    rounds, turns = math.ceil(concepts / gpus), math.ceil(trainings / at_once)
    packed = min(turns, pack_size(plan, Device(cluster.memory_gib * 2**30, cuda=True)))
    regularized = training.regularization != "none"
    default = training.steps or method.steps * (concepts if joint else 1)
    steps = fmean(concept.training.steps or default for concept in batch.concepts)
    whole = 4 * model.parameters
    phases: list[Phase] = []

    def phase(kind: str, *moved: tuple[float, int], memory: float | None = None, **seconds: float) -> None:
        """moved: bytes, and how many nodes' network they cross. memory: bytes of a GPU.
        seconds: what limits it -> how long that alone would take."""
        seconds["network"] = sum(size / (count * node) for size, count in moved)
        limit = max(seconds, key=lambda name: seconds[name])
        gib = None if memory is None else memory / 2**30
        phases.append(Phase(kind, seconds[limit], sum(size for size, _ in moved) / 2**30, limit, gib))

    if training.regularization == "real":
        index = captions * (ROW + VECTOR * 2)  # half precision
        encoding = captions / (gpus * cluster.captions_per_second)
        # all nodes read captions and send vectors in float32 to one, which writes the index
        phase("index", (captions * ROW, nodes), (captions * (ROW + VECTOR * 4) + index, 1), GPUs=encoding)
        # all the classes whose hits fit in memory are multiplied with each block that is read
        depth = 4 * round(retrieval.images * retrieval.oversample)
        scans = math.ceil(concepts / max(1, HITS_AT_ONCE // depth))
        phase(
            "candidates",
            (nodes * index, nodes),
            disks=scans * captions * VECTOR * 2 / 2**30 / (nodes * cluster.scan_gib_per_second),
            CPUs=2 * concepts * captions * VECTOR / (nodes * cores),
        )
        tried = concepts * retrieval.images / (1 - cluster.dead_links)
        sets = concepts * retrieval.images * IMAGE
        # from the web, and into the store
        phase("regularization", (2 * sets, nodes), downloads=tried / (nodes * cluster.downloads_per_second))
    drawing = evaluation.steps * 2 * model.unet_flops + model.vae_flops
    image = 3 * model.pixels**2
    if training.regularization == "generated":
        sets = concepts * retrieval.images * image
        phase("generated", (sets, nodes), memory=whole, GPUs=rounds * retrieval.images * drawing / float32)
    views = 5 * (training.views if training.augment else 1) + (retrieval.images if regularized else 0)
    latents = 4 * model.latent_numbers * views
    phase(
        "features",
        (concepts * latents + (sets if regularized else 0), nodes),
        memory=whole,
        GPUs=rounds * views * model.vae_flops / float32,
    )
    weights = 4 * model.trained
    # a ring of ranks crosses the network of each node it spans once; within a node nothing is counted
    spanned = math.ceil(training.ranks / cluster.devices)
    exchanged = trainings * spanned * steps * exchanged_bytes(plan) if spanned > 1 else 0.0
    read = spanned * concepts * latents + at_once * training.ranks * whole
    phase(
        "train",
        (read + exchanged + trainings * weights, min(nodes, at_once * spanned)),
        memory=pack_bytes(plan, packed, cuda=True),
        GPUs=turns * steps * rank_samples(training) * (2 + model.trained_share) * model.unet_flops / speed,
    )
    if method.unet == "text_kv" and trainings > 1:
        _add_merge(phase, plan, cluster, concepts, model.trained, model.text_width)
    models = 4 if method.unet == "text_kv" else 3
    drawn = fmean(len(batch.prompts_of(concept)) for concept in batch.concepts) * evaluation.samples
    # a task for each concept and model; its own weights, and on each node the merged model
    phase(
        "evaluate",
        (concepts * (models * drawn * image + weights) + nodes * weights, nodes),
        memory=whole,
        GPUs=math.ceil(concepts * models / gpus) * drawn * drawing / float32,
    )
    phase("release", (concepts * models * drawn * image, 1))
    return phases, packed


def _add_merge(
    phase: Callable[..., None], plan: Plan, cluster: Cluster, concepts: int, trained: int, width: int
) -> None:
    """constraints, sums and merge, in float64 on CPU cores; the merge on one node."""
    cores = cluster.cpu_gflops * 1e9 / 2
    rows, outputs = concepts * CONSTRAINT_ROWS, trained // width
    constraints = rows * (width + outputs) * 8
    moved = concepts * 4 * trained + constraints
    phase("constraints", (moved, cluster.nodes), CPUs=2 * rows * trained / (cluster.nodes * cores))
    read = constraints
    if rows > width or plan.batch.merge.form == "soft":
        parts = math.ceil(concepts / SUMMED)
        sums = parts * 8 * (width**2 + trained)
        busy = min(parts, cluster.nodes)
        phase("sums", (constraints + sums, busy), CPUs=2 * rows * (width**2 + trained) / (busy * cores))
        read += sums
    rank = min(rows, width)
    regularization = plan.batch.merge.captions * POSITIONS
    gram = 2 * regularization * width**2 + 2 * width**3
    # two models, exact and in float16, are measured on all constraints and regularisation rows
    measuring = 2 * 2 * (rows + regularization) * rank * (width + outputs) + 2 * 2 * regularization * trained
    phase(
        "merge",
        (read, 1),
        CPUs=(gram + 2 * rank * width * (width + outputs) + measuring) / cores,
        disks=3 * constraints / 2**30 / cluster.scan_gib_per_second,
    )


def describe(phases: list[Phase], packed: int, cluster: Cluster) -> list[str]:
    """The prediction as a table, with what takes longest and what does not fit a GPU named."""
    lines = [f"{'stage':15} {'time':>10} {'moved, GiB':>12} {'GiB of a GPU':>13}  limited by"]
    for p in phases:
        memory = "" if p.device_gib is None else f"{p.device_gib:.1f}"
        lines.append(f"{p.kind:15} {duration(p.seconds):>10} {p.gib:12,.1f} {memory:>13}  {p.limit}")
    longest = max(phases, key=lambda p: p.seconds)
    total = sum(p.seconds for p in phases)
    lines.append(f"{'all':15} {duration(total):>10} {sum(p.gib for p in phases):12,.1f}")
    lines.append(
        f"packs of up to {packed}; longest: {longest.kind} ({100 * longest.seconds / total:.0f} %, {longest.limit}). "
        "Modelled, not measured."
    )
    for p in phases:
        if p.device_gib and p.device_gib > cluster.memory_gib:
            lines.append(
                f"does not fit: {p.kind} needs {p.device_gib:.1f} GiB of a GPU, which has {cluster.memory_gib:g}"
            )
    return lines


def duration(seconds: float) -> str:
    """Readable: "3.4 h"."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"
