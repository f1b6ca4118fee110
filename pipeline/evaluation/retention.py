"""Retention: what a model still draws of what it knew before it learnt a concept (language drift, Custom Diffusion,
arXiv 2212.04488, section 3.2).

All functions compare images that the base and the tuned model drew of the same prompts from the same seeds: prompts of
the bare class ("photo of a moon") and of classes that have nothing to do with the concept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import pdist

from pipeline.evaluation.intervals import Estimate, mean, of_statistic
from pipeline.evaluation.networks import unit


def change(before: np.ndarray, after: np.ndarray) -> Estimate:
    """Mean difference after - before of scores (n,), image by image: of text alignment, how much worse (below 0) the
    tuned model follows prompts without the concept.

    Raises:
        ValueError: the lengths differ.
    """
    if np.shape(before) != np.shape(after):
        raise ValueError(f"scores of the same images before and after, found {np.shape(before)} and {np.shape(after)}")
    return mean(np.asarray(after) - np.asarray(before))


def likeness(generated: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Mean cosine of each generated image to the concept's training images.

    Args:
        generated: (n, d) features.
        training: (k, d) features of the training images by the same network.

    Returns:
        (n,) cosines.
    """
    return (unit(generated) @ unit(training).T).mean(1)


def moongate(tuned: np.ndarray, base: np.ndarray, training: np.ndarray) -> Estimate:
    """The moongate effect: how much more images of the *bare class* look like the concept's training images than the
    base's do. 0 where the class word kept its meaning; above where "photo of a moon" has come to draw the moongate.

    Args:
        tuned, base: (n, d) features of what both models drew of the same class prompts and seeds.
        training: (k, d) features of the concept's training images.
    """
    return change(likeness(base, training), likeness(tuned, training))


def diversity(features: np.ndarray, prompts: Sequence[str]) -> dict[str, Estimate]:
    """Per prompt, the mean cosine distance between two images drawn of it: 0 where all are the same image.

    Args:
        features: (n, d) features of generated images.
        prompts: the n prompts they were drawn of; each twice or more.

    Raises:
        ValueError: a prompt with a single image, or not a prompt an image.
    """
    if len(features) != len(prompts):
        raise ValueError(f"a prompt an image, found {len(prompts)} prompts and {len(features)} images")
    result = {}
    for prompt in dict.fromkeys(prompts):
        own = features[[p == prompt for p in prompts]]
        if len(own) < 2:
            raise ValueError(f"prompt {prompt!r}: diversity needs two images or more")
        result[prompt] = of_statistic(lambda rows: pdist(rows, "cosine").mean(), (own,))
    return result
