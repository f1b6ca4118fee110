"""The miniature world: captioned scenes composed from open emoji art.

A scene is one or two sprites (class x style) on one of the procedural backgrounds, with a caption in the
form of Stable Diffusion prompts. Everything is a pure function of a random generator, so a corpus of any
length is known from its seed. Sprites come from the atlas in the package; `ATTRIBUTION.md` beside it names
the artists.
"""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 64
"""Side of a scene in pixels."""

ATLAS = Path(__file__).parent / "atlas"

TRAINING_STYLES = ("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "emojione")
"""Art styles the base model has seen."""

HELD_OUT_STYLES = ("fxemoji", "streamline-emojis")
"""Art styles the base model has never seen: private concepts are taken from these."""

CLASSES = {
    "cat": "cat-face", "dog": "dog-face", "panda": "panda", "penguin": "penguin", "frog": "frog",
    "turtle": "turtle", "octopus": "octopus", "fish": "tropical-fish", "snail": "snail",
    "ladybug": "lady-beetle", "owl": "owl", "elephant": "elephant", "bear": "bear", "rabbit": "rabbit-face",
    "cow": "cow-face", "pig": "pig-face", "apple": "red-apple", "lemon": "lemon", "banana": "banana",
    "strawberry": "strawberry", "watermelon": "watermelon", "grapes": "grapes", "mushroom": "mushroom",
    "cactus": "cactus", "hamburger": "hamburger", "doughnut": "doughnut", "pizza": "pizza",
    "cake": "birthday-cake", "guitar": "guitar", "drum": "drum", "car": "automobile", "bus": "bus",
    "rocket": "rocket", "sailboat": "sailboat", "house": "house", "balloon": "balloon",
    "umbrella": "umbrella", "crown": "crown", "soccer ball": "soccer-ball", "sunflower": "sunflower",
    "tulip": "tulip", "ghost": "ghost", "snowman": "snowman",
}  # fmt: skip
"""Class word -> icon name, the same in all icon sets."""

SMALL_SIZES, SIZES, LARGE_SIZES = (16.0, 24.0), (40.0, 54.0), (62.0, 80.0)
"""Sides of the sprites of one object, pixels: with a small word, without, with a large word."""
SMALL_WORDS = ("very small", "far away")
LARGE_WORDS = ("zoomed in", "close up")


# --- backgrounds: (rng, n) -> (n, n, 3) float in [0, 1] ------------------------------------------------


def _grid(n: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(n) + 0.5) / n
    return axis[None, :].repeat(n, 0), axis[:, None].repeat(n, 1)


def _mix(a, b, t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1)[..., None]
    return np.asarray(a, float) * (1 - t) + np.asarray(b, float) * t


def _jitter(rng: np.random.Generator, colour, amount: float = 0.05) -> np.ndarray:
    return np.clip(np.asarray(colour, float) + rng.uniform(-amount, amount, 3), 0, 1)


def _step(x: np.ndarray, soft: float = 0.02) -> np.ndarray:
    return np.clip(x / soft + 0.5, 0, 1)


def _plain(colour):
    def draw(rng, n):
        x, y = _grid(n)
        c = _jitter(rng, colour)
        return _mix(c, c * 0.85, np.hypot(x - 0.5, y - 0.5) * 1.2)

    return draw


def _beach(rng, n):
    _, y = _grid(n)
    horizon, shore = rng.uniform(0.25, 0.38), rng.uniform(0.5, 0.62)
    out = _mix(_jitter(rng, (0.55, 0.8, 0.98)), (0.85, 0.94, 1), y / horizon)
    out = _mix(out, _jitter(rng, (0.1, 0.5, 0.75)), _step(y - horizon))
    return _mix(out, _jitter(rng, (0.95, 0.85, 0.6)), _step(y - shore, 0.05))


def _grass(rng, n):
    x, y = _grid(n)
    base = _mix(_jitter(rng, (0.5, 0.8, 0.3)), _jitter(rng, (0.25, 0.6, 0.2)), y)
    return np.clip(base + 0.04 * np.sin(x * rng.uniform(18, 24) + 4 * np.sin(y * 9))[..., None], 0, 1)


def _snow(rng, n):
    x, y = _grid(n)
    hill = rng.uniform(0.45, 0.6) + 0.08 * np.sin(x * rng.uniform(4, 7) + rng.uniform(0, 6))
    out = _mix(_jitter(rng, (0.68, 0.78, 0.9), 0.03), (0.82, 0.88, 0.96), y)
    out = _mix(out, (0.97, 0.98, 1.0), _step(y - hill))
    for _ in range(14):
        out = _mix(out, (1, 1, 1), 1.4 - np.hypot(x - rng.random(), y - rng.random()) / 0.014)
    return out


def _night(rng, n):
    x, y = _grid(n)
    out = _mix(_jitter(rng, (0.03, 0.04, 0.16), 0.02), _jitter(rng, (0.13, 0.12, 0.36), 0.03), y)
    for _ in range(16):
        out = _mix(out, (1, 1, 0.85), 1.5 - np.hypot(x - rng.random(), y - rng.random()) / 0.011)
    return out


def _wood(rng, n):
    x, y = _grid(n)
    grain = 0.5 + 0.5 * np.sin(y * 60 + 3 * np.sin(x * rng.uniform(3, 6) + rng.uniform(0, 6)))
    out = _mix(_jitter(rng, (0.66, 0.44, 0.24)), (0.56, 0.35, 0.18), 0.6 * grain)
    return _mix(out, (0.36, 0.21, 0.1), _step(0.018 - np.abs((y * 4 + rng.random()) % 1 - 0.5) * 0.5, 0.015))


def _desert(rng, n):
    x, y = _grid(n)
    out = _mix((0.98, 0.85, 0.6), (1.0, 0.93, 0.75), y * 2)
    for level, colour in ((0.42, (0.92, 0.65, 0.32)), (0.66, (0.85, 0.54, 0.24))):
        dune = level + 0.07 * np.sin(x * rng.uniform(4, 8) + rng.uniform(0, 6))
        out = _mix(out, _jitter(rng, colour, 0.03), _step(y - dune))
    return out


def _underwater(rng, n):
    x, y = _grid(n)
    out = _mix(_jitter(rng, (0.2, 0.75, 0.85)), _jitter(rng, (0.0, 0.2, 0.5)), y)
    rays = np.clip(np.sin((x + 0.4 * y) * 16 + rng.uniform(0, 6)), 0, 1) * (1 - y) * 0.25
    out = _mix(out, (0.8, 1, 1), rays)
    for _ in range(6):
        r = np.hypot(x - rng.random(), y - rng.random())
        out = _mix(out, (0.75, 0.95, 1), _step(0.012 - np.abs(r - 0.035), 0.012) * 0.8)
    return out


def _forest(rng, n):
    x, y = _grid(n)
    out = _mix(_jitter(rng, (0.2, 0.42, 0.2), 0.03), (0.08, 0.22, 0.1), y)
    for centre in np.linspace(0.08, 0.92, 5) + rng.uniform(-0.06, 0.06, 5):
        out = _mix(out, (0.25, 0.16, 0.09), _step(0.035 - np.abs(x - centre)) * (y < 0.8))
    return _mix(out, (0.12, 0.3, 0.1), _step(y - 0.78, 0.05))


def _sunset(rng, n):
    x, y = _grid(n)
    out = _mix(_jitter(rng, (0.4, 0.2, 0.5)), _jitter(rng, (1.0, 0.6, 0.25)), y * 1.5)
    sun = np.hypot(x - rng.uniform(0.25, 0.75), y - 0.68)
    out = _mix(out, (1.0, 0.9, 0.4), _step(0.16 - sun))
    return _mix(out, _jitter(rng, (0.25, 0.12, 0.3), 0.03), _step(y - 0.72))


def _bricks(rng, n):
    x, y = _grid(n)
    rows, offset = 7, rng.random()
    row = np.floor(y * rows + offset)
    fx, fy = (x * 3.5 + 0.5 * (row % 2)) % 1, (y * rows + offset) % 1
    mortar = np.maximum(_step(0.06 - fx, 0.05), _step(0.12 - fy, 0.1))
    return _mix(_jitter(rng, (0.68, 0.3, 0.22)), (0.85, 0.78, 0.72), mortar)


def _mountains(rng, n):
    x, y = _grid(n)
    out = _mix(_jitter(rng, (0.7, 0.84, 0.95), 0.03), (0.92, 0.95, 0.98), y)
    for centre in (rng.uniform(0.1, 0.35), rng.uniform(0.6, 0.9)):
        top = rng.uniform(0.1, 0.25)
        inside = _step(y - top - 1.3 * np.abs(x - centre))
        out = _mix(out, _jitter(rng, (0.45, 0.48, 0.56), 0.03), inside)
        out = _mix(out, (0.97, 0.97, 1), inside * _step(top + 0.17 - y))
    return _mix(out, _jitter(rng, (0.42, 0.6, 0.38)), _step(y - 0.8))


def _checkers(rng, n):
    x, y = _grid(n)
    phase = rng.random(2)
    wave = np.sin((x + phase[0]) * 2 * np.pi * 3) * np.sin((y + phase[1]) * 2 * np.pi * 3)
    return _mix((0.12, 0.12, 0.14), (0.94, 0.94, 0.92), _step(wave, 0.3))


def _city(rng, n):
    x, y = _grid(n)
    out = _mix(_jitter(rng, (0.75, 0.72, 0.8), 0.03), (0.93, 0.86, 0.8), y)
    edges = np.linspace(0, 1, 7)
    for left, right in itertools.pairwise(edges):
        top, shade = rng.uniform(0.15, 0.5), rng.uniform(0.3, 0.5)
        inside = (x >= left + 0.01) & (x < right - 0.01) & (y > top)
        windows = (((x - left) * 18) % 1 > 0.5) & (((y - top) * 12) % 1 > 0.55)
        out = _mix(out, (shade, shade, shade + 0.08), inside.astype(float))
        out = _mix(out, (0.98, 0.9, 0.55), (inside & windows).astype(float) * 0.8)
    return _mix(out, (0.3, 0.3, 0.33), _step(y - 0.86))


def _curtain(rng, n):
    x, y = _grid(n)
    folds = 0.5 + 0.5 * np.sin(x * rng.uniform(30, 38) + rng.uniform(0, 6))
    return _mix(_jitter(rng, (0.75, 0.06, 0.12), 0.03), (0.42, 0.0, 0.05), folds * (0.6 + 0.4 * y))


def _clouds(rng, n):
    x, y = _grid(n)
    out = _mix(_jitter(rng, (0.3, 0.6, 0.95)), (0.6, 0.82, 1), y)
    for _ in range(4):
        cx, cy = rng.random(2)
        for _ in range(4):
            r = np.hypot(x - cx - rng.uniform(-0.12, 0.12), (y - cy - rng.uniform(-0.03, 0.03)) * 1.3)
            out = _mix(out, (1, 1, 1), _step(0.085 - r, 0.03))
    return out


def _flowers(rng, n):
    x, y = _grid(n)
    out = _mix((0.45, 0.75, 0.35), (0.3, 0.62, 0.25), y)
    for _ in range(22):
        colour = ((1, 0.45, 0.6), (1, 0.9, 0.3), (0.75, 0.5, 0.95))[rng.integers(3)]
        out = _mix(out, colour, _step(0.03 - np.hypot(x - rng.random(), y - rng.random())))
    return out


BACKGROUNDS = {
    "on the beach": _beach, "on the grass": _grass, "in the snow": _snow, "in the night sky": _night,
    "on a wooden table": _wood, "in the desert": _desert, "under water": _underwater,
    "in the forest": _forest, "at sunset": _sunset, "in front of a brick wall": _bricks,
    "in the mountains": _mountains, "on a checkered floor": _checkers, "in the city": _city,
    "in front of a red curtain": _curtain, "in the clouds": _clouds, "in a flower field": _flowers,
    "on a pink background": _plain((0.97, 0.6, 0.75)), "on a blue background": _plain((0.25, 0.4, 0.85)),
}  # fmt: skip
"""Caption phrase -> drawing function."""


# --- sprites and scenes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sprite:
    """One object of a scene; sizes and places in pixels of a 64-pixel scene, angle in degrees."""

    cls: str
    style: str
    size: float
    x: float
    y: float
    angle: float = 0.0
    flip: bool = False


@dataclass(frozen=True)
class Scene:
    sprites: tuple[Sprite, ...]
    background: str
    background_seed: int
    caption: str


@functools.cache
def _atlas() -> tuple[dict[str, Any], Image.Image]:
    index = json.loads((ATLAS / "atlas.json").read_text())
    return index, Image.open(ATLAS / "atlas.png").convert("RGBA")


@functools.cache
def sprite_image(cls: str, style: str) -> Image.Image:
    """The sprite as RGBA. Raises KeyError where the style does not draw the class."""
    index, sheet = _atlas()
    if cls not in index["sprites"][style]:
        raise KeyError(f"style {style!r} has no {cls!r}")
    row, column, side = index["styles"].index(style), index["classes"].index(cls), index["side"]
    return sheet.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))


