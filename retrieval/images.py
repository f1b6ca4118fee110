"""Bytes to square RGB images, as people expect them to look, and their perceptual hash."""

from __future__ import annotations

import io

import imagehash
import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
"""Larger images are refused by their header, before a decompression bomb can unpack."""


def decode(data: bytes) -> Image.Image:
    """Decode a whole image to 8-bit RGB: turned as EXIF says, the first frame, transparency on white, 16 bits scaled.

    Raises:
        ValueError: it is not an image, is broken or truncated, or has more than MAX_PIXELS pixels.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises SyntaxError for broken PNGs
        raise ValueError(f"not a whole image: {error}") from error
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits a channel; PIL itself would clip them at 255
        return Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """Cut the middle square out of an image and bring it to `size` pixels."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def perceptual_hash(image: Image.Image) -> str:
    """Hash what an image looks like: 64 bits (hexadecimal) of its middle square; similar images differ in few bits."""
    side = min(image.size)
    return str(imagehash.phash(square(image.convert("RGB"), side)))
