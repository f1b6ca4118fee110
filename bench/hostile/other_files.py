"""The other files people write: concept cards of a catalogue, retraining, study and cluster files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hostile.case import Case, Check, Seen, accepted, words, write
from hostile.common import BUS, COW, batch_text, planned, png

RETRAIN = """\
name: nightly
catalogue: catalogue
training: {{regularization: none, steps: 2, views: 1}}
merge: {{partial: {partial}}}
{extra}
"""


def read(path: str = "retrain.yaml") -> tuple[Any, dict[str, str]]:
    """What a retraining begins with: the plan of the catalogue's concepts, and what is wrong with the others."""
    from pipeline.batch import plan_usable
    from pipeline.catalogue import read_catalogue
    from pipeline.spec import load_retraining

    asked = load_retraining(path)
    concepts, problems = read_catalogue(asked)
    if problems and not (asked.merge.partial and concepts):
        raise ValueError("\n".join(problems.values()))
    plan, unusable = plan_usable(asked.with_concepts(concepts))
    return plan, problems | unusable


def catalogue(
    name: str,
    card: str | bytes | None,
    *,
    why: str = "",
    refused: str | tuple[str, ...] = (),
    right: Check | None = None,
    prepare=lambda: None,
    card_name: str = "concept.yaml",
    partial: bool = True,
    extra: str = "",
    folder: str = "odd",
    images: bool = True,
) -> Case:
    """A catalogue of a good concept, `good`, and an odd one. why: a word of what is wrong with the odd one, which is to
    be left out, the good one staying."""

    def give():
        write(
            **{
                "retrain.yaml": RETRAIN.format(partial="true" if partial else "false", extra=extra),
                "catalogue/good/concept.yaml": "class_word: bus\n",
                "catalogue/good/1.png": (BUS / "1.png").read_bytes(),
            }
        )
        if card is not None:
            write(**{f"catalogue/{folder}/{card_name}": card})
        if images:
            write(**{f"catalogue/{folder}/1.png": (COW / "1.png").read_bytes()})
        prepare()
        return read

    def left_out(seen: Seen) -> bool:
        plan, problems = seen.result
        told = "\n".join([*problems, *problems.values(), seen.text])
        return (
            [c.name for c in plan.batch.concepts] == ["good"]
            and folder in told
            and any(w in told for w in why.split("|"))
        )

    return Case(f"card: {name}", give, words(refused), left_out if why else right, writes=())


def both(seen: Seen) -> bool:
    return {c.name for c in seen.result[0].batch.concepts} == {"good", "odd"}


def both_or_said(seen: Seen) -> bool:
    """A card under nearly the right name is read, or what is wrong with it is said; it is not passed over."""
    _, problems = seen.result
    return both(seen) or "odd" in "".join([*problems, seen.text])


def one_of_two(seen: Seen) -> bool:
    plan, problems = seen.result
    return len(plan.batch.concepts) == 1 and len(problems) == 1


def _fifo() -> None:
    os.mkfifo("catalogue/odd/concept.yaml")


def _linked() -> None:
    os.symlink("/gone", "catalogue/odd/concept.yaml")


