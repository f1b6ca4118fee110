"""Drawing images with a backbone, its weights changed or not, and grids of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from training.backbone import Backbone
from training.seeds import generator


@torch.no_grad()
def draw(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """One image per prompt, each from its own seed: an image does not depend on its neighbours in the batch.

    The backbone is used as it is; put `backbone.changed(...)` around the call to draw with trained weights.

    Raises: ValueError for a prompt that is too long for the text encoders, or more steps than the noise schedule has.
    """
    backbone.words.check_fits(prompts)
    check_steps(steps, backbone.pipe.scheduler.config.num_train_timesteps)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        generators = [generator(seed) for seed in seeds[chunk]]
        images += backbone.pipe(
            list(prompts[chunk]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            height=backbone.resolution,
            width=backbone.resolution,
        ).images
        if progress:
            progress(len(images))
    return images


def check_steps(steps: int, timesteps: int) -> None:
    """Raises: ValueError for more steps of drawing than the base model's noise schedule has."""
    if steps > timesteps:
        raise ValueError(f"{steps} steps, but the base model's noise schedule has {timesteps}")


def grid(rows: Sequence[Sequence[Image.Image]], *, labels: Sequence[str] = (), side: int = 128) -> Image.Image:
    """Images as a table, one list a row, each drawn `side` pixels wide, with a label above each row."""
    head = 16 if labels else 0
    width = max(len(row) for row in rows) * side
    sheet = Image.new("RGB", (width, len(rows) * (side + head)), "white")
    canvas = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        if labels:
            canvas.text((3, y * (side + head) + 1), labels[y], "black", ImageFont.load_default(12))
        for x, image in enumerate(row):
            fitted = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (x * side, y * (side + head) + head))
    return sheet
