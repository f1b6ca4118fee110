from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from retrieval.clip import ClipModel
from retrieval.corpus import precomputed
from retrieval.index import (
    BLOCK_ROWS,
    build_index,
    build_index_from_embeddings,
    merge_hits,
    read_header,
    read_rows,
    search,
)
from retrieval.select import candidates_by_class, left_out, nearest, normalise_caption


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def corpus(folder: Path, vectors: np.ndarray, **columns: list) -> list[tuple[str, str]]:
    """Write a corpus with embeddings, by default with urls and captions that are the rows' numbers."""
    numbers = range(len(vectors))
    table = {"url": [f"http://a/{n}" for n in numbers], "caption": [f"caption {n}" for n in numbers], **columns}
    (folder / "text_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    np.save(folder / "text_emb/text_emb_0.npy", vectors)
    pq.write_table(pa.table(table), folder / "metadata/metadata_0.parquet")
    return precomputed(str(folder))


def test_search_is_exact_over_shards(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors, queries = random.standard_normal((2500, 32)), unit(random.standard_normal((5, 32)))
    index = build_index_from_embeddings(corpus(tmp_path / "c", vectors), tmp_path / "index", shard_rows=1000)
    assert [shard["rows"] for shard in read_header(index)["shards"]] == [1000, 1000, 500]
    scores, rows = search(index, queries, 50)
    exact = queries @ unit(vectors).T
    expected = np.argsort(-exact, axis=1)[:, :50]
    assert np.mean([len(set(a) & set(b)) / 50 for a, b in zip(rows, expected, strict=True)]) >= 0.99
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, 1), atol=1e-3)
    assert (np.diff(scores, axis=1) <= 0).all()
    wanted = np.array([2400, 3, 1000, 3])
    assert read_rows(index, wanted).column("caption").to_pylist() == [f"caption {n}" for n in wanted]


