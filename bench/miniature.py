"""The proof that the miniature draws what it is told, also what it never saw together:

    python bench/miniature.py                             # 500 prompts, some minutes on two cores
    python bench/miniature.py --grid docs/miniature.png   # and a labelled picture of a prompt grid

1. Prompts with pairs of class and background that were left out of training. The judge is the miniature's own CLIP:
   an object is right if its class ranks first among all classes with the background given, a background if it ranks
   first among all backgrounds with the class given. The same prompts rendered for real give what a perfect model would
   get; `object_rate` and `background_rate` are relative to that.
2. The identity judge on the art styles it never saw: does a sprite resemble itself, on another background and in
   another size and turn, more than it resembles another style's sprite of the same class? CLIP is asked the same.

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from pipeline.miniature import world
from pipeline.miniature.identity import load_identity

PACKAGE = Path(world.__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLASSES, BACKGROUNDS = list(world.CLASSES), list(world.BACKGROUNDS)
STEPS, GUIDANCE, BATCH = 25, 3.0, 50
VIEWS = 8
"""Pictures of each sprite that the identity judge compares."""

Pair = tuple[str, str]
Features = Callable[[list[Image.Image]], torch.Tensor]


def prompt_of(cls: str, background: str) -> str:
    return f"photo of {world.article(cls)} {background}"


def held_out_pairs(count: int) -> list[Pair]:
    """Pairs of class and background outside the training, in a fixed shuffled order, over and over up to `count`."""
    pairs = [(c, b) for c in CLASSES for b in BACKGROUNDS if world.is_held_out(c, b)]
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[order[i % len(pairs)]] for i in range(count)]


def render_pairs(pairs: list[Pair]) -> list[Image.Image]:
    """The pairs for real: one sprite of ordinary size, the training styles in turn."""
    images = []
    for i, (cls, background) in enumerate(pairs):
        rng = np.random.default_rng([1, i])
        styles = world.styles_of(cls)
        size = float(rng.uniform(*world.SIZES))
        images.append(_view(rng, cls, styles[i % len(styles)], background, size))
    return images


def generate(pipe: StableDiffusionPipeline, prompts: list[str]) -> list[Image.Image]:
    """One image a prompt; the noise of prompt i has seed i, so it does not depend on the batches."""
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), BATCH), desc=f"batches of {BATCH} images", disable=None):
        batch = prompts[start : start + BATCH]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        images += pipe(batch, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds).images
    return images


def _view(rng: np.random.Generator, cls: str, style: str, background: str, size: float) -> Image.Image:
    angle, flip = float(rng.uniform(-8, 8)), bool(rng.random() < 0.5)
    sprite = world.Sprite(cls, style, size, *world.near_middle(size, rng), angle, flip)
    return world.render(world.Scene((sprite,), background, int(rng.integers(2**31)), ""))[0]


# --- judges --------------------------------------------------------------------------------------------


def load_clip(folder: Path) -> tuple[Features, torch.Tensor]:
    """CLIP's image features, and its text features of every class on every background: (classes, backgrounds, D)."""
    name = f"local-dir:{folder}"
    model, preprocess = open_clip.create_model_from_pretrained(name, precision="fp32", device=DEVICE)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()

    def features(images: list[Image.Image]) -> torch.Tensor:
        return model.encode_image(torch.stack([preprocess(i) for i in images]).to(DEVICE), normalize=True)

    texts = [
        model.encode_text(tokenizer([prompt_of(c, b) for b in BACKGROUNDS]).to(DEVICE), normalize=True) for c in CLASSES
    ]
    return features, torch.stack(texts)


def rates(images: torch.Tensor, texts: torch.Tensor, pairs: list[Pair]) -> tuple[float, float]:
    """Shares of images with the right object and with the right background.

    Args:
        images: (N, D) unit features of the images.
        texts: (classes, backgrounds, D) unit features.
        pairs: what each image should show.
    """
    cls = torch.tensor([CLASSES.index(c) for c, _ in pairs])
    background = torch.tensor([BACKGROUNDS.index(b) for _, b in pairs])
    scores = torch.einsum("nd,cbd->ncb", images, texts).cpu()
    rows = torch.arange(len(pairs))
    objects = scores[rows, :, background].argmax(1) == cls
    backgrounds = scores[rows, cls, :].argmax(1) == background
    return objects.float().mean().item(), backgrounds.float().mean().item()


