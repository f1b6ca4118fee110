"""What only images of the web are; what people's own files are is in tests/training/test_images.py."""

from __future__ import annotations

import io
import signal
import threading
import time

import numpy as np
import pytest
from loopback import encoded, endless, picture
from PIL import Image

from retrieval import decoding
from retrieval.decoding import FORMATS, decode, read
from retrieval.images import perceptual_hash, square


def test_other_formats_of_pillow_are_not_opened() -> None:
    for kind in ("EPS", "PDF", "PPM", "TGA", "ICO", "PCX", "SGI"):
        with pytest.raises(ValueError, match=f"not one of {', '.join(FORMATS)}"):
            decode(encoded(picture(1), kind))


def test_too_slow_is_refused_and_the_next_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_DECODERS", decoding._Decoders())
    monkeypatch.setattr(decoding, "DECODE_SECONDS", 1.0)
    assert decode(endless(1)).size == (2000, 2000)
    hostile = endless(2000)
    assert len(hostile) < 2_000_000
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"takes more than 1 s to decode"):
        decode(hostile)
    assert time.monotonic() - start < 20
    assert decode(encoded(picture(1))).size == (96, 80)


def test_crash_is_refused_and_the_next_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoders = decoding._Decoders()
    monkeypatch.setattr(decoding, "_DECODERS", decoders)
    decode(encoded(picture(1)))
    process = decoders._process
    threading.Timer(0.3, process.kill).start()
    with pytest.raises(ValueError, match=r"crashes its decoder \(SIGKILL\)"):
        decode(endless(500))
    assert decode(encoded(picture(2))).size == (96, 80)


def test_interrupted_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_DECODERS", decoding._Decoders())
    decode(encoded(picture(1)))
    signal.signal(signal.SIGALRM, lambda *_: signal.default_int_handler(signal.SIGINT, None))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        decode(endless(30_000))
    assert time.monotonic() - start < 3
    assert decode(encoded(picture(1, (41, 42)))).size == (41, 42)


def test_threads_get_their_own_images() -> None:
    found: dict[int, tuple[int, int]] = {}

    def one(side: int) -> None:
        found[side] = decode(encoded(picture(side, (side, 40)))).size

    threads = [threading.Thread(target=one, args=(side,)) for side in range(40, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {side: (side, 40) for side in range(40, 60)}


def test_large_images_are_reduced() -> None:
    large = picture(1, (4000, 3000))
    decoded = decode(encoded(large, "JPEG"))
    assert decoded.size == (4000, 3000)
    width, height = decoded.image.size
    assert 0.99 * decoding.KEPT_PIXELS < width * height <= decoding.KEPT_PIXELS
    assert width / height == pytest.approx(4 / 3, rel=1e-3)
    assert np.abs(np.asarray(decoded.image.resize((8, 6))).astype(int) - large.resize((8, 6))).max() <= 3
    assert decode(encoded(picture(1, (3000, 2000)), "JPEG")).image.size == (3000, 2000)


def test_frames_beyond_count_make_no_image_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_DECODERS", decoding._Decoders())
    monkeypatch.setattr(decoding, "DECODE_SECONDS", 1.0)
    frame = Image.new("L", (1, 1))
    gif = encoded(frame, "GIF", save_all=True, append_images=[Image.new("L", (1, 1), 9)], duration=1)
    descriptor = gif.rindex(b"\x21\xf9")
    with pytest.raises(ValueError, match="takes more than"):
        decode(gif[:descriptor] + gif[descriptor:-1] * 300_000 + gif[-1:])


def test_truncated_and_huge_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encoded(picture(2, (200, 200)), kind)
        with pytest.raises(ValueError, match="not a whole image"):
            read(data[: len(data) // 2])
    with pytest.raises(ValueError, match="empty file"):
        decode(b"")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="20 x 20 pixels are more than 100"):
        read(encoded(picture(3, (20, 20))))
    monkeypatch.setattr(decoding, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="too large: more than 100 bytes"):
        decode(encoded(picture(3)))


def test_hash_knows_a_picture_again() -> None:
    def distance(a: Image.Image, b: Image.Image) -> int:
        return (int(perceptual_hash(a), 16) ^ int(perceptual_hash(b), 16)).bit_count()

    image = picture(4, (300, 200))
    again = Image.open(io.BytesIO(encoded(square(image, 64), "JPEG", quality=80)))
    assert distance(image, again) <= 4
    assert min(distance(image, picture(seed)) for seed in range(5, 50)) > 8
