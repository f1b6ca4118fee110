"""Batch files: their YAML, their numbers, names, tokens, words, prompts and places."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

from hostile.case import Case, Seen, accepted, polyconcept, write
from hostile.common import BUS, CLIP, COW, MODEL, batch, batch_text, finished, load, planned

FILE = "batch.yaml"


def _fifo() -> None:
    os.unlink(FILE)
    os.mkfifo(FILE)


def _link(to: str) -> None:
    os.unlink(FILE)
    os.symlink(to, FILE)


def _folder() -> None:
    os.unlink(FILE)
    os.mkdir(FILE)


def _elsewhere(name: str, right, refused=()) -> Case:
    """A correct batch under an odd name."""

    def give():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(batch_text())
        return lambda: planned(name)

    return Case(f"file {name!r}", give, refused, right)


def _missing(name: str, refused) -> Case:
    return Case(f"no file {name!r}", lambda: lambda: planned(name), refused)


def _is_text(seen: Seen) -> bool:
    return seen.result.batch.concepts[0].class_word == "2026-01-01"


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
GOOD = batch_text()

FORMS = [
    batch("empty", "", refused=FILE),
    batch("a comment only", "# nothing\n", refused=FILE),
    batch("a list", "- a\n- b\n", refused=FILE),
    batch("a word", "hello\n", refused=FILE),
    batch("a tab as indentation", "concepts:\n\t- name: a\n", refused=(FILE, "line 2|:2")),
    batch("a bracket that stays open", "concepts: [{name: a\n", refused=FILE),
    batch("two documents", GOOD + "---\n" + GOOD, refused=FILE),
    batch("concepts twice", GOOD + GOOD, refused=(FILE, "concepts")),
    batch("a setting twice", training="steps: 3, steps: 4", refused=(FILE, "steps")),
    batch("a concept's key twice", class_word="bus, class_word: cow", refused=(FILE, "class_word")),
    batch("a key twice through a quoted form", training='steps: 3, "steps": 4', refused=(FILE, "steps")),
    batch("aliases that multiply", ALIASES + "name: *h\n" + GOOD, refused=FILE),
    batch("aliases that multiply as an unknown key", ALIASES + "nothing: *h\n" + GOOD, refused=FILE),
    batch("3 000 brackets", "name: " + "[" * 3000 + "]" * 3000 + "\n" + GOOD, refused=FILE),
    batch("100 000 brackets that stay open", "name: " + "[" * 100_000, refused=FILE),
    batch("3 000 nested mappings", "name: " + "{a: " * 3000 + "1" + "}" * 3000, refused=FILE),
    batch("a Python object", "name: !!python/object/apply:os.system ['touch executed']\n" + GOOD, refused=FILE),
    batch("a Python name", "name: !!python/name:os.system\n" + GOOD, refused=FILE),
    batch("an own tag", "name: !mine x\n" + GOOD, refused=FILE),
    batch("a time as class word", class_word="2026-01-01", refused=(FILE, "class_word"), right=_is_text),
    batch("!!timestamp of no time", class_word='!!timestamp "x"', refused=FILE),
    batch("!!bool of no truth", class_word='!!bool "x"', refused=FILE),
    batch("!!int of no number", class_word='!!int "x"', refused=FILE),
    batch("!!float of no number", class_word='!!float "x"', refused=FILE),
    batch("!!binary as class word", class_word="!!binary YnVz", refused=FILE),
    batch("broken !!binary", class_word="!!binary é", refused=FILE),
    batch("a set of concepts", "concepts: !!set {a, b}\n", refused=(FILE, "concepts|set")),
    batch("!!omap", "concepts: !!omap [a: 1]\n", refused=FILE),
    batch("an anchor that holds itself", "concepts: &a [*a]\n", refused=FILE),
    batch("an alias of nothing", "name: *nothing\n" + GOOD, refused=FILE),
    batch("merge keys", "x: &x {steps: 3}\ntraining: {<<: *x}\n" + GOOD, refused=FILE),
    batch("a complex key", "? [a, b]\n: c\n" + GOOD, refused=FILE),
    batch("a mapping as key", "{a: b}: c\n" + GOOD, refused=FILE),
    batch("a number as key", "1: x\n" + GOOD, refused=(FILE, "1")),
    batch("null as key", "~: x\n" + GOOD, refused=FILE),
    batch("a NUL byte", GOOD.encode() + b"name: a\0b\n", refused=FILE),
    batch("an escape sequence", GOOD.encode() + b"name: \x1b[31mred\n", refused=FILE),
    batch("an escape sequence, quoted", GOOD + 'name: "\\e[31mred"\n', refused=(FILE, "name")),
    batch("UTF-16", GOOD.encode("utf-16"), refused=FILE, right=accepted),
    batch("Latin-1", ("# Käse\n" + GOOD).encode("latin-1"), refused=FILE),
    batch("a byte order mark", "\ufeff" + GOOD, right=accepted),
    batch("Windows' line ends", GOOD.replace("\n", "\r\n"), right=accepted),
    batch("a line separator in a word", class_word='"bus\u2028x"', refused=(FILE, "class_word"), right=accepted),
    batch("20 MB of comment", "#" + "x" * 20_000_000 + "\n" + GOOD, refused=FILE, right=accepted),
    batch("a million entries", GOOD + "nothing: [" + "x," * 1_000_000 + "]\n", refused=FILE),
    batch("a folder", "", prepare=_folder, refused=FILE),
    batch("a FIFO that nobody writes", "", prepare=_fifo, refused=FILE),
    batch("/dev/zero", "", prepare=lambda: _link("/dev/zero"), refused=FILE),
    batch("a link to nothing", "", prepare=lambda: _link("gone"), refused=FILE),
    batch("a link to itself", "", prepare=lambda: _link(FILE), refused=FILE),
    batch("a picture", BUS.joinpath("1.png").read_bytes(), refused=FILE),
    _missing("gone.yaml", ("gone.yaml",)),
    _missing("gone/\x1b[31m.yaml", ("gone",)),
    _missing("x" * 5000 + ".yaml", ("xxx",)),
    _missing("", ("batch file|no such file|directory|folder",)),
    _elsewhere("[work]/batch.yaml", accepted),
    _elsewhere("a b/батч.yaml", accepted),
    _elsewhere(os.fsdecode(b"b\xff.yaml"), accepted),
    _elsewhere("batch.yml", accepted),
    _elsewhere("BATCH.YAML", accepted),
    _elsewhere("batch", accepted),
    _elsewhere("-batch.yaml", accepted),
]


def _json(name: str, text: str | bytes, **expected) -> Case:
    def give():
        write(**{"batch.json": text})
        return lambda: planned("batch.json")

    return Case(f"JSON: {name}", give, **expected)


CONTENT = json.dumps(
    {"concepts": [{"name": "bus", "images": str(BUS), "class_word": "bus"}], "training": {"regularization": "none"}}
)
JSON = [
    _json("a byte order mark", "\ufeff" + CONTENT, right=accepted),
    _json("a key twice", CONTENT[:-1] + ', "training": {}}', refused=("batch.json", "training")),
    _json("a comma too many", CONTENT[:-1] + ",}", refused=("batch.json",)),
    _json(
        "NaN", CONTENT.replace('"none"', '"none", "learning_rate": NaN'), refused=("batch.json", "learning_rate|NaN")
    ),
    _json(
        "1e999", CONTENT.replace('"none"', '"none", "learning_rate": 1e999'), refused=("batch.json", "learning_rate")
    ),
    _json(
        "a number of 5 000 digits", CONTENT.replace('"none"', f'"none", "seed": {"9" * 5000}'), refused=("batch.json",)
    ),
    _json("3 000 brackets", "[" * 3000 + "]" * 3000, refused=("batch.json",)),
    _json("200 000 brackets", "[" * 200_000 + "]" * 200_000, refused=("batch.json",)),
    _json("empty", "", refused=("batch.json",)),
    _json("null", "null", refused=("batch.json",)),
    _json(
        "a lone surrogate",
        CONTENT.replace('"bus"}', '"bus\\ud800"}'),
        refused=("batch.json", "class_word|surrogate|Unicode"),
    ),
]

STEPS = [
    batch(f"steps: {value}", training=f"steps: {value}", refused=(FILE, "steps"))
    for value in (
        "yes",
        "on",
        "true",
        "0",
        "-1",
        "4.5",
        ".inf",
        ".nan",
        "null x",
        "[4]",
        "{a: 4}",
        "four",
        "''",
        "1:30x",
    )
] + [
    batch("steps: 4.0", training="steps: 4.0", refused=(FILE, "steps"), right=accepted),
    batch("steps of 30 digits", training=f"steps: {10**30}", refused=(FILE, "steps")),
    batch(
        "learning_rate: 1e-4",
        training="learning_rate: 1e-4",
        right=lambda s: s.result.batch.training.learning_rate == 1e-4,
    ),
]
YES = (
    [
        batch(f"{key}: yes", refused=(FILE, key), **{section: f"{key}: yes"})
        for section, keys in {
            "training": (
                "batch_size",
                "views",
                "seed",
                "learning_rate",
                "prior_weight",
                "max_grad_norm",
                "ranks",
                "pack_size",
                "checkpoint_every",
                "sample_every",
                "weight_decay",
                "token_learning_rate",
            ),
            "evaluation": ("samples", "steps", "guidance", "seed"),
        }.items()
        for key in keys
    ]
    + [
        batch(f"{section}.{key}: yes", f"{section}: {{{key}: yes}}\n" + GOOD, refused=(FILE, key))
        for section, key in (
            ("merge", "captions"),
            ("merge", "penalty"),
            ("merge", "damping"),
            ("compress", "max_bytes"),
            ("compress", "max_rank"),
            ("compress", "spectrum"),
            ("retrieval", "images"),
            ("retrieval", "oversample"),
            ("retrieval", "max_nsfw"),
        )
    ]
    + [
        batch(
            "a concept's own seed: yes",
            text=GOOD.replace("class_word: bus", "class_word: bus, training: {seed: yes}"),
            refused=(FILE, "seed"),
        ),
        batch("augment: 7", training="augment: 7", refused=(FILE, "augment")),
        batch("local: maybe", "retrieval: {local: maybe}\n" + GOOD, refused=(FILE, "local")),
    ]
)
NUMBERS = [
    *STEPS,
    *YES,
    batch("batch_size: 0", training="batch_size: 0", refused=(FILE, "batch_size")),
    batch("a billion samples", evaluation="samples: 1000000000000000000000", refused=(FILE, "samples")),
    batch("learning_rate: 0", training="learning_rate: 0", refused=(FILE, "learning_rate")),
    batch("learning_rate: -1e-4", training="learning_rate: -1e-4", refused=(FILE, "learning_rate")),
    batch("seed: -1", training="seed: -1", refused=(FILE, "seed")),
    batch(
        "ComfyUI's seed",
        training="seed: 156680208700286",
        right=lambda s: s.result.batch.training.seed == 156680208700286,
    ),
    batch("seed: 2^64", training=f"seed: {2**64}", refused=(FILE, "seed")),
    batch("a seed of 40 digits", training=f"seed: {10**40}", refused=(FILE, "seed")),
    batch("an evaluation's seed of 2^64", evaluation=f"seed: {2**64}", refused=(FILE, "seed")),
    batch("evaluation.steps: 1001", evaluation="steps: 1001", refused="evaluation.steps"),
    batch("guidance: .nan", evaluation="guidance: .nan", refused=(FILE, "guidance")),
    batch("guidance: .inf", evaluation="guidance: .inf", refused=(FILE, "guidance")),
    batch("oversample: 0.5", "retrieval: {oversample: 0.5}\n" + GOOD, refused=(FILE, "oversample")),
    batch("spectrum: 2", "compress: {spectrum: 2}\n" + GOOD, refused=(FILE, "spectrum")),
    batch("a number with spaces between", training="batch_size: 4 4", refused=(FILE, "batch_size")),
    batch("Arabic digits", training="batch_size: ٤", refused=(FILE, "batch_size")),
    batch("full-width digits", training="batch_size: ４", refused=(FILE, "batch_size")),
]

KEYS = [
    batch("an unknown key", GOOD + "epochs: 4\n", refused=(FILE, "epochs")),
    batch("a key that is nearly right", training="step: 4", refused=(FILE, "steps")),
    batch("a key in capitals", training="Steps: 4", refused=(FILE, "Steps")),
    batch("an unknown key of a concept", label="x", refused=(FILE, "label")),
    batch("an unknown key of 10 000 letters", GOOD + "x" * 10_000 + ": 4\n", refused=FILE),
    batch("an unknown key with an escape", GOOD + '"\\e[31m": 4\n', refused=FILE),
    batch("no concepts", "training: {}\n", refused=(FILE, "concepts")),
    batch("concepts: []", "concepts: []\n", refused=(FILE, "concepts")),
    batch("concepts: null", "concepts:\n", refused=(FILE, "concepts")),
    batch(
        "one concept as a mapping",
        f"concepts: {{name: bus, images: {BUS}, class_word: bus}}\n",
        refused=(FILE, "concepts"),
    ),
    batch("concepts: a word that is no file", "concepts: gone.json\n", refused=("gone.json",)),
    batch("a concept that is null", "concepts: [null]\n", refused=(FILE, "concepts")),
    batch("a concept that is a word", "concepts: [bus]\n", refused=(FILE, "concepts")),
    batch("a sole concept's error alone", class_word="''", refused=(FILE, "class_word"), never=("Tuple should have",)),
    batch("a sole concept's unknown key alone", label="x", refused=(FILE, "label"), never=("Tuple should have",)),
    batch("training: null", "training:\n" + "concepts: [{name: a, images: x, class_word: b}]\n", refused=(FILE,)),
    batch(
        "training: a list",
        "training: [a]\nconcepts: [{name: a, images: x, class_word: b}]\n",
        refused=(FILE, "training"),
    ),
    batch("an unknown method", training="method: lora", refused=(FILE, "method", "lora")),
    batch("method: 5", training="method: 5", refused=(FILE, "method")),
    batch("method: a list", training="method: [dreambooth]", refused=(FILE, "method")),
    batch(
        "regularization: no",
        text=GOOD.replace("regularization: none", "regularization: no"),
        refused=(FILE, "regularization"),
    ),
    batch(
        "regularization: None",
        text=GOOD.replace("regularization: none", "regularization: None"),
        refused=(FILE, "regularization"),
    ),
    batch("precision: FP16", training="precision: FP16", refused=(FILE, "precision")),
    batch("precision in capitals", training="precision: BF16", refused=(FILE, "precision")),
    batch("several ranks, one process", training="ranks: 2", refused=(FILE, "ranks")),
    batch("spectrum beside max_rank", "compress: {spectrum: 0.5, max_rank: 2}\n" + GOOD, refused=(FILE, "spectrum")),
    batch("three constraint prompts without places", "merge: {prompts: [a]}\n" + GOOD, refused=(FILE, "prompts")),
    batch("a catalogue in a batch file", GOOD + "catalogue: x\n", refused=(FILE, "catalogue")),
]

LONG = "x" * 250
NAMES = [
    *(
        batch(f"name: {value!r}", name=json.dumps(value), refused=(FILE, "name"))
        for value in (
            "",
            " ",
            "a b",
            "../x",
            "a/b",
            "a\\b",
            ".",
            "..",
            ".hidden",
            "-x",
            "ä",
            "a\nb",
            "bus\0",
            "bus\u202e",
            "a" * 5000,
        )
    ),
    batch("a concept's name of 250 letters", name=LONG, refused=(FILE, "name")),
    batch("a name that YAML takes for no", name="no", refused=(FILE, "name")),
    batch("a name that YAML takes for a number", name="5", refused=(FILE, "name"), right=accepted),
    batch("a name that YAML takes for nothing", name="null", refused=(FILE, "name")),
    batch("a batch's name of 250 letters", GOOD + f"name: {LONG}\n", refused=(FILE, "name")),
    batch("a batch's name that leads out", GOOD + "name: ../x\n", refused=(FILE, "name")),
    batch("a batch's name with a line end at its end", GOOD + 'name: "x\\n"\n', refused=(FILE, "name")),
    batch("a concept's name with a line end at its end", name='"bus\\n"', refused=(FILE, "name")),
]


def two(second: str, first: str = "class_word: bus") -> str:
    """Two concepts with these keys beside names and images."""
    return (
        f"concepts:\n  - {{name: first, images: {BUS}, {first}}}\n  - {{name: second, images: {COW}, {second}}}\n"
        "training: {regularization: none}\n"
    )


NFC, NFD = unicodedata.normalize("NFC", "<é>"), unicodedata.normalize("NFD", "<é>")
TOKENS = [
    *(
        batch(f"token: {token!r}", token=json.dumps(token), refused="token")
        for token in (
            "cow",
            "Cow",
            "COW",
            "cOW",
            "moscow",
            "co",
            "cowbo",
            "a",
            "!",
            "bus</w>",
            "<|endoftext|>",
            "<|EndOfText|>",
            "a b",
            " cow",
            "cow ",
            "a\nb",
            "a\tb",
            "<a\0b>",
            "\u200b",
            "\u00a0",
            "<a\x1b[31mb>",
            "ｃｏｗ\n",
            "photo",
            "Of",
            ",",
            "the",
        )
    ),
    batch("a token that is a number", token="5", refused=(FILE, "token")),
    batch("a token that is a list", token="[<a>]", refused=(FILE, "token")),
    batch("a token of 5 000 letters", token="<" + "a" * 5000 + ">", refused=(FILE, "token")),
    batch("a token with a path", token='"<../../x>"', refused="token", right=accepted),
    batch("a token of another script", token='"<корова>"', refused="token", right=accepted),
    batch("<bus> as token", token="<bus>", right=accepted),
    batch("an own plain token", token="<my-bus>", right=lambda s: s.result.batch.concepts[0].token == "<my-bus>"),
    batch("one token twice", two("class_word: cow, token: <x>", "class_word: bus, token: <x>"), refused="<x>"),
    batch(
        "tokens that differ in case", two("class_word: cow, token: <X>", "class_word: bus, token: <x>"), refused="<x>"
    ),
    batch(
        "tokens equal but for their Unicode form",
        two(f"class_word: cow, token: {NFD}", f"class_word: bus, token: {NFC}"),
        refused="token",
    ),
    batch(
        "the first takes what the second was given",
        two("class_word: cow, token: <new1>"),
        right=lambda s: len({c.token for c in s.result.batch.concepts}) == 2,
    ),
    batch(
        "the second's token in other case than the first gets",
        two("class_word: cow, token: <NEW1>"),
        refused="new1",
        right=lambda s: len({c.token.lower() for c in s.result.batch.concepts}) == 2,
    ),
    batch(
        "<new1> beside <new10>",
        two("class_word: cow, token: <new10>", "class_word: bus, token: <new1>"),
        right=accepted,
    ),
    batch("a token inside another", two("class_word: cow, token: <xx>", "class_word: bus, token: xx"), refused="xx"),
    batch("names that differ in case", two("class_word: cow").replace("second", "FIRST"), refused="first"),
    batch(
        "two new categories, one word",
        two("class_word: moongate, new_category: true", "class_word: moongate, new_category: true"),
        refused="moongate",
    ),
    batch(
        "two new categories, words that differ in case",
        two("class_word: Moongate, new_category: true", "class_word: moongate, new_category: true"),
        refused="moongate",
    ),
    batch(
        "two new categories, words that differ in a space",
        two("class_word: 'moon  gate', new_category: true", "class_word: moon gate, new_category: true"),
        refused="moon",
    ),
    batch("a new category with a token", new_category="true", token="<x>", refused=(FILE, "token")),
    batch("a new category with an initializer", new_category="true", initializer="cat", refused=(FILE, "initializer")),
    batch("new_category: 2", new_category="2", refused=(FILE, "new_category")),
    batch("an initializer of two tokens", initializer="wooden pot", refused="initializer"),
    batch("an initializer that is empty of letters", initializer="' '", refused="initializer"),
    batch("an initializer that is a number", initializer="5", refused=(FILE, "initializer")),
    batch("a rare word that is none", training="method: dreambooth", token="wxyzzyq", refused="wxyzzyq"),
]

MANY = " ".join(["very"] * 100)
CLASS_WORDS = [
    *(
        batch(f"class_word: {word!r}", class_word=json.dumps(word), refused=(FILE, "class_word"))
        for word in ("", " ", "\t", "\n", "\u00a0", "\u200b", "\u3000 ", "cat\x1b[2J")
    ),
    batch("a class word that is a number", class_word="5", refused=(FILE, "class_word")),
    batch("a class word that is true", class_word="yes", refused=(FILE, "class_word")),
    batch("a class word that is a list", class_word="[bus]", refused=(FILE, "class_word")),
    batch("a class word of 100 words", class_word=f"{MANY} bus", refused="class_word|token"),
    batch("a class word with braces", class_word='"bus {}"', refused="class_word", right=accepted),
    batch(
        "a class word with a field in braces", class_word='"{0.__class__} bus"', refused="class_word", right=accepted
    ),
    batch("a Cyrillic class word", class_word="автобус", right=accepted),
    batch("a Chinese class word", class_word="公共汽车", right=accepted),
    batch("a class word with HTML", class_word='"<script>alert(1)</script>"', right=accepted, refused="class_word"),
    batch("no class word", "concepts: [{name: a, images: x}]\n", refused=(FILE, "class_word")),
    batch(
        "a class_prompt of 200 words",
        text=batch_text(class_prompt=f"{MANY} {MANY}").replace("none", "real"),
        refused="class_prompt|token",
    ),
    batch("a class_prompt that is blank", class_prompt="'  '", refused=(FILE, "class_prompt"), right=accepted),
]

PROMPTS = [
    batch(
        "training.prompt with 100 words before the concept",
        training=f'prompt: "{MANY} {{}}"',
        refused=("prompt", "token"),
    ),
    batch(
        "training.prompt with 40 long words before the concept",
        training=f'prompt: "{"extraordinarily photorealistic " * 20}{{}}"',
        refused=("prompt", "token"),
    ),
    batch("an evaluation's prompt too long", evaluation=f'prompts: ["{MANY} {{}}"]', refused=("prompt", "token")),
    batch("a concept's prompt too long", prompts=f'["{MANY} {{}}"]', refused=("prompt", "token")),
    batch("a constraint prompt too long", f'merge: {{prompts: ["{MANY} {{}}"]}}\n' + GOOD, refused=("prompt", "token")),
    batch("words after the concept too many", evaluation=f'prompts: ["a {{}} {MANY}"]', refused=("prompt", "token")),
    batch(
        "too long in a file",
        evaluation="prompts: prompts.txt",
        files={"prompts.txt": f"a {{}}\n{MANY} {{}}\n"},
        refused=("prompt", "token"),
    ),
    batch("training.prompt without the concept", training='prompt: "photo"', refused=(FILE, "prompt")),
    batch("training.prompt with two places", training='prompt: "{} and {}"', refused=(FILE, "prompt")),
    batch("training.prompt with {0}", training='prompt: "a {0}"', refused=(FILE, "prompt")),
    batch("training.prompt with an attribute", training='prompt: "a {0.__class__}"', refused=(FILE, "prompt")),
    batch("training.prompt with a single brace", training='prompt: "a {} {"', refused=(FILE, "prompt")),
    batch("training.prompt: null", training="prompt: null", refused=(FILE, "prompt")),
    batch("no prompts", evaluation="prompts: []", refused=(FILE, "prompts")),
    batch("prompts: 5", evaluation="prompts: 5", refused=(FILE, "prompts")),
    batch("prompts with null", evaluation="prompts: [null]", refused=(FILE, "prompts")),
    batch("an empty prompt", evaluation="prompts: ['']", refused=(FILE, "prompts")),
    batch("no prompt file", evaluation="prompts: gone.txt", refused="gone.txt"),
    batch("an empty prompt file", evaluation="prompts: p.txt", files={"p.txt": ""}, refused="p.txt"),
    batch("a prompt file of blanks", evaluation="prompts: p.txt", files={"p.txt": " \n\t\n"}, refused="p.txt"),
    batch(
        "a prompt file with a byte order mark",
        evaluation="prompts: p.txt",
        files={"p.txt": "\ufeffa {}\n"},
        right=lambda s: s.result.batch.evaluation.prompts == ("a {}",),
    ),
    batch(
        "a prompt file with Windows' line ends",
        evaluation="prompts: p.txt",
        files={"p.txt": "a {}\r\nthe {}\r\n"},
        right=lambda s: s.result.batch.evaluation.prompts == ("a {}", "the {}"),
    ),
    batch(
        "a prompt file in UTF-16",
        evaluation="prompts: p.txt",
        files={"p.txt": "a {}\n".encode("utf-16")},
        refused="p.txt",
    ),
    batch("a prompt file in Latin-1", evaluation="prompts: p.txt", files={"p.txt": b"a {} caf\xe9\n"}, refused="p.txt"),
    batch("a prompt file of bytes", evaluation="prompts: p.txt", files={"p.txt": bytes(range(256))}, refused="p.txt"),
    batch(
        "a line without the concept", evaluation="prompts: p.txt", files={"p.txt": "a {}\nnothing\n"}, refused="p.txt:2"
    ),
    batch(
        "a prompt file with an escape", evaluation="prompts: p.txt", files={"p.txt": "a {} \x1b[31m\n"}, refused="p.txt"
    ),
    batch(
        "a prompt file of one line of 10 MB",
        evaluation="prompts: p.txt",
        files={"p.txt": "{} " + "x" * 10_000_000},
        refused="p.txt|prompt",
    ),
    batch("a folder as prompt file", evaluation="prompts: p.txt", files={"p.txt/x": ""}, refused="p.txt"),
    batch("a FIFO as prompt file", evaluation="prompts: p.txt", prepare=lambda: os.mkfifo("p.txt"), refused="p.txt"),
    batch(
        "/dev/zero as prompt file",
        evaluation="prompts: p.txt",
        prepare=lambda: os.symlink("/dev/zero", "p.txt"),
        refused="p.txt",
    ),
    batch("a prompt that ends in .txt", evaluation='prompts: ["a {} on sign.txt"]', right=accepted),
]


def _below() -> None:
    """Stand in another folder than the batch file's."""
    os.mkdir("below")
    os.chdir("below")


