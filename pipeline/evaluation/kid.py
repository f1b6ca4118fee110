"""Kernel inception distance (Binkowski et al., arXiv 1801.01401): how far generated images are from real ones.

The estimator is torchmetrics'; the features are those of any network (`networks.py`), so values compare only with
values from the same network.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from pipeline.evaluation.intervals import Estimate, of_statistic


def kid(generated: np.ndarray, real: np.ndarray, *, resamples: int = 300, seed: int = 0) -> Estimate:
    """Kernel inception distance of generated to real images: 0 for equal distributions, and around it, also below,
    for samples of them. Unbiased: sets of different size compare.

    Args:
        generated, real: (n, d) and (m, d) features, at least two rows each, not scaled to unit length; where a network
            learned directions only, as CLIP did, scaled to length sqrt(d), so that x·y / d is their cosine.

    Returns:
        The squared maximum mean discrepancy with the kernel (x·y / d + 1)^3; `samples` is n.

    Raises:
        ValueError: the shapes do not fit.
    """
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(f"features are (n, d) and (m, d), found {generated.shape} and {real.shape}")
    if min(len(generated), len(real)) < 2:
        raise ValueError(f"two images or more on each side, found {len(generated)} and {len(real)}")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer", category=UserWarning)
        torch.manual_seed(seed)  # torchmetrics draws its subsets with torch's generator
        return of_statistic(_kid, (generated, real), resamples=resamples, seed=seed)


def _kid(generated: np.ndarray, real: np.ndarray) -> float:
    # one subset of everything where the sets are of one size; otherwise subsets of the larger, as torchmetrics does
    size = min(len(generated), len(real), 1000)
    subsets = 1 if len(generated) == len(real) == size else 20
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=subsets, subset_size=size)
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(real).double(), real=True)
    metric.update(torch.from_numpy(generated).double(), real=False)
    return metric.compute()[0].item()
