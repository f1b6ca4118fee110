from __future__ import annotations

import io

import numpy as np
import pytest
from loopback import encoded, picture
from PIL import Image

from retrieval.images import decode, perceptual_hash, square


def test_turned_as_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(picture(1, (40, 20)), "JPEG", exif=exif)).size == (20, 40)


def test_transparent_is_white_and_first_frame_is_taken() -> None:
    assert decode(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


def test_sixteen_bits_and_cmyk() -> None:
    deep = Image.fromarray(np.full((4, 4), 65535 // 2, np.uint16))
    assert decode(encoded(deep)).getpixel((0, 0)) == (127, 127, 127)
    assert decode(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == (255, 255, 255)


def test_broken_and_huge_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encoded(picture(2, (200, 200)), kind)
        with pytest.raises(ValueError, match="not a whole image"):
            decode(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a whole image"):
        decode(b"<html>")
    monkeypatch.setattr("retrieval.images.MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="20 x 20 pixels are more than 100"):
        decode(encoded(picture(3, (20, 20))))


def test_hash_knows_a_picture_again() -> None:
    def distance(a: Image.Image, b: Image.Image) -> int:
        return (int(perceptual_hash(a), 16) ^ int(perceptual_hash(b), 16)).bit_count()

    image = picture(4, (300, 200))
    again = Image.open(io.BytesIO(encoded(square(image, 64), "JPEG", quality=80)))
    assert distance(image, again) <= 4
    assert min(distance(image, picture(seed)) for seed in range(5, 50)) > 8
