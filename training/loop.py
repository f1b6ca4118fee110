"""The training loop, of every method: what its declaration names trains, and nothing else.

Which samples, noise and timesteps a step sees is a pure function of the seed and the step number. So a resumed run
sees what the uninterrupted one would have, a member of a pack what it would have seen alone, and ranks can split a
step's batch without talking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from training.backbone import Backbone, TextFeatures
from training.objective import masked_loss, target_of
from training.pack import only, trained_layers
from training.run import Member, Run, TrainingDiverged
from training.seeds import generator
from training.strategies import Single
from training.weights import ConceptWeights


@dataclass(frozen=True)
class _Samples:
    """A member's step: its concept samples, then its regularisation samples. All but the captions' features."""

    latents: torch.Tensor
    masks: torch.Tensor
    weights: torch.Tensor  # of each sample in the loss
    noise: torch.Tensor
    moments: torch.Tensor  # in [0, 1), as a share of the training timesteps
    captions: list[str]  # of the concept samples; of the regularisation samples too while the text encoder trains
    prior: TextFeatures | None  # of the regularisation captions, computed once


def train(
    backbone: Backbone,
    members: Sequence[Member],
    *,
    strategy: Single | None = None,
    sample: Callable[[Member, Path, int], None] | None = None,
    progress: Callable[[Member, int, float], None] | None = None,
) -> Iterator[tuple[Member, ConceptWeights | TrainingDiverged]]:
    """Train a pack; yields each member as it ends, with its weights, or with why it had to stop.

    A member gets the weights it would get alone, whoever else is in the pack. Its scratch folder holds its checkpoint
    and its TensorBoard log: a member that finds a checkpoint there goes on from its step, in whatever pack, and ends
    with the weights of an uninterrupted run. The backbone is left as it was found once the iterator is exhausted or
    closed.

    Args:
        members: all of one method, with regularisation samples or none, and of one batch size. Methods that train more
            than text K/V layers and token rows take one member.
        strategy: how several processes do this together, each of which calls `train` alike; one process when None.
        sample: called with a member, a file name and the step, with the backbone in the member's trained state, to
            draw a grid: every `sample_every` steps and at the end, never where that is None.
        progress: called with a member, its finished step and its loss.

    Raises:
        ValueError: tokens or initialisers the tokenizer does not allow; members that cannot share a pack; a member of
            which nothing trains.
    """
    alike = {
        (m.method, m.settings.train_text_encoder, m.settings.batch_size, m.concepts[0].regularization is None)
        for m in members
    }
    if len(alike) > 1:
        raise ValueError("members of a pack need one method, one batch size, and all regularisation images or none")
    method, text_encoder = members[0].method, members[0].settings.train_text_encoder
    names = backbone.trained(method.unet, text_encoder=text_encoder)
    if len(members) > 1 and not method.mergeable:
        raise ValueError(f"{method.name} trains one member at a time: only K/V layers and tokens are trained in packs")
    if not names and not all(m.taught for m in members):
        raise ValueError(f"{method.name} trains only new tokens, and a new category has none: nothing to train")
    strategy = strategy or Single()
    batch_size = members[0].settings.batch_size
    if strategy.ranks > 1 and len(members) > 1:
        raise ValueError("several ranks train one member at a time")
    if batch_size % strategy.ranks:
        raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {strategy.ranks} ranks")
    with (
        backbone.changed({}, {}),
        trained_layers(backbone, names, detached_start=method.detached_start) as layers,
    ):
        tokens = _add_tokens(backbone, members)
        active: list[Run] = []
        first = 0
        for member in members:
            active.append(strategy.start(member, backbone, layers, tokens, slice(first, first + len(member.taught))))
            first += len(member.taught)
        bound: list[Run] = []
        objective = _Objective(backbone, recompute=strategy.recomputes)
        step: nn.Module = objective
        while active:
            for run in [run for run in active if run.done]:
                run.close()
                yield run.member, _outcome(run, backbone)
                active.remove(run)
            if not active:
                break
            if bound != active:
                bound = list(active)
                for name, layer in layers.items():
                    layer.bind([run.matrices[name] for run in active])
                step = strategy.wrap(objective, active)
            losses = step([_draw(run.member, run.step, strategy.rank, strategy.ranks) for run in active])
            strategy.backward(losses.sum())
            for i, (run, loss) in enumerate(zip(bound, strategy.mean(losses).tolist(), strict=True)):
                before = run.step
                run.take_gradients(i, layers, tokens)
                try:
                    run.update(loss)
                except TrainingDiverged as error:
                    run.close()
                    yield run.member, error
                    active.remove(run)
                    continue
                if run.step == before:
                    continue
                settings = run.member.settings
                if progress:
                    progress(run.member, run.step, loss)
                if sample and settings.sample_every and (run.step % settings.sample_every == 0 or run.done):
                    path = run.member.scratch / f"samples-{run.step:05d}.png"
                    # by all ranks, as each may hold only a share of the model
                    with _autocast(backbone), only(layers, i):
                        sample(run.member, path, run.step)
                    run.record_samples(path)
                # after the samples: what a checkpoint has passed is not drawn again
                if run.step % settings.checkpoint_every == 0 or run.done:
                    run.save()
            # else they would take memory through the next forward and backward pass
            for parameter in (*(layer.weight for layer in layers.values()), *tokens):
                parameter.grad = None


def _outcome(run: Run, backbone: Backbone) -> ConceptWeights | TrainingDiverged:
    try:
        return run.weights(backbone)
    except TrainingDiverged as error:
        return error


def _add_tokens(backbone: Backbone, members: Sequence[Member]) -> list[nn.Parameter]:
    """Rows for all new tokens of a pack, (tokens, width) of each text encoder; nothing when there are none."""
    concepts = [c for member in members for c in member.taught]
    if not concepts:
        return []
    backbone.copy_tokenizers()
    modules = backbone.add_tokens([c.token for c in concepts], [c.initializer for c in concepts])
    return [module.rows for module in modules]


def _draw(member: Member, step: int, rank: int, ranks: int) -> _Samples:
    """A rank's share of the samples of a step; concepts trained jointly take turns, so each gets its share whatever its
    image count."""
    settings, concepts = member.settings, member.concepts
    rng = np.random.default_rng([settings.seed, step])
    latents, masks, captions, weights = [], [], [], []
    prior_latents, prior_texts, prior_captions = [], [], []
    for k in range(settings.batch_size):
        concept = concepts[(step * settings.batch_size + k) % len(concepts)]
        view = int(rng.integers(len(concept.features.latents)))
        latents.append(concept.features.latents[view])
        masks.append(concept.features.masks[view])
        caption = settings.prompt.format(concept.phrase)
        captions.append(f"{concept.features.words[view]} {caption}".strip())
        weights.append(1 / settings.batch_size)
        prior = concept.regularization
        if prior is not None:
            image = int(rng.integers(len(prior.latents)))
            prior_latents.append(prior.latents[image])
            prior_texts.append(prior.text.rows([image]))
            prior_captions.append(prior.captions[image])
    masks += [torch.ones_like(masks[0])] * len(prior_latents)
    weights += [settings.prior_weight / settings.batch_size] * len(prior_latents)
    drawn = torch.stack(latents + prior_latents)
    random = generator(settings.seed * 1_000_003 + step)
    noise = torch.randn(drawn.shape, generator=random)
    moments = torch.rand(len(drawn), generator=random)
    size = settings.batch_size // ranks
    part = slice(rank * size, (rank + 1) * size)
    rows = [row for kind in range(0, len(drawn), settings.batch_size) for row in range(kind, len(drawn))[part]]
    return _Samples(
        drawn[rows],
        torch.stack(masks)[rows],
        torch.tensor(weights)[rows] * ranks,
        noise[rows],
        moments[rows],
        captions[part] + (prior_captions[part] if settings.train_text_encoder else []),
        TextFeatures.cat(prior_texts[part]) if prior_texts and not settings.train_text_encoder else None,
    )


def _autocast(backbone: Backbone) -> torch.autocast:
    return torch.autocast(backbone.device.type, torch.bfloat16, enabled=backbone.dtype == torch.bfloat16)


class _Objective(nn.Module):
    """The losses of a step, as a module whose parameters are the model's: what DDP and DeepSpeed wrap."""

    def __init__(self, backbone: Backbone, *, recompute: bool) -> None:
        super().__init__()
        self.unet, self.text_encoders = backbone.unet, nn.ModuleList(backbone.text_encoders)
        self.backbone, self.recompute = backbone, recompute

    def forward(self, drawn: Sequence[_Samples]) -> torch.Tensor:
        """The loss of each member, (P,): one pass of the UNet over the concept and regularisation samples of all."""
        with _autocast(self.backbone):
            return self._losses(drawn)

    def _losses(self, drawn: Sequence[_Samples]) -> torch.Tensor:
        backbone, scheduler = self.backbone, self.backbone.noise_scheduler
        unique = sorted({caption for samples in drawn for caption in samples.captions})
        if self.recompute:
            # cheap beside the UNet, and at SD 1.4's shapes 57 MB less for each caption
            encoded = checkpoint(backbone.encode_text, unique, use_reentrant=False, preserve_rng_state=False)
        else:
            encoded = backbone.encode_text(unique)
        texts = []
        for samples in drawn:
            texts.append(encoded.rows([unique.index(c) for c in samples.captions]))
            if samples.prior is not None:
                texts.append(samples.prior.to(encoded))
        latents, masks, weights, noise, moments = (
            torch.cat([getattr(samples, field) for samples in drawn]).to(backbone.device)
            for field in ("latents", "masks", "weights", "noise", "moments")
        )
        timesteps = (moments * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = target_of(scheduler, latents, noise, timesteps)
        prediction = backbone.denoise(noisy.to(backbone.dtype), timesteps, TextFeatures.cat(texts))
        return (masked_loss(prediction, target, masks) * weights).reshape(len(drawn), -1).sum(1)
