"""What a plan refuses before anything is computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.checks import UnusableConcepts, check_pair
from pipeline.cost.of_plan import disk_bytes, estimates
from pipeline.miniature.world import concept_images
from pipeline.plan import Plan, make_plan
from pipeline.ready import check_ready
from pipeline.spec import MINIATURE, ConceptBatch
from pipeline.stages.compose import Compose
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.features import Features
from pipeline.stages.generated import Generated
from pipeline.stages.train import Train
from pipeline.store import Store

LONG = " ".join(["far"] * 27)


@pytest.fixture
def planned(tmp_path: Path):
    """The plan of a batch of concepts with one picture."""
    concept_images("cow", "streamline-emojis", 1, seed=0)[0].save(tmp_path / "0.png")

    def make(*concepts: dict, **sections) -> Plan:
        own = [{"name": f"c{i}", "images": str(tmp_path), "class_word": "cow"} | c for i, c in enumerate(concepts)]
        small = {"training": {"regularization": "none"}, "evaluation": {"samples": 1, "steps": 1}}
        merged = {key: value | sections.get(key, {}) for key, value in small.items()}
        return make_plan(ConceptBatch.model_validate({"concepts": own, **sections, **merged}))

    return make


@pytest.mark.parametrize(
    ("concept", "sections", "message"),
    [
        ({}, {"training": {"prompt": f"{LONG} {{}}"}}, "training.prompt: 31 tokens, but .* takes 30"),
        ({"prompts": [f"{LONG} a a {{}}"]}, {}, r"concepts\[0\] \(c0\): prompts: 31 tokens, but .* takes 30"),
        ({}, {"evaluation": {"prompts": [f"{LONG} a a {{}}"]}}, r"\(c0\): evaluation.prompts: 31 tokens"),
        ({}, {"merge": {"prompts": ["{}", f"{LONG} a a {{}}"]}}, "merge.prompts: 31 tokens"),
        ({"class_word": f"{LONG} far far far"}, {}, "class_word: 31 tokens, .*; shorten '<new1> far far"),
        (
            {"class_prompt": f"{LONG} far far far far"},
            {"training": {"regularization": "generated"}},
            "class_prompt: 31 tokens",
        ),
        ({"token": "Cow"}, {}, r"concepts\[0\] \(c0\): token 'Cow': .* reads it as 'cow', which it knows already"),
        ({"token": "owbo"}, {}, "token 'owbo': a tokenizer finds a new token inside other words too"),
        ({}, {"evaluation": {"steps": 1001}}, "evaluation.steps: 1001 steps, but .* has 1000"),
    ],
)
def test_what_would_be_cut_off_or_read_otherwise(planned, concept, sections, message):
    planned({"prompts": [f"{LONG} a {{}}"]})  # 30 tokens
    with pytest.raises(ValueError, match=message):
        planned(concept, **sections)


def test_a_concept_is_refused_alone(planned):
    with pytest.raises(UnusableConcepts) as unusable:
        planned({}, {"token": "Cow"}, {"prompts": [f"{LONG} a a {{}}"]}, {"images": "/nowhere"})
    assert list(unusable.value.concepts) == ["c1", "c2", "c3"]


def test_prompts_of_two_concepts(planned):
    plan = planned({}, {"token": "<other>"})
    check_pair(plan.batch, plan.batch.concepts, [f"{LONG[:-8]} {{0}} {{1}}"])
    with pytest.raises(ValueError, match="31 tokens"):
        check_pair(plan.batch, plan.batch.concepts, [f"{LONG} {{0}} {{1}}"])


@pytest.mark.parametrize("words", [("moongate", "moongate"), ("moongate", "MoonGate"), ("moon gate", "moon  gate")])
def test_new_categories_of_one_class_word(planned, words):
    gates = [{"class_word": word, "new_category": True} for word in words]
    with pytest.raises(ValueError, match=r"have the same class_word 'moon ?gate'"):
        planned(*gates)
    planned(gates[0], {"class_word": words[0]})  # which has a token


def test_tokens_that_differ_in_their_unicode_form(planned):
    with pytest.raises(ValueError, match="have the same token"):
        planned({"token": "<caf\u00e9>"}, {"token": "<cafe\u0301>"})


def test_drawings_without_the_bases_safety_checker_are_others(planned, tmp_path):
    """Where it was on they may be black; of a base that has none all keys stay what they were."""
    folder = tmp_path / "base"
    shutil.copytree(MINIATURE / "model", folder)
    generated = {"regularization": "generated"}
    clip = {"clip": str(MINIATURE / "clip")}

    def plan() -> Plan:
        return planned({}, {"token": "<b>"}, base=str(folder), training=generated, evaluation=clip)

    without = plan()
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with_one = plan()
    for kind in (Generated, Evaluate):
        assert "safety_checker" not in without.of(kind)[0].hashed()
        assert with_one.of(kind)[0].hashed()["safety_checker"] is False
    assert "safety_checker" not in with_one.of(Train)[0].hashed()
    both = list(with_one.evaluations().values())
    assert Compose.of(both[0]["base"], both[1]["base"], ["{0} {1}"]).hashed()["safety_checker"] is False


def test_a_clip_that_cannot_be_loaded(planned, tmp_path):
    def refused(clip: str) -> str:
        with pytest.raises(ValueError, match=r"^evaluation\.clip: ") as error:
            planned({}, evaluation={"clip": clip})
        return str(error.value)

    assert "CLIP directory /no/clip: not there" in refused("/no/clip")
    assert "its pretrained tags are" in refused("ViT-B-32/laion2b")
    assert "cannot be had" in refused("hf-hub:nobody/nothing")
    folder = tmp_path / "clip"
    shutil.copytree(MINIATURE / "clip", folder)
    (folder / "open_clip_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "open_clip_model.safetensors is not whole" in refused(str(folder))
    (folder / "open_clip_config.json").unlink()
    assert "needs open_clip_config.json" in refused(str(folder))


def test_seeds_of_other_programs(planned):
    seed = 156680208700286
    plan = planned({"training": {"seed": seed}}, evaluation={"seed": seed}, training={"seed": seed})
    assert plan.of(Train)[0].training.seed == seed
    with pytest.raises(ValueError, match="less than 9223372036854775808"):
        planned({}, training={"seed": 2**63})


def test_places_that_cannot_be_written(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for sections, message in (
        ({"output": "file/runs"}, r"output: file/runs: .*/file is a file; name a folder"),
        ({"store": "file"}, r"store: .*file: .*/file is a file"),
        ({"publish": {"to": "/proc/releases"}}, "publish.to: /proc/releases: /proc cannot be written"),
    ):
        plan = planned({}, **sections)
        with pytest.raises(ValueError, match=message):
            check_ready(plan, Store(plan.batch.store_url))
    plan = planned({}, output="new/runs")
    assert check_ready(plan, Store(plan.batch.store_url)) == []
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_too_small(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = planned({}, training={"views": 1_000_000_000})
    with pytest.raises(ValueError, match=r"store: .*: what is to do leaves \d{4}\.\d GB or more there, but"):
        check_ready(plan, Store(plan.batch.store_url))
    assert disk_bytes(plan, plan.of(Features)) == 1_000_000_000 * 32 * 8 * 8 * 4


def test_seconds_of_features_are_those_of_what_is_encoded(planned):
    own = {"views": 1, "augment": False}
    kinds = ("none", "generated", "real")
    plans = [planned({}, training=own | {"regularization": kind}, retrieval={"images": 3}) for kind in kinds]
    seconds = [estimates(plan, cuda=False)[plan.of(Features)[0].key].seconds for plan in plans]
    assert seconds[1] > 2 * seconds[0] and seconds[2] > 2 * seconds[0]
