from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.evaluation.measures import measures_of
from pipeline.gate import RETENTION, judge
from pipeline.release.publish import publish
from pipeline.spec import Gate
from pipeline.stages.released import Released
from pipeline.stages.stage import run_stage
from pipeline.store import Store

GATE = Gate(image=0.02, text=0.01)


def table(image: float, text: float = 0.3, spread: float = 0.0, images: int = 16) -> pd.DataFrame:
    noise = np.tile([-spread, spread], images // 2)
    rows = {"prompt": "photo of a {}", "seed": np.arange(images), "image": image + noise, "text": text}
    return pd.DataFrame(rows)


def refused(new: dict, current: dict, missing: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    return [(v.measure, v.concept) for v in judge(GATE, new, current, list(missing)) if not v.passed]


def test_every_measure_has_its_tolerance() -> None:
    assert {measure.tolerance for measure in (*measures_of(["dino"]), RETENTION)} < set(Gate.model_fields)


def test_a_fall_beyond_the_tolerance_is_refused() -> None:
    current = {"a": table(0.7), "b": table(0.7)}
    assert refused({"a": table(0.685), "b": table(0.9)}, current) == []
    assert refused({"a": table(0.675), "b": table(0.9)}, current) == [("image", "a")]
    # one concept's text may fall where the whole does not
    assert refused({"a": table(0.7, text=0.285), "b": table(0.7, text=0.3)}, current) == []
    assert refused({"a": table(0.7, text=0.26), "b": table(0.7, text=0.3)}, current) == [("text", "")]


def test_the_interval_is_of_differences_image_by_image() -> None:
    """What varies from image to image alike in both does not widen it; what varies between the two does."""
    assert refused({"a": table(0.675, spread=0.3)}, {"a": table(0.7, spread=0.3)}) == [("image", "a")]
    assert refused({"a": table(0.675, spread=0.3)}, {"a": table(0.7)}) == []
    (text, image) = judge(GATE, {"a": table(0.675, spread=0.04)}, {"a": table(0.7)}, [])
    assert image.change == pytest.approx(-0.025) and image.error == pytest.approx(0.04 * (16 / 15) ** 0.5 / 4)
    assert (text.change, text.error, text.concept) == (0, 0, "")


def test_classes_are_kept() -> None:
    """Retention is of all classes together; a new category, which has none, does not stand in the way."""
    current = {"a": table(0.7).assign(retention=0.3), "b": table(0.7).assign(retention=0.3), "moongate": table(0.7)}
    gate = Gate(retention=0.02)

    def change(a: float, b: float) -> list:
        new = current | {"a": table(0.7).assign(retention=a), "b": table(0.7).assign(retention=b)}
        return [(v.concept, v.passed) for v in judge(gate, new, current, []) if v.measure == "retention"]

    assert change(0.25, 0.35) == [("", True)]
    assert change(0.25, 0.26) == [("", False)]


def test_what_is_in_one_release_only() -> None:
    assert refused({"new": table(0.1, text=0.0), "a": table(0.7)}, {"a": table(0.7)}) == []
    assert judge(GATE, {"new": table(0.1)}, {}, []) == []
    # of a new one its class is compared, which the current release can draw, and nothing else
    classes = table(0.7)[["prompt", "seed"]].assign(retention=0.3)
    spoiled = {"new": table(0.1, text=0.0).assign(retention=0.1)}
    assert refused(spoiled, {"new": classes}) == [("retention", ""), ("retention", "new")]
    # however many keep theirs beside it
    others = {f"c{i}": table(0.7).assign(retention=0.3) for i in range(20)}
    assert refused(spoiled | others, {"new": classes} | others) == [("retention", "new")]
    assert refused({"a": table(0.7)}, {"a": table(0.7)}, missing=("b",)) == [("presence", "b")]
    assert "could not be made again" in str(judge(GATE, {}, {}, ["b"])[0])


def test_a_release_stands_in_for_a_lost_store(tmp_path: Path) -> None:
    """Its weights are taken from the release, if they are what its manifest says."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made/merged.safetensors").write_bytes(b"weights")
    info = publish(tmp_path / "made", str(tmp_path / "releases"))
    sha256 = info.manifest["files"]["merged.safetensors"]["sha256"]
    store = Store(str(tmp_path / "store"))
    places = Released.Places(info.url)
    made = run_stage(Released(name="v0001", sha256=sha256, places=places), store, print)
    assert made.file.read_bytes() == b"weights"
    with pytest.raises(ValueError, match="not what its manifest says"):
        run_stage(Released(name="v0001", sha256="0" * 64, places=places), store, print)
    assert [p.name for p in store.local.glob("released/*")] == [made.folder.name]
