"""What `plan` says of memory is what a process takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.estimate import estimates, model_size, pack_bytes, pack_size, stage_bytes
from pipeline.miniature.world import concept_images
from pipeline.plan import Plan, make_plan
from pipeline.spec import MINIATURE, ConceptBatch
from training.methods import METHODS

PACKS = Path(__file__).parents[2] / "bench" / "packs.py"


@pytest.fixture
def planned(tmp_path):
    """The plan of one concept with settings of its training."""
    concept_images("cat", "streamline-emojis", 1, seed=0)[0].save(tmp_path / "0.png")
    concept = {"name": "cat", "images": str(tmp_path), "class_word": "cat"}

    def make(**training) -> Plan:
        return make_plan(ConceptBatch.model_validate({"name": "one", "concepts": [concept], "training": training}))

    return make


@pytest.fixture
def plan(planned) -> Plan:
    return planned()


@pytest.mark.slow
@pytest.mark.parametrize("members", [1, 16])
def test_memory_of_a_pack(plan, members):
    command = [sys.executable, str(PACKS), "--measure", "miniature", str(members)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    measured = json.loads(done.stdout.splitlines()[-1])["bytes"]
    assert pack_bytes(plan, members) == pytest.approx(measured, rel=0.25)


def test_size_of_a_pack(plan):
    """As many as fit in nine tenths of the memory, and never none."""
    memory = 2 * 2**30
    size = pack_size(plan, memory)
    assert size > 1
    assert pack_bytes(plan, size) <= 0.9 * memory < pack_bytes(plan, size + 1)
    assert pack_size(plan, 2**20) == 1


def test_memory_that_tasks_ask_for(plan):
    """What `plan` prints; a training's is that of its whole pack."""
    printed = estimates(plan)
    for stage in plan:
        assert stage_bytes(plan, [stage]) == int((printed[stage.key].gib or 0) * 2**30)
    assert stage_bytes(plan, plan.of("train") * 3) == int(pack_bytes(plan, 3))


@pytest.mark.parametrize("train_text_encoder", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_trains_is_counted(backbone, method, train_text_encoder):
    names = backbone.trained(METHODS[method].unet, text_encoder=train_text_encoder)
    numbers = sum(backbone.parameters[name].numel() for name in names)
    size = model_size(str(MINIATURE / "model"), method, train_text_encoder=train_text_encoder)
    assert size.trained == numbers


def test_a_whole_unet_takes_more_memory_and_time(planned):
    kv, whole, token = (planned(method=m) for m in ("custom_diffusion", "custom_diffusion_all", "textual_inversion"))
    assert pack_bytes(token, 1) < pack_bytes(kv, 1)
    unet = model_size(str(MINIATURE / "model"), "custom_diffusion_all")
    assert pack_bytes(whole, 1) > unet.trained * 16 + pack_bytes(kv, 1) - 1e9
    assert unet.trained_share == 1
    assert pack_size(whole, 2**40) == 1 < pack_size(token, 2 * 2**30)
