"""The training loop: K/V of every cross-attention layer and the new token rows, nothing else.

Which samples, noise and timesteps a step sees is a pure function of the seed and the step number. So a resumed run
sees what the uninterrupted one would have, and ranks can split a step's batch without talking.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from training.backbone import Backbone, TextFeatures
from training.checkpoint import load_tensors, optimizer_tensors, restore_optimizer, save_tensors
from training.features import ConceptFeatures, RegularizationFeatures
from training.objective import masked_loss, target_of
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
class _Batch:
    latents: torch.Tensor
    masks: torch.Tensor
    captions: list[str]
    text: TextFeatures | None  # of regularisation captions, computed once


def _detach_begin_of_text(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """Keys and values of position 0, the same for every prompt, take no gradient (authors' `CustomDiffusion`)."""
    return torch.cat([output[:, :1].detach(), output[:, 1:]], 1)


def train(
    backbone: Backbone,
    concepts: Sequence[TrainingConcept],
    settings: TrainingSettings,
    *,
    scratch: Path,
    sample: Callable[[Path, int], None] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> ConceptWeights:
    """Train one concept, or several jointly, into one set of weights.

    The backbone is left as it was found. `scratch` holds the checkpoint and the TensorBoard log; a run that finds a
    checkpoint there goes on from its step, and the result is that of an uninterrupted run.

    Args:
        sample: called with a file name and the step, with the backbone in its trained state, to draw a grid.
        progress: called with the finished step and its loss.

    Raises:
        TrainingDiverged: NaN or infinite loss; the checkpoint before it stays in `scratch`.
        ValueError: tokens or initialisers the tokenizer does not allow.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with backbone.changed({}, {}):
        rows = _fresh_tokens(backbone, concepts)
        original = {name: layer.weight.data for name, layer in backbone.layers.items()}
        hooks = [layer.register_forward_hook(_detach_begin_of_text) for layer in backbone.layers.values()]
        try:
            for layer in backbone.layers.values():
                layer.weight = nn.Parameter(layer.weight.detach().float().clone())
            return _optimize(backbone, concepts, settings, rows, original, scratch, sample, progress)
        finally:
            for hook in hooks:
                hook.remove()
            for name, layer in backbone.layers.items():
                layer.weight = nn.Parameter(original[name], requires_grad=False)


def _fresh_tokens(backbone: Backbone, concepts: Sequence[TrainingConcept]) -> list[nn.Parameter]:
    backbone.copy_tokenizers()
    modules = backbone.add_tokens([c.token for c in concepts], [c.initializer for c in concepts])
    return [module.rows for module in modules]


def _optimize(
    backbone: Backbone,
    concepts: Sequence[TrainingConcept],
    settings: TrainingSettings,
    rows: list[nn.Parameter],
    original: dict[str, torch.Tensor],
    scratch: Path,
    sample: Callable[[Path, int], None] | None,
    progress: Callable[[int, float], None] | None,
) -> ConceptWeights:
    matrices = {name: layer.weight for name, layer in backbone.layers.items()}
    trained = [*matrices.values(), *rows]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(matrices.values()), "lr": settings.learning_rate},
            {"params": rows, "lr": settings.token_learning_rate},
        ],
        weight_decay=settings.weight_decay,
        fused=backbone.device.type == "cuda",
    )
    checkpoint, losses = scratch / "checkpoint.safetensors", []
    if checkpoint.exists():
        tensors, metadata = load_tensors(checkpoint)
        with torch.no_grad():
            for name, weight in matrices.items():
                weight.copy_(tensors[f"weight.{name}"])
            for i, row in enumerate(rows):
                row.copy_(tensors[f"rows.{i}"])
        restore_optimizer(optimizer, tensors)
        losses = json.loads(metadata["losses"])

    def save() -> None:
        tensors = {f"weight.{name}": weight for name, weight in matrices.items()}
        tensors |= {f"rows.{i}": row for i, row in enumerate(rows)} | optimizer_tensors(optimizer)
        save_tensors(checkpoint, tensors, {"losses": json.dumps(losses)})

    log = SummaryWriter(str(scratch / "tensorboard"), purge_step=len(losses) + 1 if losses else None)
    autocast = torch.autocast(backbone.device.type, torch.bfloat16, enabled=backbone.dtype == torch.bfloat16)
    for step in range(len(losses), settings.steps):
        concept_batch, prior_batch = _draw(concepts, settings, step)
        with autocast:
            loss = _loss(backbone, concept_batch, prior_batch, settings, step)
        value = loss.item()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, settings.max_grad_norm).item()
        for what, number in (("loss", value), ("gradient", norm)):
            if not math.isfinite(number):
                raise TrainingDiverged(
                    f"{', '.join(c.name for c in concepts)}: the {what} became {number} at step {step + 1}; the "
                    f"checkpoint of an earlier step stays in {scratch}; lower training.learning_rate "
                    f"(now {settings.learning_rate})"
                )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value)
        log.add_scalar("loss", value, step + 1)
        log.add_scalar("gradient_norm", norm, step + 1)
        if progress:
            progress(step + 1, value)
        done = step + 1 == settings.steps
        if sample and ((step + 1) % settings.sample_every == 0 or done):
            path = scratch / f"samples-{step + 1:05d}.png"
            with autocast:
                sample(path, step + 1)
            log.add_image("samples", np.asarray(Image.open(path)), step + 1, dataformats="HWC")
        # after the samples: what a checkpoint has passed is not drawn again
        if (step + 1) % settings.checkpoint_every == 0 or done:
            save()
    log.close()

    deltas = {n: (w.detach().float() - original[n].float()).cpu() for n, w in matrices.items()}
    tokens = {c.token: [row[i].detach().float().cpu() for row in rows] for i, c in enumerate(concepts)}
    described = [{"name": c.name, "token": c.token, "class_word": c.class_word} for c in concepts]
    return ConceptWeights(
        deltas, tokens, {"base": backbone.digest, "concepts": described, "steps": settings.steps, "losses": losses}
    )


def _draw(concepts: Sequence[TrainingConcept], settings: TrainingSettings, step: int) -> tuple[_Batch, _Batch | None]:
    """The samples of a step; concepts trained jointly take turns, so each gets its share whatever its image count."""
    rng = np.random.default_rng([settings.seed, step])
    latents, masks, texts = [], [], []
    prior_latents, prior_texts = [], []
    for k in range(settings.batch_size):
        concept = concepts[(step * settings.batch_size + k) % len(concepts)]
        view = int(rng.integers(len(concept.features.latents)))
        latents.append(concept.features.latents[view])
        masks.append(concept.features.masks[view])
        caption = settings.prompt.format(f"{concept.token} {concept.class_word}")
        texts.append(f"{concept.features.words[view]} {caption}".strip())
        prior = concept.regularization
        if prior is not None:
            image = int(rng.integers(len(prior.latents)))
            prior_latents.append(prior.latents[image])
            prior_texts.append(prior.text.rows([image]))
    batch = _Batch(torch.stack(latents), torch.stack(masks), texts, None)
    if not prior_latents:
        return batch, None
    stacked = torch.stack(prior_latents)
    return batch, _Batch(stacked, torch.ones_like(stacked[:, :1]), [], TextFeatures.cat(prior_texts))


def _loss(
    backbone: Backbone, concept: _Batch, prior: _Batch | None, settings: TrainingSettings, step: int
) -> torch.Tensor:
    """One pass of the UNet over concept and regularisation samples together."""
    device = backbone.device
    unique = sorted(set(concept.captions))
    text = backbone.encode_text(unique).rows([unique.index(c) for c in concept.captions])
    latents, masks = concept.latents, concept.masks
    weights = torch.full((len(latents),), 1 / len(latents))
    if prior is not None and prior.text is not None:
        pooled = None if prior.text.pooled is None else prior.text.pooled.to(text.hidden)
        text = TextFeatures.cat([text, TextFeatures(prior.text.hidden.to(text.hidden), pooled)])
        latents, masks = torch.cat([latents, prior.latents]), torch.cat([masks, prior.masks])
        weights = torch.cat([weights, torch.full((len(prior.latents),), settings.prior_weight / len(prior.latents))])
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    count = backbone.noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, count, (len(latents),), generator=generator).to(device)
    latents = latents.to(device)
    noisy = backbone.noise_scheduler.add_noise(latents, noise, timesteps)
    target = target_of(backbone.noise_scheduler, latents, noise, timesteps)
    prediction = backbone.denoise(noisy.to(backbone.dtype), timesteps, text)
    return (masked_loss(prediction, target, masks.to(device)) * weights.to(device)).sum()
