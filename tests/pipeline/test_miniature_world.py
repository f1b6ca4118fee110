"""The miniature world and its corpus: reproducible, honest about what was held out, served as on the web."""

from __future__ import annotations

import dataclasses
import io
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.miniature import corpus, world

SEED = 7


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [corpus.corpus_scene(SEED, i) for i in range(3000)]


# --- the table -----------------------------------------------------------------------------------------


def test_rows_are_reproducible_whatever_the_count_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.write_corpus(tmp_path / "long.parquet", 300, SEED)
    monkeypatch.setattr(corpus, "BATCH", 7)
    corpus.write_corpus(tmp_path / "short.parquet", 100, SEED)
    corpus.write_corpus(tmp_path / "other.parquet", 100, SEED + 1)
    long, short, other = (pq.read_table(tmp_path / f"{n}.parquet") for n in ("long", "short", "other"))
    assert long.column_names == ["url", "caption"] and long.num_rows == 300
    assert short.to_pylist() == long.slice(0, 100).to_pylist()
    assert other["caption"].to_pylist() != short["caption"].to_pylist()
    assert short["url"][42].as_py() == f"scenes/{SEED}/42.png"
    assert short["caption"].to_pylist() == [corpus.corpus_scene(SEED, i).caption for i in range(100)]


def test_empty_corpus(tmp_path: Path) -> None:
    corpus.write_corpus(tmp_path / "none.parquet", 0, SEED)
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0
    with pytest.raises(ValueError, match=r"count \(-1\)"):
        corpus.write_corpus(tmp_path / "none.parquet", -1, SEED)


def test_a_table_cut_short_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.write_corpus(tmp_path / "rows.parquet", 5, SEED)

    def interrupted(seed: int, index: int) -> world.Scene:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "corpus_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corpus.write_corpus(tmp_path / "rows.parquet", 9, SEED)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == 5


def test_nothing_held_out_is_in_the_corpus(scenes: list[world.Scene]) -> None:
    for scene in scenes:
        for sprite in scene.sprites:
            assert not world.is_held_out(sprite.cls, scene.background)
            assert sprite.style in world.TRAINING_STYLES
    assert not set(world.TRAINING_STYLES) & set(world.HELD_OUT_STYLES)


def test_the_corpus_covers_the_world(scenes: list[world.Scene]) -> None:
    sprites = [s for scene in scenes for s in scene.sprites]
    assert {s.cls for s in sprites} == set(world.CLASSES)
    assert {s.style for s in sprites} == set(world.TRAINING_STYLES)
    assert {s.background for s in scenes} == set(world.BACKGROUNDS)
    for scene in scenes:
        assert all(s.cls in scene.caption for s in scene.sprites)
    share = np.mean([len(s.sprites) == 2 for s in scenes])
    assert 0.12 < share < 0.18


def test_held_out_pairs_are_about_one_in_seven_and_touch_everything() -> None:
    pairs = [(c, b) for c in world.CLASSES for b in world.BACKGROUNDS if world.is_held_out(c, b)]
    assert {c for c, _ in pairs} == set(world.CLASSES) and {b for _, b in pairs} == set(world.BACKGROUNDS)
    assert 0.12 < len(pairs) / (len(world.CLASSES) * len(world.BACKGROUNDS)) < 0.17


# --- pictures ------------------------------------------------------------------------------------------


def test_masks_cover_the_sprites(scenes: list[world.Scene]) -> None:
    """What differs from the bare background lies under the mask, and the other way round."""
    for scene in scenes[:60]:
        image, mask = world.render(scene)
        bare, nothing = world.render(dataclasses.replace(scene, sprites=()))
        assert image.size == (world.SIZE, world.SIZE) and mask.dtype == np.float32 and mask.shape == (64, 64)
        assert not nothing.any() and mask.max() == 1
        changed = (np.asarray(image) != np.asarray(bare)).any(2)
        assert not (changed & (mask == 0)).any()
        # a sprite may have a colour of the background here and there
        assert changed[mask > 0.5].mean() > 0.9


def test_every_class_is_drawn_by_four_training_styles_at_least() -> None:
    for cls in world.CLASSES:
        styles = world.styles_of(cls)
        assert len(styles) >= 4
        pictures = {world.sprite_image(cls, s).tobytes() for s in styles}
        assert len(pictures) == len(styles), f"two styles draw the same {cls}"
    for style in world.HELD_OUT_STYLES:
        assert sum(style in world.styles_of(c, (style,)) for c in world.CLASSES) >= 20


def test_unknown_sprite_names_style_and_class() -> None:
    with pytest.raises(KeyError, match=r"fxemoji.*cat"):
        world.sprite_image("cat", "fxemoji")


def test_every_style_is_attributed_under_a_permissive_licence() -> None:
    lines = (world.ATLAS / "ATTRIBUTION.md").read_text().splitlines()
    for style in world.TRAINING_STYLES + world.HELD_OUT_STYLES:
        (line,) = [x for x in lines if x.startswith(f"- `{style}`:")]
        assert " by " in line
        assert any(f", {licence} (" in line for licence in ("Apache-2.0", "MIT", "CC-BY-4.0"))
        assert "-SA" not in line


# --- the server ----------------------------------------------------------------------------------------


def test_served_images_are_the_rendered_ones(tmp_path: Path) -> None:
    corpus.write_corpus(tmp_path / "rows.parquet", 30, SEED)
    urls = pq.read_table(tmp_path / "rows.parquet")["url"].to_pylist()
    with corpus.serve_corpus() as base, ThreadPoolExecutor(16) as pool:
        assert base.startswith("http://127.0.0.1:") and base.endswith("/")
        answers = list(pool.map(get, [base + url for url in urls]))
    for i, (status, body) in enumerate(answers):
        assert status == 200
        expected, _ = world.render(corpus.corpus_scene(SEED, i))
        assert (np.asarray(Image.open(io.BytesIO(body))) == np.asarray(expected)).all()


NOT_FOUND = """scenes/ scenes/7/ scenes/7/x.png scenes/7/-1.png scenes/7/1.5.png scenes/7/1.jpg scenes/07/1.png
scenes/7/%31.png scenes/7/1.png/ scenes/../scenes/7/1.png etc/passwd"""


@pytest.mark.parametrize("path", ["", f"scenes/7/{'9' * 400}.png", *NOT_FOUND.split()])
def test_anything_else_is_not_found(path: str) -> None:
    with corpus.serve_corpus() as base:
        status, body = get(base + path)
    assert status == 404 and b"href" not in body


def test_server_is_quiet_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with corpus.serve_corpus() as base:
        get(base + "scenes/7/1.png")
        get(base + "nothing")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(base + "scenes/7/1.png", timeout=5)


def test_dead_links_are_always_the_same_ones() -> None:
    def dead() -> list[bool]:
        with corpus.serve_corpus(dead_share=0.3) as base:
            return [get(f"{base}scenes/{SEED}/{i}.png")[0] == 404 for i in range(200)]

    first = dead()
    assert 0.2 < np.mean(first) < 0.4
    assert dead() == first
    with pytest.raises(ValueError, match="dead_share"), corpus.serve_corpus(dead_share=1.5):
        pass
