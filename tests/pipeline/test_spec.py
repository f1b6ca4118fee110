"""The spec refuses what it does not know, and says where."""

from __future__ import annotations

import json
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
        (CONCEPT + "trainig: {steps: 3}", r"batch.yaml: trainig: unknown key; did you mean 'training'\?"),
        (CONCEPT + "training: {step: 3}", r"training.step: unknown key; did you mean 'steps'\?"),
        (
            "concepts: [{name: a, images: a, clas_word: a}]",
            r"concepts\[0\].clas_word: unknown key; did you mean 'class_word'",
        ),
        (CONCEPT + "training: {steps: 0}", r"training.steps: .*greater than 0, found 0"),
        (CONCEPT + "training: {steps: many}", r"training.steps: .*found 'many'"),
        (CONCEPT + "training: {learning_rate: .nan}", r"training.learning_rate: .*found nan"),
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
        ("just text", r"expected a mapping with the key 'concepts', found str"),
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