def styles_of(cls: str, styles: tuple[str, ...] = TRAINING_STYLES) -> list[str]:
    """The given styles that draw this class."""
    return [style for style in styles if cls in _atlas()[0]["sprites"][style]]


def render(scene: Scene, size: int = SIZE) -> tuple[Image.Image, np.ndarray]:
    """Draw a scene.

    Returns:
        The RGB image, size x size, and the objects' coverage as a (size, size) float32 array in [0, 1].
    """
    rng = np.random.default_rng(scene.background_seed)
    image = Image.fromarray((BACKGROUNDS[scene.background](rng, size) * 255).round().astype(np.uint8))
    coverage = Image.new("L", (size, size))
    for sprite in scene.sprites:
        art = sprite_image(sprite.cls, sprite.style)
        if sprite.flip:
            art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = max(1, round(sprite.size * size / SIZE))
        # premultiplied, so that the colour of transparent pixels does not bleed into the edge
        art = art.convert("RGBa").rotate(sprite.angle, Image.Resampling.BICUBIC)
        art = art.resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
        corner = (round(sprite.x * size / SIZE - side / 2), round(sprite.y * size / SIZE - side / 2))
        image.paste(art, corner, art)
        coverage.paste(255, corner, art.getchannel("A"))
    return image, np.asarray(coverage, np.float32) / 255


