"""One training and where it stands: its weights, optimizer, losses, checkpoint and log."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from training.backbone import Backbone
from training.checkpoint import load_tensors, optimizer_tensors, restore_optimizer, save_tensors
from training.features import ConceptFeatures, RegularizationFeatures
from training.methods import METHODS, Method
from training.pack import Layers
from training.weights import ConceptWeights

log = logging.getLogger(__name__)


class TrainingDiverged(ValueError):
    """The loss became NaN or infinite; the last checkpoint is the one before."""


@dataclass(frozen=True)
class TrainingConcept:
    """One concept as the loop sees it."""

    name: str
    token: str
    """New or rare, as the method says; empty for a new category, which goes by its class word alone."""
    initializer: str | int
    """A word of one token, or a number for a row of its own, see `training.tokens.own_row`."""
    class_word: str
    features: ConceptFeatures
    regularization: RegularizationFeatures | None

    @property
    def phrase(self) -> str:
        """How captions name it: `<new1> cat`."""
        return f"{self.token} {self.class_word}".strip()


@dataclass(frozen=True)
class TrainingSettings:
    """See `pipeline.spec.Training` for meanings and the paper's values."""

    steps: int
    batch_size: int
    learning_rate: float
    token_learning_rate: float
    weight_decay: float
    max_grad_norm: float
    prior_weight: float
    prompt: str
    seed: int
    optimizer: str
    checkpoint_every: int
    sample_every: int | None
    method: str = "custom_diffusion"
    train_text_encoder: bool = False


@dataclass(frozen=True)
class Member:
    """What becomes one set of weights: one concept, or several trained jointly. scratch: where its checkpoint is."""

    concepts: Sequence[TrainingConcept]
    settings: TrainingSettings
    scratch: Path

    @property
    def method(self) -> Method:
        return METHODS[self.settings.method]

    @property
    def taught(self) -> list[TrainingConcept]:
        """The concepts with a new token, whose rows train."""
        return [c for c in self.concepts if c.token] if self.method.token == "new" else []


Checkpoint = tuple[dict[str, torch.Tensor], dict[str, str]]
"""Tensors and metadata: `weight.<parameter>`, `rows.<text encoder>`, `optimizer.<i>.<name>`; the losses, and a checksum
of the tensors. It is the same whatever the strategy was and however many ranks there were."""

CHECKPOINT, OLDER = "checkpoint.safetensors", "checkpoint-older.safetensors"
"""In a member's scratch folder: the last checkpoint, and the one before."""


def find_checkpoint(
    member: Member, backbone: Backbone, layers: Layers, tokens: Sequence[nn.Parameter]
) -> Checkpoint | None:
    """The newest checkpoint of a member that is whole; None where there is none, and the training begins at its start.

    layers, tokens: as of `Run`. What is damaged is logged as a warning, and removed.
    """
    shapes = {f"weight.{name}": backbone.parameters[name].shape for name in layers}
    shapes |= {f"rows.{i}": (len(member.taught), rows.shape[1]) for i, rows in enumerate(tokens) if member.taught}
    for name in (CHECKPOINT, OLDER):
        path = member.scratch / name
        try:
            tensors, metadata = load_tensors(path)
            _check_checkpoint(tensors, metadata, shapes, member.settings.steps)
            return tensors, metadata
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            log.warning("%s: %s cannot be used, going on without it: %s", _names(member), path, error)
            with contextlib.suppress(OSError):  # it would take the older one's place when the next is written
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return None


def _check_checkpoint(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], shapes: dict[str, Sequence[int]], steps: int
) -> None:
    """Raises: ValueError unless it is what `Run.save` writes of a training with tensors of these shapes and at most so
    many steps."""
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != tuple(shape):
            raise ValueError(f"it has no tensor {name!r} of the shape {tuple(shape)}")
    losses = json.loads(metadata.get("losses", "null"))
    if not (isinstance(losses, list) and losses and all(isinstance(loss, float) for loss in losses)):
        raise ValueError("it has no losses")
    if len(losses) > steps:
        raise ValueError(f"it has losses of {len(losses)} steps, and the training has {steps}")
    # checkpoints of older versions have none
    if metadata.get("checksum", checksum := _checksum(tensors)) != checksum:
        raise ValueError("its tensors are not those that were written")


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Of the tensors' names and bytes."""
    sum_ = 0
    for name in sorted(tensors):
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        sum_ = zlib.crc32(data, zlib.crc32(name.encode(), sum_))
    return f"{sum_:08x}"


def _names(member: Member) -> str:
    return ", ".join(concept.name for concept in member.concepts)


