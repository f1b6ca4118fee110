"""Files that people write, read strictly: YAML, JSON and lists of lines. What is wrong is named with file and line.

YAML is taken for plain values: text, numbers, true and false, lists and mappings. A key stands once in a mapping, tags
(`!!bool`) are refused, dates are text. Anchors and merge keys (`<<`) work; what they stand for counts as if written.
"""

from __future__ import annotations

import bisect
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from json import decoder
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pipeline.places import masked
from retrieval.regular import open_regular

MOST_BYTES = 8 << 20
"""Of a file of settings; a list of lines may have ten times as many."""
MOST_VALUES = 500_000
"""In a file; long texts count for several, aliases for what they stand for."""
DEPTH = 50
"""Of lists and mappings in one another."""
LONGEST_NUMBER = 100
"""Digits; what is longer is text."""
LONGEST_NAME = 100
"""Letters of a name: names are parts of the names of files, which have room for 255 bytes."""
MOST_IN_TEXT = 10_000
"""Letters of a setting."""
SPACES = "\t\r\n\u200c\u200d"
"""With what joins or parts letters in some scripts, and in emoji."""
MOST_LETTERS = 80
"""Of a value in a message."""

WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **{form: True for word in ("true", "yes", "on") for form in (word, word.title(), word.upper())},
    **{form: False for word in ("false", "no", "off") for form in (word, word.title(), word.upper())},
}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0b[01]+)")
FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Written:
    """A value as it stands in a file.

    text: of a word or number without quotes, as it is written. inner: what a list or mapping holds, by index or key.
    """

    value: Any
    line: int
    text: str = ""
    inner: Mapping[Any, Written] = field(default_factory=dict)
    size: int = 1

    def find(self, keys: Sequence[str | int]) -> tuple[Written, int]:
        """The innermost value on a way of keys, and how many of them led to it."""
        found, count = self, 0
        for key in keys:
            if key not in found.inner:
                break
            found, count = found.inner[key], count + 1
        return found, count


def shown(value: Any, most: int = MOST_LETTERS) -> str:
    """A value in a message: one line of at most so many characters, without passwords."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = masked(repr(value))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def check_visible(text: str) -> str:
    """The text, if it can be shown as it is. Raises: ValueError for codes that a terminal obeys, characters that change
    the order of others or that nothing shows, and more letters than any setting needs."""
    if len(text) > MOST_IN_TEXT:
        raise ValueError(f"expected at most {MOST_IN_TEXT} letters, found {len(text)}")
    for character in text:
        if not (character.isprintable() or character in SPACES or unicodedata.category(character) == "Zs"):
            raise ValueError(f"has a character that cannot be seen, U+{ord(character):04X}, in {shown(text)}")
    return text


# --- text and lines ------------------------------------------------------------------------------------


def read_text(path: Path, what: str, most: int = MOST_BYTES) -> str:
    """A text file in UTF-8, with or without a byte order mark. what: it should be, for messages. most: bytes.

    Raises: ValueError when there is no such file, it is no regular one (a pipe would block), too large or no text.
    """
    try:
        with open_regular(path) as f:
            data = f.read(most + 1)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the path of a {what}") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder; give the path of a {what}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; give the path of a {what}") from None
    if len(data) > most:
        raise ValueError(f"{path}: larger than {most >> 20} MiB, too much for a {what}")
    return decoded(data, str(path))


def decoded(data: bytes, where: str) -> str:
    """Raises: ValueError naming the line that is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{where}:{line}: cannot be read as text: byte 0x{data[error.start]:02x} is not UTF-8; save it as UTF-8"
        ) from None


