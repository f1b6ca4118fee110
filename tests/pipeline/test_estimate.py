"""What `plan` says of memory is what a process takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.estimate import pack_bytes, pack_size
from pipeline.miniature.world import concept_images
from pipeline.plan import Plan, make_plan
from pipeline.spec import ConceptBatch

PACKS = Path(__file__).parents[2] / "bench" / "packs.py"


@pytest.fixture
def plan(tmp_path) -> Plan:
    concept_images("cat", "streamline-emojis", 1, seed=0)[0].save(tmp_path / "0.png")
    concept = {"name": "cat", "images": str(tmp_path), "class_word": "cat"}
    return make_plan(ConceptBatch.model_validate({"name": "one", "concepts": [concept]}))


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
