"""The training loop: K/V of every cross-attention layer and the new token rows, nothing else.

Which samples, noise and timesteps a step sees is a pure function of the seed and the step number. So a resumed run
sees what the uninterrupted one would have, a member of a pack what it would have seen alone, and ranks can split a
step's batch without talking.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter

from training.backbone import Backbone, TextFeatures
from training.checkpoint import load_tensors, optimizer_tensors, restore_optimizer, save_tensors
from training.features import ConceptFeatures, RegularizationFeatures
from training.objective import masked_loss, target_of
from training.pack import StackedLinear, only, stacked_layers
from training.weights import ConceptWeights


class TrainingDiverged(ValueError):
    """The loss became NaN or infinite; the last checkpoint is the one before."""


@dataclass(frozen=True)
class TrainingConcept:
    """One concept as the loop sees it."""

    name: str
    token: str
    initializer: str | int
    """A word of one token, or which of `backbone.RARE_WORDS`."""
    class_word: str
    features: ConceptFeatures
    regularization: RegularizationFeatures | None


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
    checkpoint_every: int
    sample_every: int


@dataclass(frozen=True)
class Member:
    """What becomes one set of weights: one concept, or several trained jointly. scratch: where its checkpoint is."""

    concepts: Sequence[TrainingConcept]
    settings: TrainingSettings
    scratch: Path


@dataclass(frozen=True)
class _Samples:
    """A member's step: its concept samples, then its regularisation samples. All but the captions' features."""

    latents: torch.Tensor
    masks: torch.Tensor
    weights: torch.Tensor  # of each sample in the loss
    noise: torch.Tensor
    moments: torch.Tensor  # in [0, 1), as a share of the training timesteps
    captions: list[str]  # of the concept samples
    prior: TextFeatures | None  # of the regularisation captions, computed once


class _Run:
    """Where a member stands: its own weights, optimizer, losses and log."""

    def __init__(self, member: Member, backbone: Backbone, tokens: Sequence[nn.Parameter], span: slice) -> None:
        """tokens: the pack's token rows, of each text encoder; the member's are those at `span`, as views."""
        settings = member.settings
        self.member, self.span = member, span
        self.matrices = {n: nn.Parameter(layer.weight.float().clone()) for n, layer in backbone.layers.items()}
        self.rows = [nn.Parameter(rows.data[span]) for rows in tokens]
        self.trained = [*self.matrices.values(), *self.rows]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.matrices.values()), "lr": settings.learning_rate},
                {"params": self.rows, "lr": settings.token_learning_rate},
            ],
            weight_decay=settings.weight_decay,
            fused=True,
        )
        member.scratch.mkdir(parents=True, exist_ok=True)
        self.checkpoint = member.scratch / "checkpoint.safetensors"
        self.losses: list[float] = []
        if self.checkpoint.exists():
            tensors, metadata = load_tensors(self.checkpoint)
            with torch.no_grad():
                for name, weight in self.matrices.items():
                    weight.copy_(tensors[f"weight.{name}"])
                for i, row in enumerate(self.rows):
                    row.copy_(tensors[f"rows.{i}"])
            restore_optimizer(self.optimizer, tensors)
            self.losses = json.loads(metadata["losses"])
        self.log = SummaryWriter(
            str(member.scratch / "tensorboard"), purge_step=len(self.losses) + 1 if self.losses else None
        )

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def done(self) -> bool:
        return self.step >= self.member.settings.steps

    def take_gradients(self, place: int, layers: dict[str, StackedLinear], tokens: Sequence[nn.Parameter]) -> None:
        """The member's slice of the pack's gradients, as its weights are slices of the pack's."""
        for name, weight in self.matrices.items():
            gradient = layers[name].weight.grad
            weight.grad = None if gradient is None else gradient[place]
        for row, rows in zip(self.rows, tokens, strict=True):
            row.grad = None if rows.grad is None else rows.grad[self.span]

    def update(self, loss: float) -> None:
        """One step of the optimizer with the gradients at hand.

        Raises: TrainingDiverged for a loss or gradient that is no number; the weights then stay what they were.
        """
        settings = self.member.settings
        norm = nn.utils.clip_grad_norm_(self.trained, settings.max_grad_norm).item()
        for what, number in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(number):
                raise TrainingDiverged(
                    f"{', '.join(c.name for c in self.member.concepts)}: the {what} became {number} at step "
                    f"{self.step + 1}; the checkpoint of an earlier step stays in {self.member.scratch}; lower "
                    f"training.learning_rate (now {settings.learning_rate})"
                )
        self.optimizer.step()
        self.losses.append(loss)
        self.log.add_scalar("loss", loss, self.step)
        self.log.add_scalar("gradient_norm", norm, self.step)

    def save(self) -> None:
        tensors: dict[str, torch.Tensor] = {f"weight.{name}": weight for name, weight in self.matrices.items()}
        tensors |= {f"rows.{i}": row for i, row in enumerate(self.rows)} | optimizer_tensors(self.optimizer)
        save_tensors(self.checkpoint, tensors, {"losses": json.dumps(self.losses)})

    def weights(self, backbone: Backbone) -> ConceptWeights:
        deltas = {n: (w.detach() - backbone.layers[n].weight.float()).cpu() for n, w in self.matrices.items()}
        concepts = self.member.concepts
        tokens = {c.token: [row[i].detach().cpu().clone() for row in self.rows] for i, c in enumerate(concepts)}
        described = [{"name": c.name, "token": c.token, "class_word": c.class_word} for c in concepts]
        metadata = {"base": backbone.digest, "concepts": described, "steps": self.step, "losses": self.losses}
        return ConceptWeights(deltas, tokens, metadata)


