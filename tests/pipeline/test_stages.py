"""What all stages have in common: keys, order, and which of them one process does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from pipeline.cost.estimate import Device
from pipeline.miniature.world import concept_images
from pipeline.plan import Plan, make_plan
from pipeline.spec import ConceptBatch
from pipeline.stages import STAGES
from pipeline.stages.candidates import Candidates
from pipeline.stages.compose import Compose
from pipeline.stages.stage import Artifact, Stage
from pipeline.stages.train import Train


@dataclass(frozen=True, kw_only=True)
class Cut(Stage[Artifact]):
    kind, version = "cut", 1

    @dataclass(frozen=True)
    class Places:
        folder: str

    size: int
    sharp: bool = False
    places: Places


@pytest.fixture
def planned(tmp_path):
    concept_images("cow", "streamline-emojis", 1, seed=0)[0].save(tmp_path / "0.png")

    def make(*tokens: str, **sections) -> Plan:
        own = [{"images": str(tmp_path), "class_word": "cow", "token": token} for token in tokens]
        concepts = [{"name": f"c{i}"} | concept for i, concept in enumerate(own)]
        return make_plan(ConceptBatch.model_validate({"concepts": concepts, **sections}))

    return make


def test_a_key_is_of_what_determines_the_result():
    stage = Cut(name="one", size=3, places=Cut.Places("/here"))
    assert stage.hashed() == {"size": 3}  # a field at its default is left out: stores from before it stay valid
    for change in ({"name": "other"}, {"places": Cut.Places("/there")}, {"sharp": False}):
        assert dataclasses.replace(stage, **change).key == stage.key
    changed = [{"size": 4}, {"sharp": True}, {"inputs": (stage,)}]
    keys = {dataclasses.replace(stage, **change).key for change in changed}
    assert len(keys) == 3 and stage.key not in keys


def test_each_stage_reads_only_results_of_those_before_it(planned):
    assert len({kind.kind for kind in STAGES}) == len(STAGES)
    plans = [
        planned("<a>", "<b>", merge={"form": "soft"}),
        planned("<a>", "<b>", training={"regularization": "generated", "composition": "joint"}),
    ]
    first, second = plans[0].evaluations().values()
    stages = [*plans[0], *plans[1], Compose.of(first["merged"], second["merged"], ["{0} and {1}"])]
    for stage in stages:
        for source in stage.inputs:
            assert STAGES.index(type(source)) < STAGES.index(type(stage))
    assert {kind.kind for kind in STAGES} - {stage.kind for stage in stages} == {"released"}


def test_trainings_share_a_process_where_they_can(planned):
    """As few packs as memory allows, of even sizes, but one for each device; a token is once in a pack."""
    plan = planned("<a>", "<b>", "<c>", "<d>", "<e>", training={"regularization": "none", "pack_size": 3})
    trainings = plan.of(Train)

    def packs(stages, devices: int) -> list[int]:
        return [len(pack) for pack in Train.jobs(stages, devices, lambda: Device(2**40, cuda=False))]

    assert packs(trainings, 1) == [3, 2]
    assert packs(trainings, 4) == [2, 1, 1, 1]
    again = dataclasses.replace(trainings[0], training=dataclasses.replace(trainings[0].training, seed=1))
    assert packs([trainings[0], again], 1) == [1, 1]
    other = dataclasses.replace(trainings[1], places=dataclasses.replace(trainings[1].places, compile=True))
    assert packs([trainings[0], other], 1) == [1, 1]
    assert Train.jobs([], 1, lambda: pytest.fail("looked at a device for nothing")) == []


def test_one_search_is_of_one_index(planned):
    """Variants of a study may have corpora of their own."""
    small = planned("<a>", "<b>", retrieval={"miniature_captions": 100}).of(Candidates)
    large = planned("<a>", retrieval={"miniature_captions": 200}).of(Candidates)
    more = planned("<a>", retrieval={"miniature_captions": 100, "images": 7}).of(Candidates)
    assert Candidates.jobs([*small, *large, *more], 1, lambda: Device(0, cuda=False)) == [
        tuple(small),
        tuple(large),
        tuple(more),
    ]
