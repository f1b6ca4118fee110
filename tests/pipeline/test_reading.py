"""Files that people write: plain values are read as they are meant, all else is refused with file and line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.places import check_named, check_place, located, masked
from pipeline.reading import parse_written, read_lines, read_text, read_written, shown


def test_plain_values():
    text = "a: 1\nb: yes\nc: Off\nd: ~\ne: 1.5e-4\nf: 2024-01-01\ng: '1'\nh: 007\ni: 1e-4\nj: .inf\nk: 0x1F\nl: 1_000\n"
    values = [1, True, False, None, 1.5e-4, "2024-01-01", "1", "007", "1e-4", float("inf"), 31, 1000]
    found = parse_written(text, "f", is_json=False)
    assert list(found.value.values()) == values
    assert [type(v) for v in found.value.values()] == [type(v) for v in values]
    assert found.find(("b",))[0].text == "yes" and found.find(("b", "c"))[1] == 1
    assert [entry.line for entry in found.inner.values()] == list(range(1, 13))
    shared = "base: &base {steps: 1, seed: 2}\na: {<<: *base, steps: 3}\nb: {<<: [*base, {seed: 4, x: 5}]}\n"
    assert parse_written(shared, "f", is_json=False).value == {
        "base": {"steps": 1, "seed": 2},
        "a": {"steps": 3, "seed": 2},
        "b": {"steps": 1, "seed": 2, "x": 5},
    }
    emoji = '{"a":\t["\\ud83d\\ude00", 1, 1.5, true, null, {}, []]}'
    assert parse_written(emoji, "f", is_json=True).value == {"a": ["😀", 1, 1.5, True, None, {}, []]}
    assert parse_written("", "f", is_json=False).value is None


@pytest.mark.parametrize(
    ("text", "is_json", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", False, "f:5: the key 'c' is given twice, first in line 3"),
        ('{"a": 1,\n "b": 2,\n "a": 3}', True, "f:3: the key 'a' is given twice, first in line 1"),
        ("\na: !!bool x", False, "f:2: the tag 'tag:yaml.org,2002:bool' is not taken"),
        ("a: !!timestamp x", False, "f:1: the tag"),
        ("a: !!python/name:os.system x", False, "f:1: the tag"),
        ("a: 1\nb: [", False, "f:2: not valid YAML"),
        ('{"a": 1,\n}', True, "f:2: not valid JSON"),
        ("[1] x", True, "f:1: not valid JSON: Extra data"),
        ("", True, "f:1: not valid JSON"),
        ("a: \x00", False, "f:1: not valid YAML"),
        ("[" * 3000, False, "f:1: lists and mappings are nested more than 50 deep"),
        ("[" * 3000, True, "f:1: lists and mappings are nested more than 50 deep"),
        ('{"a":' * 3000, True, "f:1: lists and mappings are nested more than 50 deep"),
        ("a: 1\n---\nb: 2", False, "f:2: a second document begins"),
        ("a: *b", False, "f:1: *b: nothing before has the anchor &b"),
        ("a: &a [*a]", False, "f:1: *a: nothing before has the anchor &a"),
        ("? [a]\n: 1", False, "f:1: a key is one word"),
        ("<<: 3", False, "f:1: << takes a mapping, or a list of them; found 3"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{o}'] * 10)}]\n" for o, n in
            zip("abcdefgh", "bcdefghi", strict=True)),
            False,
            "more than 500000 values",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(text, is_json, message):
    with pytest.raises(ValueError) as refused:
        parse_written(text, "f", is_json=is_json)
    assert message in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize("name", ["x.yaml", "x.json", "x.JSON", "x.txt"])
def test_text_of_every_kind(tmp_path, name):
    """With a byte order mark and the line ends of any system; a pipe does not block, a folder is no file."""
    file = tmp_path / name
    file.write_bytes('\ufeff["a",\r\n"b"]\r\n'.encode())
    assert read_written(file, "list").value == ["a", "b"]
    file.write_bytes("\ufeff\r\none\u2028one\r two \n\nthree".encode())
    assert list(read_lines(file, "list")) == [(2, "one\u2028one"), (3, "two"), (5, "three")]
    for content, message in (
        ("ä\nü".encode("latin-1"), f"{name}:1: cannot be read as text: byte 0xe4 is not UTF-8"),
        (b"a\nb\n" + "a".encode("utf-16"), f"{name}:3: cannot be read as text: byte 0xff"),
        (b"x" * (9 << 20), "larger than 8 MiB"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_text(file, "list")
    file.unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file; give the path of a list"):
        read_text(file, "list")
    os.mkfifo(file)
    with pytest.raises(ValueError, match="not a regular file"):
        read_text(file, "list")
    with pytest.raises(ValueError, match="a folder"):
        read_text(tmp_path, "list")


def test_a_thousand_concepts_are_read_in_a_moment():
    text = "".join(f"- {{name: c{i}, images: images/c{i}, class_word: cat, token: <c{i}>}}\n" for i in range(1000))
    start = time.process_time()
    assert len(parse_written(text, "f", is_json=False).value) == 1000
    assert time.process_time() - start < 5


def test_values_in_messages_are_short_and_without_passwords():
    assert [shown(value) for value in (None, True, 1, 1.5, "x", [1], {})] == [
        "nothing",
        "true",
        "1",
        "1.5",
        "'x'",
        "a list",
        "a mapping",
    ]
    assert len(shown("x" * 10**6)) == 80
    assert "secret" not in shown("https://me:" + "secret" * 50 + "@host/x")


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("https://me:pw@host/a and s3://KEY:SE/C+R@bucket/b.", "https://***@host/a and s3://***@bucket/b."),
        ("'sftp://me:p@w@host'", "'sftp://***@host'"),
        ("https://token@host/", "https://***@host/"),
        ('no bucket "KEY:SE/C+R@bucket" here', 'no bucket "***@bucket" here'),
        ("a.yaml:3: C:/x@y", None),
        ("https://h/x?a=1&X-Amz-Signature=ab%2F&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
        ("hf://owner/name@v0001, me@host, s3://b/k@2, http://h:8265/x", None),
    ],
)
def test_passwords_are_masked(text, safe):
    assert masked(text) == (safe or text)


def test_places(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    folder = tmp_path / "[work]"
    (folder / "cat").mkdir(parents=True)
    (tmp_path / "w").mkdir()
    for place, expected in (
        ("cat", f"{folder}/cat"),
        ("../dog", f"{tmp_path}/dog"),
        ("~/x", "/home/me/x"),
        ("/x/./y", "/x/y"),
        ("s3://b/k", "s3://b/k"),
        ("", ""),
        ("cat/*.png", f"{tmp_path}/[[]work]/cat/*.png"),
    ):
        assert located(place, folder) == expected
    for wrong in ("s3://", "s3:///key", "s3:", "s3:/b/k", "s4://b/k", "https:// /x"):
        with pytest.raises(ValueError, match=r"names no bucket or host|is no URL|on no storage that is known"):
            check_place(wrong)
    for keys in ("s3://KEY:SE/CRET@bucket/k", "simplecache::s3://:SE/CRET@bucket"):
        with pytest.raises(ValueError, match=r"\*\*\*@bucket.*: keys are not read from an address") as refused:
            check_place(keys)
        assert "CRET" not in str(refused.value)
    for right in ("", "x:y", "s3://bucket/a@b:c@d", "C:/x", "s3://b/k", "memory://x", "file:///x", "/x", "~/x"):
        assert check_place(right) == right
    with pytest.raises(ValueError, match="no folder or URL is named"):
        check_named(" ")
    assert Path(located("x", Path())) == Path.cwd() / "x"