def train(
    backbone: Backbone,
    members: Sequence[Member],
    *,
    sample: Callable[[Member, Path, int], None] | None = None,
    progress: Callable[[Member, int, float], None] | None = None,
) -> Iterator[tuple[Member, ConceptWeights | TrainingDiverged]]:
    """Train a pack; yields each member as it ends, with its weights, or with why it had to stop.

    A member gets the weights it would get alone, whoever else is in the pack. Its scratch folder holds its checkpoint
    and its TensorBoard log: a member that finds a checkpoint there goes on from its step, in whatever pack, and ends
    with the weights of an uninterrupted run. The backbone is left as it was found once the iterator is exhausted or
    closed.

    Args:
        members: all with regularisation samples or none, and of one batch size.
        sample: called with a member, a file name and the step, with the backbone in the member's trained state, to
            draw a grid.
        progress: called with a member, its finished step and its loss.

    Raises:
        ValueError: tokens or initialisers the tokenizer does not allow; members that cannot share a pack.
    """
    if len({(m.settings.batch_size, m.concepts[0].regularization is None) for m in members}) > 1:
        raise ValueError("members of a pack need one batch size, and all regularisation images or none")
    autocast = torch.autocast(backbone.device.type, torch.bfloat16, enabled=backbone.dtype == torch.bfloat16)
    with backbone.changed({}, {}), stacked_layers(backbone) as layers:
        tokens = _add_tokens(backbone, members)
        active: list[_Run] = []
        first = 0
        for member in members:
            active.append(_Run(member, backbone, tokens, slice(first, first + len(member.concepts))))
            first += len(member.concepts)
        bound: list[_Run] = []
        while active:
            for run in [run for run in active if run.done]:
                run.log.close()
                yield run.member, run.weights(backbone)
                active.remove(run)
            if not active:
                break
            if bound != active:
                bound = list(active)
                for name, layer in layers.items():
                    layer.bind([run.matrices[name] for run in active])
            with autocast:
                losses = _losses(backbone, active)
            for parameter in (*(layer.weight for layer in layers.values()), *tokens):
                parameter.grad = None
            losses.sum().backward()
            for i, (run, loss) in enumerate(zip(bound, losses.tolist(), strict=True)):
                run.take_gradients(i, layers, tokens)
                try:
                    run.update(loss)
                except TrainingDiverged as error:
                    run.log.close()
                    yield run.member, error
                    active.remove(run)
                    continue
                settings = run.member.settings
                if progress:
                    progress(run.member, run.step, loss)
                if sample and (run.step % settings.sample_every == 0 or run.done):
                    path = run.member.scratch / f"samples-{run.step:05d}.png"
                    with autocast, only(layers, i):
                        sample(run.member, path, run.step)
                    run.log.add_image("samples", np.asarray(Image.open(path)), run.step, dataformats="HWC")
                # after the samples: what a checkpoint has passed is not drawn again
                if run.step % settings.checkpoint_every == 0 or run.done:
                    run.save()


