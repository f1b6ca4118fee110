from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from webdataset import TarWriter

from retrieval.regularization import RegularizationSet


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        ({"jpg": b"x", "txt": b"a cat"}, "sample '000': its image cannot be read"),
        ({"txt": b"a cat"}, "sample '000': an image and its caption are needed"),
        ({"jpg": b"x"}, "sample '000': an image and its caption are needed"),
        (None, "no whole archive"),
    ],
)
def test_a_damaged_set_is_named(tmp_path: Path, sample: dict | None, why: str) -> None:
    RegularizationSet.generated(tmp_path / "set", [Image.new("RGB", (8, 8))], "a cat")
    shard = tmp_path / "set/00000.tar"
    shard.write_bytes(b"x" * 700)
    if sample:
        with TarWriter(str(shard)) as tar:
            tar.write({"__key__": "000", **sample})
    with pytest.raises(ValueError, match=rf"00000\.tar: {why}"):
        list(RegularizationSet.load(tmp_path / "set"))
