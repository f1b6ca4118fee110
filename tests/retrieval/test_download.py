from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback import Web, encoded, endless, picture

from retrieval import decoding
from retrieval.download import download
from retrieval.images import perceptual_hash
from retrieval.regularization import RegularizationSet

pytestmark = pytest.mark.slow  # img2dataset takes seconds to start


def sum_of(seed: int) -> str:
    return hashlib.sha256(encoded(picture(seed))).hexdigest()


def table(urls: list[str], sha256: list[str | None] | None = None) -> pa.Table:
    return pa.table(
        {
            "url": urls,
            "caption": [f"caption {number}" for number in range(len(urls))],
            "similarity": pa.array([1 - number / 100 for number in range(len(urls))], pa.float32()),
            "sha256": pa.array(sha256 or [None] * len(urls), pa.string()),
        }
    )


def statuses(found: RegularizationSet) -> list[str]:
    return pq.read_table(found.path / "samples.parquet").column("status").to_pylist()


def test_every_candidate_has_its_fate(web: Web, tmp_path: Path) -> None:
    web.pages = {"/script": encoded(picture(1005), "EPS")}
    web.statuses = {"/moved": (429, {"Retry-After": "1"})}
    web.redirects = {"/meta": "http://169.254.169.254/latest", "/moved": "/image/8.png"}
    fates = {
        "image/1.png": "success",
        "missing": "failed_to_download",
        "short": "failed_to_download",
        "drip": "failed_to_download",
        "large": "failed_to_download",
        "meta": "failed_to_download",
        "truncated": "failed_to_resize",
        "page": "failed_to_resize",
        "tiny": "failed_to_resize",
        "file:///etc/passwd": "refused",
        "http://169.254.169.254/latest": "refused",
        "http://me:word@127.0.0.1/": "refused",
        "http://[what/": "refused",
        "image/1.png?again": "duplicate",
        "image/2.png": "duplicate",
        "image/3.png": "success",
        "image/4.png": "hash_mismatch",
        "image/5.png": "blocked",
        "moved": "success",
        "script": "failed_to_resize",
        "image/ä 9.png": "success",
        "image/10.png": "blocked",
    }
    pins = [None] * len(fates)
    pins[list(fates).index("image/4.png")] = "0" * 64
    settings = {
        "count": 6,
        "image_size": 32,
        "local": True,
        "base_url": web.address,
        "exclude": [perceptual_hash(picture(2))],
        "blocked_sha256": [sum_of(5), sum_of(10).upper()],
        "timeout": 2,
        "max_bytes": 100_000,
    }
    found = download(table(list(fates), pins), tmp_path / "set", **settings)

    assert dict(zip(fates, statuses(found), strict=True)) == fates
    assert (found.asked, found.got, len(found)) == (6, 4, 4)
    assert found.statuses["refused"] == 4 and sum(found.statuses.values()) == len(fates)
    assert found.shortfall.startswith("4 of 6 images; all 22 candidates are used up (2 blocked, 2 duplicate")
    assert RegularizationSet.load(found.path) == found

    images = list(found)
    assert (
        [caption for _, caption in images]
        == found.captions()
        == ["caption 0", "caption 15", "caption 18", "caption 20"]
    )
    assert all(image.mode == "RGB" and image.size == (32, 32) for image, _ in images)
    first = next(found.samples())
    assert set(first) - {"__url__", "__local_path__"} == {"__key__", "jpg", "txt", "json"}
    assert json.loads(first["json"]) == {
        "url": "image/1.png",
        "caption": "caption 0",
        "status": "success",
        "similarity": 1.0,
        "sha256": hashlib.sha256(encoded(picture(1))).hexdigest(),
    }
    reasons = pq.read_table(found.path / "samples.parquet").column("reason").to_pylist()
    assert all(
        (reason is None) == (status == "success") for reason, status in zip(reasons, statuses(found), strict=True)
    )
    assert sorted(path.name for path in found.path.iterdir()) == ["00000.tar", "samples.parquet", "set.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]

    again = download(table(list(fates), pins), tmp_path / "again", **settings)
    for name in ("00000.tar", "set.json"):
        assert (again.path / name).read_bytes() == (found.path / name).read_bytes()


def test_an_image_that_takes_too_long_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    from retrieval.fetch import SquareResizer

    monkeypatch.setattr(decoding, "_DECODERS", decoding._Decoders())
    monkeypatch.setattr(decoding, "DECODE_SECONDS", 0.5)
    resize = SquareResizer(32)
    good, hostile = encoded(picture(1)), endless(3000)
    assert resize(io.BytesIO(hostile))[0] is None
    assert resize(io.BytesIO(hostile))[-1] == "takes more than 0.5 s to decode"
    assert resize(io.BytesIO(good))[1:] == (32, 32, 96, 80, None)


def test_asks_again_until_there_are_enough(web: Web, tmp_path: Path) -> None:
    urls = ["missing"] * 20 + [f"image/{number}.png" for number in range(30)]
    found = download(table(urls), tmp_path / "set", count=4, image_size=32, local=True, base_url=web.address + "/")
    assert found.got == 4 and found.shortfall is None
    assert found.captions() == [f"caption {number}" for number in range(20, 24)]
    assert found.statuses["surplus"] > 0
    assert len(web.asked) == sum(found.statuses.values())


def test_private_addresses_are_never_asked(web: Web, tmp_path: Path) -> None:
    urls = [f"{web.address}/image/{number}.png" for number in range(3)]
    found = download(table(urls), tmp_path / "set", count=2, image_size=32)
    assert web.asked == []
    assert statuses(found) == ["refused"] * 3
    assert found.got == 0 and "3 refused" in found.shortfall
    assert list(found) == [] and found.captions() == []


def test_several_processes(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.download.FETCH_SHARD_ROWS", 4)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    urls = [f"image/{number}.png" for number in range(8)] + ["http://169.254.169.254/"]
    found = download(
        table(urls), tmp_path / "set", count=9, image_size=32, local=True, base_url=web.address, processes=2, threads=2
    )
    assert statuses(found) == ["success"] * 8 + ["refused"]
    assert list((tmp_path / "tmp").iterdir()) == []  # of what img2dataset imports, in processes that are killed


def test_failure_of_img2dataset_is_an_error_and_leaves_nothing(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "img2dataset.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    with pytest.raises(RuntimeError, match=r"made nothing and ended with exit code 1:\n(.|\n)*broken on purpose"):
        download(table(["image/1.png"]), tmp_path / "set", count=1, image_size=32, local=True, base_url=web.address)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        download(table(["a"]), tmp_path, count=1, image_size=32)
    with pytest.raises(ValueError, match="count is 0"):
        download(table(["a"]), tmp_path / "set", count=0, image_size=32)
    with pytest.raises(ValueError, match="threads is 0"):
        download(table(["a"]), tmp_path / "set", count=1, image_size=32, threads=0)
    with pytest.raises(ValueError, match="is not a regularisation set"):
        RegularizationSet.load(tmp_path)
