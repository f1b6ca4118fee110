"""The spec refuses what it does not know, and says where."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from pipeline.checks import read_block_list
from pipeline.miniature.world import concept_images
from pipeline.mistakes import kinds_of
from pipeline.plan import make_plan
from pipeline.spec import (
    MINIATURE,
    Concept,
    ConceptBatch,
    Mark,
    Retraining,
    Section,
    clip_path,
    load_batch,
    load_retraining,
    marked,
    overridden,
)
from pipeline.stages.train import Train


def write(tmp_path: Path, text: str, name: str = "batch.yaml") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


CONCEPT = "concepts: [{name: cat, images: cat, class_word: cat}]\n"
TWO = "concepts: [{name: a, images: a, class_word: cat}, {name: b, images: b, class_word: dog}]\n"


def _concept(more: str) -> str:
    return f"concepts: [{{name: cat, images: cat, class_word: cat, {more}}}]\n"


def _sections(section: type[Section]) -> list[type[Section]]:
    """A part of the spec and all parts of it."""
    kinds = {kind for field in section.model_fields.values() for kind in kinds_of(field.annotation)}
    inner = sorted((kind for kind in kinds if issubclass(kind, Section)), key=lambda kind: kind.__name__)
    return [section, *(part for kind in inner for part in _sections(kind))]


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
        (CONCEPT + CONCEPT, r"batch.yaml:2: the key 'concepts' is given twice, first in line 1"),
        (CONCEPT + "training: {steps: yes}", r"batch.yaml:2: training.steps: expected a number, found yes"),
        (CONCEPT + "training: {pack_size: on}", r"training.pack_size: expected a number, found on"),
        (CONCEPT + "training: {deepspeed: {stage: true}}", r"training.deepspeed.stage: expected a number, found true"),
        (CONCEPT + "training: {learning_rate: false}", r"training.learning_rate: expected a number, found false"),
        (CONCEPT + "training: {augment: 1}", r"training.augment: expected true or false, found 1$"),
        (CONCEPT + "training: {compile: 0.0}", r"training.compile: expected true or false, found 0.0"),
        (CONCEPT + "training:\n  steps: 3\n  seed: -1", r"batch.yaml:4: training.seed: .*found -1"),
        (CONCEPT + "training:", r"batch.yaml:2: training: expected a mapping, found nothing"),
        ("concepts: [{name: a, images: a, class_word: no}]", r"concepts\[0\].class_word: expected text, found no"),
        ("concepts: [{name: a, images: a, class_word: ' \t'}]", r"concepts\[0\].class_word: blank"),
        (f"concepts: [{{name: {'a' * 250}, images: a, class_word: a}}]", r"name: .*at most 100 characters, found 'a+…"),
        (CONCEPT + f"name: {'a' * 250}", r"batch.yaml:2: name: .*at most 100 characters"),
        (_concept(f"token: <{'ä' * 60}>"), r"concepts\[0\].token: a token has at most 100 bytes"),
        (CONCEPT + "output: s3://b", r"output: report and summary go to a local folder"),
        (CONCEPT + "output: ''", r"output: report and summary go to a local folder"),
        (CONCEPT + "store: s3://", r"store: 's3://' names no bucket"),
        (CONCEPT + "publish: {to: s3:/b}", r"publish.to: 's3:/b' is no URL; write s3://"),
        (CONCEPT + "retrieval: {corpus: 's4://b'}", r"retrieval.corpus: 's4://b' is on no storage"),
        (
            CONCEPT + "retrieval: {base_url: 'https://me:pw@h'}",
            r"retrieval.base_url: .*without user names and passwords; found 'https://\*\*\*@h'",
        ),
        ("just text", r"expected a mapping with the key 'concepts', found 'just text'"),
        ("a: [", r"not valid YAML"),
        (CONCEPT + "store: hf://owner/name", r"store: the hub gets copies of releases, by `publish.hub"),
        (CONCEPT + "publish: {to: 'http://h/x'}", r"publish.to: http://h/x: nothing is written over HTTP"),
        *(
            (
                CONCEPT + f"publish: {{hub: '{name}'}}",
                r"publish.hub: expected a repository of the hub, owner/name",
            )
            for name in ("name", "a/b/c", "../x", "https://h/a/b", "a b/c", "/b")
        ),
        (_concept(r'initializer: " "'), r"concepts\[0\].initializer: blank; give a word, or leave it out"),
        (
            _concept(r'class_prompt: "a\e[2J"'),
            r"class_prompt: has a character that cannot be seen, U\+001B",
        ),
        (CONCEPT + r'output: "a\0b"', r"output: has a character that cannot be seen, U\+0000"),
        (CONCEPT + r'evaluation: {prompts: ["{} \u202e"]}', r"evaluation.prompts: has a character .* U\+202E"),
        (CONCEPT + f"evaluation: {{prompts: ['{{}} {'a' * 20_000}']}}", r"prompts: expected at most 10000 letters"),
        (CONCEPT + "training: {prompt: a photo}", r"training.prompt: a prompt names the concept once by '{}'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_batch(write(tmp_path, text))


def test_words_of_every_script(tmp_path):
    for word in ("کتاب‌خانه", "❤️‍🔥 cat", "公共\u3000汽车"):
        batch = load_batch(write(tmp_path, CONCEPT.replace("class_word: cat", f"class_word: {word}")))
        assert batch.concepts[0].class_word == " ".join(word.split())


@pytest.mark.parametrize("section", [*_sections(Retraining), *_sections(Concept)], ids=lambda section: section.__name__)
def test_every_number_has_a_bound(section):
    for name, field in section.model_fields.items():
        if {int, float} & set(kinds_of(field.annotation)):
            schema = section.model_json_schema()["properties"][name]
            assert all(
                {"maximum", "exclusiveMaximum", "enum"} & set(kind)
                for kind in schema.get("anyOf", [schema])
                if kind.get("type") in ("integer", "number")
            ), name


def test_a_wrong_concept_is_the_only_mistake(tmp_path):
    with pytest.raises(ValueError) as refused:
        load_batch(write(tmp_path, "concepts:\n- {name: a, images: a, class_word: 3}\n"))
    assert str(refused.value) == f"{tmp_path}/batch.yaml:2: concepts[0].class_word: expected text, found 3"


def test_many_or_long_mistakes_are_cut(tmp_path):
    text = f"{'k' * 500}: 1\nconcepts: &all [{', '.join(['{name: 3}'] * 200)}]\nmerge: *all\n"
    with pytest.raises(ValueError) as refused:
        load_batch(write(tmp_path, text))
    assert len(str(refused.value).splitlines()) == 21 and len(str(refused.value)) < 10_000


def test_places_are_relative_to_the_file(tmp_path, monkeypatch):
    """But for `output`; they stand in the spec as they are written."""
    monkeypatch.setenv("HOME", "/home/me")
    folder = tmp_path / "[work]"
    folder.mkdir()
    (folder / "base").mkdir()
    text = CONCEPT.replace("images: cat", "images: [cat, 'c*/?.png']") + (
        "name: x\nbase: base\noutput: runs/{name}\nstore: st\npublish: {to: ../to, signing_key: key.pem}\n"
        "retrieval: {block_list: bad.txt, corpus: '~/c/*.parquet', clip: ./clip}\nevaluation: {clip: ~/clip}\n"
    )
    batch = load_batch(write(folder, text))
    assert (batch.store_url, batch.release_url, batch.output_path) == (f"{folder}/st", f"{tmp_path}/to", "runs/x")
    assert (batch.base_path, batch.signing_key) == (f"{folder}/base", f"{folder}/key.pem")
    assert (batch.corpus, batch.at(batch.retrieval.block_list)) == ("/home/me/c/*.parquet", f"{folder}/bad.txt")
    clips = [clip_path(section.clip, batch.folder) for section in (batch.retrieval, batch.evaluation)]
    assert clips == [f"{folder}/clip", "/home/me/clip"]
    assert batch.concepts[0].images == (f"{folder}/cat", f"{tmp_path}/[[]work]/c*/?.png")
    assert (batch.base, batch.store) == ("base", "st")
    with pytest.raises(ValueError, match="store: 'st' is relative"):
        batch.check_places()
    home = overridden(batch, output="~/runs/{name}")
    assert (
        home.output_path == "/home/me/runs/x" and home.store_url == batch.store_url and home.concepts == batch.concepts
    )
    for wrong in ("s3://b/x", ""):
        with pytest.raises(ValueError, match=r"^--output: report and summary go to a local folder"):
            overridden(batch, output=wrong)
    assert load_batch(write(tmp_path, CONCEPT + "output: ~/x")).store_url == "/home/me/x/store"


def test_a_signing_key_is_where_the_file_is(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    for load, concepts in ((load_batch, CONCEPT), (load_retraining, "catalogue: cards\n")):
        file = write(tmp_path, concepts + "publish: {signing_key: keys/mine.pem}")
        assert load(file).signing_key == f"{tmp_path}/keys/mine.pem"


def test_a_release_says_nothing_of_a_machine(tmp_path):
    """The same batch beside the same base in two folders is one release; paths in the home folder stay there."""
    (tmp_path / "key").mkdir()
    keys, specs = set(), []
    for name in ("one", "two"):
        folder = tmp_path / name
        (folder / "cat").mkdir(parents=True)
        concept_images("cat", "noto", 1, seed=1)[0].save(folder / "cat" / "1.png")
        for model in ("model", "clip"):
            (folder / f"my{model}").symlink_to(MINIATURE / model)
        written = {"one": "./my", "two": "./my"}[name]
        text = CONCEPT + (
            f"base: {written}model\nevaluation: {{clip: {folder}/myclip}}\ntraining: {{regularization: none}}\n"
            f"store: {folder}/store\npublish: {{signing_key: {folder}/key.pem, license_name: x, "
            "license_link: 'https://me:pw@h/licence'}\n"
        )
        release = make_plan(load_batch(write(folder, text))).release
        keys.add(release.key)
        specs.append(json.dumps(release.hashed()))
        assert release.places.base_name == "./mymodel"
    assert len(keys) == 1 and specs[0] == specs[1]
    assert str(tmp_path) not in specs[0] and "pw" not in specs[0] and '"clip": "myclip"' in specs[0]


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


@pytest.mark.parametrize(
    ("instance", "of_class", "class_word", "noted"),
    [
        ("a photo of sks bus", "a photo of bus", "bus", "'sks' is not the concept's token"),
        ("photo of a <new1> bus", "A picture of the bus.", "bus", ""),
        ("photo of <new1> wooden  pot", "a wooden pot", "wooden pot", ""),
        ("<new1> bus", "an image of a bus", "bus", ""),
        ("a high quality photo of a <new1> bus", "a high quality photo of a bus", "bus", "'high quality photo of …'"),
        ("a painting of my own <new1> bus at night", "bus", "bus", "'painting of … my own at night' of the instance"),
    ],
)
def test_instance_prompts_of_other_trainers(tmp_path, instance, of_class, class_word, noted):
    """With a byte order mark, as some editors write it."""
    entry = {"instance_prompt": instance, "class_prompt": of_class, "instance_data_dir": "bus"}
    batch = load_batch(write(tmp_path, "\ufeff" + json.dumps([entry]), "list.json"))
    assert (batch.concepts[0].class_word, batch.concepts[0].token) == (class_word, "<new1>")
    assert len(batch.notes) == bool(noted) and noted in "".join(batch.notes)
    rare = load_batch(write(tmp_path, "concepts: list.json\ntraining: {method: dreambooth}"))
    assert rare.concepts[0].token == ("sks" if "sks" in instance else "<new1>")
    for key, value, message in (
        ("class_prompt", "a photo of a", "names no class; found 'a photo of a'"),
        ("instance_prompt", "<a> <b>", "expected one new token like <new1>, found '<a> <b>'"),
        ("instance_data_dir", 3, "expected text, found 3"),
    ):
        with pytest.raises(ValueError, match=rf"list.json: \[0\].{key}: {message}"):
            load_batch(write(tmp_path, json.dumps([entry | {key: value}]), "list.json"))


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "{}  cat.jpg",
        "{} *dir/cat.jpg",
        "\\{}  odd\\nname",
        "SHA256 (" + "1" * 64 + ".jpg) = {}",
        "SHA2-256(cat.jpg)= {}",
        '"{}","reported"',
        "sha256:{}",
        "SHA256          {}       C:\\cat.jpg",
    ],
)
def test_block_lists(tmp_path, form):
    sums = [f"{i:02x}" * 31 + "aB" for i in range(2)]
    lines = ["# bad ones", "", *(form.format(s) for s in (sums[0], sums[1].upper(), sums[0].upper()))]
    (tmp_path / "bad.txt").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert read_block_list(str(tmp_path / "bad.txt")) == [s.lower() for s in sums]
    for wrong in ("f" * 63, "f" * 128, "cat.jpg", "g" * 64):
        (tmp_path / "bad.txt").write_text(f"{sums[0]}\n{wrong}\n")
        with pytest.raises(ValueError, match=r"bad.txt:2: expected a sha256 sum of 64 hexadecimal digits"):
            read_block_list(str(tmp_path / "bad.txt"))


def test_prompt_suites(tmp_path):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "cat.txt").write_text("photo of a {}.\n\n  {} in the snow \n")
    cat = "concepts: [{name: cat, images: cat, class_word: cat, prompts: %s}]\n"
    suite = ("photo of a {}.", "{} in the snow")
    (tmp_path / "suites" / "marked.txt").write_text("\ufeffphoto of a {}.\r\n{} in the snow")
    assert load_batch(write(tmp_path, cat % "suites/marked.txt")).concepts[0].prompts == suite
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


def test_older_names_of_the_merges_forms(tmp_path):
    (tmp_path / "cat").mkdir()
    for older, now in (("auto", "soft"), ("hard", "paper"), ("soft", "soft"), ("paper", "paper")):
        path = write(tmp_path, f"concepts: [{{name: a, images: cat, class_word: cat}}]\nmerge: {{form: {older}}}")
        assert load_batch(path).merge.form == now


def test_every_place_is_sent_and_none_is_published():
    """By their marks: what only says how a training is done is what its key leaves out, too."""
    private = {way[-1] for way in marked(ConceptBatch, Mark.PRIVATE) if way[0] == "training"}
    assert private == {field.name for field in dataclasses.fields(Train.Places)} - {"base"}
    sent = {".".join(way) for way in marked(ConceptBatch, Mark.FILE, Mark.MODEL)}
    files = {"retrieval.corpus", "retrieval.block_list", "training.deepspeed.config"}
    assert sent == files | {"base", "retrieval.clip", "evaluation.clip", "evaluation.judges"}
    assert set(marked(ConceptBatch, Mark.SUITES)) == {("evaluation", "prompts"), ("concepts", "*", "prompts")}