LOADED = {"hand_over": load}
PLACES = [
    batch("output in ~", GOOD + "output: ~/runs/x\n", right=lambda s: _at(s.result.output_path, "~/runs/x"), **LOADED),
    batch("store in ~", GOOD + "store: ~/store\n", right=lambda s: _at(s.result.store_url, "~/store"), **LOADED),
    batch("publish.to in ~", GOOD + "publish: {to: ~/r}\n", right=lambda s: _at(s.result.release_url, "~/r"), **LOADED),
    batch(
        "store relative to the file",
        GOOD + "store: st\n",
        right=lambda s: _beside(s.result.store_url, "st"),
        prepare=_below,
        hand_over=lambda: load("../batch.yaml"),
    ),
    batch(
        "publish.to relative to the file",
        GOOD + "publish: {to: r}\n",
        right=lambda s: _beside(s.result.release_url, "r"),
        prepare=_below,
        hand_over=lambda: load("../batch.yaml"),
    ),
    batch(
        "a block list relative to the file, with the miniature",
        text=GOOD.replace("none", "real") + "retrieval: {block_list: b.txt}\n",
        files={"b.txt": "a" * 64 + "\n"},
        prepare=_below,
        hand_over=lambda: planned("../batch.yaml"),
        right=accepted,
    ),
    batch("output: a URL", GOOD + "output: s3://bucket/x\n", refused=(FILE, "output")),
    batch("output with NUL", GOOD + 'output: "a\\0b"\n', refused=(FILE, "output")),
    batch("output with an unset variable", GOOD + "output: $HOME/x\n", refused=(FILE, "output"), right=accepted),
    batch("output: null", GOOD + "output: null\n", refused=(FILE, "output")),
    batch("store: s3://", GOOD + "store: s3://\n", refused=(FILE, "store")),
    batch("store: s3:///x", GOOD + "store: s3:///x\n", refused=(FILE, "store")),
    batch("store: http://…", GOOD + "store: http://127.0.0.1:9/x\n", refused=(FILE, "store")),
    batch("store of an unknown kind", GOOD + "store: nothing://x\n", refused="nothing"),
    batch("store: hf://…", GOOD + "store: hf://owner/name\n", refused=(FILE, "store")),
    batch("publish.to: s3://", GOOD + "publish: {to: 's3://'}\n", refused=(FILE, "publish.to|to")),
    batch("publish.to: http://…", GOOD + "publish: {to: 'http://127.0.0.1:9/x'}\n", refused=(FILE, "publish.to|to")),
    batch("publish.to: the hub", GOOD + "publish: {to: 'hf://owner/name'}\n", refused=(FILE, "publish.to|to")),
    batch("publish.hub without an owner", GOOD + "publish: {hub: name}\n", refused=(FILE, "hub")),
    batch("publish.hub with three parts", GOOD + "publish: {hub: a/b/c}\n", refused=(FILE, "hub")),
    batch("publish.hub that leads out", GOOD + "publish: {hub: ../x}\n", refused=(FILE, "hub")),
    batch("publish.hub as a URL", GOOD + "publish: {hub: 'https://hub.example/a/b'}\n", refused=(FILE, "hub")),
    batch(
        "no signing key",
        GOOD + "publish: {signing_key: gone.pem}\n",
        refused="gone.pem",
        hand_over=lambda: polyconcept("run", FILE),
    ),
    batch(
        "a password in a corpus's address",
        text=GOOD.replace("none", "real") + "retrieval: {corpus: 'http://me:SECRET@127.0.0.1:9/c.parquet'}\n",
        refused="corpus",
        never=("SECRET",),
    ),
    batch(
        "a password in base_url",
        text=GOOD.replace("none", "real") + "retrieval: {base_url: 'http://me:SECRET@127.0.0.1:9/'}\n",
        refused="base_url",
        never=("SECRET",),
        right=accepted,
    ),
    batch(
        "keys in a bucket's address",
        GOOD + "store: s3://KEY:SECRET@bucket/x\n",
        refused="store",
        never=("SECRET",),
        right=accepted,
    ),
    batch(
        "a password in publish.to",
        GOOD + "publish: {to: 's3://KEY:SECRET@bucket/x'}\n",
        refused="publish",
        never=("SECRET",),
        right=accepted,
    ),
    batch(
        "no corpus", text=GOOD.replace("none", "real") + "retrieval: {corpus: gone.parquet}\n", refused="gone.parquet"
    ),
    batch("no CLIP", evaluation="clip: ./gone", refused="gone"),
    batch("a CLIP that open_clip does not know", evaluation="clip: ViT-Z-99/nothing", refused="ViT-Z-99"),
    batch("a CLIP folder with nothing in it", evaluation="clip: c", files={"c/x": ""}, refused="c"),
    batch(
        "a CLIP folder with pickles only",
        evaluation="clip: c",
        files={"c/open_clip_config.json": "{}", "c/model.bin": b"\x80\x04."},
        refused="c",
    ),
    batch("no DeepSpeed file", training="strategy: deepspeed, deepspeed: {config: gone.json}", refused="gone.json"),
    batch(
        "a DeepSpeed file that is a list",
        training="strategy: deepspeed, deepspeed: {config: d.json}",
        files={"d.json": "[]"},
        refused="d.json",
    ),
    batch(
        "a DeepSpeed file that is nested",
        training="strategy: deepspeed, deepspeed: {config: d.json}",
        files={"d.json": "[" * 100_000},
        refused="d.json",
    ),
]


