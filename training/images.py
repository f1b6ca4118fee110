"""A concept's images, read as people expect them to look: upright, in sRGB, on white. What cannot be used is named."""

from __future__ import annotations

import glob
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from retrieval.decoding import decode, read_file

MIN_SIDE = 32
"""Images with a shorter side (pixels) are refused."""

READABLE = (".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
# not readable here, but people mean them as images: named instead of ignored
CLAIMED = (".heic", ".heif", ".jxl", ".svg", ".psd", ".ppm", ".pgm", ".tga", ".ico", ".dng", ".cr2", ".nef", ".arw")
SUFFIXES = frozenset(READABLE + CLAIMED)
"""Suffixes (lower case) of files that claim to be images."""


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
        # with links that lead nowhere: to be named as images that cannot be read
        entries = [p for p in map(Path, sorted(matches)) if not p.is_dir()]
        images = [p for p in entries if p.suffix.lower() in SUFFIXES]
        if not images:
            if not matches and not path.is_dir():
                what = "no such file or folder, and no file matches it as a pattern"
            else:
                what = f"no image among {len(entries)} files" if entries else "the folder holds no files"
                if folders := len(matches) - len(entries):
                    what += f", and its {folders} folders are not searched (a pattern like 'cat/**/*' searches them)"
            raise ValueError(
                f"no images at {str(place)!r}: {what}. Give a folder, a file or a pattern like 'cat/*.jpg'."
            )
        found |= dict.fromkeys(images)
    if not found:
        raise ValueError("no images: the list of places is empty. Give a folder, a file or a pattern like 'cat/*.jpg'.")
    return list(found)


def load_images(paths: list[str] | str) -> ConceptImages:
    """Load the images at some places (see `list_images`) as RGB, upright, in sRGB, transparent parts white.

    Of an animation the first frame is taken, large images are reduced (`retrieval.decoding`); an image whose pixels
    came before is left out and noted.

    Raises:
        ValueError: when a place has no image, or none can be used; it names every file with its reason.
    """
    loaded = ConceptImages()
    seen: dict[str, Path] = {}
    for path in list_images(paths):
        try:
            data = read_file(path)
            decoded = decode(data)
            if min(decoded.size) < MIN_SIDE:
                width, height = decoded.size
                raise ValueError(f"{width} x {height} pixels, a side of at least {MIN_SIDE} is needed")
        except ValueError as error:
            loaded.rejected.append(f"{path}: {error}")
        except OSError as error:
            why = "a link that leads nowhere" if path.is_symlink() and not path.exists() else error.strerror
            loaded.rejected.append(f"{path}: cannot be read: {why}")
        else:
            image = decoded.image
            pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
            if pixels in seen:
                loaded.notes.append(f"{path}: the same picture as {seen[pixels]}, used once")
                continue
            seen[pixels] = path
            loaded.images.append(image)
            loaded.paths.append(path)
            loaded.digests.append(hashlib.sha256(data).hexdigest())
            loaded.notes += [f"{path}: {note}" for note in decoded.notes]
    if not loaded.images:
        raise ValueError("none of the images can be used:\n" + "\n".join(f"  {line}" for line in loaded.rejected))
    return loaded
