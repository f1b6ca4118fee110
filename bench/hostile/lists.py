"""Lists of concepts of other trainers (`concepts_list.json`, `dataset.json`), and block lists."""

from __future__ import annotations

import json
import os
from typing import Any

from hostile.case import Case, Check, Seen, accepted, words, write
from hostile.common import BUS, COW, batch_text, load, planned

LIST = "concepts_list.json"


def listed(
    name: str, *entries: Any, text: str | bytes | None = None, refused=(), right: Check | None = None, plan=True
) -> Case:
    """A list of concepts that is the batch file itself."""

    def give():
        write(**{LIST: json.dumps(entries) if text is None else text})
        return lambda: load(LIST)

    return Case(name, give, words(refused), right)


def entry(
    instance: Any = "photo of a <new1> bus", prompt: Any = "bus", folder: Any = str(BUS), **more: Any
) -> dict[str, Any]:
    return {"instance_prompt": instance, "class_prompt": prompt, "instance_data_dir": folder} | more


def _is_bus(seen: Seen) -> bool:
    return all(concept.class_word == "bus" for concept in seen.result.concepts)


def _with_token(seen: Seen) -> bool:
    """The identifier is kept as the token, or a note says that it is not."""
    (concept,) = seen.result.concepts
    return concept.class_word == "bus" and (
        "sks" in concept.token or "sks" in " ".join([seen.text, *getattr(seen.result, "notes", ())])
    )


CLASSES = [
    listed(f"class_prompt: {prompt!r}", entry(prompt=prompt), right=_is_bus)
    for prompt in (
        "bus",
        "photo of a bus",
        "a photo of a bus",
        "a photo of bus",
        "photo of bus",
        "a bus",
        "A photo of a bus",
        "the photo of the bus",
        "photo of an bus",
        "a picture of a bus",
        "  a photo of a bus  ",
        "a photo of the bus",
        "Photo Of A bus",
    )
]
LISTS = [
    *CLASSES,
    listed(
        "DreamBooth's prompts with sks", entry("a photo of sks bus", "a photo of bus"), right=_with_token, refused="sks"
    ),
    listed("sks and an article", entry("a photo of a sks bus", "a photo of a bus"), right=_with_token, refused="sks"),
    listed("class_prompt: a photo of a", entry(prompt="photo of a "), refused=(LIST, "class_prompt")),
    listed("a blank class_prompt", entry(prompt="  "), refused=(LIST, "class_prompt")),
    listed("an empty list", refused=(LIST, "concepts")),
    listed("a list of words", "bus", refused=(LIST, "[0]")),
    listed("a list in a list", [entry()], refused=(LIST, "[0]")),
    listed("null in it", entry(), None, refused=(LIST, "[1]")),
    listed(
        "no instance_data_dir", {"instance_prompt": "a", "class_prompt": "bus"}, refused=(LIST, "instance_data_dir")
    ),
    listed("a number as prompt", entry(5), refused=(LIST, "instance_prompt")),
    listed("a number as folder", entry(folder=5), refused=(LIST, "instance_data_dir")),
    listed("an empty folder", entry(folder=""), refused=(LIST, "instance_data_dir")),
    listed("an unknown key", entry(caption="x"), refused=(LIST, "caption")),
    listed("two tokens in a prompt", entry("photo of <a> <b> bus"), refused=(LIST, "instance_prompt")),
    listed(
        "a token with a full stop behind it",
        entry("photo of a <new1>, bus."),
        right=lambda s: s.result.concepts[0].token == "<new1>",
        refused=(LIST, "instance_prompt"),
    ),
    listed("class_data_dir and num_class_images of other scripts", entry(class_data_dir="x"), right=accepted),
    listed(
        "two of one token",
        entry(),
        entry(folder=str(COW)),
        right=lambda s: len({c.token for c in s.result.concepts}) == 2,
    ),
    listed(
        "two of one token of three",
        entry(),
        entry(folder=str(COW)),
        entry("photo of a <new2> cat"),
        refused=(LIST, "token|<new1>"),
    ),
    listed("a prompt suite that is not there", entry(prompt_filename="gone.txt"), refused="gone.txt"),
    listed("a byte order mark", text="\ufeff" + json.dumps([entry()]), right=_is_bus),
    listed("UTF-16", text=json.dumps([entry()]).encode("utf-16"), refused=LIST, right=_is_bus),
    listed(
        "a key twice", text=json.dumps([entry()])[:-2] + ', "class_prompt": "cow"}]', refused=(LIST, "class_prompt")
    ),
    listed("JSON lines", text=json.dumps(entry()) + "\n" + json.dumps(entry()), refused=LIST),
    listed("cut off", text=json.dumps([entry()])[:40], refused=LIST),
    listed("single quotes", text=str([entry()]), refused=LIST),
    listed("nested 100 000 times", text="[" * 100_000, refused=LIST),
    listed("an object of lists", text=json.dumps({"bus": [entry()]}), refused=(LIST, "bus")),
    listed("folders in ~", entry(folder="~/photos"), right=lambda s: "~" not in s.result.concepts[0].images[0]),
    listed("Windows' folders", entry(folder="C:\\photos\\bus"), right=accepted),
]


