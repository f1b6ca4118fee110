"""A concept's images, read as people expect them to look: upright, in sRGB, on white. What cannot be used is named."""

from __future__ import annotations

import glob
import hashlib
import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

MIN_SIDE = 32
"""Images with a shorter side (pixels) are refused."""

MAX_PIXELS = 80_000_000
"""Images with more pixels are refused by their header. A little under Pillow's own limit (89 million)."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
"""The only decoders used: others of Pillow's start programs (EPS) or exist for files nobody trains on."""

READABLE = (".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
# not readable here, but people mean them as images: named instead of ignored
CLAIMED = (".heic", ".heif", ".jxl", ".svg", ".psd", ".ppm", ".pgm", ".tga", ".ico", ".dng", ".cr2", ".nef", ".arw")
SUFFIXES = frozenset(READABLE + CLAIMED)
"""Suffixes (lower case) of files that claim to be images."""

_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@dataclass
class ConceptImages:
    """Usable images; the first three lists run in parallel.

    `digests` are the sha256 of the files' bytes in hex. `notes` say what a user may not expect of an image that is
    used (or is there twice), `rejected` which file is not used and why; both as `"<path>: <text>"`.
    """

    images: list[Image.Image] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)


def list_images(paths: list[str] | str) -> list[Path]:
    """The image files at some places, each once, in the order of the places and sorted within one.

    Args:
        paths: folders (their image files, not those of subfolders), files (whatever their suffix) and glob patterns
            (`**` crosses folders); `~` is expanded.

    Raises:
        ValueError: where a place has no image; it names the place.
    """
    found: dict[Path, None] = {}
    for place in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(place).expanduser()
        if path.is_file():
            found[path] = None
            continue
        # leaves out hidden files, among them the `._*.jpg` that macOS puts on foreign disks
        matches = glob.glob(f"{glob.escape(str(path))}/*" if path.is_dir() else str(path), recursive=True)
        files = [p for p in map(Path, sorted(matches)) if p.is_file()]
        images = [p for p in files if p.suffix.lower() in SUFFIXES]
        if not images:
            if path.is_dir() or files:
                what = f"no image among {len(files)} files" if files else "the folder holds no files"
            else:
                what = "no such file or folder, and no file matches it as a pattern"
            raise ValueError(
                f"no images at {str(place)!r}: {what}. Give a folder, a file or a pattern like 'cat/*.jpg'."
            )
        found |= dict.fromkeys(images)
    if not found:
        raise ValueError("no images: the list of places is empty. Give a folder, a file or a pattern like 'cat/*.jpg'.")
    return list(found)


def load_images(paths: list[str] | str) -> ConceptImages:
    """Load the images at some places (see `list_images`) as RGB, upright, in sRGB, transparent parts white.

    Of an animation the first frame is taken; an image whose pixels came before is left out and noted.

    Raises:
        ValueError: when a place has no image, or none can be used; it names every file with its reason.
    """
    loaded = ConceptImages()
    seen: dict[str, Path] = {}
    for path in list_images(paths):
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                image, notes = _read(file)
        except UnidentifiedImageError:
            unknown = f"not one of {', '.join(FORMATS)}; save it as PNG or JPEG"
            loaded.rejected.append(f"{path}: {unknown if path.stat().st_size else 'empty file'}")
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            loaded.rejected.append(f"{path}: too large: {error}; scale it down")
        # decoders raise whatever a broken file leads them to: OSError, SyntaxError, struct.error, IndexError ...
        except Exception as error:
            loaded.rejected.append(f"{path}: cannot be used: {str(error) or type(error).__name__}")
        else:
            pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
            if pixels in seen:
                loaded.notes.append(f"{path}: the same picture as {seen[pixels]}, used once")
                continue
            seen[pixels] = path
            loaded.images.append(image)
            loaded.paths.append(path)
            loaded.digests.append(digest)
            loaded.notes += [f"{path}: {note}" for note in notes]
    if not loaded.images:
        raise ValueError("none of the images can be used:\n" + "\n".join(f"  {line}" for line in loaded.rejected))
    return loaded


def _read(file: BinaryIO) -> tuple[Image.Image, list[str]]:
    notes = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        source = Image.open(file, formats=FORMATS)
        width, height = source.size
        if width * height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{width} x {height} pixels exceed the limit of {MAX_PIXELS}")
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"{width} x {height} pixels, a side of at least {MIN_SIDE} is needed")
        image = ImageOps.exif_transpose(source)
        # the second picture in a phone's JPEG (MPO) is a preview or a depth map, nothing to tell anyone
        frames = 1 if source.format == "MPO" else getattr(source, "n_frames", 1)
        if frames > 1:
            notes.append(f"the first of {frames} frames is used")
        if image.mode.startswith("I;16"):
            white_is_zero = isinstance(source, TiffImagePlugin.TiffImageFile) and source.tag_v2.get(262) == 0
            image = _eight_bit(image, white_is_zero)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no agreed white; save it with 8 or 16 bits a channel")
    rgb, profile_note = _on_white(image)
    return rgb, notes + profile_note


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
