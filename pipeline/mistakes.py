"""What is wrong with a file: pydantic's errors as lines that name the file, the line, the key and the value."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.reading import MOST_LETTERS, Written, shown

MOST_MISTAKES = 20
"""That one message names."""
EXPECTED = {
    **dict.fromkeys(("model_type", "dict_type"), "expected a mapping"),
    **dict.fromkeys(("string_type", "string_unicode"), "expected text"),
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "expected a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "expected a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "expected true or false"),
    "tuple_type": "expected a list",
}
"""What pydantic says in a programmer's words."""


def explain(error: ValidationError, root: type[BaseModel], file: str = "", written: Written | None = None) -> list[str]:
    """What is wrong with a file that was to be a `root`, a line for each key. written: its content, for their lines."""
    found: dict[str, tuple[list[str], str]] = {}
    errors = error.errors(include_url=False)
    around = {item["loc"][:i] for item in errors for i in range(len(item["loc"]))}
    for item in errors:
        place = item["loc"]
        if item["type"] == "too_short" and place in around:  # of its entries only the right ones were counted
            continue
        keys, fields = _keys(root, place)
        key = "".join(f"[{k}]" if isinstance(k, int) else f".{_short(k)}" for k in keys).lstrip(".")
        node, known = written.find(keys) if written else (None, 0)
        where = f"{file}:{node.line}: " if node and known else f"{file}: " if file else ""
        message, value = item["msg"].removeprefix("Value error, "), ""
        if item["type"] == "extra_forbidden":
            message = f"unknown key{nearest(str(place[-1]), fields)}"
        elif item["type"] == "missing":
            message = "missing"
        elif item["type"] != "value_error":
            message = EXPECTED.get(item["type"], message)
            is_word = node and known == len(keys) and node.text and not isinstance(item["input"], str)
            value = f", found {node.text[:MOST_LETTERS] if node and is_word else shown(item['input'])}"
        messages, _ = found.setdefault(f"{where}{key}: " if key else where, ([], value))
        messages.append(message)
    lines = [f"{begin}{'; or '.join(messages)}{value}" for begin, (messages, value) in found.items()]
    return lines[:MOST_MISTAKES] + ([f"… and {len(lines) - MOST_MISTAKES} more"] if lines[MOST_MISTAKES:] else [])


def _keys(model: type[BaseModel], place: tuple[int | str, ...]) -> tuple[list[int | str], list[str]]:
    """The keys of a place that pydantic names, without its marks of unions; and what keys there are beside the last."""
    keys: list[int | str] = []
    beside = list(model.model_fields)
    for i, part in enumerate(place):
        if isinstance(part, int):
            keys.append(part)
        elif part in model.model_fields:
            keys.append(part)
            beside = list(model.model_fields)
            kinds = kinds_of(model.model_fields[part].annotation)
            model = next((kind for kind in kinds if issubclass(kind, BaseModel)), BaseModel)
        elif i == len(place) - 1 and model is not BaseModel:
            keys.append(part)
            beside = list(model.model_fields)
    return keys, beside


def _short(key: str) -> str:
    return key if len(key) <= 40 and key.isprintable() else shown(key, 40)


def nearest(key: str, known: Collection[str]) -> str:
    """The end of a message about a key that is not known."""
    close = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(known))}"


def kinds_of(annotation: Any) -> Iterator[type]:
    """The types that a field's type is made of."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for argument in get_args(annotation):
        yield from (type(argument),) if get_origin(annotation) is Literal else kinds_of(argument)
