"""The augmentation of Custom Diffusion: random resize with size words and a mask of what is valid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

SMALL_WORDS = ("very small", "far away")
LARGE_WORDS = ("zoomed in", "close up")
WHOLE_FROM = 0.6
"""Scale from which a view shows the whole image at full size."""
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
    return View(_pixels(_square(image, size)), torch.ones(1, size // factor, size // factor), "")


def random_view(image: Image.Image, size: int, factor: int, rng: np.random.Generator) -> View:
    """A random view (paper section 4, "Training details"; authors' `MaskBase`, src/finetune_data.py).

    Two times in three a scale is drawn from U[s/3, s], else from U[1.2 s, 1.4 s]:

    - below 0.6 s the image is pasted at that scale somewhere on an empty canvas, with "very small" or "far away";
      the loss counts only what was pasted;
    - from 0.6 s to s the view is the whole image at full size, without words (the diffusers example pastes here too);
    - above s it is a random crop, with "zoomed in" or "close up".

    Args:
        image: RGB. Its centre square is used.
        size: s, pixels; factor: pixels a latent cell.
    """
    if rng.random() < 2 / 3:
        scale = int(rng.integers(size // 3, size + 1))
        if scale >= WHOLE_FROM * size:
            return plain_view(image, size, factor)
        x, y = (int(v) for v in rng.integers(0, size - scale + 1, 2))
        pixels = torch.zeros(3, size, size)
        pixels[:, y : y + scale, x : x + scale] = _pixels(_square(image, scale))
        mask = torch.zeros(1, size // factor, size // factor)
        mask[:, _inside(y, scale, size, factor), _inside(x, scale, size, factor)] = 1
        return View(pixels, mask, str(rng.choice(SMALL_WORDS)))
    scale = int(rng.integers(round(1.2 * size), round(1.4 * size) + 1))
    x, y = (int(v) for v in rng.integers(0, scale - size + 1, 2))
    crop = _square(image, scale).crop((x, y, x + size, y + size))
    return View(_pixels(crop), torch.ones(1, size // factor, size // factor), str(rng.choice(LARGE_WORDS)))


def mirrored(view: View) -> View:
    """Left and right exchanged."""
    return View(view.pixels.flip(-1), view.mask.flip(-1), view.words)


def _square(image: Image.Image, size: int) -> Image.Image:
    """Its centre square, size x size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


def _inside(start: int, length: int, size: int, factor: int) -> slice:
    """Latent cells one cell inside a pasted edge, where that is not the canvas's own edge; at least one cell.

    On the coarse grid of a small model that can be none: then the cells wholly covered, or the middle one.
    """
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
