"""Lists of concepts as other trainers have them, in this project's form.

    [{"instance_prompt": "photo of a <new1> cat", "class_prompt": "cat", "instance_data_dir": …}, …]

It is the form of the authors' trainer, of diffusers' `train_custom_diffusion.py` and, with a prompt suite each in
`prompt_filename`, of the authors' 101-concept benchmark. `class_data_dir` is not used: regularisation images are
retrieved.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pipeline.mistakes import nearest
from pipeline.reading import LONGEST_NAME, shown
from training.methods.method import Method

KEYS = ("instance_prompt", "class_prompt", "instance_data_dir", "class_data_dir", "prompt_filename")
ARTICLE = r"(?:an?|the)(?:\s+|$)"
PHOTO = "photo|photograph|picture|image|pic"
ART = "painting|drawing|rendering|rendition|illustration|portrait|sketch|shot"
FRAME = re.compile(
    rf"(?:(?:{ARTICLE})?(?P<kind>(?:[\w-]+\s+){{0,2}}?(?:{PHOTO}|{ART})s?)\s+(?:of|showing)\s+)?(?:{ARTICLE})?",
    re.IGNORECASE,
)
"""What a prompt has before the thing that it shows."""


def concepts_of(
    path: Path, entries: list[Any], folder: Path, method: Method
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The concepts of a list, and notes on what is understood otherwise than it may be meant.

    path: of the list, for messages. folder: of the list, from the batch file's. method: that is to train; only one that
    has concepts go by rare words takes a word like `sks` as it is.

    Raises: ValueError naming the file and the entry.
    """
    concepts: list[dict[str, Any]] = []
    notes: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        where = f"{path}: [{i}]"
        _check(entry, where)
        class_word = _split(entry["class_prompt"])[1]
        if not class_word:
            raise ValueError(f"{where}.class_prompt: names no class; found {shown(entry['class_prompt'])}")
        try:
            token, remarks = _token(entry["instance_prompt"], class_word, method)
        except ValueError as error:
            raise ValueError(f"{where}.instance_prompt: {error}") from None
        for remark in remarks:
            notes.setdefault(remark, []).append(i)
        images, suite = Path(entry["instance_data_dir"]), entry.get("prompt_filename")
        concepts.append(
            {
                "name": f"{i + 1:03d}-{re.sub('[^A-Za-z0-9_-]', '-', images.name)}"[:LONGEST_NAME],
                "images": [os.path.join(folder, os.path.expanduser(images))],
                "class_word": class_word,
                "token": token,
                "class_prompt": entry["class_prompt"],
                "prompts": [os.path.join(folder, os.path.expanduser(suite))] if suite else [],
            }
        )
    if len(concepts) > 1 and len({c["token"] for c in concepts}) == 1:
        for concept in concepts:  # the benchmark trains each in a run of its own, always as `<new1>`
            concept["token"] = ""
    others = {note: f" and {len(at) - 1} more" if at[1:] else "" for note, at in notes.items()}
    return concepts, tuple(f"{path}: [{at[0]}]{others[note]}: {note}" for note, at in notes.items())


def _check(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a mapping, found {shown(entry)}")
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"{where}.{shown(key)[1:-1]}: unknown key{nearest(key, KEYS)}")
    for key in KEYS[:3]:
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            found = f"expected text, found {shown(entry[key])}" if key in entry else "missing"
            raise ValueError(f"{where}.{key}: {found}; the form is {', '.join(KEYS[:3])}")
    if not isinstance(entry.get("prompt_filename", ""), str | None):
        raise ValueError(f"{where}.prompt_filename: expected text, found {shown(entry['prompt_filename'])}")


def _split(prompt: str) -> tuple[str, str]:
    """What kind of picture a prompt asks for, if it says, and of what: `a photo of a wooden pot.` -> wooden pot."""
    words = " ".join(prompt.split()).rstrip(" .,;!")
    found = FRAME.match(words)
    assert found  # it may be empty
    return found["kind"] or "", words[found.end() :]


def _token(prompt: str, class_word: str, method: Method) -> tuple[str, list[str]]:
    """The token that an instance prompt names, empty for one by position, and what of the prompt is not used.

    Raises: ValueError for two tokens.
    """
    kind, thing = _split(prompt)
    words = thing.split()
    tokens = [word for word in words if word.startswith("<") and word.endswith(">")]
    if len(tokens) > 1:
        raise ValueError(f"expected one new token like <new1>, found {shown(' '.join(tokens))}")
    known = re.search(rf"(?<!\S){re.escape(class_word)}(?!\S)", thing, re.IGNORECASE)
    before, after = (thing[: known.start()], thing[known.end() :]) if known else (thing, "")
    rest = [word for word in before.split() if word not in tokens]
    notes = []
    token = "".join(tokens)
    if not token and len(rest) == 1:
        (identifier,) = rest
        rest = []
        if method.token == "rare":
            token = identifier
        else:
            notes.append(
                f"{shown(identifier)} is not the concept's token: {method.name} makes new ones, <new1>, <new2>, … by "
                "position, which stand in its place"
            )
    unused = " ".join([*rest, *after.split()])
    if not re.fullmatch(rf"(?:{PHOTO})?s?", kind, re.IGNORECASE):
        unused = f"{kind} of … {unused}".strip()
    if unused:
        notes.append(f"{shown(unused)} of the instance prompt is not used: `training.prompt` captions all images")
    return token, notes
