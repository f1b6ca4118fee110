"""The augmentation is that of method.md section 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from training.augment import LARGE_WORDS, SMALL_WORDS, mirrored, plain_view, random_view
from training.features import concept_features


@pytest.mark.parametrize(("size", "factor"), [(512, 8), (64, 8)])
def test_scales_words_and_masks(size, factor):
    image = Image.new("RGB", (size, size), (255, 255, 255))
    kinds = {"small": 0, "whole": 0, "large": 0}
    for seed in range(300):
        view = random_view(image, size, factor, np.random.default_rng(seed))
        assert view.pixels.shape == (3, size, size) and view.mask.shape == (1, size // factor, size // factor)
        covered = view.pixels[0] > 0.5
        scale = int(covered.any(0).sum())
        if not view.words:
            # from 0.6 s to s: the whole image, nothing is pasted
            kinds["whole"] += 1
            assert torch.equal(view.pixels, plain_view(image, size, factor).pixels) and view.mask.all()
        elif view.words in LARGE_WORDS:
            kinds["large"] += 1
            assert scale == size and view.mask.all()
        else:
            kinds["small"] += 1
            assert view.words in SMALL_WORDS and size // 3 <= scale < 0.6 * size and view.mask.sum() >= 1
            # outside the pasted image the canvas is empty, and the loss does not count there
            assert view.pixels[:, ~covered].abs().max() == 0
            if scale >= 3 * factor:
                cells = covered.view(size // factor, factor, size // factor, factor).all(3).all(1)
                assert not (view.mask[0].bool() & ~cells).any()
    expected = {"small": 2 / 3 * 0.4, "whole": 2 / 3 * 0.6, "large": 1 / 3}
    assert all(abs(kinds[kind] / 300 - share) < 0.08 for kind, share in expected.items()), kinds


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


def test_mirrored_views_are_views_mirrored():
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 20, 64))
    view = random_view(image, 64, 8, np.random.default_rng(3))
    other = mirrored(view)
    assert other.words == view.words
    assert torch.equal(other.pixels.flip(-1), view.pixels) and torch.equal(other.mask.flip(-1), view.mask)


def test_flip_mirrors_half_of_the_views(miniature):
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 20, 64))
    drawn = {}
    for flip in (False, True):
        made = concept_features(miniature, [image], ["1" * 40], views=24, augment=True, seed=0, flip=flip)
        large = [i for i, words in enumerate(made.words) if words in LARGE_WORDS or not words]
        pixels = miniature.pipe.vae.decode(made.latents[large] / miniature.pipe.vae.config.scaling_factor).sample
        blue = pixels[:, 2] - pixels[:, 0]
        drawn[flip] = (blue[..., :20].mean((1, 2)) > blue[..., 44:].mean((1, 2))).tolist()
    assert all(drawn[False])  # the blue edge is on the left
    assert 0.25 < sum(drawn[True]) / len(drawn[True]) < 0.75
    plain = concept_features(miniature, [image], ["1" * 40], views=1, augment=False, seed=0, flip=True)
    assert len(plain.latents) == 2