CARDS = [
    catalogue("!!bool of no truth", 'class_word: !!bool "x"\n', why="class_word|concept.yaml"),
    catalogue("!!timestamp of no time", 'class_word: !!timestamp "x"\n', why="concept.yaml"),
    catalogue("a time", "class_word: 2026-01-01\n", right=both_or_said),
    catalogue("3 000 brackets", "class_word: " + "[" * 3000, why="concept.yaml"),
    catalogue("3 000 closed brackets", "class_word: " + "[" * 3000 + "]" * 3000, why="concept.yaml"),
    catalogue(
        "aliases that multiply",
        "a: &a [x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True))
        + "class_word: *g\n",
        why="concept.yaml",
    ),
    catalogue("a FIFO", None, prepare=_fifo, why="concept.yaml"),
    catalogue("a link to nothing", None, prepare=_linked, why="concept.yaml"),
    catalogue("a folder", None, prepare=lambda: os.mkdir("catalogue/odd/concept.yaml"), why="concept.yaml"),
    catalogue("empty", "", why="concept.yaml"),
    catalogue("a list", "- a\n", why="concept.yaml"),
    catalogue("Latin-1", b"class_word: K\xe4se\n", why="concept.yaml"),
    catalogue("a byte order mark", "\ufeffclass_word: cow\n", right=both),
    catalogue("a key twice", "class_word: cow\nclass_word: bus\n", why="class_word"),
    catalogue("an unknown key", "class_word: cow\nclas: x\n", why="clas"),
    catalogue("a name", "class_word: cow\nname: x\n", why="name"),
    catalogue("a blank class word", "class_word: ' '\n", why="class_word"),
    catalogue("steps: yes", "class_word: cow\ntraining: {steps: yes}\n", why="steps"),
    catalogue("a known token", "class_word: cow\ntoken: Cow\n", why="Cow"),
    catalogue("a prompt too long", f"class_word: cow\nprompts: ['{'very ' * 100} {{}}']\n", why="prompt|token"),
    catalogue("concept.yml", "class_word: cow\n", card_name="concept.yml", right=both_or_said),
    catalogue("CONCEPT.YAML", "class_word: cow\n", card_name="CONCEPT.YAML", right=both_or_said),
    catalogue("Concept.yaml", "class_word: cow\n", card_name="Concept.yaml", right=both_or_said),
    catalogue(
        "two cards",
        "class_word: cow\n",
        card_name="concept.yml",
        prepare=lambda: write(**{"catalogue/odd/concept.yaml": "class_word: bus\n"}),
        why="concept.y",
    ),
    catalogue("no images", "class_word: cow\n", images=False, why="odd"),
    catalogue("a folder with a space", "class_word: cow\n", folder="odd one", why="name"),
    catalogue("a folder with a bracket", "class_word: cow\n", folder="[odd]", why="name"),
    catalogue("a folder of 250 letters", "class_word: cow\n", folder="x" * 250, why="name|x"),
    catalogue("a folder whose name is not UTF-8", "class_word: cow\n", folder=os.fsdecode(b"odd\xff"), why="name"),
    catalogue("a folder that differs from another in case", "class_word: cow\n", folder="Good", right=one_of_two),
    catalogue(
        "a wrong card where none may be left out", "class_word: ' '\n", partial=False, refused=("odd", "class_word")
    ),
    catalogue(
        "a hidden folder",
        "class_word: cow\n",
        folder=".trash",
        right=lambda s: [c.name for c in s.result[0].batch.concepts] == ["good"],
    ),
    catalogue(
        "a loop of links", "class_word: cow\n", prepare=lambda: os.symlink(".", "catalogue/odd/loop"), right=both
    ),
    catalogue(
        "a loop of links as a concept",
        None,
        images=False,
        prepare=lambda: os.symlink(".", "catalogue/self"),
        right=lambda s: [c.name for c in s.result[0].batch.concepts] == ["good"],
    ),
]


def retraining(
    name: str, text: str | bytes, refused: str | tuple[str, ...], right: Check | None = None, prepare=lambda: None
) -> Case:
    def give():
        write(**{"retrain.yaml": text, "c/good/concept.yaml": "class_word: bus\n", "c/good/1.png": png()})
        prepare()
        return read

    return Case(f"retraining: {name}", give, words(refused), right, writes=())


