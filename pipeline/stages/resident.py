"""The base model of a process, and a concept's own images as stages read them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from training.backbone import Backbone, load_backbone
from training.images import ConceptImages, load_images


@functools.lru_cache(maxsize=1)
def resident_base(path: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """One a process: a worker that runs several stages loads it once."""
    return load_backbone(path, dtype=dtype)


def planned_images(places: Sequence[str], digests: Sequence[str]) -> ConceptImages:
    """A concept's images, which are to be those that the plan saw: the artifact's key says so.

    Raises: ValueError when they were changed since.
    """
    found = load_images(list(places))
    if found.digests != list(digests):
        raise ValueError(f"{', '.join(places)}: the images changed during the run; run again")
    return found
