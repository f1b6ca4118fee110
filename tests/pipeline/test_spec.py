"""The spec refuses what it does not know, and says where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.spec import ConceptBatch, load_batch


def write(tmp_path: Path, text: str, name: str = "batch.yaml") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


CONCEPT = "concepts: [{name: cat, images: cat, class_word: cat}]\n"
TWO = "concepts: [{name: a, images: a, class_word: cat}, {name: b, images: b, class_word: dog}]\n"


def _concept(more: str) -> str:
    return f"concepts: [{{name: cat, images: cat, class_word: cat, {more}}}]\n"


def test_paper_defaults(tmp_path):
    batch = load_batch(write(tmp_path, CONCEPT))
    assert batch.retrieval.images == 200
    assert batch.training.learning_rate == 8e-5 and batch.training.batch_size * 2 == 8
    assert batch.training.prior_weight == 1.0 and batch.training.augment
    assert batch.concepts[0].token == "<new1>" and batch.concepts[0].phrase == "<new1> cat"
    assert batch.concepts[0].images == (str(tmp_path / "cat"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CONCEPT + "trainig: {steps: 3}", r"batch.yaml:2: trainig: unknown key; did you mean 'training'\?"),
        (CONCEPT + "training: {step: 3}", r"training.step: unknown key; did you mean 'steps'\?"),
        (
            "concepts: [{name: a, images: a, clas_word: a}]",
            r"concepts\[0\].clas_word: unknown key; did you mean 'class_word'",
        ),
        (CONCEPT + "training: {steps: 0}", r"training.steps: .*greater than 0, found 0"),
        (CONCEPT + "training: {steps: many}", r"training.steps: .*found 'many'"),
        (CONCEPT + "training: {learning_rate: .nan}", r"training.learning_rate: .*found .nan"),
        (CONCEPT + "training: {method: lora}", r"training.method: expected one of custom_diffusion, .*; found 'lora'"),
        (CONCEPT + "training: {composition: both}", r"training.composition: .*'merged' or 'joint', found 'both'"),
        (
            CONCEPT + "training: {train_text_encoder: true}",
            "custom_diffusion leaves the text encoder alone; use dreamb",
        ),
        (CONCEPT + "training: {method: dreambooth, pack_size: 2}", "pack_size: 2 sets of weights of dreambooth cannot"),
        (
            CONCEPT + "training: {method: dreambooth, strategy: deepspeed}",
            "strategy: 'deepspeed' trains custom_diffusion only; use 'ddp' for dreambooth",
        ),
        (
            TWO + "training: {method: dreambooth}",
            "training.composition: 'merged' folds changes of text K/V layers only, and dreambooth changes more",
        ),
        (
            CONCEPT + "training: {method: dreambooth}\ncompress: {max_rank: 3}",
            "compress: only changes of text K/V layers have low-rank factors, not dreambooth's",
        ),
        (_concept("new_category: true, token: <x>"), r"concepts\[0\].token: a new_category goes by its class word"),
        (_concept("new_category: true, initializer: x"), r"concepts\[0\].initializer: not used: a new_category has no"),
        (
            _concept("initializer: x") + "training: {method: dreambooth}",
            r"concepts\[0\].initializer: not used: dreambooth makes no new token",
        ),
        (
            _concept("new_category: true") + "training: {method: textual_inversion}",
            r"concepts\[0\].new_category: textual_inversion trains nothing but the token it lacks",
        ),
        (
            "concepts: ["
            + ", ".join(f"{{name: c{i}, images: x, class_word: cat}}" for i in range(4))
            + "]\ntraining: {method: dreambooth, composition: joint}",
            r"concepts\[3\].token: pll, ucd, ktn are given out; name a rare word yourself",
        ),
        ("concepts: []", r"concepts: .*at least 1"),
        ("name: x", r"concepts: missing"),
        ("concepts: [{name: a/b, images: a, class_word: a}]", r"concepts\[0\].name"),
        ("concepts: [{name: a, images: a, class_word: a, token: 'a b'}]", r"one word without spaces, found 'a b'"),
        ("just text", r"expected a mapping with the key 'concepts', found 'just text'"),
        ("a: [", r"not valid YAML"),
        (CONCEPT + "training: {prompt: a photo}", r"training.prompt: a prompt names the concept once by '{}'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_batch(write(tmp_path, text))


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.yaml: no such file"):
        load_batch(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(("field", "values"), [("name", ("a", "a")), ("token", ("<x>", "<x>"))])
def test_two_concepts_with_one_name_or_token(field, values):
    concepts = [
        {"name": f"c{i}", "images": "x", "class_word": "cat", **{field: value}} for i, value in enumerate(values)
    ]
    with pytest.raises(ValueError, match=rf"concepts\[0\] and concepts\[1\] have the same {field} '{values[0]}'"):
        ConceptBatch.model_validate({"concepts": concepts})


def test_given_tokens_are_not_given_twice():
    concepts = [{"name": "a", "images": "x", "class_word": "cat"}]
    concepts.append({"name": "b", "images": "x", "class_word": "cat", "token": "<new1>"})
    assert [c.token for c in ConceptBatch.model_validate({"concepts": concepts}).concepts] == ["<new2>", "<new1>"]


def test_concepts_list_of_other_trainers(tmp_path):
    entries = [
        {
            "instance_prompt": "photo of a <new1> cat",
            "class_prompt": "cat",
            "instance_data_dir": "./data/cat",
            "class_data_dir": "./real_reg/samples_cat/",
        },
        {"instance_prompt": "photo of a <new2> pot", "class_prompt": "wooden pot", "instance_data_dir": "/data/pot"},
    ]
    batch = load_batch(write(tmp_path, json.dumps(entries), "concepts_list.json"))
    assert [c.token for c in batch.concepts] == ["<new1>", "<new2>"]
    assert [c.class_word for c in batch.concepts] == ["cat", "wooden pot"]
    assert batch.concepts[0].images == (str(tmp_path / "data/cat"),) and batch.concepts[1].images == ("/data/pot",)
    entries[0]["instance_promt"] = "x"
    with pytest.raises(ValueError, match=r"\[0\].instance_promt: unknown key; did you mean 'instance_prompt'"):
        load_batch(write(tmp_path, json.dumps(entries), "concepts_list.json"))


def test_prompt_suites(tmp_path):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "cat.txt").write_text("photo of a {}.\n\n  {} in the snow \n")
    cat = "concepts: [{name: cat, images: cat, class_word: cat, prompts: %s}]\n"
    suite = ("photo of a {}.", "{} in the snow")
    batch = load_batch(write(tmp_path, cat % "suites/cat.txt"))
    assert batch.concepts[0].prompts == batch.prompts_of(batch.concepts[0]) == suite
    assert load_batch(write(tmp_path, cat % "['a {}', suites/cat.txt]")).concepts[0].prompts == ("a {}", *suite)
    assert load_batch(write(tmp_path, CONCEPT + "evaluation: {prompts: suites/cat.txt}")).evaluation.prompts == suite
    for text, message in (
        ("{}\nphoto of a cat\n", r"prompts: .*cat.txt:2: a prompt names the concept once by '{}'.*'photo of a cat'"),
        ("{0} and {1}", r"cat.txt:1: a prompt names"),
        ("\n", "cat.txt: no prompts in it"),
    ):
        (tmp_path / "suites" / "cat.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_batch(write(tmp_path, cat % "suites/cat.txt"))
    with pytest.raises(ValueError, match=r"concepts\[0\].prompts: .*nothing.txt: no such file"):
        load_batch(write(tmp_path, cat % "nothing.txt"))


def test_the_authors_benchmark_as_it_is(tmp_path):
    """The form of customconcept101/dataset.json: every concept is `<new1>` of its own run, with a suite of prompts."""
    entries = [
        {
            "instance_prompt": instance,
            "class_prompt": word,
            "instance_data_dir": f"./benchmark_dataset/{folder}",
            "class_data_dir": f"./regularization/{folder}",
            "prompt_filename": f"prompts/{word}.txt",
        }
        for instance, word, folder in (
            ("photo of a <new1> barn", "barn", "scene_barn"),
            ("photo of <new1> sunglasses", "sunglasses", "wearable_sunglasses2"),
            ("photo of a <new1> barn", "barn", "scene_barn2"),
        )
    ]
    benchmark = tmp_path / "customconcept101"
    (benchmark / "prompts").mkdir(parents=True)
    for word in ("barn", "sunglasses"):
        (benchmark / "prompts" / f"{word}.txt").write_text(f"photo of a {{}}.\n{{}} beside a {word}\n")
    (benchmark / "dataset.json").write_text(json.dumps(entries))
    batch = load_batch(benchmark / "dataset.json")
    assert [c.token for c in batch.concepts] == ["<new1>", "<new2>", "<new3>"]
    assert [c.name for c in batch.concepts] == ["001-scene_barn", "002-wearable_sunglasses2", "003-scene_barn2"]
    assert batch.concepts[1].images == (str(benchmark / "benchmark_dataset" / "wearable_sunglasses2"),)
    assert batch.concepts[1].prompts == ("photo of a {}.", "{} beside a sunglasses")
    # beside a base model and settings of one's own
    own = "concepts: customconcept101/dataset.json\ntraining: {steps: 9}\n"
    named = load_batch(write(tmp_path, own))
    assert named.concepts == batch.concepts and named.training.steps == 9 and named.name == "batch"
    entries[1]["instance_prompt"] = "photo of <new2> sunglasses"  # two of three alike: a mistake
    (benchmark / "dataset.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"concepts\[0\] and concepts\[2\] have the same token"):
        load_batch(benchmark / "dataset.json")
    shutil.rmtree(benchmark)
    with pytest.raises(ValueError, match=r"customconcept101/dataset.json: no such file"):
        load_batch(write(tmp_path, own))
    with pytest.raises(ValueError, match=r"batch.yaml: expected a list of concepts, found a mapping"):
        load_batch(write(tmp_path, "concepts: batch.yaml"))


def test_a_method_brings_its_defaults(tmp_path):
    text = CONCEPT + "training: {method: dreambooth}"
    batch = load_batch(write(tmp_path, text))
    assert (batch.training.regularization, batch.training.augment, batch.training.learning_rate) == (
        "generated",
        False,
        5e-6,
    )
    assert batch.concepts[0].phrase == "pll cat"
    given = load_batch(write(tmp_path, CONCEPT + "training: {method: dreambooth, augment: true, regularization: none}"))
    assert given.training.augment and given.training.regularization == "none"
    category = load_batch(write(tmp_path, _concept("new_category: true")))
    assert category.concepts[0].phrase == "cat" and category.concepts[0].token == ""
