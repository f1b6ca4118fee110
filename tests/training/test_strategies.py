"""Two real processes make the weights that one makes; any strategy goes on from any other's checkpoint."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.loop import train
from training.run import Member, TrainingDiverged
from training.weights import ConceptWeights

pytestmark = pytest.mark.slow
ZERO = {f"zero{stage}": {"zero": stage, "offload": False} for stage in (1, 2, 3)}
ZERO["offloaded"] = {"zero": 2, "offload": True}


def _alone(backbone, member: Member) -> ConceptWeights:
    ((_, result),) = train(backbone, [member])
    assert isinstance(result, ConceptWeights)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def member(concepts, settings, folder):
    def make(name: str, steps: int = settings.steps, **changes) -> Member:
        concept = dataclasses.replace(concepts[0], **changes)
        return Member([concept], dataclasses.replace(settings, steps=steps, batch_size=4), folder / name)

    return make


@pytest.fixture(scope="module")
def single(backbone, member) -> ConceptWeights:
    """What one process makes of the whole batch."""
    return _alone(backbone, member("single"))


def _dreambooth(member: Member) -> Member:
    """All of the UNet and the text encoder, in place."""
    concept = dataclasses.replace(member.concepts[0], token="pll")
    settings = dataclasses.replace(member.settings, method="dreambooth", train_text_encoder=True)
    return dataclasses.replace(member, concepts=[concept], settings=settings)


@pytest.fixture(scope="module")
def made(backbone, pico, member, folder) -> dict[str, dict]:
    """All cases in one start of two ranks, each with half of the batch."""
    cases = {"ddp": (member("ddp"), "ddp", {})}
    cases |= {name: (member(name), "deepspeed", options) for name, options in ZERO.items()}
    # cut off after 4 steps of one process, gone on with by two
    _alone(backbone, member("on", steps=4))
    for name in ("ddp", "zero1", "zero2", "zero3"):
        shutil.copytree(folder / "on", folder / f"{name}-on")
        cases[f"{name}-on"] = (member(f"{name}-on"), *cases[name][1:])
        # and the other way round
        cases[f"{name}-cut"] = (member(f"{name}-cut", steps=4), *cases[name][1:])
    for name in ("zero1", "zero2", "zero3"):  # and two by two: cases are trained in their order
        for steps, case in ((4, f"{name}-begun"), (6, f"{name}-ended")):
            cases[case] = (member(f"{name}-twice", steps=steps), *cases[name][1:])
    features = member("x").concepts[0].features
    broken = dataclasses.replace(features, latents=features.latents * float("nan"))
    cases["dreambooth"] = (_dreambooth(member("dreambooth")), "ddp", {})
    cases["nan"] = (member("nan", features=broken), "ddp", {})
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(__file__).with_name("ranks.py")), str(folder / "cases.pt"), str(pico)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in cases}


@pytest.mark.parametrize(
    "name", ["ddp", *ZERO, "ddp-on", *(f"zero{stage}-{how}" for stage in (1, 2, 3) for how in ("on", "ended"))]
)
def test_two_ranks_are_one_with_twice_the_batch(same_weights, made, single, name):
    result = made[name]["result"]
    same_weights(result, single)
    assert result.metadata["losses"] == pytest.approx(single.metadata["losses"], rel=1e-4)


def test_any_method_trains_on_two_ranks(backbone, made, member):
    result, alone = made["dreambooth"]["result"], _alone(backbone, _dreambooth(member("dreambooth-alone")))
    assert result.metadata["losses"] == pytest.approx(alone.metadata["losses"], rel=1e-4)
    assert result.deltas.keys() == alone.deltas.keys()
    apart = sum((result.deltas[name] - delta).square().sum() for name, delta in alone.deltas.items())
    changed = sum(delta.square().sum() for delta in alone.deltas.values())
    # gradients that are all rounding (biases before a norm) count in full, as Adam divides by their size
    assert apart < 0.02**2 * changed


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3"])
def test_one_goes_on_where_two_were_cut_off(backbone, same_weights, made, member, single, name):
    same_weights(_alone(backbone, member(f"{name}-cut")), single)


def test_stage_3_shares_out_the_frozen_model(backbone, made):
    whole = sum(p.numel() for p in backbone.unet.parameters())
    assert all(size == whole for size in made["zero2"]["resident"])
    # each rank keeps half; DeepSpeed leaves small tensors (norms, biases) whole
    assert all(size < 0.6 * whole for size in made["zero3"]["resident"])


def test_divergence_is_seen_by_all_ranks(made):
    assert isinstance(made["nan"]["result"], TrainingDiverged)


def test_what_cannot_be_shared_is_refused(backbone, member):
    from training.strategies import Single

    two = Single()
    two.ranks = 2
    with pytest.raises(ValueError, match="one member at a time"):
        list(train(backbone, [member("a"), member("b")], strategy=two))
    odd = member("odd")
    odd = dataclasses.replace(odd, settings=dataclasses.replace(odd.settings, batch_size=3))
    with pytest.raises(ValueError, match="a batch of 3 cannot be shared evenly by 2 ranks"):
        list(train(backbone, [odd], strategy=two))