HEAD = "catalogue: c\ntraining: {regularization: none}\n"
RETRAININGS = [
    retraining("concepts in it", HEAD + "concepts: []\n", ("retrain.yaml", "concepts")),
    retraining("no catalogue", "training: {}\n", ("retrain.yaml", "catalogue")),
    retraining("a catalogue that is not there", "catalogue: gone\n", "gone"),
    retraining("a catalogue that is a file", "catalogue: retrain.yaml\n", "retrain.yaml"),
    retraining("a catalogue without concepts", "catalogue: e\n", "e", prepare=lambda: os.mkdir("e")),
    retraining("catalogue: s3://", "catalogue: 's3://'\n", "catalogue|s3://"),
    retraining("catalogue: http of no server", "catalogue: http://127.0.0.1:9/c\n", "127.0.0.1:9"),
    retraining("a setting twice", HEAD + "gate: {image: 1, image: 2}\n", ("retrain.yaml", "image")),
    retraining("gate.image: yes", HEAD + "gate: {image: yes}\n", ("retrain.yaml", "image")),
    retraining("gate.text: .nan", HEAD + "gate: {text: .nan}\n", ("retrain.yaml", "text")),
    retraining("gate.image: -1", HEAD + "gate: {image: -1}\n", ("retrain.yaml", "image")),
    retraining("lease: 0", HEAD + "lease: 0\n", ("retrain.yaml", "lease")),
    retraining("lease: yes", HEAD + "lease: yes\n", ("retrain.yaml", "lease")),
    retraining("lease: 1e9", HEAD + "lease: 1.0e+9\n", ("retrain.yaml", "lease")),
    retraining("one sample", HEAD + "evaluation: {samples: 1}\n", ("retrain.yaml", "samples")),
    retraining("3 000 brackets", HEAD + "gate: " + "[" * 3000, "retrain.yaml"),
    retraining("!!bool of no truth", HEAD + 'name: !!bool "x"\n', "retrain.yaml"),
]

STUDY = """\
name: s
batch:
  concepts: [{{name: bus, images: {bus}, class_word: bus}}, {{name: cow, images: {cow}, class_word: cow}}]
  training: {{regularization: none, views: 1}}
tables:
  - name: one
    variants: [{variants}]
    {table}
{extra}
"""


def _cases() -> list[Any]:
    from pipeline.study import cases, load_study

    return list(cases(load_study(Path("study.yaml")), Path("study.yaml")))


def study(
    name: str,
    refused: str | tuple[str, ...] = (),
    right: Check | None = None,
    text: str | None = None,
    variants="{name: a}",
    table="",
    extra="",
) -> Case:
    content = STUDY.format(bus=BUS, cow=COW, variants=variants, table=table, extra=extra) if text is None else text
    return Case(
        f"study: {name}", lambda: (write(**{"study.yaml": content}), _cases)[1], words(refused), right, writes=()
    )


