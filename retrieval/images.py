"""Square images, and what an image looks like."""

from __future__ import annotations

import imagehash
from PIL import Image, ImageOps


def square(image: Image.Image, size: int) -> Image.Image:
    """Cut the middle square out of an image and bring it to `size` pixels."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def perceptual_hash(image: Image.Image) -> str:
    """Hash what an image looks like: 64 bits (hexadecimal) of its middle square; similar images differ in few bits."""
    side = min(image.size)
    return str(imagehash.phash(square(image.convert("RGB"), side)))