class Run:
    """A member in training. Its weights are slices of the pack's, which its own optimizer moves."""

    def __init__(
        self,
        member: Member,
        backbone: Backbone,
        layers: Layers,
        tokens: Sequence[nn.Parameter],
        span: slice,
        found: Checkpoint | None,
        *,
        writes: bool = True,
    ) -> None:
        """layers: what trains; the member starts from the backbone's values.
        tokens: the pack's token rows, of each text encoder; the member's are those at `span`, as views.
        found: the checkpoint to go on from. writes: whether this process keeps the checkpoint and the log."""
        self.member, self.span = member, span
        self.matrices = {n: nn.Parameter(backbone.parameters[n].detach().float().clone()) for n in layers}
        self.rows = [nn.Parameter(rows.data[span]) for rows in tokens] if member.taught else []
        self.losses: list[float] = []
        if found:
            tensors, metadata = found
            with torch.no_grad():
                for name, weight in self.matrices.items():
                    weight.copy_(tensors[f"weight.{name}"])
                for i, row in enumerate(self.rows):
                    row.copy_(tensors[f"rows.{i}"])
            self.losses = json.loads(metadata["losses"])
        self.trained: list[nn.Parameter] = [*self.matrices.values(), *self.rows]
        self.optimizer = self.make_optimizer(list(self.matrices.values()), self.rows)
        if found:
            restore_optimizer(self.optimizer, found[0])
        self.log = None
        if writes:
            member.scratch.mkdir(parents=True, exist_ok=True)
            purge_step = len(self.losses) + 1 if self.losses else None
            self.log = SummaryWriter(str(member.scratch / "tensorboard"), purge_step=purge_step)

    def make_optimizer(self, matrices: list[nn.Parameter], rows: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        settings = self.member.settings
        groups = [
            {"params": matrices, "lr": settings.learning_rate},
            {"params": list(rows), "lr": settings.token_learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        if settings.optimizer == "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit
            except ImportError:
                raise ValueError(
                    "training.optimizer: adamw8bit needs bitsandbytes; install 'polyconcept[gpu]' on the nodes"
                ) from None
            return AdamW8bit(groups, weight_decay=settings.weight_decay)
        return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def done(self) -> bool:
        return self.step >= self.member.settings.steps

    def take_gradients(self, place: int, layers: Layers, tokens: Sequence[nn.Parameter]) -> None:
        """The member's slice of the pack's gradients, as its weights are slices of the pack's."""
        for name, weight in self.matrices.items():
            weight.grad = layers[name].gradient(place)
        for row, rows in zip(self.rows, tokens if self.rows else (), strict=True):
            row.grad = None if rows.grad is None else rows.grad[self.span]

    def update(self, loss: float) -> None:
        """One step of the optimizer with the gradients at hand.

        Raises: TrainingDiverged for a loss or gradient that is no number; the weights then stay what they were.
        """
        norm = nn.utils.clip_grad_norm_(self.trained, self.member.settings.max_grad_norm).item()
        self.check(loss, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()  # views that would keep the pack's whole gradients
        self.record(loss, norm)

    def check(self, loss: float, norm: float) -> None:
        for what, number in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(number):
                raise self._diverged(f"the {what} became {number} at step {self.step + 1}")

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{_names(self.member)}: {what}; the checkpoint of an earlier step stays in {self.member.scratch}; lower "
            f"training.learning_rate (now {self.member.settings.learning_rate})"
        )

    def record(self, loss: float, norm: float) -> None:
        self.losses.append(loss)
        self._write(lambda log: log.add_scalar("loss", loss, self.step))
        self._write(lambda log: log.add_scalar("gradient_norm", norm, self.step))

    def record_samples(self, path: Path) -> None:
        """path: of a grid of images that the weights at hand draw, where this process keeps the log."""
        self._write(lambda log: log.add_image("samples", np.asarray(Image.open(path)), self.step, dataformats="HWC"))

    def close(self) -> None:
        self._write(SummaryWriter.close)

    def _write(self, write: Callable[[SummaryWriter], None]) -> None:
        try:
            if self.log:
                write(self.log)
        except FileNotFoundError:  # another run was first with the same training, and removed the scratch folder
            self.log = None

    def values(self) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """The parameters by name, and the token rows of each text encoder, float32."""
        return dict(self.matrices), list(self.rows)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return optimizer_tensors(self.optimizer)

    def save(self) -> None:
        matrices, rows = self.values()
        tensors = {f"weight.{name}": weight for name, weight in matrices.items()}
        tensors |= {f"rows.{i}": row for i, row in enumerate(rows)} | self.optimizer_state()
        if self.log:
            last = self.member.scratch / CHECKPOINT
            with contextlib.suppress(FileNotFoundError):  # of the first
                os.replace(last, last.with_name(OLDER))  # now: two are kept, and the next one's room is not a third's
            save_tensors(last, tensors, {"losses": json.dumps(self.losses), "checksum": _checksum(tensors)})

    def weights(self, backbone: Backbone) -> ConceptWeights:
        """What was trained. Raises: TrainingDiverged where it is no number: after the last step no loss says so."""
        matrices, rows = self.values()
        for tensor in (*matrices.values(), *rows):
            if not torch.isfinite(tensor).all():
                raise self._diverged(f"a weight is no finite number after step {self.step}")
        deltas = {n: (w.detach() - backbone.parameters[n].float()).cpu() for n, w in matrices.items()}
        tokens = {c.token: [row[i].detach().cpu().clone() for row in rows] for i, c in enumerate(self.member.taught)}
        metadata = {
            "base": backbone.digest,
            "method": self.member.method.name,
            "concepts": [{"name": c.name, "token": c.token, "class_word": c.class_word} for c in self.member.concepts],
            "steps": self.step,
            "losses": self.losses,
        }
        return ConceptWeights(deltas, tokens, metadata)
