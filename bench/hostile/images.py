"""Images of a concept, and of strangers: broken, wrongly named, huge, slow; and the places that name them."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from hostile.case import Case, Check, Seen, accepted, words, write
from hostile.common import encoded, picture, png


def load(*places: str):
    from training.images import load_images

    return load_images(list(places) or ["photos"])


def beside(name: str, file: str, content: bytes | Callable[[], bytes] | None, *, prepare=lambda: None) -> Case:
    """An image that cannot be used beside one that can: the other is used, this one named."""

    def give():
        write(**{"photos/good.png": encoded(picture(1))})
        if content is not None:
            write(**{f"photos/{file}": content() if callable(content) else content})
        prepare()
        return load

    def named(seen: Seen) -> bool:
        told = "\n".join([*seen.result.rejected, *seen.result.notes])
        return len(seen.result.images) == 1 and Path(file).name in told

    return Case(name, give, right=named)


def used(
    name: str, file: str, content: bytes | Callable[[], bytes], check: Callable[[Image.Image], object] = lambda _: True
) -> Case:
    """An image that is odd but whole: it is used, as RGB. check: of the image."""

    def give():
        write(**{f"photos/{file}": content() if callable(content) else content})
        return load

    def right(seen: Seen) -> bool:
        (image,) = seen.result.images
        return image.mode == "RGB" and bool(check(image))

    return Case(name, give, right=right)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(
    width: int, height: int, *, depth: int = 8, colour: int = 2, data: bytes | None = None, extra: bytes = b""
) -> bytes:
    """A PNG by hand. data: of its pixels, unpacked; zeros when None."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = zlib.compress(bytes(height * (1 + width * 3)) if data is None else data, 9)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def large_png(width: int, height: int) -> bytes:
    """Of one colour, a bit a pixel: tiny as a file."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row * 100) for _ in range(height // 100)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def slow_jpeg(scans: int) -> bytes:
    """A progressive JPEG of 4 000 x 4 000 pixels whose last scan comes again and again: each is a pass over all."""
    data = io.BytesIO()
    Image.new("L", (4000, 4000), 128).save(data, "JPEG", progressive=True, quality=50)
    whole = data.getvalue()
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + whole[-2:]


def turned(orientation: int) -> bytes:
    """Red on top as it should look, stored as EXIF's orientation says."""
    image = Image.new("RGB", (64, 48), "blue")
    image.paste("red", (0, 0, 64, 24))
    image.putpixel((0, 0), (0, 255, 0))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = image.transpose(Image.Transpose(back[orientation])) if orientation in back else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, "PNG", exif=exif)


def _upright(image: Image.Image) -> bool:
    return image.size == (64, 48) and image.getpixel((32, 5)) == (255, 0, 0) and image.getpixel((0, 0)) == (0, 255, 0)


