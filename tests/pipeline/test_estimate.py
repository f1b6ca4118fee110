"""What `plan` says of memory is what a process takes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cost.estimate import Device
from pipeline.cost.model_size import LiveBytes, model_size
from pipeline.cost.of_plan import estimates, stage_bytes
from pipeline.miniature.world import concept_images
from pipeline.plan import make_plan, training_of
from pipeline.spec import MINIATURE, ConceptBatch
from pipeline.stages.train import AVERAGES, Train
from training.attention import use_attention
from training.loop import train
from training.methods import METHODS
from training.run import Member

PACKS = Path(__file__).parents[2] / "bench" / "packs.py"


@pytest.fixture
def batch(tmp_path) -> ConceptBatch:
    """Of one concept."""
    concept_images("cat", "streamline-emojis", 1, seed=0)[0].save(tmp_path / "0.png")
    concept = {"name": "cat", "images": str(tmp_path), "class_word": "cat"}
    return ConceptBatch.model_validate({"name": "one", "concepts": [concept]})


@pytest.fixture
def planned(batch):
    """Its training, with these settings."""

    def make(**training) -> Train:
        changed = ConceptBatch.model_validate(dict(batch) | {"training": training})
        return training_of(changed, "base", changed.concepts, ())

    return make


@pytest.fixture
def one(planned) -> Train:
    return planned()


@pytest.mark.slow
def test_resident_memory_of_a_pack(one):
    """Of a process on the CPU; what each more member takes by itself, as the process is most of it."""
    measured = {}
    for members in (1, 16):
        command = [sys.executable, str(PACKS), "--measure", "miniature", str(members)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
        measured[members] = json.loads(done.stdout.splitlines()[-1])["bytes"]
        assert one.pack_bytes(members) == pytest.approx(measured[members], rel=0.1)
    each = one.pack_bytes(16) - one.pack_bytes(1)
    assert each == pytest.approx(measured[16] - measured[1], rel=0.2)


@pytest.mark.parametrize(
    "training", [{}, {"gradient_checkpointing": True}, {"optimizer": "adamw8bit"}, {"regularization": "none"}]
)
def test_tensors_of_a_pack(miniature, miniature_concepts, settings, planned, tmp_path, training):
    """Counted in a real training, as a GPU's allocator would: what each more member takes."""
    regularized = training.get("regularization") != "none"
    own = dataclasses.replace(settings, steps=2, batch_size=4, optimizer=training.get("optimizer", "adamw"))
    most = {}
    use_attention(miniature.unet, "sdpa")
    if training.get("gradient_checkpointing"):
        miniature.unet.enable_gradient_checkpointing()
    try:
        for count in (1, 3):
            members = []
            for i in range(count):
                prior = miniature_concepts[0].regularization if regularized else None
                concept = dataclasses.replace(miniature_concepts[0], token=f"<c{i}>", regularization=prior)
                members.append(Member([concept], own, tmp_path / f"{count}-{i}"))
            parts = (miniature.unet, *miniature.text_encoders)
            with LiveBytes(tensor for part in parts for tensor in (*part.parameters(), *part.buffers())) as live:
                for _ in train(miniature, members):
                    pass
            most[count] = live.peak
    finally:
        miniature.unet.disable_gradient_checkpointing()
    one = planned(**training)
    each = (one.pack_bytes(3, cuda=True) - one.pack_bytes(1, cuda=True)) / 2
    width = 2  # of a number in bfloat16, which a GPU would train in
    trained = model_size(str(MINIATURE / "model")).trained * (8 + AVERAGES[own.optimizer])
    assert trained + 4 / width * (each - trained) == pytest.approx((most[3] - most[1]) / 2, rel=0.1)


def test_size_of_a_pack(planned):
    """As many as fit in nine tenths of the memory, and never none; what is asked for, when it is."""
    memory = 2 * 2**30
    for settings in ({}, {"gradient_checkpointing": True}, {"optimizer": "adamw8bit"}):
        for cuda in (False, True):
            one = planned(**settings)
            size = one.pack_size(Device(memory, cuda))
            assert size > 1
            assert one.pack_bytes(size, cuda=cuda) <= 0.9 * memory < one.pack_bytes(size + 1, cuda=cuda)
    assert planned().pack_size(Device(2**20, cuda=False)) == 1
    assert planned(pack_size=3).pack_size(Device(2**20, cuda=False)) == 3
    assert planned(strategy="ddp", ranks=2).pack_size(Device(2**40, cuda=True)) == 1


def test_precision_is_that_of_the_device(planned):
    """`auto` is bf16 on a GPU, wherever the plan is made."""
    automatic, half, full = (planned(precision=precision) for precision in ("auto", "bf16", "fp32"))
    assert automatic.pack_bytes(4, cuda=True) == half.pack_bytes(4, cuda=True) < full.pack_bytes(4, cuda=True)
    assert automatic.pack_bytes(4) == full.pack_bytes(4)


