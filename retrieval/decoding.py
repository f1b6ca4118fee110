"""A stranger's image, from bytes to RGB as people expect it to look: upright, in sRGB, on white, no larger than needed.

Every image of a concept, of the web and of a preference study is decoded here, by the decoders of `FORMATS` alone. They
are C code that a file of a few megabytes can keep busy for hours, or crash, and that no thread can interrupt. So they
run in a process of their own, which starts with the first image, ends with ours, and is replaced when an image ends it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from retrieval.regular import open_regular

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
"""The only decoders used: others of Pillow's start programs (EPS) or exist for files nobody trains on."""

MAX_BYTES = 1_000_000_000
"""Larger files are refused unread."""

MAX_PIXELS = 80_000_000
"""Images with more pixels are refused by their header. A little under Pillow's own limit (89 million)."""

KEPT_PIXELS = 6_000_000
"""Images with more pixels are reduced to that: many are held in memory, and SDXL's largest views have 2 million."""

DECODE_SECONDS = 10.0
"""Processor time that one image may take. Not time by the clock, which on a busy machine would refuse good images."""

_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@dataclass(frozen=True)
class Decoded:
    image: Image.Image
    """RGB, at most KEPT_PIXELS."""
    size: tuple[int, int]
    """Width and height in pixels, upright, before it was reduced."""
    notes: list[str] = field(default_factory=list)
    """What one may not expect: frames left out, a colour profile ignored."""


def read_file(path: Path) -> bytes:
    """An image file's bytes, for `decode`: of one that is too large, enough for it to say so.

    Raises: ValueError for what is no regular file (a pipe would block), OSError for what cannot be read.
    """
    with open_regular(path) as file:
        return file.read(MAX_BYTES + 1)


def decode(data: bytes) -> Decoded:
    """Decode an image file's bytes in the process of decoders; of an animation the first frame.

    Raises:
        ValueError: it is no whole image of one of FORMATS, is larger than MAX_BYTES or MAX_PIXELS, takes more than
            DECODE_SECONDS, or crashes its decoder.
        RuntimeError: the process of decoders cannot be started.
    """
    if not data:
        raise ValueError("empty file")
    if len(data) > MAX_BYTES:
        raise ValueError(f"too large: more than {MAX_BYTES} bytes; scale it down")
    return _DECODERS.decode(data)


class _Decoders:
    """The process of decoders: one image at a time, whichever thread asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def decode(self, data: bytes) -> Decoded:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            try:
                self._connection.send_bytes(data)
                reply = json.loads(self._connection.recv_bytes())
                if "error" in reply:
                    raise ValueError(reply["error"])
                width, height = reply["kept"]
                image = Image.frombytes("RGB", (width, height), self._connection.recv_bytes())
            except (EOFError, ConnectionError):
                raise self._end() from None
            except ValueError:
                raise
            except BaseException:  # such as Ctrl-C: what comes next must not get this image's answer
                self._process.kill()
                self._end()
                raise
        return Decoded(image, tuple(reply["size"]), reply["notes"])

    def _start(self) -> subprocess.Popen:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "retrieval.decoding", str(DECODE_SECONDS)],
                cwd=Path(__file__).parents[1],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
            )

    def _end(self) -> Exception:
        """End the process, and say why it ended if it has done so by itself."""
        assert self._process is not None
        self._connection.close()  # which ends it
        code = self._process.wait()
        self._process = None
        if code == -signal.SIGPROF:
            return ValueError(f"takes more than {DECODE_SECONDS:g} s to decode")
        if code < 0:
            return ValueError(f"crashes its decoder ({signal.Signals(-code).name})")
        return RuntimeError(f"the process that decodes images ended with exit code {code}")


_DECODERS = _Decoders()


def _serve(connection: Connection, seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever C code it is in
    while True:
        data = connection.recv_bytes()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            decoded = read(data)
        except Exception as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(json.dumps({"error": str(error) or type(error).__name__}).encode())
            continue
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply = {"size": decoded.size, "kept": decoded.image.size, "notes": decoded.notes}
        connection.send_bytes(json.dumps(reply).encode())
        connection.send_bytes(decoded.image.tobytes())


def read(data: bytes) -> Decoded:
    """Decode in this process, without a time limit; else as `decode`."""
    try:
        image, size, notes = _load(data)
    except UnidentifiedImageError:
        raise ValueError(f"not one of {', '.join(FORMATS)}; save it as PNG or JPEG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"too large: {error}; scale it down") from None
    # decoders raise whatever a broken file leads them to: OSError, SyntaxError, struct.error, IndexError ...
    except Exception as error:
        raise ValueError(f"not a whole image: {str(error) or type(error).__name__}") from None
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no agreed white; save it with 8 or 16 bits a channel")
    rgb, profile_note = _on_white(image)
    if rgb.width * rgb.height > KEPT_PIXELS:
        share = math.sqrt(KEPT_PIXELS / (rgb.width * rgb.height))
        kept = (max(1, int(rgb.width * share)), max(1, int(rgb.height * share)))
        rgb = rgb.resize(kept, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return Decoded(rgb, size, notes + profile_note)


def _load(data: bytes) -> tuple[Image.Image, tuple[int, int], list[str]]:
    """The first frame, upright, with 8 bits a channel where the file has 16; its size; notes."""
    notes = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        source = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = source.size
        if width * height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
        image = ImageOps.exif_transpose(source)
        # the second picture in a phone's JPEG (MPO) is a preview or a depth map, nothing to tell anyone
        frames = 1 if source.format == "MPO" else getattr(source, "n_frames", 1)
        if frames > 1:
            notes.append(f"the first of {frames} frames is used")
        if image.mode.startswith("I;16"):
            white_is_zero = isinstance(source, TiffImagePlugin.TiffImageFile) and source.tag_v2.get(262) == 0
            image = _eight_bit(image, white_is_zero)
    return image, image.size, notes


def _eight_bit(image: Image.Image, white_is_zero: bool) -> Image.Image:
    """16-bit grey as "L", info kept. Pillow's own conversion cuts off at 255 instead of scaling."""
    values = np.asarray(image).astype(np.float32) / 257
    grey = Image.fromarray((255 - values if white_is_zero else values).round().astype(np.uint8))
    # not `transparency`: it is a 16-bit value
    grey.info = {k: v for k, v in image.info.items() if k != "transparency"}
    return grey


def _on_white(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Any 8-bit mode -> RGB in sRGB, composited on white; and what was ignored of the colour profile."""
    kind = "CMYK" if image.mode == "CMYK" else "GRAY" if image.mode in ("1", "L", "LA", "La") else "RGB"
    profile, alpha, notes = image.info.get("icc_profile"), None, []
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            if space != kind and (kind, space) != ("GRAY", "RGB"):
                raise ValueError(f"it is for {space}, the image is {kind}")
            mode = "L" if space == "GRAY" else space
            image = ImageCms.profileToProfile(image.convert(mode), source, _SRGB, outputMode="RGB") or image
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            notes.append(f"the colour profile is ignored: {error}")
    image = image.convert("RGB")
    if alpha is not None:
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        image = white
    image.info.clear()
    return image, notes


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError):  # the process that asks has ended
        _serve(Connection(0), float(sys.argv[1]))
