"""The training objective: the model's own target, masked, and the regularisation loss beside it."""

from __future__ import annotations

import torch

PREDICTIONS = ("epsilon", "v_prediction")
"""What a model may predict, as its scheduler's `prediction_type` says."""


def target_of(scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the model has to predict: the noise, or the velocity (v-prediction models).

    Raises: ValueError for a scheduler with another prediction type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"the base model's scheduler predicts {kind!r}; known are {', '.join(PREDICTIONS)}")


def masked_loss(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared error over the valid region, per sample: (B,).

    Args:
        prediction, target: (B, c, h, w). mask: (B, 1, h, w), its sum positive for each sample.

    The mean over channels too, so that concept and regularisation images weigh the same: the diffusers example
    divides the sum over all channels by the one-channel mask, which counts a concept c times.
    """
    error = (prediction.float() - target.float()).square().mean(1, keepdim=True)
    return (error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
