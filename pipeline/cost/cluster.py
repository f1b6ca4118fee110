"""A cluster that is not at hand, and a batch in numbers, from which each stage says what it takes there.

A kind of stage takes the longer of its computing and its moving of bytes, over the network of all nodes or, where one
process reads or writes everything, of one. The store is a URL: what a node reads, crosses the network, once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from pipeline.cost.estimate import Device
from pipeline.cost.model_size import ModelSize
from pipeline.spec import ConceptBatch, Section, read_mapping, validated
from training.attention import training_dtype
from training.methods import METHODS, Method

if TYPE_CHECKING:
    from pipeline.stages.train import Train

Quantity = Annotated[float, Field(ge=1e-6, le=1e6)]
Count = Annotated[int, Field(ge=1, le=100_000)]


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


def load_cluster(path: Path) -> Cluster:
    """Raises: ValueError naming the file and the key."""
    written = read_mapping(path, "cluster file (.yaml)", "nodes")
    return validated(Cluster, written.value, path, written)


@dataclass(frozen=True)
class Phase:
    """One kind of stage: seconds on the whole cluster, GiB that cross the network, what limits it, and the GiB that it
    takes of a GPU (None: it needs none, or they are not counted)."""

    kind: str
    seconds: float
    gib: float
    limit: str
    device_gib: float | None


@dataclass(frozen=True)
class Forecast:
    """A batch of so many `concepts` like those it has, each of a class of its own, over a corpus of so many `captions`.

    training: one like all of them. model: the base in their method's hands.
    """

    cluster: Cluster
    batch: ConceptBatch
    training: Train
    model: ModelSize
    concepts: int
    captions: int

    @property
    def method(self) -> Method:
        return METHODS[self.batch.training.method]

    # the cluster

    @property
    def gpus(self) -> int:
        return self.cluster.nodes * self.cluster.devices

    @property
    def speed(self) -> float:
        """Operations a second of a GPU that trains."""
        return self.cluster.tflops * 1e12

    @property
    def float32(self) -> float:
        """Operations a second of a GPU that does all else."""
        half = training_dtype(self.batch.training.precision, cuda=True) == torch.bfloat16
        return (self.cluster.float32_tflops or self.cluster.tflops / (8 if half else 1)) * 1e12

    @property
    def cores(self) -> float:
        """Operations a second of a node's cores."""
        return self.cluster.cpu_gflops * 1e9

    @property
    def float64(self) -> float:
        return self.cores / 2

    # what there is to do

    @property
    def trainings(self) -> int:
        return 1 if self.batch.training.composition == "joint" else self.concepts

    @property
    def merges(self) -> bool:
        return self.method.unet == "text_kv" and self.trainings > 1

    @property
    def rounds(self) -> int:
        """Concepts come in whole numbers to a GPU."""
        return math.ceil(self.concepts / self.gpus)

    @property
    def at_once(self) -> int:
        """Trainings."""
        return min(self.trainings, self.gpus // self.batch.training.ranks)

    @property
    def turns(self) -> int:
        """Trainings come in whole numbers to their ranks."""
        return math.ceil(self.trainings / self.at_once)

    @property
    def packed(self) -> int:
        """Sets of weights that a GPU trains at once."""
        return min(self.turns, self.training.pack_size(Device(self.cluster.memory_gib * 2**30, cuda=True)))

    @property
    def steps(self) -> float:
        """Of a training: the mean of the batch's concepts."""
        together = self.concepts if self.batch.training.composition == "joint" else 1
        default = self.batch.training.steps or self.method.steps * together
        return fmean(concept.training.steps or default for concept in self.batch.concepts)

    # sizes

    @property
    def whole_bytes(self) -> int:
        """Of the base, float32."""
        return 4 * self.model.parameters

    @property
    def weights_bytes(self) -> int:
        """Of what a training makes."""
        return 4 * self.model.trained

    @property
    def image_bytes(self) -> int:
        """Of one that a model draws."""
        return 3 * self.model.pixels**2

    @property
    def drawing_flops(self) -> float:
        """Of an image."""
        return self.batch.evaluation.steps * 2 * self.model.unet_flops + self.model.vae_flops

    def phase(self, kind: str, *moved: tuple[float, int], memory: float | None = None, **seconds: float) -> Phase:
        """moved: bytes, and how many nodes' network they cross. memory: bytes of a GPU.
        seconds: what limits it -> how long that alone would take."""
        node = self.cluster.network_gbit / 8 * 1e9
        seconds["network"] = sum(size / (count * node) for size, count in moved)
        limit = max(seconds, key=lambda name: seconds[name])
        gib = None if memory is None else memory / 2**30
        return Phase(kind, seconds[limit], sum(size for size, _ in moved) / 2**30, limit, gib)
