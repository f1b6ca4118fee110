from __future__ import annotations

import os
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback import Web

from retrieval.corpus import BATCH_BYTES, check_corpus, corpus_digest, corpus_rows, precomputed, read_corpus


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


TEXTS = [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", TEXTS, ids=str)
def test_every_type_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(["a", None, "b"], kind if not pa.types.is_dictionary(kind) else pa.string())
    column = values.dictionary_encode() if pa.types.is_dictionary(kind) else values
    write(tmp_path / "a.parquet", {"url": column, "caption": column, "sha256": column, "nsfw": column})
    assert [row["caption"] for row in rows(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("caption", [["a cat", "a dog"]], r"'caption' has the type list<\w+: string>; text is needed"),
        ("caption", [{"en": "a cat"}], r"'caption' has the type struct<en: string>; text is needed"),
        ("caption", [7], "'caption' has the type int64; text is needed"),
        ("url", [["u"]], "'url' has the type list"),
        ("nsfw", [[0.5]], r"'nsfw' has the type list<\w+: double>; numbers or words is needed"),
        ("sha256", [7], "'sha256' has the type int64; hexadecimal text or 32 bytes is needed"),
    ],
)
def test_columns_of_another_kind_are_named(tmp_path: Path, name: str, values: list, wanted: str) -> None:
    write(tmp_path / "a.parquet", {"url": ["u"], "caption": ["c"], name: values})
    with pytest.raises(ValueError, match=rf"a\.parquet: the column {wanted}"):
        rows(tmp_path)


def test_text_that_is_not_utf8_costs_its_row_only(tmp_path: Path) -> None:
    captions = pa.array([b"one", b"caf\xe9", "café".encode(), b"four"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 4, captions.buffers())
    write(tmp_path / "a.parquet", {"url": ["u1", "u2", "u3", "u4"], "caption": broken})
    assert [row["caption"] for row in rows(tmp_path)] == ["one", "café", "four"]
    assert corpus_rows(str(tmp_path)) == 4


def test_a_column_that_is_there_twice_is_not_guessed(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["u"]), pa.array(["one"]), pa.array(["two"])], ["url", "caption", "caption"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has 2 columns named 'caption'; keep one"):
        rows(tmp_path)


@pytest.mark.parametrize("dictionary", [True, False])
def test_memory_is_bounded_by_bytes_not_rows(tmp_path: Path, dictionary: bool) -> None:
    """A file of some kilobytes that unpacks to 2 GB where all rows are read at once."""
    long = "a cat " * 40_000
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 8192, pa.int32()), pa.array([long])) if dictionary else None
    caption = same if dictionary else pa.array([long] * 300)
    columns = {"url": pa.array(["u"] * len(caption)), "caption": caption}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", compression="zstd", use_dictionary=dictionary)
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    before, count = pa.total_allocated_bytes(), 0
    for batch in read_corpus(str(tmp_path)):
        assert pa.total_allocated_bytes() - before < 2 * BATCH_BYTES
        assert set(batch.column("caption").to_pylist()) == {long[:4000]}
        count += batch.num_rows
    assert count == len(caption)


def test_rows_without_url_or_caption_are_skipped(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"url": ["u1", None, "u3", "u4"], "caption": ["one", "two", None, "  "]})
    assert [row["url"] for row in rows(tmp_path)] == ["u1"]


