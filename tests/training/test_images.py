"""Every kind of file a user may put among a concept's images."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from training import images as module
from training.images import list_images, load_images

SIDE = 48


def photo(seed: int = 0) -> Image.Image:
    """A smooth RGB picture, red to the right, green downwards."""
    ramp = np.linspace(20, 220, SIDE).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (SIDE, 1)), np.tile(ramp[:, None], (1, SIDE)), np.full((SIDE, SIDE), seed)], 2)
    return Image.fromarray(pixels.astype(np.uint8))


def only(path: Path) -> np.ndarray:
    """The one image of a file, as a (H, W, 3) array."""
    loaded = load_images(str(path))
    assert loaded.rejected == [] and len(loaded.images) == 1 and loaded.images[0].mode == "RGB"
    return np.asarray(loaded.images[0])


def reason(folder: Path, name: str) -> str:
    """Why a file of a folder that also has a good image is rejected."""
    photo().save(folder / "good.png")
    loaded = load_images(str(folder))
    assert [p.name for p in loaded.paths] == ["good.png"]
    assert len(loaded.rejected) == 1 and loaded.rejected[0].startswith(f"{folder / name}: ")
    return loaded.rejected[0]


# --- colour profiles, built by hand: no machine has to have them ---------------------------------------


def icc(kind: bytes, space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ") -> bytes:
    table, body, offset = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"\0" * 4, 0x02400000, kind, space, pcs)
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def curve(gamma: float) -> bytes:
    return b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256))


def rgb_profile() -> bytes:
    """Adobe RGB (1998): wider than sRGB, gamma 2.2."""
    primaries = {b"rXYZ": (0.60974, 0.31111, 0.01947), b"gXYZ": (0.20528, 0.62567, 0.06087)}
    primaries |= {b"bXYZ": (0.14919, 0.06322, 0.74457), b"wtpt": (0.9642, 1.0, 0.8249)}
    tags = {k: b"XYZ " + struct.pack(">I3i", 0, *(round(x * 65536) for x in v)) for k, v in primaries.items()}
    return icc(b"mntr", b"RGB ", tags | {name: curve(2.2) for name in (b"rTRC", b"gTRC", b"bTRC")})


def grey_profile(gamma: float) -> bytes:
    white = b"XYZ " + struct.pack(">I3i", 0, 63190, 65536, 54061)
    return icc(b"mntr", b"GRAY", {b"wtpt": white, b"kTRC": curve(gamma)})


def cmyk_profile() -> bytes:
    """A press whose cyan ink prints a strong red (Lab 53, 80, 67), black prints black, the others nothing."""
    ramp = bytes(range(256))
    white, red, black = bytes([255, 128, 128]), bytes([135, 208, 195]), bytes([0, 128, 128])
    grid = (white + black) * 4 + (red + black) * 4  # the first ink varies slowest
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1" + b"\0" * 4 + bytes([4, 3, 2, 0]) + identity + ramp * 4 + grid + ramp * 3
    return icc(b"prtr", b"CMYK", {b"A2B0": lut}, pcs=b"Lab ")


# --- what is found -------------------------------------------------------------------------------------


def test_folder_file_and_pattern(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(["b.JPG", "a.png", "notes.txt", "._a.png", "sub/c.webp", "cat[1].png"]):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image")
        else:
            photo(i).save(tmp_path / name, format="PNG")
    folder = str(tmp_path)
    names = ["a.png", "b.JPG", "cat[1].png"]
    assert [p.name for p in list_images(folder)] == names
    assert [p.name for p in list_images(f"{folder}/**/*")] == [*names, "c.webp"]
    assert [p.name for p in list_images([f"{folder}/sub", f"{folder}/cat[1].png", f"{folder}/sub/c.webp"])] == [
        "c.webp",
        "cat[1].png",
    ]
    # a file that is named is taken whatever its suffix
    assert list_images(f"{folder}/notes.txt") == [tmp_path / "notes.txt"]


def test_folders_and_dead_links_are_said(tmp_path: Path) -> None:
    for name in ("winter", "summer"):
        (tmp_path / "cat" / name).mkdir(parents=True)
        photo().save(tmp_path / "cat" / name / "a.png")
    with pytest.raises(
        ValueError, match=r"its 2 folders are not searched \(a pattern like 'cat/\*\*/\*' searches them"
    ):
        list_images(str(tmp_path / "cat"))
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(ValueError, match=r"gone\.jpg: cannot be read: a link that leads nowhere"):
        load_images(str(tmp_path))
    assert "a link that leads nowhere" in reason(tmp_path, "gone.jpg")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "linked.png").symlink_to("pipe.png")
    for place in (tmp_path, tmp_path / "pipe.png", tmp_path / "linked.png"):
        with pytest.raises(ValueError, match=r".png: not a regular file"):
            load_images(str(place))
    photo().save(tmp_path / "a.png")
    assert [path.name for path in load_images(str(tmp_path)).paths] == ["a.png"]


def test_nothing_found_names_the_place(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    for place, what in [("missing", "no such file"), ("*.jpg", "no such file"), ("empty", "holds no files")]:
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=what) as error:
            list_images([str(tmp_path), str(tmp_path / place)])
        assert str(tmp_path / place) in str(error.value)
    (tmp_path / "empty" / "readme.md").write_text("")
    with pytest.raises(ValueError, match="no image among 1 files"):
        list_images(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="list of places is empty"):
        list_images([])


def test_digest_is_of_the_file(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    assert load_images(str(tmp_path)).digests == [hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()]


def test_duplicates_are_used_once_and_noted(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    photo().save(tmp_path / "b.png")
    photo().save(tmp_path / "c.bmp")  # other bytes, same pixels
    photo(9).save(tmp_path / "d.png")
    loaded = load_images(str(tmp_path))
    assert [p.name for p in loaded.paths] == ["a.png", "d.png"] and loaded.rejected == []
    assert loaded.notes == [
        f"{tmp_path / name}: the same picture as {tmp_path / 'a.png'}, used once" for name in ("b.png", "c.bmp")
    ]


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"half.{suffix}"
    photo().save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reason(tmp_path, path.name)


def test_corrupt_data(tmp_path: Path) -> None:
    photo().save(tmp_path / "bad.png")
    data = bytearray((tmp_path / "bad.png").read_bytes())
    data[80:120] = b"\xff" * 40
    (tmp_path / "bad.png").write_bytes(data)
    assert "not a whole image" in reason(tmp_path, "bad.png")


def test_not_an_image_though_it_claims_to_be(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "notes.txt").write_text("ignored")
    assert "save it as PNG or JPEG" in reason(tmp_path, "page.jpg")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert reason(tmp_path, "empty.png").endswith("empty file")


def test_postscript_in_disguise_starts_no_ghostscript(tmp_path: Path) -> None:
    photo().save(tmp_path / "script.png", format="EPS")
    assert "not one of" in reason(tmp_path, "script.png")


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])  # over our limit, Pillow's warning, Pillow's error
def test_decompression_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    assert "too large" in reason(tmp_path, "bomb.png")


def test_very_small(tmp_path: Path) -> None:
    photo().crop((0, 0, SIDE, module.MIN_SIDE - 1)).save(tmp_path / "strip.png")
    assert "48 x 31 pixels" in reason(tmp_path, "strip.png")
    photo().crop((0, 0, SIDE, module.MIN_SIDE)).save(tmp_path / "strip.png")
    assert len(load_images(str(tmp_path)).images) == 2


def test_float_pixels(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).random((SIDE, SIDE), np.float32)).save(tmp_path / "hdr.tif")
    assert "8 or 16 bits" in reason(tmp_path, "hdr.tif")


def test_none_usable_lists_each_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no")
    photo().resize((8, 8)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"none of the images can be used") as error:
        load_images(str(tmp_path))
    assert str(tmp_path / "a.jpg") in str(error.value) and "8 x 8 pixels" in str(error.value)


# --- what is read as it is -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", module.READABLE)
def test_readable_formats(tmp_path: Path, suffix: str) -> None:
    kind = {".apng": "PNG", ".jfif": "JPEG"}.get(suffix)
    photo().save(tmp_path / f"a{suffix}", format=kind, quality=95)
    # the palette of a GIF and the block codes are lossy
    assert np.abs(only(tmp_path / f"a{suffix}").astype(int) - np.asarray(photo())).mean() < 8


def test_second_picture_of_a_phone_is_passed_over_silently(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[photo(200)], quality=95)
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    assert np.abs(only(tmp_path / "a.jpg").astype(int) - np.asarray(photo())).mean() < 8
    assert load_images(str(tmp_path)).notes == []


# --- what is converted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    frames = [Image.new("RGB", (SIDE, SIDE), c) for c in ("red", "lime", "blue")]
    extra = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **extra)
    assert (only(path) == (255, 0, 0)).all()
    assert load_images(str(path)).notes == [f"{path}: the first of 3 frames is used"]


def test_cmyk_without_profile(tmp_path: Path) -> None:
    Image.new("CMYK", (SIDE, SIDE), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(only(tmp_path / "a.jpg").astype(int) - (0, 255, 255)).max() <= 2


def test_cmyk_with_profile(tmp_path: Path) -> None:
    Image.new("CMYK", (SIDE, SIDE), (255, 0, 0, 0)).save(tmp_path / "a.tif", icc_profile=cmyk_profile())
    red, green, blue = only(tmp_path / "a.tif")[0, 0]
    assert red > 245 and green < 40 and blue < 40


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert (only(tmp_path / f"a.{suffix}") == np.round(values / 257)[..., None]).all()


def test_sixteen_bit_grey_with_inverted_scale(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    saved = np.asarray(Image.open(tmp_path / "a.tif"))
    assert (only(tmp_path / "a.tif") == np.round((65535 - saved) / 257)[..., None]).all()


def test_sixteen_bit_rgb_is_scaled(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    values = np.asarray(photo()).astype(np.uint16) * 257
    for name in ("a.png", "a.tif"):
        cv2.imwrite(str(tmp_path / name), values[..., ::-1])
        assert (only(tmp_path / name) == np.asarray(photo())).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_rotation(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = photo().crop((0, 0, SIDE, 40))
    stored = upright.rotate({3: 180, 6: 90}[orientation], expand=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif, quality=100, lossless=True)
    pixels = only(tmp_path / f"a.{suffix}")
    assert pixels.shape == (40, SIDE, 3)
    assert np.abs(pixels.astype(int) - np.asarray(upright)).max() < 16


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    colour = np.zeros((SIDE, SIDE, 4), np.uint8)
    colour[:, :16] = (0, 200, 0, 255)
    colour[:, 16:32] = (0, 200, 0, 51)  # a fifth
    colour[:, 32:] = (255, 0, 0, 0)  # the colour of what is transparent must not show
    for name in ("a.png", "a.webp", "a.tif"):
        Image.fromarray(colour).save(tmp_path / name, lossless=True)
        pixels = only(tmp_path / name)
        assert (pixels[:, :16] == (0, 200, 0)).all()
        assert (pixels[:, 16:32] == (204, 244, 204)).all()
        assert (pixels[:, 32:] == 255).all()


def test_premultiplied_alpha(tmp_path: Path) -> None:
    stored = Image.new("RGBA", (SIDE, SIDE), (0, 40, 0, 51))  # (0, 200, 0) at a fifth, multiplied already
    stored.save(tmp_path / "a.tif")
    # Pillow writes only "unassociated" (2) into the ExtraSamples entry
    entry = struct.pack("<HHI", 338, 3, 1)
    data = (tmp_path / "a.tif").read_bytes().replace(entry + b"\2", entry + b"\1")
    (tmp_path / "a.tif").write_bytes(data)
    assert Image.open(tmp_path / "a.tif").tag_v2[338] == (1,)
    assert np.abs(only(tmp_path / "a.tif").astype(int) - (204, 244, 204)).max() <= 1


def test_grey_with_alpha(tmp_path: Path) -> None:
    Image.new("LA", (SIDE, SIDE), (0, 51)).save(tmp_path / "a.png")
    assert (only(tmp_path / "a.png") == 204).all()


def test_palette(tmp_path: Path) -> None:
    picture = Image.new("P", (SIDE, SIDE), 1)
    picture.putpalette([0, 0, 0, 10, 120, 230, 255, 0, 0])
    picture.paste(2, (0, 0, 24, SIDE))
    picture.save(tmp_path / "a.png", transparency=2)
    pixels = only(tmp_path / "a.png")
    assert (pixels[:, 24:] == (10, 120, 230)).all() and (pixels[:, :24] == 255).all()


def test_greyscale(tmp_path: Path) -> None:
    photo().getchannel("R").save(tmp_path / "a.png")
    assert (only(tmp_path / "a.png") == np.asarray(photo())[..., :1]).all()


def test_wide_gamut_becomes_srgb(tmp_path: Path) -> None:
    """Expected: Adobe RGB -> XYZ (D50) -> sRGB by the published matrices, evaluated here."""
    adobe = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
    srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    values = np.array([120, 150, 100])
    linear = np.linalg.solve(srgb, adobe @ (values / 255) ** (round(2.2 * 256) / 256))
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    for alpha in ((), (255,)):
        Image.new("RGBA" if alpha else "RGB", (SIDE, SIDE), (*values, *alpha)).save(
            tmp_path / "a.png", icc_profile=rgb_profile()
        )
        pixel = only(tmp_path / "a.png")[0, 0]
        assert np.abs(pixel - expected).max() <= 1.5 and np.abs(pixel - values).max() > 10


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_with_grey_profile(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (SIDE, SIDE), 128 if mode == "L" else (128, 255)).save(
        tmp_path / "a.png", icc_profile=grey_profile(1.0)
    )
    # half of the light is 188 in sRGB
    assert np.abs(only(tmp_path / "a.png").astype(int) - 188).max() <= 2


def test_grey_with_rgb_profile(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("L", (SIDE, SIDE), 100).save(tmp_path / "a.png", icc_profile=profile)
    assert np.abs(only(tmp_path / "a.png").astype(int) - 100).max() <= 1
    assert load_images(str(tmp_path)).notes == []


@pytest.mark.parametrize(
    ("profile", "why"), [(b"nonsense", "colour profile is ignored"), (grey_profile(1.0), "it is for GRAY")]
)
def test_unusable_profile_is_ignored_and_noted(tmp_path: Path, profile: bytes, why: str) -> None:
    photo().save(tmp_path / "a.png", icc_profile=profile)
    assert (only(tmp_path / "a.png") == np.asarray(photo())).all()
    assert why in load_images(str(tmp_path)).notes[0]
