"""The augmentation is that of method.md section 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from training.augment import LARGE_WORDS, SMALL_WORDS, plain_view, random_view


@pytest.mark.parametrize(("size", "factor"), [(512, 8), (64, 8)])
def test_scales_words_and_masks(size, factor):
    image = Image.new("RGB", (size, size), (255, 255, 255))
    kinds = {"small": 0, "plain": 0, "large": 0}
    for seed in range(300):
        view = random_view(image, size, factor, np.random.default_rng(seed))
        assert view.pixels.shape == (3, size, size) and view.mask.shape == (1, size // factor, size // factor)
        assert view.mask.sum() >= 1
        covered = view.pixels[0] > 0.5
        scale = int(covered.any(0).sum())
        if view.words in LARGE_WORDS:
            kinds["large"] += 1
            assert scale == size and view.mask.all()
            continue
        assert size // 3 <= scale <= size
        kinds["small" if view.words else "plain"] += 1
        assert (view.words in SMALL_WORDS) == (scale < 0.6 * size)
        # outside the pasted image the canvas is empty, and the loss does not count there
        assert view.pixels[:, ~covered].abs().max() == 0 if scale < size else True
        if scale >= 3 * factor:
            cells = covered.view(size // factor, factor, size // factor, factor).all(3).all(1)
            assert not (view.mask[0].bool() & ~cells).any()
    assert 0.25 < kinds["large"] / 300 < 0.42
    assert kinds["small"] > 40 and kinds["plain"] > 40


def test_mask_keeps_one_cell_from_a_pasted_edge():
    image = Image.new("RGB", (512, 512), (255, 255, 255))
    for seed in range(50):
        view = random_view(image, 512, 8, np.random.default_rng(seed))
        covered = view.pixels[0] > 0.5
        if view.words in LARGE_WORDS or covered.all():
            continue
        ys, xs = torch.where(covered)
        rows, columns = torch.where(view.mask[0] > 0)
        top, bottom, left, right = int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1
        assert int(rows.min()) == top // 8 + 1 and int(rows.max()) == bottom // 8 - 2
        assert int(columns.min()) == left // 8 + 1 and int(columns.max()) == right // 8 - 2


def test_plain_view_is_the_centre_square():
    image = Image.new("RGB", (128, 64), (255, 0, 0))
    image.paste((0, 0, 255), (32, 0, 96, 64))
    view = plain_view(image, 64, 8)
    assert view.words == "" and view.mask.all()
    assert torch.allclose(view.pixels.mean((1, 2)), torch.tensor([-1.0, -1.0, 1.0]), atol=0.05)
