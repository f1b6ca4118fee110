"""The training of one concept, or of several together, into one set of weights."""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch

from pipeline.cost.estimate import PROCESS, Device, Estimate
from pipeline.cost.model_size import ModelSize, model_size
from pipeline.spec import Zero
from pipeline.stages.features import feature_bytes
from pipeline.stages.pack import Trained, train_pack
from pipeline.stages.stage import Progress, Stage, Workers
from pipeline.store import Store, content_key
from training.attention import training_dtype
from training.methods import METHODS
from training.strategies import DDP, DeepSpeed, Single, deepspeed_config
from training.tokens import spelling

if TYPE_CHECKING:
    from pipeline.cost.cluster import Forecast, Phase

AVERAGES = {"adamw": 8, "adamw8bit": 2}
"""Bytes of the optimizer's two averages of a trained number. The number and its gradient take 4 each."""
GAPS = 1.4
"""Resident bytes of activations on the CPU over the tensors' own: its allocator leaves gaps between small ones.
Measured on the miniature."""


class TaughtConcept(NamedTuple):
    token: str
    class_word: str
    initializer: str | int
    """The word that its row starts from, or which of the rare words."""


@dataclass(frozen=True)
class TrainSettings:
    """See `pipeline.spec.Training`."""

    method: str
    train_text_encoder: bool
    steps: int
    batch_size: int
    learning_rate: float
    token_learning_rate: float
    optimizer: Literal["adamw", "adamw8bit"]
    weight_decay: float
    max_grad_norm: float
    prior_weight: float
    regularization: Literal["real", "generated", "none"]
    prompt: str
    precision: Literal["auto", "fp32", "bf16"]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Train(Stage[Trained]):
    kind, version, on_device, artifact = "train", 4, True, Trained

    @dataclass(frozen=True)
    class Places:
        """Settings that change how fast the weights come, not what they are (but for rounding)."""

        base: str
        attention: Literal["auto", "xformers", "sdpa"]
        pack_size: int | Literal["auto"]
        strategy: Literal["single", "ddp", "deepspeed"]
        ranks: int
        deepspeed: Zero
        gradient_checkpointing: bool
        compile: bool
        checkpoint_every: int
        sample_every: int | None

    base: str
    training: TrainSettings
    concepts: dict[str, TaughtConcept]
    deepspeed: dict[str, Any] | None = None
    """A configuration of the user's own; it can change the weights, as by quantized gradients."""
    places: Places

    # how a runner goes about it

    @property
    def ranks(self) -> int:
        return 0 if self.places.strategy == "single" else self.places.ranks

    @classmethod
    def jobs(cls, stages: Sequence[Self], devices: int, device: Callable[[], Device]) -> list[tuple[Self, ...]]:
        """Packs, which share a resident base: as few as memory allows, but one for each device, of even sizes."""
        alike: dict[tuple[str, int], list[Self]] = {}
        before: collections.Counter[tuple[str, str]] = collections.Counter()
        for stage in stages:
            key = content_key([stage._shared()])
            tokens = [spelling(concept.token) for concept in stage.concepts.values() if concept.token]
            # a tokenizer learns a word once: a concept's trainings with other seeds or rates are in other packs
            place = max((before[key, token] for token in tokens), default=0)
            before.update({(key, token): place + 1 - before[key, token] for token in tokens})
            alike.setdefault((key, place), []).append(stage)
        packs: list[tuple[Self, ...]] = []
        for members in alike.values():
            size = members[0].pack_size(device())
            count = max(-(-len(members) // size), min(devices, len(members)))
            packs += [tuple(members[i::count]) for i in range(count)]
        return packs

    def _shared(self) -> list[Any]:
        """What the members of a pack have in common."""
        own, how = self.training, self.places
        what = [own.method, own.train_text_encoder, own.batch_size, own.precision, own.optimizer]
        what += [own.regularization != "none", how.base, how.attention, how.gradient_checkpointing, how.compile]
        return [*what, how.pack_size, how.strategy]

    @classmethod
    def run_job(cls, stages: Sequence[Self], store: Store, progress: Progress, workers: Workers) -> dict[str, str]:
        if not stages[0].ranks:
            return train_pack(stages, store, progress)
        failures: dict[str, str] = {}
        for stage in stages:
            if not stage.is_in(store):
                failures |= workers.on_ranks(stage.ranks, functools.partial(_rank, stage, store.root), stage.key)
        return failures

    def strategy(self) -> Single:
        """How the processes that call this alike share the work, each being one of the ranks."""
        if self.places.strategy == "single":
            return Single()
        if self.places.strategy == "ddp":
            return DDP()
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"
        return DeepSpeed(self.deepspeed_config())

    def deepspeed_config(self) -> dict[str, Any]:
        """DeepSpeed's whole configuration, where that is the strategy."""
        if self.deepspeed is not None:
            return self.deepspeed
        zero, share = self.places.deepspeed, self.training.batch_size // self.places.ranks
        return deepspeed_config(share, self.training.max_grad_norm, zero=zero.stage, offload=zero.offload)

    # what it costs

    def size(self) -> ModelSize:
        return model_size(
            self.places.base,
            self.training.method,
            train_text_encoder=self.training.train_text_encoder,
            gradient_checkpointing=self.places.gradient_checkpointing,
        )

    @property
    def rank_samples(self) -> int:
        """Samples that one rank has in a step."""
        kinds = 1 if self.training.regularization == "none" else 2
        return self.training.batch_size // self.places.ranks * kinds

    def estimate(self, model: ModelSize, device: Device, together: int = 1) -> Estimate:
        # ranks have a GPU each, but share the cores of a machine
        samples = self.rank_samples * (1 if device.cuda else self.places.ranks)
        # forward, backward for the activations, and for what trains
        passes = 2 + model.trained_share
        operations = self.training.steps * samples * passes * model.unet_flops
        return Estimate(
            operations / device.speed,
            self.pack_bytes(together, cuda=device.cuda) / 2**30,
            disk=4.0 * model.trained,
            scratch=(4 + AVERAGES[self.training.optimizer]) * model.trained,
        )

    def pack_bytes(self, members: int, *, cuda: bool = False) -> float:
        """Peak memory, bytes, of a GPU, or of a process on the CPU, that trains so many sets of weights like this one
        as one pack; of one rank where several train a set together."""
        settings, ranks, model, zero = self.training, self.places.ranks, self.size(), self._zero()
        width = training_dtype(settings.precision, cuda=cuda).itemsize
        # a rank's share of the optimizer's averages, of the gradients and of the weights
        averages, gradients, weights = (1 / ranks if zero["stage"] >= stage else 1.0 for stage in (1, 2, 3))
        buffer = 0.0
        # on the CPU what is offloaded stays where it is, and a buffer takes memory only where something is in it
        if cuda and zero["stage"]:
            averages = 0.0 if _offloads(zero, "offload_optimizer") else averages
            weights = 0.0 if zero["stage"] == 3 and _offloads(zero, "offload_param") else weights
            buffer = 4 * float(zero.get("reduce_bucket_size", 5e8))  # DeepSpeed's default
        step = self.rank_samples * model.step_bytes * width / 4
        trained = model.trained * (4 * weights + 4 * gradients + AVERAGES[settings.optimizer] * averages)
        # the autoencoder is not a part of what the ranks run
        base = width * (model.vae_parameters + weights * (model.parameters - model.vae_parameters))
        return (buffer if cuda else PROCESS) + base + members * (trained + (step if cuda else GAPS * step))

    def pack_size(self, device: Device) -> int:
        """How many sets of weights like this one train at once, at least 1: as `training.pack_size` says, or as fit in
        nine tenths of the memory. Always 1 where the method or the strategy does not train in packs."""
        if not METHODS[self.training.method].mergeable or self.places.strategy != "single":
            return 1
        if self.places.pack_size != "auto":
            return self.places.pack_size
        alone, two = (self.pack_bytes(members, cuda=device.cuda) for members in (1, 2))
        return max(1, 1 + int((0.9 * device.memory - alone) // (two - alone)))

    def exchanged_bytes(self) -> float:
        """What a rank on a GPU sends in a step, and as much arrives: gradients, averaged in two rounds of a ring; with
        ZeRO-3 the model, put together in the forward and again in the backward pass, and gradients in one round."""
        if self.places.ranks == 1:
            return 0.0
        model = self.size()
        gradients = 4.0 * model.trained
        if self._zero()["stage"] < 3:
            return 2 * gradients
        width = training_dtype(self.training.precision, cuda=True).itemsize
        return 2 * width * (model.parameters - model.vae_parameters) + gradients

    def _zero(self) -> dict[str, Any]:
        """DeepSpeed's `zero_optimization`; stage 0, nothing is shared out, for other strategies."""
        return self.deepspeed_config()["zero_optimization"] if self.places.strategy == "deepspeed" else {"stage": 0}

    @classmethod
    def phase(cls, forecast: Forecast) -> Phase | None:
        f, like = forecast, forecast.training
        # a ring of ranks crosses the network of each node it spans once; within a node nothing is counted
        spanned = -(-like.places.ranks // f.cluster.devices)
        exchanged = f.trainings * spanned * f.steps * like.exchanged_bytes() if spanned > 1 else 0.0
        read = spanned * f.concepts * feature_bytes(f) + f.at_once * like.places.ranks * f.whole_bytes
        samples = like.rank_samples * (2 + f.model.trained_share)
        return f.phase(
            cls.kind,
            (read + exchanged + f.trainings * f.weights_bytes, min(f.cluster.nodes, f.at_once * spanned)),
            memory=like.pack_bytes(f.packed, cuda=True),
            GPUs=f.turns * f.steps * samples * f.model.unet_flops / f.speed,
        )


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return (zero.get(what) or {}).get("device", "none") != "none"


def _rank(stage: Train, root: str, progress: Progress) -> dict[str, str]:
    return train_pack([stage], Store(root), progress, stage.strategy())