def _add_tokens(backbone: Backbone, members: Sequence[Member]) -> list[nn.Parameter]:
    """Rows for all concepts of a pack, (concepts, width) of each text encoder."""
    concepts = [c for member in members for c in member.concepts]
    backbone.copy_tokenizers()
    modules = backbone.add_tokens([c.token for c in concepts], [c.initializer for c in concepts])
    return [module.rows for module in modules]


def _draw(member: Member, step: int) -> _Samples:
    """The samples of a step; concepts trained jointly take turns, so each gets its share whatever its image count."""
    settings, concepts = member.settings, member.concepts
    rng = np.random.default_rng([settings.seed, step])
    latents, masks, captions, weights = [], [], [], []
    prior_latents, prior_texts = [], []
    for k in range(settings.batch_size):
        concept = concepts[(step * settings.batch_size + k) % len(concepts)]
        view = int(rng.integers(len(concept.features.latents)))
        latents.append(concept.features.latents[view])
        masks.append(concept.features.masks[view])
        caption = settings.prompt.format(f"{concept.token} {concept.class_word}")
        captions.append(f"{concept.features.words[view]} {caption}".strip())
        weights.append(1 / settings.batch_size)
        prior = concept.regularization
        if prior is not None:
            image = int(rng.integers(len(prior.latents)))
            prior_latents.append(prior.latents[image])
            prior_texts.append(prior.text.rows([image]))
    masks += [torch.ones_like(masks[0])] * len(prior_latents)
    weights += [settings.prior_weight / settings.batch_size] * len(prior_latents)
    drawn = torch.stack(latents + prior_latents)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    return _Samples(
        drawn,
        torch.stack(masks),
        torch.tensor(weights),
        torch.randn(drawn.shape, generator=generator),
        torch.rand(len(drawn), generator=generator),
        captions,
        TextFeatures.cat(prior_texts) if prior_texts else None,
    )


def _losses(backbone: Backbone, runs: Sequence[_Run]) -> torch.Tensor:
    """The loss of each member, (P,): one pass of the UNet over the concept and regularisation samples of all."""
    device, scheduler = backbone.device, backbone.noise_scheduler
    drawn = [_draw(run.member, run.step) for run in runs]
    unique = sorted({caption for samples in drawn for caption in samples.captions})
    # computed again for the backward pass: cheap beside the UNet, and at SD 1.4's shapes 57 MB less for each caption
    encoded = checkpoint(backbone.encode_text, unique, use_reentrant=False, preserve_rng_state=False)
    texts = []
    for samples in drawn:
        texts.append(encoded.rows([unique.index(c) for c in samples.captions]))
        if samples.prior is not None:
            texts.append(samples.prior.to(encoded))
    latents, masks, weights, noise, moments = (
        torch.cat([getattr(samples, field) for samples in drawn]).to(device)
        for field in ("latents", "masks", "weights", "noise", "moments")
    )
    timesteps = (moments * scheduler.config.num_train_timesteps).long()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = target_of(scheduler, latents, noise, timesteps)
    prediction = backbone.denoise(noisy.to(backbone.dtype), timesteps, TextFeatures.cat(texts))
    return (masked_loss(prediction, target, masks) * weights).reshape(len(runs), -1).sum(1)