def test_ranks_share_out_samples_and_what_the_stage_says(planned):
    size = model_size(str(MINIATURE / "model"))

    def gib(ranks: int, **training) -> float:
        return planned(ranks=ranks, batch_size=4, **training).pack_bytes(1) / 2**30

    def zero(stage: int, ranks: int = 4) -> float:
        return gib(ranks, strategy="deepspeed", deepspeed={"stage": stage})

    ddp = gib(4, strategy="ddp")
    assert ddp == planned(batch_size=1).pack_bytes(1) / 2**30  # one sample and the whole model
    saved = 3 / 4 * size.trained / 2**30  # three quarters of the numbers are the other ranks'
    assert ddp - zero(1) == pytest.approx(8 * saved)
    assert zero(1) - zero(2) == pytest.approx(4 * saved)
    frozen = 3 / 4 * (size.parameters - size.vae_parameters) / 2**30
    assert zero(2) - zero(3) == pytest.approx(4 * saved + 4 * frozen)
    assert zero(3, ranks=1) == gib(1)


def test_offloading_frees_a_gpu_and_no_process_on_the_cpu(planned):
    size, width = model_size(str(MINIATURE / "model")), 2
    for stage, freed in (
        (2, 4 * size.trained),
        (3, (4 + 2) * size.trained + width * (size.parameters - size.vae_parameters) / 2),
    ):
        kept, moved = (
            planned(strategy="deepspeed", ranks=2, deepspeed={"stage": stage, "offload": offload})
            for offload in (False, True)
        )
        assert kept.pack_bytes(1) == moved.pack_bytes(1)
        assert kept.pack_bytes(1, cuda=True) - moved.pack_bytes(1, cuda=True) == pytest.approx(freed)


def test_what_ranks_exchange(planned):
    """Gradients twice (averaged, and handed back); with stage 3 the model twice, in bfloat16, and gradients once."""
    size = model_size(str(MINIATURE / "model"))
    assert planned().exchanged_bytes() == 0
    assert planned(strategy="ddp", ranks=2).exchanged_bytes() == 8 * size.trained
    assert planned(strategy="deepspeed", ranks=2).exchanged_bytes() == 8 * size.trained
    whole = planned(strategy="deepspeed", ranks=2, deepspeed={"stage": 3})
    assert whole.exchanged_bytes() == 4 * (size.parameters - size.vae_parameters) + 4 * size.trained


def test_a_deepspeed_configuration_of_ones_own_says_what_is_shared(planned, tmp_path):
    file = tmp_path / "own.json"

    def gib(config) -> float:
        file.write_text(json.dumps(config))
        return planned(strategy="deepspeed", ranks=2, deepspeed={"config": str(file)}).pack_bytes(1, cuda=True)

    made = planned(strategy="deepspeed", ranks=2, deepspeed={"stage": 3})
    expected = made.pack_bytes(1, cuda=True)
    assert gib({"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e7}}) == expected
    assert gib({"zero_optimization": {"stage": 3}}) == pytest.approx(expected + 4 * (5e8 - 5e7))


def test_memory_that_tasks_ask_for(batch):
    """What `plan` prints; a training's is that of its whole pack."""
    plan = make_plan(batch)
    printed = estimates(plan, cuda=False)
    for stage in plan:
        assert stage_bytes(plan, [stage]) == int((printed[stage.key].gib or 0) * 2**30)
    assert stage_bytes(plan, plan.of(Train) * 3) == int(plan.of(Train)[0].pack_bytes(3))


@pytest.mark.parametrize("train_text_encoder", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_trains_is_counted(miniature, method, train_text_encoder):
    names = miniature.trained(METHODS[method].unet, text_encoder=train_text_encoder)
    numbers = sum(miniature.parameters[name].numel() for name in names)
    size = model_size(str(MINIATURE / "model"), method, train_text_encoder=train_text_encoder)
    assert size.trained == numbers


def test_a_whole_unet_takes_more_memory_and_time(planned):
    kv, whole, token = (planned(method=m) for m in ("custom_diffusion", "custom_diffusion_all", "textual_inversion"))
    assert token.pack_bytes(1) < kv.pack_bytes(1)
    unet = model_size(str(MINIATURE / "model"), "custom_diffusion_all")
    assert whole.pack_bytes(1) > unet.trained * 16 + kv.pack_bytes(1) - 1e9
    assert unet.trained_share == 1
    assert whole.pack_size(Device(2**40, cuda=False)) == 1 < token.pack_size(Device(2 * 2**30, cuda=False))