def test_optional_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"url": ["u"], "text": ["t"], "punsafe": [0.25], "sha256": ["ab"]})
    write(tmp_path / "b.parquet", {"URL": ["u", "v"], "TEXT": ["t", "t"], "NSFW": ["UNLIKELY", "?"]})
    assert rows(tmp_path / "a.parquet") == [{"url": "u", "caption": "t", "nsfw": 0.25, "sha256": "ab"}]
    assert [row["nsfw"] for row in rows(tmp_path / "b.parquet")] == [0.0, None]

    exact = bytes(range(32))
    pins = pa.array([exact, None], pa.binary(32))
    write(tmp_path / "c.parquet", {"url": ["u", "v"], "text": ["t", "t"], "sha256": pins})
    write(tmp_path / "d.parquet", {"url": ["u"], "text": ["t"], "sha256": [f" {exact.hex().upper()}"]})
    assert [row["sha256"] for row in rows(tmp_path / "c.parquet")] == [exact.hex(), None]
    assert [row["sha256"] for row in rows(tmp_path / "d.parquet")] == [exact.hex()]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (pa.array(["UNLIKELY", "nsfw", "0.25"]), [0.0, 1.0, 0.25]),
        (pa.array(["UNSURE", "?", None]).dictionary_encode(), [0.5, None, None]),
        (pa.array([0.5, float("nan"), None]), [0.5, None, None]),
        (pa.array([0.5, 0.25, 0.5]).dictionary_encode(), [0.5, 0.25, 0.5]),
        (pa.array([0, 1, None]), [0.0, 1.0, None]),
        (pa.array([True, False, None]), [1.0, 0.0, None]),
        (pa.array([Decimal("1.00"), Decimal("0.25"), None]), [1.0, 0.25, None]),
        (pa.nulls(3), [None] * 3),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_every_kind_of_score(tmp_path: Path, scores: pa.Array, expected: list) -> None:
    write(tmp_path / "a.parquet", {"url": ["u"] * 3, "caption": ["c"] * 3, "punsafe": scores})
    assert [row["nsfw"] for row in rows(tmp_path)] == expected


def test_scores_that_are_asked_for_have_to_be_there(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"url": ["u"], "caption": ["c"]})
    check_corpus(str(tmp_path), scores=False)
    with pytest.raises(ValueError, match=r"a\.parquet has no column of NSFW scores, named .*'punsafe'"):
        check_corpus(str(tmp_path), scores=True)
    write(tmp_path / "a.parquet", {"url": ["u"], "caption": ["c"], "nsfw": ["safe"]})
    with pytest.raises(ValueError, match=r"a\.parquet: none of the first 1 rows has an NSFW score that can be read"):
        check_corpus(str(tmp_path), scores=True)


@pytest.mark.parametrize("name", ["metadata/metadata_0.parquet", "text_emb/text_emb_0.npy"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    embeddings(tmp_path, {"0": (1, 1)})
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} cannot be read: not a regular file"):
        precomputed(str(tmp_path))


@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.parametrize("place", ["corpus.parquet", "corpus", "corpus/*.parquet"])
def test_a_server_that_refuses_is_said(web: Web, status: int, place: str) -> None:
    web.statuses = {path: (status, {}) for path in ("/corpus.parquet", "/corpus", "/corpus/")}
    for ask in (rows, corpus_digest, corpus_rows):
        with pytest.raises(ValueError, match=f"corpus {re.escape(web.address)}.* the server answers {status}"):
            ask(f"{web.address}/{place}")


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


def test_embeddings_cut_short(tmp_path: Path) -> None:
    embeddings(tmp_path, {"0": (9, 9)})
    file = tmp_path / "text_emb/text_emb_0.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"text_emb_0\.npy is cut short: it has 195 of 200 bytes"):
        precomputed(str(tmp_path))
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"text_emb_0\.npy is not a readable \.npy file"):
        precomputed(str(tmp_path))
    file.write_bytes(whole.replace(b"(9, ", b"(-9,"))
    with pytest.raises(ValueError, match=r"text_emb_0\.npy must hold rows of floats; it has shape \(-9"):
        precomputed(str(tmp_path))
    np.save(file, np.ones((9, 4), np.float16))
    (tmp_path / "metadata/metadata_0.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"metadata_0\.parquet cannot be read: .*Parquet magic bytes"):
        precomputed(str(tmp_path))


def test_pickled_embeddings_are_refused(tmp_path: Path) -> None:
    embeddings(tmp_path, {"0": (1, 1)})
    np.save(tmp_path / "text_emb/text_emb_0.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(ValueError, match="rows of floats"):
        precomputed(str(tmp_path))


def test_embeddings_of_another_name_are_not_passed_over(tmp_path: Path) -> None:
    embeddings(tmp_path, {"0": (1, 1)})
    (tmp_path / "text_emb/text_emb_0.npy").rename(tmp_path / "text_emb/text_emb_a.npy")
    with pytest.raises(ValueError, match=r"text_emb_a\.npy: expected a name like text_emb_0\.npy"):
        precomputed(str(tmp_path))


def test_plain_corpus_has_no_embeddings(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"url": ["u1"], "caption": ["one"]})
    assert precomputed(str(tmp_path)) is None
