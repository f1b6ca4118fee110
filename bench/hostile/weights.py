"""Weights that people give to `merge` and `sample`: their own, others', broken ones, and where the result goes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hostile.bases import POINTER
from hostile.case import Case, Check, Seen, accepted, polyconcept, words, write
from hostile.common import Pickled, backbone, concept_weights, save_weights

Made = dict[str, Any]
ARGUMENTS = ("a.safetensors", "b.safetensors", "--captions", "captions.txt", "--out", "out.safetensors")


def prepare() -> None:
    """The base, once for all."""
    backbone()


def _good() -> None:
    save_weights("a.safetensors", concept_weights("bus", "<new1>", "bus", 1))
    save_weights("b.safetensors", concept_weights("cow", "<new2>", "cow", 2))
    write(**{"captions.txt": "a bus\na cow on the beach\nan umbrella\n"})


def is_whole(seen: Seen, name: str = "out.safetensors", concepts: int = 2) -> bool:
    from pipeline.merge.factors import MergedModel

    merged = MergedModel.load(Path(name))
    finite = all(t.isfinite().all() for t in [*merged.left.values(), *merged.right.values()])
    return finite and len(merged.metadata["concepts"]) == concepts


def merge(
    name: str,
    spoil: Callable[[], Any] = lambda: None,
    *arguments: str,
    refused: str | tuple[str, ...] = (),
    right: Check | None = None,
    writes: tuple[str, ...] | None = None,
) -> Case:
    """Two good files of weights, of which something is spoilt, and the command that merges them."""

    def give():
        _good()
        spoil()
        return lambda: polyconcept("merge", *(arguments or ARGUMENTS))

    if right is not None and writes is None:
        writes = ("out",)
    return Case(f"merge: {name}", give, words(refused), right, writes=writes)


def changed(change: Callable[[Made], Any]) -> Callable[[], None]:
    """The second file, with a change of its tensors or its description."""

    def spoil() -> None:
        made = concept_weights("cow", "<new2>", "cow", 2)
        change(made)
        save_weights("b.safetensors", made)

    return spoil


def tensor(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[], None]:
    """The second file, its first layer's change changed."""

    def apply(made: Made) -> None:
        name = next(iter(made["tensors"]))
        made["tensors"][name] = change(made["tensors"][name])
        if made["tensors"][name] is None:
            del made["tensors"][name]

    return changed(apply)


def all_tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    return changed(lambda made: made["tensors"].update({k: change(v) for k, v in made["tensors"].items()}))


def described(**changes: Any) -> Callable[[], None]:
    return changed(lambda made: made["described"].update(changes))


def token(new: str, name: str = "cow") -> Callable[[], None]:
    """The second file with another token."""

    def spoil() -> None:
        made = concept_weights(name, new, "cow", 2)
        save_weights("b.safetensors", made)

    return spoil


def raw(content: bytes | str, name: str = "b.safetensors") -> Callable[[], None]:
    return lambda: write(**{name: content})


def _special(make: Callable[[str], Any], name: str = "b.safetensors") -> Callable[[], None]:
    def spoil() -> None:
        os.unlink(name)
        make(name)

    return spoil


def _nan(t: torch.Tensor, value: float = float("nan")) -> torch.Tensor:
    t = t.clone()
    t[0, 0] = value
    return t


def header(described: dict[str, Any] | str, data: bytes = bytes(64), size: int | None = None) -> bytes:
    """A safetensors file by hand."""
    text = (described if isinstance(described, str) else json.dumps(described)).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def _rank_one() -> None:
    """Factors of one row that claim layers of 10^5 x 10^5: 80 GB when they are multiplied."""
    layer = next(iter(backbone().layers))
    tensors = {f"left.{layer}": torch.ones(100_000, 1), "right.shared": torch.ones(1, 100_000)}
    metadata = {
        "kind": "merged",
        "base": backbone().digest,
        "concepts": [{"name": "x", "token": "<x>", "class_word": "x"}],
    }
    save_file(tensors, "b.safetensors", {"polyconcept": json.dumps(metadata)})