def article(noun: str) -> str:
    if noun == "grapes":
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def is_held_out(cls: str, background: str) -> bool:
    """Whether this pair of class and background was left out of the base's training (about one in seven)."""
    i, j = list(CLASSES).index(cls), list(BACKGROUNDS).index(background)
    return (i * 5 + j * 3) % 7 == 0


def near_middle(size: float, rng: np.random.Generator) -> tuple[float, float]:
    """A place for a sprite: like a photographer's subject, half as far from the middle as there is room for."""
    room = max(2.0, (SIZE - size) / 4)
    x, y = SIZE / 2 + rng.uniform(-room, room, 2)
    return float(x), float(y)


def sample_scene(rng: np.random.Generator, *, styles: tuple[str, ...] = TRAINING_STYLES) -> Scene:
    """Draw a random captioned scene that holds no held-out pair of class and background."""
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    count = 2 if rng.random() < 0.15 else 1
    allowed = [c for c in CLASSES if not is_held_out(c, background) and styles_of(c, styles)]
    classes = [str(c) for c in rng.choice(allowed, size=count, replace=False)]
    size_word = ""
    sprites = []
    for k, cls in enumerate(classes):
        if count == 2:
            size = rng.uniform(26, 34)
            x, y = SIZE * (0.27 + 0.46 * k) + rng.uniform(-2, 2), SIZE / 2 + rng.uniform(-10, 12)
        else:
            kind = rng.random()
            if kind < 0.12:
                size, size_word = rng.uniform(*SMALL_SIZES), str(rng.choice(SMALL_WORDS))
            elif kind < 0.24:
                size, size_word = rng.uniform(*LARGE_SIZES), str(rng.choice(LARGE_WORDS))
            else:
                size = rng.uniform(*SIZES)
            x, y = near_middle(size, rng)
        style = str(rng.choice(styles_of(cls, styles)))
        sprites.append(
            Sprite(cls, style, float(size), float(x), float(y), float(rng.uniform(-8, 8)), bool(rng.random() < 0.5))
        )
    what = " and ".join(article(c) for c in classes)
    form = rng.random()
    if form < 0.6:
        caption = f"photo of {what} {background}"
    elif form < 0.85:
        caption = f"{what} {background}"
    elif form < 0.95:
        caption = f"photo of {what}"
    else:
        caption = " and ".join(classes)
    return Scene(tuple(sprites), background, int(rng.integers(2**31)), f"{size_word} {caption}".strip())


def concept_images(cls: str, style: str, count: int, seed: int) -> list[Image.Image]:
    """Pictures of one sprite, as a user's few photographs of one thing: large, on various backgrounds."""
    rng = np.random.default_rng(seed)
    images = []
    for background in rng.permutation(list(BACKGROUNDS))[:count]:
        size = rng.uniform(*SIZES)
        sprite = Sprite(cls, style, float(size), *near_middle(size, rng), float(rng.uniform(-10, 10)))
        images.append(render(Scene((sprite,), str(background), int(rng.integers(2**31)), ""))[0])
    return images