def _fifo_list():
    os.mkfifo("list.json")
    write(**{"batch.yaml": "concepts: list.json\n"})
    return lambda: load()


BESIDE = [
    Case("a FIFO as list of concepts", _fifo_list, ("list.json",)),
    Case(
        "a list that names itself as the batch file does",
        lambda: (write(**{"b.json": '{"concepts": "b.json"}'}), lambda: load("b.json"))[1],
        ("b.json",),
    ),
]

SUM, OTHER = "ab" * 32, "0123456789abcdef" * 4


def block_list(name: str, text: str | bytes | None, blocks: set[str] | None = None, refused=()) -> Case:
    """A block list of a plan of retrieved images. blocks: sums that it is to be read as."""

    def give():
        write(**{"batch.yaml": batch_text("retrieval: {block_list: blocked.txt}").replace("none", "real")})
        if text is None:
            os.mkfifo("blocked.txt")
        else:
            write(**{"blocked.txt": text})
        return planned

    def blocked(seen: Seen) -> bool:
        return all(set(s.block_list) == blocks for s in seen.result if hasattr(s, "block_list"))

    return Case(f"block list: {name}", give, words(refused), None if blocks is None else blocked)


BLOCKS = [
    block_list("plain", f"{SUM}\n{OTHER}\n", {SUM, OTHER}),
    block_list("capitals", f"{SUM.upper()}\n", {SUM}),
    block_list("as sha256sum prints it", f"{SUM}  photos/a b.jpg\n{OTHER}  c.jpg\n", {SUM, OTHER}),
    block_list("as sha256sum prints binary files", f"{SUM} *a.jpg\n", {SUM}),
    block_list("as sha256sum prints a name with a backslash", f"\\{SUM}  a\\\\b.jpg\n", {SUM}, ("blocked.txt", "1")),
    block_list("as BSD prints it", f"SHA256 (a.jpg) = {SUM}\n", {SUM}, ("blocked.txt", "1")),
    block_list("a byte order mark", f"\ufeff{SUM}\n", {SUM}),
    block_list("Windows' line ends", f"{SUM}\r\n{OTHER}\r\n", {SUM, OTHER}),
    block_list("empty lines and spaces", f"\n  {SUM}  \n\n", {SUM}),
    block_list("a comment", f"# mine\n{SUM}\n", {SUM}, ("blocked.txt", "1")),
    block_list("empty", "", set(), "blocked.txt"),
    block_list("a line that is none", f"{SUM}\nhello\n", refused=("blocked.txt", "2")),
    block_list("a sum of 63 digits", f"{SUM[:-1]}\n", refused=("blocked.txt", "1")),
    block_list("a sum of 65 digits", f"{SUM}a\n", refused=("blocked.txt", "1")),
    block_list("MD5 sums", "d41d8cd98f00b204e9800998ecf8427e\n", refused=("blocked.txt", "1")),
    block_list("a letter that is no digit", f"g{SUM[1:]}\n", refused=("blocked.txt", "1")),
    block_list("full-width digits", f"{'ａｂ' * 32}\n", refused=("blocked.txt", "1")),
    block_list("commas", f"{SUM},{OTHER}\n", {SUM, OTHER}, ("blocked.txt", "1")),
    block_list("UTF-16", f"{SUM}\n".encode("utf-16"), {SUM}, "blocked.txt"),
    block_list("bytes", bytes(range(256)), refused="blocked.txt"),
    block_list("a FIFO", None, refused="blocked.txt"),
]

CASES = [*LISTS, *BESIDE, *BLOCKS]
