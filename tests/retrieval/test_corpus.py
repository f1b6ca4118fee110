from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval.corpus import corpus_digest, precomputed, read_corpus


def write(path: Path, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def rows(path: Path | str) -> list[dict]:
    return [row for batch in read_corpus(str(path)) for row in batch.to_pylist()]


@pytest.mark.parametrize("names", [("url", "caption"), ("URL", "TEXT"), ("url", "text"), ("Image_URL", "alt_text")])
def test_published_column_names(tmp_path: Path, names: tuple[str, str]) -> None:
    write(tmp_path / "a.parquet", {"similarity": [0.3], names[0]: ["http://a/1"], names[1]: ["a cat"]})
    assert rows(tmp_path / "a.parquet") == [{"url": "http://a/1", "caption": "a cat"}]


def test_missing_column_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"link": ["http://a/1"], "caption": ["a cat"]})
    with pytest.raises(
        ValueError, match=r"a\.parquet has no url column: found \['link', 'caption'\], accepted .*'url'"
    ):
        rows(tmp_path)


def test_not_a_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("url,caption")
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file"):
        rows(tmp_path)
    with pytest.raises(ValueError, match=r"no \.parquet file there"):
        rows(tmp_path / "nothing")


def test_rows_without_url_or_caption_are_skipped(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"url": ["u1", None, "u3", "u4"], "caption": ["one", "two", None, "  "]})
    assert [row["url"] for row in rows(tmp_path)] == ["u1"]


def test_optional_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"url": ["u"], "text": ["t"], "punsafe": [0.25], "sha256": ["ab"]})
    write(tmp_path / "b.parquet", {"URL": ["u", "v"], "TEXT": ["t", "t"], "NSFW": ["UNLIKELY", "?"]})
    assert rows(tmp_path / "a.parquet") == [{"url": "u", "caption": "t", "nsfw": 0.25, "sha256": "ab"}]
    assert [row["nsfw"] for row in rows(tmp_path / "b.parquet")] == [0.0, None]


def test_file_folder_glob_and_address_read_the_same(tmp_path: Path) -> None:
    write(tmp_path / "part/1.parquet", {"url": ["u1"], "caption": ["one"]})
    write(tmp_path / "part/2.parquet", {"url": ["u2"], "caption": ["two"]})
    expected = [{"url": "u1", "caption": "one"}, {"url": "u2", "caption": "two"}]
    for path in (tmp_path, f"{tmp_path}/*/*.parquet", f"file://{tmp_path}/part"):
        assert rows(path) == expected
    assert rows(tmp_path / "part/2.parquet") == expected[1:]


def test_digest_follows_the_content(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"url": ["u1"], "caption": ["one"]})
    before = corpus_digest(str(tmp_path))
    assert corpus_digest(str(tmp_path)) == before
    write(tmp_path / "a.parquet", {"url": ["u1"], "caption": ["two"]})
    assert corpus_digest(str(tmp_path)) != before


def embeddings(folder: Path, counts: dict[str, tuple[int, int]]) -> None:
    (folder / "text_emb").mkdir()
    for number, (vectors, captions) in counts.items():
        np.save(folder / f"text_emb/text_emb_{number}.npy", np.ones((vectors, 4), np.float16))
        write(folder / f"metadata/metadata_{number}.parquet", {"url": ["u"] * captions, "caption": ["c"] * captions})


@pytest.mark.parametrize("numbers", [["0", "2", "10"], ["0000", "0002", "0010"]])
def test_published_embeddings_in_the_order_of_their_numbers(tmp_path: Path, numbers: list[str]) -> None:
    embeddings(tmp_path, dict.fromkeys(numbers, (3, 3)))
    pairs = precomputed(str(tmp_path))
    assert [Path(npy).name for npy, _ in pairs] == [f"text_emb_{number}.npy" for number in numbers]
    assert [Path(table).name for _, table in pairs] == [f"metadata_{number}.parquet" for number in numbers]


def test_embeddings_that_do_not_fit(tmp_path: Path) -> None:
    embeddings(tmp_path, {"0": (3, 2)})
    with pytest.raises(ValueError, match=r"text_emb_0\.npy has 3 rows, metadata_0\.parquet has 2"):
        precomputed(str(tmp_path))
    np.save(tmp_path / "text_emb/text_emb_1.npy", np.ones((1, 4)))
    with pytest.raises(ValueError, match=r"only one of them has \[1\]"):
        precomputed(str(tmp_path))


def test_pickled_embeddings_are_refused(tmp_path: Path) -> None:
    embeddings(tmp_path, {"0": (1, 1)})
    np.save(tmp_path / "text_emb/text_emb_0.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(ValueError, match="rows of floats"):
        precomputed(str(tmp_path))


def test_plain_corpus_has_no_embeddings(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"url": ["u1"], "caption": ["one"]})
    assert precomputed(str(tmp_path)) is None