def _at(place: str, written: str) -> bool:
    return os.path.abspath(place) == os.path.abspath(os.path.expanduser(written))


def _beside(place: str, name: str) -> bool:
    """Whether it is beside the batch file, whose folder is that above the current one."""
    return os.path.abspath(place) == os.path.join(os.path.dirname(os.getcwd()), name)


def _same_release() -> list[str]:
    """Keys of the release of one batch with a base of its own, in two folders."""
    import shutil

    keys = []
    for folder in ("one", "two"):
        os.makedirs(f"runs/{folder}")
        shutil.copytree(MODEL, f"runs/{folder}/mybase")
        clip = f"evaluation: {{clip: {CLIP}}}"
        text = batch_text("base: ./mybase").replace("evaluation: {}", clip)
        Path(f"runs/{folder}/batch.yaml").write_text(text)
        plan = planned(f"runs/{folder}/batch.yaml")
        keys.append((plan.release.key, json.dumps(plan.release.hashed())))
    return keys


SILENT = [
    Case(
        "one batch with its own base in two folders",
        lambda: _same_release,
        right=lambda s: s.result[0][0] == s.result[1][0] and "/runs/" not in s.result[0][1],
    ),
    Case(
        "publish.hub that cannot be reached, with `run`", lambda: _run_with_hub, ("hub|owner/name",), writes=("runs",)
    ),
]


def prepare() -> None:
    finished()


def _run_with_hub() -> None:
    """Everything is done already but the publication. The hub is to be a port where nothing listens."""
    text = (finished() / "batch.yaml").read_text() + "publish: {to: runs/rel, hub: owner/name}\n"
    text = text.replace(f"output: {finished()}/out", f"output: runs/out\nstore: {finished()}/out/store")
    Path("runs").mkdir()
    Path("runs/b.yaml").write_text(text.replace("runs/rel", f"{os.getcwd()}/runs/rel"))
    polyconcept("run", "runs/b.yaml")


CASES = [*FORMS, *JSON, *NUMBERS, *KEYS, *NAMES, *TOKENS, *CLASS_WORDS, *PROMPTS, *PLACES, *SILENT]