STUDIES = [
    study("a good one", right=lambda s: len(s.result) == 1),
    study("no tables", "tables", text="batch: {concepts: []}\n"),
    study("tables: a word", "tables", text="batch: {}\ntables: x\n"),
    study("batch: a list", "batch", text="batch: [a]\ntables: [{name: a, variants: [{name: b}]}]\n"),
    study("a batch without concepts", "concepts", text="batch: {}\ntables: [{name: a, variants: [{name: b}]}]\n"),
    study(
        "concepts of a batch that are words",
        "concepts",
        text="batch: {concepts: [bus]}\ntables: [{name: a, variants: [{name: b}]}]\n",
    ),
    study(
        "concepts of a batch that are null",
        "concepts",
        text="batch: {concepts: }\ntables: [{name: a, variants: [{name: b}]}]\n",
    ),
    study(
        "concepts of a batch that are a file's name",
        "concepts|gone.json",
        text="batch: {concepts: gone.json}\ntables: [{name: a, variants: [{name: b}]}]\n",
    ),
    study(
        "a concept without a name",
        "name",
        text=f"batch: {{concepts: [{{images: {BUS}, class_word: bus}}]}}\n"
        "tables: [{name: a, variants: [{name: b}]}]\n",
    ),
    study("a key twice", ("study.yaml", "name"), extra="name: t"),
    study(
        "a variant's change twice",
        ("study.yaml", "training"),
        variants="{name: a, changes: {training: {steps: 1}, training: {steps: 2}}}",
    ),
    study("a change of an unknown key", "nothing", variants="{name: a, changes: {nothing: 1}}"),
    study("a change that is a list", "changes", variants="{name: a, changes: [1]}"),
    study("training changed to null", "training", variants="{name: a, changes: {training: }}", right=accepted),
    study("training changed to a word", "training|mapping", variants="{name: a, changes: {training: x}}"),
    study("steps changed to yes", "steps", variants="{name: a, changes: {training: {steps: yes}}}"),
    study("a method that is a list", "method", variants="{name: a, changes: {training: {method: [a]}}}"),
    study("a seed that is yes", "seed", table="seeds: [yes]"),
    study("a seed that is negative", "seed", table="seeds: [-1]"),
    study("an unknown concept", "gone", table="concepts: [gone]"),
    study("more beside than there are", "beside", variants="{name: a, beside: 9}"),
    study("together: yes", "together", variants="{name: a, together: yes}"),
    study("a variant named base", "base", variants="{name: base}"),
    study("two variants of one name", "'a'", variants="{name: a}, {name: a}"),
    study(
        "a table's name that leads out",
        "name",
        text=STUDY.format(bus=BUS, cow=COW, variants="{name: a}", table="", extra="").replace(
            "name: one", "name: ../x"
        ),
    ),
    study(
        "two tables of one name",
        "one",
        extra="  - {name: one, variants: [{name: b}]}",
        text=STUDY.format(bus=BUS, cow=COW, variants="{name: a}", table="", extra="").replace(
            "tables:\n", "tables:\n  - {name: one, variants: [{name: b}]}\n"
        ),
    ),
    study("pair prompts with one place", "pair_prompts", table="pair_prompts: ['a {}']"),
    study("3 000 brackets", "study.yaml", text="batch: " + "[" * 3000),
    study("!!timestamp of no time", "study.yaml", text='batch: !!timestamp "x"\n'),
    study("an output that is a URL", "output", extra="output: s3://bucket/x", right=None),
]


def cluster(
    name: str, text: str | bytes, refused: str | tuple[str, ...] = "cluster.yaml", right: Check | None = None
) -> Case:
    def give():
        write(**{"cluster.yaml": text, "batch.yaml": batch_text()})

        def predicted():
            from pipeline.cost.cluster import load_cluster
            from pipeline.cost.prediction import predict

            return predict(planned(), load_cluster(Path("cluster.yaml")), concepts=10, captions=1000)

        return predicted

    return Case(f"cluster: {name}", give, words(refused), right, writes=())


CLUSTER = "{nodes: 1, devices: 1, memory_gib: 80, tflops: 100%s}\n"
CLUSTERS = [
    cluster("a good one", CLUSTER % "", (), accepted),
    cluster("nodes twice", CLUSTER % ", nodes: 2", ("cluster.yaml", "nodes")),
    cluster("nodes: yes", "{nodes: yes, devices: 1, memory_gib: 80, tflops: 100}", ("cluster.yaml", "nodes")),
    cluster("nodes: 0", "{nodes: 0, devices: 1, memory_gib: 80, tflops: 100}", ("cluster.yaml", "nodes")),
    cluster("tflops: .inf", "{nodes: 1, devices: 1, memory_gib: 80, tflops: .inf}", ("cluster.yaml", "tflops")),
    cluster("dead_links: 1", CLUSTER % ", dead_links: 1", ("cluster.yaml", "dead_links")),
    cluster("an unknown key", CLUSTER % ", gpus: 1", ("cluster.yaml", "gpus")),
    cluster("a list", "[1]\n"),
    cluster("empty", ""),
    cluster("!!bool of no truth", 'nodes: !!bool "x"\n'),
    cluster("3 000 brackets", "nodes: " + "[" * 3000),
    cluster("bytes", bytes(range(256))),
]

CASES = [*CARDS, *RETRAININGS, *STUDIES, *CLUSTERS]