def identity_scores(features: Features) -> dict[str, float]:
    """How well features tell a held-out sprite from the other styles' sprites of its class.

    Returns:
        `auc`: how often the cosine of two views of one sprite exceeds that of two views of different ones.
        `triplet`: the same with the anchor view in common.
    """
    rng = np.random.default_rng(2)
    same, other, triplets = [], [], []
    for cls in CLASSES:
        new = world.styles_of(cls, world.HELD_OUT_STYLES)
        if not new:
            continue
        styles = new + world.styles_of(cls)
        views = [
            _view(rng, cls, style, str(background), float(rng.uniform(28, 58)))
            for style in styles
            for background in rng.permutation(BACKGROUNDS)[:VIEWS]
        ]
        f = features(views).cpu().reshape(len(styles), VIEWS, -1)
        for k in range(len(new)):
            within = (f[k] @ f[k].T)[~torch.eye(VIEWS, dtype=torch.bool)].reshape(VIEWS, VIEWS - 1)
            across = (f[k] @ f[torch.arange(len(styles)) != k].flatten(0, 1).T).reshape(VIEWS, -1)
            same.append(within.flatten())
            other.append(across.flatten())
            triplets.append((within[:, :, None] > across[:, None, :]).float().mean())
    positive, negative = torch.cat(same), torch.cat(other).sort().values
    auc = torch.searchsorted(negative, positive).float().mean() / len(negative)
    return {"auc": auc.item(), "triplet": torch.stack(triplets).mean().item()}


# --- the picture ---------------------------------------------------------------------------------------


def draw_grid(pipe: StableDiffusionPipeline, path: Path, scale: int = 2) -> None:
    """Generated images, classes across and backgrounds down; a frame marks pairs left out of the training."""
    classes = ["cat", "panda", "octopus", "apple", "pizza", "car", "rocket", "sunflower"]
    backgrounds = ["on the beach", "in the snow", "in the night sky", "on a wooden table", "at sunset", "under water"]
    images = generate(pipe, [prompt_of(c, b) for b in backgrounds for c in classes])
    side, gap, left, top = world.SIZE * scale, 6, 150, 30
    step = side + gap
    sheet = Image.new("RGB", (left + step * len(classes), top + step * len(backgrounds) + 26), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, cls in enumerate(classes):
        pen.text((left + step * column + side / 2, top / 2), cls, "black", font, anchor="mm")
    for row, background in enumerate(backgrounds):
        pen.text((left - 10, top + step * row + side / 2), background, "black", font, anchor="rm")
        for column, cls in enumerate(classes):
            x, y = left + step * column, top + step * row
            image = images[row * len(classes) + column].resize((side, side), Image.Resampling.BICUBIC)
            if world.is_held_out(cls, background):
                pen.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), "crimson")
            sheet.paste(image, (x, y))
    foot = f"photo of a ... ; red frame: never seen together in training; DDIM {STEPS} steps, guidance {GUIDANCE:g}"
    pen.text((left, sheet.height - 14), foot, "black", font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"grid: {path}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=PACKAGE, help="folder with model/, clip/ and identity/")
    parser.add_argument("--count", type=int, default=500, help="prompts (default: 500)")
    parser.add_argument("--grid", type=Path, help="write a picture of a prompt grid (PNG) here")
    arguments = parser.parse_args()
    if not (arguments.package / "model").is_dir():
        parser.error(f"no weights in {arguments.package}; make them with python -m pipeline.miniature.pretrain")
    start = time.time()

    pipe = StableDiffusionPipeline.from_pretrained(arguments.package / "model", dtype=torch.float32).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    clip, texts = load_clip(arguments.package / "clip")
    identity_net = load_identity(arguments.package / "identity" / "model.safetensors").to(DEVICE)

    def identity(images: list[Image.Image]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(i) for i in images])).to(DEVICE)
        return identity_net(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)

    if arguments.grid:
        draw_grid(pipe, arguments.grid)
    pairs = held_out_pairs(arguments.count)
    real_object, real_background = rates(clip(render_pairs(pairs)), texts, pairs)
    generating = time.time()
    images = generate(pipe, [prompt_of(*pair) for pair in pairs])
    generating = time.time() - generating
    made_object, made_background = rates(clip(images), texts, pairs)
    by_identity, by_clip = identity_scores(identity), identity_scores(clip)

    print(f"{len(pairs)} prompts, {len(set(pairs))} pairs of class and background outside the training")
    print(f"{f'first of {len(CLASSES)} classes, {len(BACKGROUNDS)} backgrounds':40} {'real':>9} {'generated':>9}")
    print(f"{'  right object':40} {real_object:9.1%} {made_object:9.1%}")
    print(f"{'  right background':40} {real_background:9.1%} {made_background:9.1%}")
    print(f"{'which sprite of a class, new styles':40} {'identity':>9} {'CLIP':>9}")
    print(f"{'  AUC':40} {by_identity['auc']:9.3f} {by_clip['auc']:9.3f}")
    print(f"{'  triplets in order':40} {by_identity['triplet']:9.3f} {by_clip['triplet']:9.3f}")
    figures = {
        "object_rate": made_object / max(real_object, 1e-9),
        "background_rate": made_background / max(real_background, 1e-9),
        "object_rate_generated": made_object,
        "background_rate_generated": made_background,
        "object_rate_real": real_object,
        "background_rate_real": real_background,
        "identity_auc_held_out": by_identity["auc"],
        "identity_triplets_held_out": by_identity["triplet"],
        "clip_auc_held_out": by_clip["auc"],
        "clip_triplets_held_out": by_clip["triplet"],
        "prompts": len(pairs),
        "seconds_generating": generating,
        "seconds": time.time() - start,
    }
    print(json.dumps({k: round(v, 4) for k, v in figures.items()}))


if __name__ == "__main__":
    main()