def read_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank, without the blanks around it. Raises: as `read_text`."""
    # not `splitlines`: editors do not count what else Unicode takes for the end of a line
    for number, line in enumerate(re.split(r"\r\n|\r|\n", read_text(path, what, 10 * MOST_BYTES)), 1):
        if line.strip():
            yield number, line.strip()


# --- YAML and JSON -------------------------------------------------------------------------------------


def read_written(path: Path, what: str) -> Written:
    """What is in a JSON file (by its suffix) or a YAML file. Raises: as `read_text` and `parse_written`."""
    return parse_written(read_text(path, what), str(path), is_json=path.suffix.lower() == ".json")


def parse_written(text: str | bytes, where: str, *, is_json: bool) -> Written:
    """What a text says. where: it is from, for messages.

    Raises: ValueError for what is no YAML or JSON, a key that is given twice, a tag, too much or too deep.
    """
    text = decoded(text, where) if isinstance(text, bytes) else text
    try:
        return _Json(text, where).whole() if is_json else _Yaml(text, where).whole()
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}:{error.lineno}: not valid JSON: {error.msg}, column {error.colno}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = min(mark.line, text.count("\n")) + 1 if mark else 1  # what is missing at the end is not a line further
        raise ValueError(f"{where}:{line}: not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{where}:{line}: not valid YAML: {error.reason}") from None


class _Reader:
    def __init__(self, text: str, where: str) -> None:
        self.text, self.where, self.depth = text, where, 0

    def refuse(self, line: int, why: str) -> NoReturn:
        raise ValueError(f"{self.where}:{line}: {why}")

    def enter(self, line: int) -> None:
        self.depth += 1
        if self.depth > DEPTH:
            self.refuse(line, f"lists and mappings are nested more than {DEPTH} deep")

    def leave(self, inner: dict[Any, Written], line: int, *, is_list: bool) -> Written:
        self.depth -= 1
        size = 1 + sum(entry.size for entry in inner.values())
        if size > MOST_VALUES:
            self.refuse(line, f"more than {MOST_VALUES} values, aliases counted as what they stand for")
        values = {key: entry.value for key, entry in inner.items()}
        return Written(list(values.values()) if is_list else values, line, inner=inner, size=size)

    def scalar(self, value: Any, line: int, text: str) -> Written:
        return Written(value, line, "" if isinstance(value, str) else text, size=1 + len(text) // 64)

    def add(self, inner: dict[Any, Written], key: str, value: Written, line: int) -> None:
        if key in inner:
            self.refuse(line, f"the key {shown(key)} is given twice, first in line {inner[key].line}; keep one")
        inner[key] = replace(value, line=line)


class _Json(_Reader):
    def __init__(self, text: str, where: str) -> None:
        super().__init__(text, where)
        self.ends = [match.start() for match in re.finditer("\n", text)]
        self.plain = json.JSONDecoder(parse_int=_integer).scan_once  # type: ignore[attr-defined]

    def whole(self) -> Written:
        start = len(self.text) - len(self.text.lstrip(" \t\r\n"))
        try:
            value, end = self.value(self.text, start)
        except StopIteration:
            raise json.JSONDecodeError("Expecting value", self.text, start) from None
        if rest := self.text[end:].lstrip(" \t\r\n"):
            raise json.JSONDecodeError("Extra data", self.text, len(self.text) - len(rest))
        return value

    def value(self, text: str, index: int) -> tuple[Written, int]:
        """The value that begins at an index, and the index behind it: what `decoder` calls for all that is inside."""
        line = bisect.bisect_left(self.ends, index) + 1
        inner: dict[Any, Written] = {}
        if text[index : index + 1] not in ("{", "["):
            value, end = self.plain(text, index)
            return self.scalar(value, line, text[index:end]), end
        self.enter(line)
        if is_list := text[index] == "[":
            values, end = decoder.JSONArray((text, index + 1), self.value)  # type: ignore[attr-defined]
            inner |= dict(enumerate(values))
        else:
            pairs, end = decoder.JSONObject((text, index + 1), True, self.value, None, list)  # type: ignore[attr-defined]
            for key, each in pairs:
                self.add(inner, key, each, each.line)
        return self.leave(inner, line, is_list=is_list), end


class _Yaml(_Reader):
    def whole(self) -> Written:
        self.anchors: dict[str, Written] = {}
        self.events = yaml.parse(self.text, Loader=yaml.CSafeLoader)
        document: Written | None = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if document:
                    self.refuse(_line(event), "a second document begins; a file holds one")
                document = self.value(next(self.events))
        return document or Written(None, 1)

    def value(self, event: yaml.Event) -> Written:
        line = _line(event)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                self.refuse(line, f"*{event.anchor}: nothing before has the anchor &{event.anchor}")
            return self.anchors[event.anchor]
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.tag:
            self.refuse(line, f"the tag {shown(event.tag)} is not taken; leave it out, and put text in quotes")
        if isinstance(event, yaml.ScalarEvent):
            made = self.scalar(_plain(event.value) if event.implicit[0] else event.value, line, event.value)
        else:
            self.enter(line)
            is_list = isinstance(event, yaml.SequenceStartEvent)
            made = self.leave(self.list() if is_list else self.mapping(), line, is_list=is_list)
        if event.anchor:
            self.anchors[event.anchor] = made
        return made

    def list(self) -> dict[Any, Written]:
        inner: dict[Any, Written] = {}
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            inner[len(inner)] = self.value(event)
        return inner

    def mapping(self) -> dict[Any, Written]:
        inner: dict[Any, Written] = {}
        merged: dict[Any, Written] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            line = _line(event)
            if not isinstance(event, yaml.ScalarEvent):
                self.refuse(line, "a key is one word")
            value = self.value(next(self.events))
            if event.value == "<<" and event.implicit[0]:
                for each in value.inner.values() if isinstance(value.value, list) else (value,):
                    if not isinstance(each.value, dict):
                        self.refuse(line, f"<< takes a mapping, or a list of them; found {shown(each.value)}")
                    merged = {**each.inner, **merged}
            else:
                self.add(inner, event.value, value, line)
        return {**merged, **inner}


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _plain(text: str) -> Any:
    """What a word without quotes means; `1e-4` and `007` are text, and numbers where one is wanted."""
    if text in WORDS:
        return WORDS[text]
    if len(text) > LONGEST_NUMBER:
        return text
    if INTEGER.fullmatch(text):
        return int(text.replace("_", ""), 0)
    if FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    return float(text.replace(".", "", 1)) if SPECIAL.fullmatch(text) else text


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= LONGEST_NUMBER else text
