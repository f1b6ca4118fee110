"""The augmentation of Custom Diffusion: random resize with size words and a mask of what is valid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

SMALL_WORDS = ("very small", "far away")
LARGE_WORDS = ("zoomed in", "close up")
SIZE_WORDS = SMALL_WORDS + LARGE_WORDS
"""What may stand before a caption."""


@dataclass(frozen=True)
class View:
    """One augmented view.

    pixels: (3, s, s) float32 in [-1, 1]; the empty canvas is 0.
    mask: (1, s/f, s/f) float32, 1 where the loss counts, at latent resolution.
    words: size words to put before the caption, or empty.
    """

    pixels: torch.Tensor
    mask: torch.Tensor
    words: str


def plain_view(image: Image.Image, size: int, factor: int) -> View:
    """The whole image, its shorter side cut to a square, no words."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return View(_pixels(square), torch.ones(1, size // factor, size // factor), "")


def random_view(image: Image.Image, size: int, factor: int, rng: np.random.Generator) -> View:
    """A random view (paper section 4, "Training details"; authors' `MaskBase`).

    Two times in three the image is scaled to U[s/3, s] and pasted at a random place on an empty canvas; otherwise
    to U[1.2 s, 1.4 s] and cropped to s. Below 0.6 s come "very small" / "far away", above s "zoomed in" / "close up".

    Args:
        image: RGB. Its centre square is used.
        size: s, pixels; factor: pixels a latent cell.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    cells = size // factor
    if rng.random() < 2 / 3:
        scale = int(rng.integers(size // 3, size + 1))
        scaled = square.resize((scale, scale), Image.Resampling.BICUBIC)
        x, y = (int(v) for v in rng.integers(0, size - scale + 1, 2))
        pixels = torch.zeros(3, size, size)
        pixels[:, y : y + scale, x : x + scale] = _pixels(scaled)
        mask = torch.zeros(1, cells, cells)
        rows, columns = _inside(y, scale, size, factor), _inside(x, scale, size, factor)
        mask[:, rows, columns] = 1
        words = str(rng.choice(SMALL_WORDS)) if scale < 0.6 * size else ""
        return View(pixels, mask, words)
    scale = int(rng.integers(round(1.2 * size), round(1.4 * size) + 1))
    scaled = square.resize((scale, scale), Image.Resampling.BICUBIC)
    x, y = (int(v) for v in rng.integers(0, scale - size + 1, 2))
    crop = scaled.crop((x, y, x + size, y + size))
    return View(_pixels(crop), torch.ones(1, cells, cells), str(rng.choice(LARGE_WORDS)))


def _inside(start: int, length: int, size: int, factor: int) -> slice:
    """Latent cells one cell inside a pasted edge, where that is not the canvas's own edge; at least one cell.

    On the coarse grid of a small model that can be none: then the cells wholly covered, or the middle one.
    """
    if length == size:
        return slice(0, size // factor)
    first, last = start // factor + 1, (start + length) // factor - 1
    if last <= first:
        first, last = -(-start // factor), (start + length) // factor
    if last <= first:
        first = (start + length // 2) // factor
        last = first + 1
    return slice(first, last)


def _pixels(image: Image.Image) -> torch.Tensor:
    array = np.asarray(image.convert("RGB"), np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)
