"""Seeds as people bring them from other programs, of up to 19 digits."""

from __future__ import annotations

import torch


def generator(seed: int) -> torch.Generator:
    """Of the CPU, where the numbers are the same whatever the device. Of seeds that torch has no room for, as sums and
    products of large ones, the lower 64 bits count."""
    return torch.Generator().manual_seed(seed % 2**64)