def _lora(prefix: str, down: str, up: str, layers: str = "attn2.to_k") -> Callable[[], None]:
    def spoil() -> None:
        tensors = {}
        for name, layer in backbone().layers.items():
            key = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
            out, width = layer.weight.shape
            tensors |= {
                f"{key}.{down}.weight": torch.ones(4, width) * 0.01,
                f"{key}.{up}.weight": torch.ones(out, 4) * 0.01,
            }
            if prefix.endswith("_"):
                tensors[f"{key}.alpha"] = torch.tensor(4.0)
        if layers == "all":
            tensors["unet.conv_in.lora_A.weight"] = torch.ones(4, 4)
        save_file(tensors, "b.safetensors")

    return spoil


def _dense() -> None:
    """diffusers' custom-diffusion file: whole weights, not changes."""
    tensors = {}
    for name, layer in backbone().layers.items():
        attention, _, part = name.rpartition(".")
        tensors[f"{attention}.processor.{part}_custom_diffusion.weight"] = layer.weight.data.clone() + 0.01
    save_file(tensors, "b.safetensors")


def _pickled(name: str, content: Any) -> Callable[[], None]:
    return lambda: Path(name).write_bytes(pickle.dumps(content))


NFC, NFD = "<é>", "<e\u0301>"
OUT = "out.safetensors"
NAME = "b.safetensors"
CHANGED = [
    merge("two good files", right=is_whole),
    merge("one token twice", token("<new1>"), refused=(NAME, "<new1>")),
    merge("tokens that differ in case", token("<NEW1>"), refused=(NAME, "<NEW1>")),
    merge(
        "tokens equal but for their Unicode form",
        lambda: (token(NFD)(), save_weights("a.safetensors", concept_weights("bus", NFC, "bus", 1))),
        refused=NAME,
    ),
    merge("one name twice", token("<new2>", "bus"), refused=(NAME, "bus")),
    merge(
        "the same file twice", lambda: None, "a.safetensors", "a.safetensors", *ARGUMENTS[2:], refused="a.safetensors"
    ),
    merge("a token that the base knows", token("cat"), refused=(NAME, "cat")),
    merge("a token that the base knows in small letters", token("Cat"), refused=(NAME, "Cat")),
    merge("a token with a space", token("<a b>"), refused=(NAME, "<a b>")),
    merge("an empty token", token(""), refused=NAME),
    merge("NaN", tensor(_nan), refused=(NAME, "NaN|finite")),
    merge("infinity", tensor(lambda t: _nan(t, float("inf"))), refused=(NAME, "infinit|finite")),
    merge(
        "NaN in a token's row",
        changed(lambda m: m["tensors"].update({"token.0.<new2>": m["tensors"]["token.0.<new2>"] * float("nan")})),
        refused=(NAME, "NaN|finite"),
    ),
    merge("numbers near the largest", all_tensors(lambda t: t.sign() * 1e38), refused=NAME),
    merge("half precision", all_tensors(lambda t: t.half()), right=is_whole),
    merge("bfloat16", all_tensors(lambda t: t.bfloat16()), right=is_whole),
    merge("double precision", all_tensors(lambda t: t.double()), right=is_whole, refused=NAME),
    merge("bytes", all_tensors(lambda t: t.to(torch.int8)), refused=(NAME, "int8|type")),
    merge("true and false", all_tensors(lambda t: t > 0), refused=(NAME, "bool|type")),
    merge("complex numbers", all_tensors(lambda t: t.to(torch.complex64)), refused=(NAME, "complex|type")),
    merge("float8", all_tensors(lambda t: t.to(torch.float8_e4m3fn)), refused=(NAME, "float8|type"), right=is_whole),
    merge("a layer of another shape", tensor(lambda t: t[:, :-1].contiguous()), refused=NAME),
    merge("a layer turned", tensor(lambda t: t.t().contiguous()), refused=NAME, right=accepted),
    merge("a layer of one axis", tensor(lambda t: t.flatten()), refused=NAME),
    merge("an empty layer", tensor(lambda t: t[:0]), refused=NAME),
    merge("a layer missing", tensor(lambda _: None), refused=NAME),
    merge(
        "all layers missing",
        changed(lambda m: [m["tensors"].pop(k) for k in list(m["tensors"]) if k.startswith("delta")]),
        refused=NAME,
    ),
    merge(
        "a layer too many",
        changed(lambda m: m["tensors"].update({"delta.no.such.layer": torch.ones(2, 2)})),
        refused=NAME,
    ),
    merge(
        "a layer that is the UNet's, but not K or V",
        changed(lambda m: m["tensors"].update({"delta.conv_in.bias": torch.ones(32)})),
        refused=NAME,
    ),
    merge(
        "a row of another width",
        changed(lambda m: m["tensors"].update({"token.0.<new2>": torch.ones(3)})),
        refused=NAME,
    ),
    merge("a row missing", changed(lambda m: m["tensors"].pop("token.0.<new2>")), refused=NAME),
    merge(
        "a row for a second text encoder",
        changed(lambda m: m["tensors"].update({"token.1.<new2>": torch.ones(64)})),
        refused=NAME,
    ),
    merge(
        "a row whose encoder is a word",
        changed(lambda m: m["tensors"].update({"token.x.<new2>": torch.ones(64)})),
        refused=NAME,
    ),
    merge(
        "a row whose encoder is missing",
        changed(lambda m: m["tensors"].update({"token.": torch.ones(64)})),
        refused=NAME,
    ),
    merge(
        "a row whose encoder is an Arabic digit",
        changed(lambda m: m["tensors"].update({"token.٠.<x>": torch.ones(64)})),
        refused=NAME,
    ),
    merge("another base's weights", described(base="0" * 16), refused=(NAME, "0000")),
    merge("no base", described(base=None), refused=NAME),
    merge("a base that is a list", described(base=["x"]), refused=NAME),
    merge("concepts that are a word", described(concepts="x"), refused=NAME),
    merge("concepts that are none", described(concepts=[]), refused=NAME),
    merge("a concept without a name", described(concepts=[{"token": "<new2>", "class_word": "cow"}]), refused=NAME),
    merge(
        "a concept whose name is a number",
        described(concepts=[{"name": 5, "token": "<new2>", "class_word": "cow"}]),
        refused=NAME,
    ),
    merge(
        "a concept whose name is a list",
        described(concepts=[{"name": ["x"], "token": "<new2>", "class_word": "cow"}]),
        refused=NAME,
    ),
    merge(
        "a concept with another token than its row's",
        described(concepts=[{"name": "cow", "token": "<other>", "class_word": "cow"}]),
        refused=NAME,
    ),
    merge(
        "a concept whose name is an escape",
        described(concepts=[{"name": "\x1b[31m", "token": "<new2>", "class_word": "cow"}]),
        refused=NAME,
    ),
    merge(
        "a class word too long",
        described(concepts=[{"name": "cow", "token": "<new2>", "class_word": "very " * 200}]),
        refused=NAME,
    ),
    merge(
        "a class word with braces",
        described(concepts=[{"name": "cow", "token": "<new2>", "class_word": "{0.__class__}"}]),
        refused=NAME,
        right=is_whole,
    ),
    merge("a kind that is unknown", described(kind="other"), refused=NAME),
    merge("a kind that is a list", described(kind=["x"]), refused=NAME),
    merge("a method that changes more", described(method="dreambooth"), refused=NAME, right=accepted),
    merge("no description", lambda: save_weights("b.safetensors", concept_weights(token="<new2>"), {}), refused=NAME),
    merge(
        "a description that is no JSON",
        lambda: save_weights("b.safetensors", concept_weights(token="<new2>"), {"polyconcept": "{"}),
        refused=NAME,
    ),
    merge(
        "a description that is a list",
        lambda: save_weights("b.safetensors", concept_weights(token="<new2>"), {"polyconcept": "[]"}),
        refused=NAME,
    ),
    merge(
        "a description that is nested",
        lambda: save_weights("b.safetensors", concept_weights(token="<new2>"), {"polyconcept": "[" * 100_000}),
        refused=NAME,
    ),
]
FILES = [
    merge("an empty file", raw(b""), refused=NAME),
    merge("text", raw("hello"), refused=NAME),
    merge("a Git LFS pointer", raw(POINTER), refused=NAME),
    merge("a file cut off", lambda: os.truncate("b.safetensors", os.path.getsize("b.safetensors") // 2), refused=NAME),
    merge("a header of 2^63 bytes", raw(header("{}", size=2**63)), refused=NAME),
    merge("a header that is no JSON", raw(header("hello")), refused=NAME),
    merge("a header that is a list", raw(header("[]")), refused=NAME),
    merge("a header that is nested", raw(header("[" * 100_000)), refused=NAME),
    merge(
        "a tensor of 80 GB that is not there",
        raw(header({"delta.x": {"dtype": "F32", "shape": [20_000_000_000], "data_offsets": [0, 80_000_000_000]}})),
        refused=NAME,
    ),
    merge(
        "tensors that share bytes",
        raw(header({k: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for k in "ab"})),
        refused=NAME,
    ),
    merge("an unknown type", raw(header({"a": {"dtype": "F7", "shape": [16], "data_offsets": [0, 64]}})), refused=NAME),
    merge(
        "a negative shape", raw(header({"a": {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}})), refused=NAME
    ),
    merge("rank-one factors that claim 80 GB", _rank_one, refused=NAME),
    merge("a pickle in its place", _pickled(NAME, Pickled()), refused=NAME),
    merge("a pickled .bin", _pickled("b.bin", Pickled()), "a.safetensors", "b.bin", *ARGUMENTS[2:], refused="b.bin"),
    merge(
        "a file that torch saved",
        lambda: torch.save({"x": torch.ones(3)}, "b.pt"),
        "a.safetensors",
        "b.pt",
        *ARGUMENTS[2:],
        refused="b.pt",
    ),
    merge(
        "a file that torch saved, with code",
        lambda: torch.save(Pickled(), "b.bin"),
        "a.safetensors",
        "b.bin",
        *ARGUMENTS[2:],
        refused="b.bin",
    ),
    merge("nothing there", lambda: os.unlink(NAME), refused=NAME),
    merge("a folder", _special(os.mkdir), refused=NAME),
    merge("a FIFO", _special(os.mkfifo), refused=NAME),
    merge("/dev/zero", _special(lambda n: os.symlink("/dev/zero", n)), refused=NAME),
    merge("a link to itself", _special(lambda n: os.symlink(n, n)), refused=NAME),
    merge("a kohya LoRA of K and V", _lora("lora_unet_", "lora_down", "lora_up"), refused=NAME, right=accepted),
    merge("a PEFT LoRA of K and V", _lora("unet.", "lora_A", "lora_B"), refused=NAME, right=accepted),
    merge("a LoRA of more than K and V", _lora("unet.", "lora_A", "lora_B", "all"), refused=NAME),
    merge("diffusers' custom-diffusion file without a token", _dense, refused=NAME, right=accepted),
    merge("a textual inversion alone", lambda: save_file({"<new2>": torch.ones(64)}, NAME), refused=NAME),
    merge("no files", lambda: None, *ARGUMENTS[2:], refused="weights|concepts"),
]
CAPTIONS = [
    merge("no captions", lambda: os.unlink("captions.txt"), refused="captions.txt"),
    merge("empty captions", raw("", "captions.txt"), refused="captions.txt"),
    merge("blank captions", raw(" \n\t\n", "captions.txt"), refused="captions.txt"),
    merge("captions in Latin-1", raw(b"caf\xe9\n", "captions.txt"), refused="captions.txt"),
    merge("captions in UTF-16", raw("a bus\n".encode("utf-16"), "captions.txt"), refused="captions.txt"),
    merge("captions that are bytes", raw(bytes(range(256)), "captions.txt"), refused="captions.txt"),
    merge("captions with a byte order mark", raw("\ufeffa bus\n", "captions.txt"), right=is_whole),
    merge("a caption of 1 MB", raw("very " * 200_000, "captions.txt"), right=is_whole, refused="captions.txt"),
    merge("a folder as captions", _special(os.mkdir, "captions.txt"), refused="captions.txt"),
    merge("a FIFO as captions", _special(os.mkfifo, "captions.txt"), refused="captions.txt"),
    merge(
        "/dev/zero as captions", _special(lambda n: os.symlink("/dev/zero", n), "captions.txt"), refused="captions.txt"
    ),
]


def out(name: str, spoil: Callable[[], Any], place: str, *more: str, **expected: Any) -> Case:
    return merge(name, spoil, *ARGUMENTS[:4], "--out", place, *more, **expected)


PLACES = [
    out("out is an input", lambda: None, "a.safetensors", refused="a.safetensors"),
    out("out is an input by another path", lambda: None, "./x/../a.safetensors", refused="a.safetensors"),
    out("out is a link to an input", lambda: os.symlink("a.safetensors", OUT), OUT, refused=OUT),
    out("out is a hard link of an input", lambda: os.link("a.safetensors", OUT), OUT, refused=OUT),
    out("out is the captions", lambda: None, "captions.txt", refused="captions.txt"),
    out("out is the sums", lambda: None, "sums.safetensors", "--sums", "sums.safetensors", refused="sums.safetensors"),
    out("out is a folder", lambda: os.mkdir("o"), "o", refused="o"),
    out(
        "out is in a folder that is not there",
        lambda: None,
        "gone/out.safetensors",
        refused="gone",
        right=lambda s: is_whole(s, "gone/out.safetensors"),
        writes=("gone",),
    ),
    out("out is a file's inside", lambda: None, "captions.txt/out.safetensors", refused="captions.txt"),
    out("out is empty", lambda: None, "", refused="--out|out"),
    out("out has NUL", lambda: None, "a\0b", refused="out|a"),
    out("out has 300 letters", lambda: None, "x" * 300, refused="xxx"),
    out("out is a FIFO", lambda: os.mkfifo(OUT), OUT, refused=OUT),
    out("sums are an input", lambda: None, OUT, "--sums", "a.safetensors", refused="a.safetensors"),
    out("sums are text", raw("x", "sums.safetensors"), OUT, "--sums", "sums.safetensors", refused="sums.safetensors"),
    out("sums are the captions", lambda: None, OUT, "--sums", "captions.txt", refused="captions.txt"),
    out(
        "sums with the paper's form", lambda: None, OUT, "--sums", "sums.safetensors", "--form", "paper", refused="sums"
    ),
    out("a removal without sums", lambda: None, OUT, "--remove", "a.safetensors", refused="sums|remove"),
    out(
        "a removal of what is not merged",
        lambda: None,
        OUT,
        "--sums",
        "sums.safetensors",
        "--remove",
        "a.safetensors",
        refused="a.safetensors",
    ),
    out("an unknown form", lambda: None, OUT, "--form", "medium", refused="medium"),
    out("an unknown base", lambda: None, OUT, "--base", "./gone", refused="gone"),
]


def sample(
    name: str,
    *arguments: str,
    spoil: Callable[[], Any] = lambda: None,
    refused: str | tuple[str, ...] = (),
    right: Check | None = None,
    weights: str = "a.safetensors",
    prompt: str = "photo of a <new1> bus",
    out: str = "out.png",
) -> Case:
    def give():
        _good()
        spoil()
        options = {"--steps": "1", "--count": "1", "--out": out} | dict(
            zip(arguments[::2], arguments[1::2], strict=True)
        )
        return lambda: polyconcept("sample", weights, prompt, *[word for pair in options.items() for word in pair])

    return Case(f"sample: {name}", give, words(refused), right, writes=("out",) if right else None)


def drawn(_: Seen) -> bool:
    from PIL import Image

    return Image.open("out.png").width > 10


def _release() -> None:
    """Somebody else's release that is no longer whole."""
    os.makedirs("rel/v0001")
    shutil.copy("a.safetensors", "rel/v0001/merged.safetensors")


SAMPLES = [
    sample("a good file", right=drawn),
    sample("no such token in the prompt", prompt="photo of a bus", right=drawn),
    sample("an empty prompt", prompt="", refused="prompt", right=drawn),
    sample("a prompt too long", prompt="very " * 200 + "<new1> bus", refused="prompt|token"),
    sample("a prompt with an escape", prompt="a <new1> \x1b[31m", refused="prompt", right=drawn),
    sample("out is no picture", out="a.safetensors", refused="--out"),
    sample("out is in no folder", out="gone/out.png", refused="gone"),
    sample("out is a folder", out="o.png", spoil=lambda: os.mkdir("o.png"), refused="o.png"),
    sample(
        "out is a link to the weights",
        out="out.png",
        spoil=lambda: os.symlink("a.safetensors", "out.png"),
        refused="out.png",
    ),
    sample("out is a FIFO", out="o.png", spoil=lambda: os.mkfifo("o.png"), refused="o.png"),
    sample("a seed of 2^64", "--seed", str(2**64), refused="seed"),
    sample("a seed of 2^64 - 1", "--seed", str(2**64 - 1), refused="seed", right=drawn),
    sample("a negative seed", "--seed", "-1", refused="seed", right=drawn),
    sample("ComfyUI's seed", "--seed", "156680208700286", right=drawn),
    sample("1 001 steps", "--steps", "1001", refused="steps"),
    sample("no steps", "--steps", "0", refused="steps"),
    sample("guidance nan", "--guidance", "nan", refused="guidance"),
    sample("guidance inf", "--guidance", "inf", refused="guidance"),
    sample("no such file", weights="gone.safetensors", refused="gone.safetensors"),
    sample("a folder that is no release", weights=".", refused="release|."),
    sample("a release without its manifest", weights="rel/v0001", spoil=_release, refused="rel", right=drawn),
    sample("an address of no server", weights="http://127.0.0.1:9/a.safetensors", refused="127.0.0.1:9"),
    sample("an address with a password", weights="http://me:SECRET@127.0.0.1:9/a.safetensors", refused="127.0.0.1:9"),
    sample("another base's weights", weights="b.safetensors", spoil=described(base="0" * 16), refused="b.safetensors"),
    sample("no base", weights="b.safetensors", spoil=described(base=""), refused="b.safetensors"),
    sample("NaN", weights="b.safetensors", spoil=tensor(_nan), refused=("b.safetensors", "NaN|finite")),
    sample(
        "a layer of another shape", weights="b.safetensors", spoil=tensor(lambda t: t[:-1]), refused="b.safetensors"
    ),
    sample(
        "complex numbers",
        weights="b.safetensors",
        spoil=all_tensors(lambda t: t.to(torch.complex64)),
        refused="b.safetensors",
    ),
    sample(
        "a row of another width",
        weights="b.safetensors",
        spoil=changed(lambda m: m["tensors"].update({"token.0.<new2>": torch.ones(3)})),
        refused="b.safetensors",
    ),
    sample("rank-one factors that claim 80 GB", weights="b.safetensors", spoil=_rank_one, refused="b.safetensors"),
    sample(
        "a token that the base knows beside a new one",
        weights="b.safetensors",
        spoil=changed(lambda m: m["tensors"].update({"token.0.cat": m["tensors"]["token.0.<new2>"] * 3})),
        refused=("b.safetensors", "cat"),
    ),
    sample("text", weights="b.safetensors", spoil=raw("hello"), refused="b.safetensors"),
    sample("a pickle", weights="b.safetensors", spoil=_pickled("b.safetensors", Pickled()), refused="b.safetensors"),
]


def twice() -> Callable[[], tuple[bytes, bytes]]:
    """The same merge, twice."""
    _good()

    def merged() -> tuple[bytes, bytes]:
        polyconcept("merge", *ARGUMENTS)
        first = Path(OUT).read_bytes()
        polyconcept("merge", *ARGUMENTS)
        return first, Path(OUT).read_bytes()

    return merged


TWICE = [Case("merge: twice, byte for byte", twice, right=lambda s: s.result[0] == s.result[1], writes=("out",))]

CASES = [*CHANGED, *FILES, *CAPTIONS, *PLACES, *SAMPLES, *TWICE]