def gif(frames: int) -> bytes:
    images = [Image.new("P", (40, 40), i % 256) for i in range(frames)]
    data = io.BytesIO()
    images[0].save(data, "GIF", save_all=True, append_images=images[1:])
    return data.getvalue()


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 100 100
%%EndComments
(executed) (w) file closefile
showpage
"""
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="100" height="100"><image href="file:///etc/passwd"/></svg>'
WHOLE = encoded(picture(2), "PNG")
JPEG = encoded(picture(2), "JPEG", quality=95)
WEBP = encoded(picture(2), "WEBP")
GIF = encoded(picture(2), "GIF")
TIFF = encoded(picture(2), "TIFF")
BMP = encoded(picture(2), "BMP")


def loop_tiff() -> bytes:
    """Its directory names itself as the next one."""
    entries = [
        (256, 3, 1, 64),
        (257, 3, 1, 64),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 200),
        (277, 3, 1, 1),
        (278, 3, 1, 64),
        (279, 4, 1, 4096),
    ]
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + struct.pack("<I", 8)
    return (b"II*\0" + struct.pack("<I", 8) + body).ljust(200, b"\0") + bytes(4096)


BROKEN = [
    beside(f"{what} as {file}", file, content)
    for what, file, content in (
        ("nothing", "a.png", b""),
        ("one byte", "a.jpg", b"\xff"),
        ("text", "a.png", b"hello\n"),
        ("a web page", "a.jpg", b"<!doctype html><html>404</html>"),
        ("zeros", "a.webp", bytes(5000)),
        ("a PNG's signature", "a.png", WHOLE[:8]),
        ("half a PNG", "a.png", WHOLE[: len(WHOLE) // 2]),
        ("a PNG's header", "a.png", WHOLE[:40]),
        ("half a JPEG", "a.jpg", JPEG[: len(JPEG) // 2]),
        ("half a WebP", "a.webp", WEBP[: len(WEBP) // 2]),
        ("half a GIF", "a.gif", GIF[: len(GIF) // 3]),
        ("half a TIFF", "a.tif", TIFF[: len(TIFF) // 2]),
        ("half a BMP", "a.bmp", BMP[: len(BMP) // 2]),
        ("a PNG with a wrong checksum", "a.png", WHOLE[:60] + b"xxxx" + WHOLE[64:]),
        ("a PNG of 100 000 x 100 000", "a.png", raw_png(100_000, 100_000, data=b"x")),
        ("a PNG of 2^31 pixels a side", "a.png", raw_png(2**31 - 1, 2**31 - 1, data=b"x")),
        ("a PNG of no width", "a.png", raw_png(0, 64, data=b"")),
        ("a PNG of 1 x 1", "a.png", png(size=(1, 1))),
        ("a PNG of 31 x 500", "a.png", png(size=(31, 500))),
        ("a PNG of 20 000 x 1", "a.png", png(size=(20_000, 1))),
        ("EPS", "a.png", EPS),
        ("EPS", "a.jpg", EPS),
        ("SVG", "a.svg", SVG),
        ("SVG", "a.png", SVG),
        ("PDF", "a.jpg", b"%PDF-1.4\n%%EOF"),
        ("Photoshop's", "a.psd", b"8BPS\0\1" + bytes(200)),
        ("HEIC's header", "a.heic", b"\0\0\0\x18ftypheic" + bytes(200)),
        ("AVIF's header", "a.avif", b"\0\0\0\x18ftypavif" + bytes(200)),
        ("JPEG XL", "a.jxl", b"\xff\x0a" + bytes(200)),
        ("an icon", "a.ico", encoded(picture(3).convert("RGBA"), "ICO")),
        ("PPM", "a.ppm", encoded(picture(3), "PPM")),
        ("a raw photo", "a.dng", b"II*\0" + bytes(500)),
        ("a zip archive", "a.jpg", b"PK\x03\x04" + bytes(200)),
        ("a script", "a.png", b"#!/bin/sh\ntouch executed\n"),
        ("a pickle", "a.png", b"cos\nsystem\n(S'touch executed'\ntR."),
        ("32-bit grey", "a.tif", lambda: encoded(Image.fromarray(np.ones((64, 64), np.float32)), "TIFF")),
    )
]
LARGE = [
    beside("a PNG of 81 megapixels in 10 kB", "a.png", lambda: large_png(9000, 9000)),
    beside("a WebP of 16 383 x 16 383", "a.webp", lambda: _declared_webp()),
    beside("a GIF of 65 535 x 65 535", "a.gif", lambda: GIF[:6] + b"\xff\xff\xff\xff" + GIF[10:]),
    beside("a BMP of 2^31 a side", "a.bmp", lambda: BMP[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + BMP[26:]),
    beside("a TIFF of 10^9 strips", "a.tif", lambda: _many_strips()),
    Case(
        "five PNGs of 79 megapixels, 93 kB each",
        lambda: _large(5),
        right=lambda s: len(s.result.images) + len(s.result.rejected) + len(s.result.notes) >= 5,
    ),
    Case("twenty photos of 24 megapixels", lambda: _photos(20), right=lambda s: len(s.result.images) == 20, seconds=40),
    Case(
        "a GIF of 3 000 frames",
        lambda: (write(**{"photos/a.gif": gif(3000)}), load)[1],
        right=lambda s: len(s.result.images) == 1,
    ),
    beside("a progressive JPEG of 3 000 scans", "a.jpg", lambda: slow_jpeg(3000)),
    beside(
        "a PNG with 500 MB of packed text",
        "a.png",
        lambda: raw_png(64, 64, data=b"x", extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(500_000_000), 9))),
    ),
    beside(
        "a PNG with a packed profile of 500 MB",
        "a.png",
        lambda: raw_png(64, 64, extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(500_000_000), 9))),
    ),
    used(
        "a JPEG with 60 kB of EXIF",
        "a.jpg",
        lambda: JPEG[:2] + b"\xff\xe1" + struct.pack(">H", 60_002) + b"Exif\0\0" + bytes(59_994) + JPEG[2:],
    ),
    used("a TIFF whose directory names itself", "a.tif", loop_tiff),
]


def _declared_webp() -> bytes:
    data = encoded(picture(4), "WEBP", lossless=True)
    place = data.index(b"VP8L") + 9
    return data[:place] + struct.pack("<I", 16382 | 16382 << 14) + data[place + 4 :]


def _many_strips() -> bytes:
    place = (
        TIFF.rindex(struct.pack("<HH", 273, 4))
        if struct.pack("<HH", 273, 4) in TIFF
        else TIFF.rindex(struct.pack("<H", 273))
    )
    return TIFF[: place + 4] + struct.pack("<I", 10**9) + TIFF[place + 8 :]


def _large(count: int):
    for i in range(count):
        write(**{f"photos/{i}.png": large_png(8880 - 8 * i, 8900)})
    return load


def _photos(count: int):
    for i in range(count):
        write(**{f"photos/{i}.jpg": encoded(picture(i, (6000, 4000)), "JPEG", quality=60)})
    return load


def _profile(space: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


ODD = [
    *(used(f"EXIF's orientation {n}", "a.png", lambda n=n: turned(n), _upright) for n in range(1, 9)),
    used("EXIF's orientation 9", "a.png", lambda: turned(9)),
    used("EXIF that is junk", "a.jpg", lambda: JPEG[:2] + b"\xff\xe1\x00\x10Exif\0\0" + b"\xff" * 8 + JPEG[2:]),
    used(
        "CMYK",
        "a.jpg",
        lambda: encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=100),
        lambda i: i.getpixel((9, 9))[0] > 200,
    ),
    used(
        "one bit",
        "a.png",
        lambda: encoded(Image.new("1", (64, 64), 1)),
        lambda i: i.getpixel((9, 9)) == (255, 255, 255),
    ),
    used(
        "16-bit grey",
        "a.png",
        lambda: encoded(Image.fromarray(np.full((64, 64), 32896, np.uint16))),
        lambda i: 120 < i.getpixel((9, 9))[0] < 136,
    ),
    used(
        "16-bit TIFF",
        "a.tif",
        lambda: encoded(Image.fromarray(np.full((64, 64), 32896, np.uint16)), "TIFF"),
        lambda i: 120 < i.getpixel((9, 9))[0] < 136,
    ),
    used(
        "all transparent",
        "a.png",
        lambda: encoded(Image.new("RGBA", (64, 64), (255, 0, 0, 0))),
        lambda i: i.getpixel((9, 9)) == (255, 255, 255),
    ),
    used(
        "grey with transparency",
        "a.png",
        lambda: encoded(Image.new("LA", (64, 64), (0, 0))),
        lambda i: i.getpixel((9, 9)) == (255, 255, 255),
    ),
    used(
        "a palette with a transparent colour",
        "a.png",
        lambda: encoded(Image.new("P", (64, 64), 0), transparency=0),
        lambda i: i.getpixel((9, 9)) == (255, 255, 255),
    ),
    used("a profile that is junk", "a.jpg", lambda: encoded(picture(2), "JPEG", icc_profile=b"junk" * 50)),
    used("a profile of another space", "a.jpg", lambda: encoded(picture(2), "JPEG", icc_profile=_profile("LAB"))),
    used("a JPEG named .png", "a.png", JPEG),
    used("a suffix in capitals", "A.JPEG", JPEG),
    used(
        "a picture of two in a phone's file",
        "a.jpg",
        lambda: encoded(picture(2), "MPO", save_all=True, append_images=[picture(3)]),
    ),
    used("a name with a line end", "a\nb.png", WHOLE),
    used("a name with an escape", "a\x1b[31m.png", WHOLE),
    used("a name that is not UTF-8", os.fsdecode(b"a\xff.png"), WHOLE),
    used("a name with brackets and stars", "[a]*?.png", WHOLE),
    used("upside-down BMP", "a.bmp", lambda: BMP[:22] + struct.pack("<i", -80) + BMP[26:]),
]


def place(
    name: str, prepare: Callable[[], None], *places: str, refused: str | tuple[str, ...] = (), count: int | None = None
) -> Case:
    """Places of images. count: how many images are to be found there."""
    right: Check | None = None if count is None else lambda s: len(s.result.images) == count

    def give():
        prepare()
        return lambda: load(*places)

    return Case(name, give, words(refused), right)


def some(*names: str) -> Callable[[], None]:
    return lambda: write(**{name: encoded(picture(i)) for i, name in enumerate(names)})


def _fifo() -> None:
    some("photos/good.png")()
    os.mkfifo("photos/a.png")


PLACES = [
    place("no such folder", lambda: None, "gone", refused="gone"),
    place("an empty folder", lambda: os.mkdir("photos"), "photos", refused="photos"),
    place("a folder with folders only", some("photos/a/1.png"), "photos", refused=("photos", "folder")),
    place(
        "a folder with a link to nothing only",
        lambda: (os.mkdir("photos"), os.symlink("/gone", "photos/a.png")),
        "photos",
        refused=("photos", "a.png|link|dangling"),
    ),
    place("a folder with hidden files only", some("photos/.a.png", "photos/._b.jpg"), "photos", refused="photos"),
    place("a folder with texts only", lambda: write(**{"photos/a.txt": "x"}), "photos", refused="photos"),
    place("a folder named [work]", some("[work]/1.png", "[work]/2.png"), "[work]", count=2),
    place("a folder with stars", some("a*b/1.png"), "a*b", count=1),
    place("a pattern", some("a/1.png", "a/2.png", "b/3.png"), "a/*.png", count=2),
    place("a pattern in a folder named [work]", some("[work]/1.png"), "[[]work]/*.png", count=1),
    place("a pattern that matches nothing", some("a/1.png"), "b/*.png", refused="b/*.png"),
    place("a pattern that does not end", some("a/1.png"), "a/[", refused="a/["),
    place("one place twice", some("a/1.png"), "a", "a", "a/1.png", count=1),
    place("the same picture twice", lambda: write(**{"a/1.png": WHOLE, "a/2.png": WHOLE}), "a", count=1),
    place("the empty place", some("a/1.png"), "", refused="images"),
    place("a place with NUL", lambda: None, "a\0b", refused="a"),
    place("a place of 5 000 letters", lambda: None, "x" * 5000, refused="xxx"),
    place("a FIFO among the images", _fifo, "photos", count=1),
    place("a FIFO as the image", lambda: os.mkfifo("a.png"), "a.png", refused="a.png"),
    place("/dev/zero", lambda: None, "/dev/zero", refused="/dev/zero"),
    place(
        "a link to /dev/zero",
        lambda: (some("photos/good.png")(), os.symlink("/dev/zero", "photos/a.png")),
        "photos",
        count=1,
    ),
    place(
        "a link to itself", lambda: (some("photos/good.png")(), os.symlink("a.png", "photos/a.png")), "photos", count=1
    ),
    place("a folder named 1.png", lambda: (some("photos/good.png")(), os.mkdir("photos/1.png")), "photos", count=1),
    place("a URL", lambda: None, "http://127.0.0.1:9/a.png", refused="127.0.0.1:9"),
    place("an archive", lambda: write(**{"a.zip": b"PK\x03\x04"}), "a.zip", refused="a.zip"),
]


def stranger(
    name: str, content: bytes | Callable[[], bytes], refused: str | tuple[str, ...] = (), right: Check | None = None
) -> Case:
    """An image of the web. A program that draws PostScript is on the path: it is not to be started."""

    def give():
        data = content() if callable(content) else content
        write(**{"../tmp/bin/gs": "#!/bin/sh\ntouch executed\n"})
        os.chmod("../tmp/bin/gs", 0o755)
        os.environ["PATH"] = f"{Path('../tmp/bin').resolve()}:{os.environ['PATH']}"

        def decoded():
            """As a download does with what a server sent."""
            from retrieval.fetch import SquareResizer

            jpeg, *_, error = SquareResizer(64)(io.BytesIO(data))
            if error:
                raise ValueError(f"image: {error}")
            return Image.open(io.BytesIO(jpeg))

        return decoded

    return Case(f"of the web: {name}", give, words(refused), right)


STRANGERS = [
    stranger("EPS", EPS, "image"),
    stranger("nothing", b"", "image"),
    stranger("half a JPEG", JPEG[: len(JPEG) // 2], "image"),
    stranger("half a PNG", WHOLE[: len(WHOLE) // 2], "image"),
    stranger("a broken PNG", WHOLE[:60] + b"xxxx" + WHOLE[64:], "image"),
    stranger("81 megapixels", lambda: large_png(9000, 9000), "pixels|image"),
    stranger("100 000 x 100 000", raw_png(100_000, 100_000, data=b"x"), "pixels|image"),
    stranger("a progressive JPEG of 3 000 scans", lambda: slow_jpeg(3000), "image|time|seconds|scans"),
    stranger(
        "a PNG with 500 MB of packed text",
        lambda: raw_png(64, 64, data=b"x", extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(500_000_000), 9))),
        "image",
    ),
    stranger("PCX", encoded(picture(1), "PCX"), "image"),
    stranger("a TIFF whose directory names itself", loop_tiff, "image", accepted),
    stranger("WMF", b"\xd7\xcd\xc6\x9a" + bytes(40) + b"\x01\x00\x09\x00" + bytes(40), "image"),
    stranger("CMYK", encoded(Image.new("CMYK", (64, 64)), "JPEG"), (), lambda s: s.result.mode == "RGB"),
    stranger("a GIF of 1 000 frames", lambda: gif(1000), (), lambda s: s.result.mode == "RGB"),
]

CASES = [*BROKEN, *LARGE, *ODD, *PLACES, *STRANGERS]