def test_files_of_embeddings_follow_one_another(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((30, 8)))
    pairs = [pair for n in range(3) for pair in corpus(tmp_path / str(n), vectors[10 * n : 10 * n + 10])]
    index = build_index_from_embeddings(pairs, tmp_path / "index", shard_rows=6)
    assert [shard["rows"] for shard in read_header(index)["shards"]] == [6, 4] * 3
    assert search(index, vectors, 1)[1].ravel().tolist() == list(range(30))
    assert read_rows(index, np.array([29])).column("caption").to_pylist() == ["caption 9"]
    with pytest.raises(ValueError, match=r"different widths, \[5, 8\]"):
        build_index_from_embeddings([*pairs, *corpus(tmp_path / "odd", np.eye(5))], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_more_neighbours_than_rows(tmp_path: Path) -> None:
    index = build_index_from_embeddings(corpus(tmp_path / "c", np.eye(3)), tmp_path / "index")
    scores, rows = search(index, unit(np.array([[3.0, 2, 1]])), 10)
    assert rows.tolist() == [[0, 1, 2]] and scores.shape == (1, 3)


def test_equal_captions_come_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = np.tile(unit(random.standard_normal((7, 32))), (2 * BLOCK_ROWS // 7, 1))  # every position of a block
    index = build_index_from_embeddings(corpus(tmp_path / "c", vectors), tmp_path / "index", shard_rows=10_000)
    copies = len(vectors) // 7
    for number in (1, 3):
        _, rows = search(index, vectors[:number], copies)
        assert rows.tolist() == [list(range(query, len(vectors), 7)) for query in range(number)]


def test_unusable_rows_are_left_out_with_their_embedding(tmp_path: Path) -> None:
    vectors = np.eye(5, dtype=np.float32)
    vectors[1], vectors[3, 0] = 0, np.nan
    pairs = corpus(tmp_path / "c", vectors, caption=["zero", "one", None, "three", "four"])
    index = build_index_from_embeddings(pairs, tmp_path / "index")
    assert read_rows(index, np.arange(2)).column("caption").to_pylist() == ["zero", "four"]
    assert search(index, np.eye(5, dtype=np.float32)[4:], 1)[1].tolist() == [[1]]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(_: list[str]) -> np.ndarray:
        raise OSError("no space left")

    batch = pa.RecordBatch.from_pydict({"url": ["u"], "caption": ["c"]})
    with pytest.raises(OSError, match="no space left"):
        build_index([batch], fail, tmp_path / "index")
    with pytest.raises(ValueError, match="no usable captions"):
        build_index([], fail, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="is not a caption index"):
        read_header(tmp_path)


# --- selection ---


def choose(folder: Path, columns: dict, count: int, **options: object) -> list[str]:
    """Select from captions that are the less similar the later they come; return their urls."""
    angles = np.linspace(0, 1, len(columns["caption"]))
    index = build_index_from_embeddings(
        corpus(folder / "c", np.stack([np.cos(angles), np.sin(angles)], 1), **columns), folder / "index"
    )
    (table,) = nearest(index, np.array([[1, 0]], np.float32), count, **options)
    return table.column("url").to_pylist()


def test_each_thing_once_the_nearest_first(tmp_path: Path) -> None:
    columns = {
        "url": ["a", "b", "a#top", "d", "e", "f"],
        "caption": ["A cat!", "a  CAT", "another cat", "Cat № 5", "cat no_5", "a dog"],
    }
    assert choose(tmp_path, columns, 10) == ["a", "d", "f"]


def test_a_dropped_row_does_not_hide_others(tmp_path: Path) -> None:
    columns = {"url": ["a", "a", "c"], "caption": ["one", "two", "two"]}
    assert choose(tmp_path, columns, 10) == ["a", "c"]


def test_searches_deeper_past_duplicates(tmp_path: Path) -> None:
    columns = {"caption": ["the same"] * 300 + ["one", "two", "three"]}
    assert choose(tmp_path, columns, 3) == ["http://a/0", "http://a/300", "http://a/301"]


def test_nsfw_and_block_list_are_counted(tmp_path: Path) -> None:
    scores = [0.1, 0.9, None, 0.2, float("nan"), 0.1]
    columns = {"caption": list("abcdef"), "nsfw": scores, "sha256": ["x", "y", "z", "BAD", "v", "worse"]}
    assert choose(tmp_path, columns, 9, max_nsfw=0.5, blocked_sha256=["Bad", "WORSE"]) == ["http://a/0"]
    (table,) = nearest(tmp_path / "index", np.array([[1, 0]], np.float32), 9, max_nsfw=0.5, blocked_sha256=["bad"])
    assert left_out(table.schema) == {"nsfw": 1, "unscored": 2, "blocked": 1}
    (table,) = nearest(tmp_path / "index", np.array([[1, 0]], np.float32), 9)
    assert left_out(table.schema) == {}


def test_by_clip_and_all_classes_at_once(clip: ClipModel, tmp_path: Path) -> None:
    captions = CAPTIONS
    batch = pa.RecordBatch.from_pydict({"url": captions, "caption": captions})
    index = build_index([batch], clip.encode_text, tmp_path / "index", model=clip.digest)
    cat, dog = candidates_by_class(index, clip, ["cat", "dog"], 4)
    exact = captions[int((clip.encode_text(captions) @ clip.encode_text(["dog"])[0]).argmax())]
    assert dog.column("caption")[0].as_py() == exact
    assert cat.column("url").equals(candidates_by_class(index, clip, ["cat"], 4)[0].column("url"))
    assert cat.num_rows == 4 and cat.column_names == ["url", "caption", "similarity", "sha256"]


def test_searched_in_parts_is_searched_whole(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    vectors[50:] = vectors[3]  # equal scores, across shards
    index = build_index_from_embeddings(corpus(tmp_path / "c", vectors), tmp_path / "index", shard_rows=13)
    queries = vectors[:4] / np.linalg.norm(vectors[:4], axis=1, keepdims=True)
    whole = search(index, queries, 40)
    parts = [search(index, queries, 40, shards) for shards in (range(0, 2), range(2, 3), range(3, 5))]
    for merged, expected in zip(merge_hits(parts, 40), whole, strict=True):
        np.testing.assert_array_equal(merged, expected)


def another(clip: ClipModel) -> ClipModel:
    """Of the same width, with other weights."""
    model = copy.deepcopy(clip.model)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.text_projection)
    return dataclasses.replace(clip, name="another", model=model)


CAPTIONS = [f"a {thing} {place}" for thing in ("cat", "dog", "car") for place in ("here", "there", "in a box")]


def published(folder: Path, vectors: np.ndarray) -> list[tuple[str, str]]:
    return corpus(folder, vectors, url=CAPTIONS, caption=CAPTIONS)


def test_embeddings_of_another_model_are_refused(clip: ClipModel, tmp_path: Path) -> None:
    theirs = published(tmp_path / "theirs", another(clip).encode_text(CAPTIONS))
    where = r"theirs/text_emb/text_emb_0\.npy: these embeddings are not of the CLIP model"
    with pytest.raises(ValueError, match=rf"{where} .*: 9 captions .* a similarity of -?0\.\d\d .* at least 0\.9"):
        build_index_from_embeddings(theirs, tmp_path / "index", clip=clip)
    ours = published(tmp_path / "ours", 3 * clip.encode_text(CAPTIONS).astype(np.float16))
    with pytest.raises(ValueError, match=where):  # one file of several
        build_index_from_embeddings(ours + theirs, tmp_path / "index", clip=clip)
    index = build_index_from_embeddings(ours, tmp_path / "index", clip=clip)
    assert read_header(index)["model"] == clip.digest
    narrow = published(tmp_path / "narrow", np.ones((9, 5)))
    with pytest.raises(ValueError, match=r"have a width of 5, those of the CLIP model .* 16\. Set retrieval\.clip"):
        build_index_from_embeddings(narrow, tmp_path / "other", clip=clip)


def test_a_caption_of_many_rows_is_encoded_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.eye(3, dtype=np.float32)[[ord(text) - ord("a") for text in texts]]

    captions = ["b", "a", "b", "c", "b"]
    batch = pa.RecordBatch.from_pydict({"url": captions, "caption": captions})
    index = build_index([batch], encode, tmp_path / "index")
    assert asked == ["b", "a", "c"]
    assert search(index, np.eye(3, dtype=np.float32)[[1]], 3)[1].tolist() == [[0, 2, 4]]


def test_another_models_index_is_refused(clip: ClipModel, tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"url": CAPTIONS, "caption": CAPTIONS})
    index = build_index([batch], clip.encode_text, tmp_path / "index", model="other")
    with pytest.raises(ValueError, match="encoded with another CLIP model"):
        candidates_by_class(index, clip, ["cat"], 1)
    # built by earlier versions from published embeddings: of whatever model they were
    unknown = build_index([batch], clip.encode_text, tmp_path / "unknown")
    assert candidates_by_class(unknown, clip, ["cat"], 1)[0].num_rows == 1
    with pytest.raises(ValueError, match="unknown: these embeddings are not of the CLIP model another"):
        candidates_by_class(unknown, another(clip), ["cat"], 1)
    index = build_index_from_embeddings(corpus(tmp_path / "d", np.eye(5)), tmp_path / "narrow")
    with pytest.raises(ValueError, match="width 5, the CLIP model makes 16"):
        candidates_by_class(index, clip, ["cat"], 1)


@pytest.mark.parametrize("dtype", [">f4", ">f2", "f8", ">f8", "g"])
def test_embeddings_of_every_float_type(tmp_path: Path, dtype: str) -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((9, 8)))
    index = build_index_from_embeddings(published(tmp_path / "c", vectors.astype(dtype)), tmp_path / "index")
    assert search(index, vectors, 1)[1].ravel().tolist() == list(range(9))


def test_embeddings_cut_short_after_they_were_listed(tmp_path: Path) -> None:
    pairs = published(tmp_path / "c", np.eye(9))
    file = tmp_path / "c/text_emb/text_emb_0.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"text_emb_0\.npy is not a readable \.npy file"):
        build_index_from_embeddings(pairs, tmp_path / "index")


def test_normalised_captions() -> None:
    assert normalise_caption("  A  Cat,\tON_the—Mat… ") == "a cat on the mat"
    assert normalise_caption("ﬁne Straße") == "fine strasse"
