"""Training changes what it should and nothing else; resumed = uninterrupted."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from torch._dynamo.utils import counters

from pipeline.miniature.world import concept_images
from pipeline.sampling import draw
from training.backbone import Backbone, TokenRows
from training.checkpoint import load_tensors, save_tensors
from training.features import ConceptFeatures, concept_features
from training.loop import train
from training.pack import StackedLinear
from training.run import Member, TrainingDiverged
from training.seeds import generator
from training.strategies import Single
from training.weights import ConceptWeights


def _state(backbone: Backbone) -> dict[str, torch.Tensor]:
    parts = {"unet": backbone.unet, "vae": backbone.vae, "text": backbone.text_encoders[0]}
    return {f"{p}.{k}": v.clone() for p, module in parts.items() for k, v in module.state_dict().items()}


def train_alone(backbone, concepts, settings, *, scratch, **callbacks) -> ConceptWeights:
    ((_, result),) = train(backbone, [Member(concepts, settings, scratch)], **callbacks)
    if isinstance(result, TrainingDiverged):
        raise result
    return result


def test_only_text_kv_and_new_rows_train(backbone, concepts, settings, tmp_path, monkeypatch):
    seen = {}
    adamw = torch.optim.AdamW

    def spy(groups, **options):
        seen["shapes"] = sorted(tuple(p.shape) for group in groups for p in group["params"])
        seen["unet"] = {n for n, p in backbone.unet.named_parameters() if p.requires_grad}
        seen["text"] = {n for n, p in backbone.text_encoders[0].named_parameters() if p.requires_grad}
        return adamw(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    weights = train_alone(backbone, concepts[:1], settings, scratch=tmp_path)
    expected = {f"{name}.weight" for name in backbone.layers}
    assert expected and all(".attn2.to_" in name for name in expected)
    assert seen["unet"] == expected
    assert len(seen["text"]) == 1 and next(iter(seen["text"])).endswith("rows")
    row = (1, backbone.text_encoders[0].get_input_embeddings().embedding_dim)
    assert seen["shapes"] == sorted([row, *(tuple(layer.weight.shape) for layer in backbone.layers.values())])
    assert set(weights.deltas) == set(backbone.layers)
    assert all(delta.abs().max() > 0 for delta in weights.deltas.values())
    assert list(weights.tokens) == ["<new1>"]


def test_backbone_is_left_as_it_was(backbone, concepts, settings, tmp_path):
    before, words = _state(backbone), len(backbone.tokenizers[0])
    train_alone(backbone, concepts, settings, scratch=tmp_path)
    after = _state(backbone)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert len(backbone.tokenizers[0]) == len(backbone.pipe.tokenizer) == words
    assert not any(p.requires_grad for p in backbone.unet.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_resumed_is_uninterrupted(backbone, concepts, settings, tmp_path, optimizer):
    settings = dataclasses.replace(settings, optimizer=optimizer)
    whole = train_alone(backbone, concepts[:1], settings, scratch=tmp_path / "whole")
    train_alone(backbone, concepts[:1], dataclasses.replace(settings, steps=4), scratch=tmp_path / "cut")
    resumed = train_alone(backbone, concepts[:1], settings, scratch=tmp_path / "cut")
    assert resumed.metadata == whole.metadata
    assert all(torch.equal(resumed.deltas[k], whole.deltas[k]) for k in whole.deltas)
    assert torch.equal(resumed.tokens["<new1>"][0], whole.tokens["<new1>"][0])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _blank_end(file: Path) -> None:
    """As some file systems leave it after a power failure: of the right length, but never written."""
    data = file.read_bytes()
    file.write_bytes(data[:-1000] + bytes(1000))


def _foreign(file: Path) -> None:
    save_tensors(file, {"x": torch.zeros(2)})


def _other_shape(file: Path) -> None:
    tensors, metadata = load_tensors(file)
    name = next(name for name in tensors if name.startswith("weight."))
    save_tensors(file, tensors | {name: tensors[name][:1]}, {"losses": metadata["losses"]})


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [_empty, _cut, _blank_end, _foreign, _other_shape, _folder])
def test_a_damaged_checkpoint(backbone, concepts, settings, tmp_path, caplog, damage):
    """The one before is taken; where that is damaged, too, the training begins again."""
    settings = dataclasses.replace(settings, steps=3, checkpoint_every=1)
    whole = train_alone(backbone, concepts[:1], settings, scratch=tmp_path)
    last, older = tmp_path / "checkpoint.safetensors", tmp_path / "checkpoint-older.safetensors"
    done: list[int] = []

    def resumed() -> list[int]:
        done.clear()
        made = train_alone(
            backbone, concepts[:1], settings, scratch=tmp_path, progress=lambda _, step, __: done.append(step)
        )
        assert made.metadata == whole.metadata
        assert all(torch.equal(made.deltas[k], whole.deltas[k]) for k in whole.deltas)
        return done

    assert resumed() == [] and not caplog.records
    damage(last)
    assert resumed() == [3]
    assert [r.levelname for r in caplog.records] == ["WARNING"] and f"cat: {last} cannot be used" in caplog.text
    damage(last), damage(older)
    assert resumed() == [1, 2, 3]


def test_a_damaged_checkpoint_is_its_own_member_s(backbone, same_weights, concepts, settings, tmp_path):
    """The others of the pack go on from theirs."""
    settings = dataclasses.replace(settings, steps=3, checkpoint_every=1)
    members = _members(concepts, settings, tmp_path)
    whole = {member.concepts[0].name: result for member, result in train(backbone, members)}
    for file in members[0].scratch.glob("checkpoint*"):
        _empty(file)
    done: list[tuple[str, int]] = []
    again = train(backbone, members, progress=lambda member, step, _: done.append((member.concepts[0].name, step)))
    for member, result in list(again):
        same_weights(result, whole[member.concepts[0].name])
    assert [step for name, step in done if name == "c0"] == [1, 2, 3] and not [name for name, _ in done if name == "c1"]


class _Watched(Single):
    """Sees which gradients are there when those of a step are to be made."""

    def wrap(self, objective, runs):
        self.parameters = [*objective.parameters(), *(p for run in runs for p in run.trained)]
        self.seen: list[bool] = []
        return objective

    def backward(self, loss):
        self.seen.append(any(p.grad is not None for p in self.parameters))
        loss.backward()


@pytest.mark.parametrize("method", ["custom_diffusion", "custom_diffusion_crossattn"])
def test_gradients_of_a_step_are_gone_in_the_next(backbone, concepts, settings, tmp_path, method):
    strategy = _Watched()
    train_alone(
        backbone,
        concepts[:1],
        dataclasses.replace(settings, steps=2, method=method),
        scratch=tmp_path,
        strategy=strategy,
    )
    assert strategy.seen == [False, False]


def test_every_jointly_trained_concept_trains(backbone, concepts, settings, tmp_path):
    """The last concept too: peers' masks got that wrong twice (diffusers #7294, custom-diffusion #41)."""
    start = [backbone.text_encoders[0].get_input_embeddings().weight]
    weights = train_alone(backbone, concepts, settings, scratch=tmp_path)
    assert list(weights.tokens) == ["<new1>", "<new2>"]
    for (row,) in weights.tokens.values():
        assert not (start[0] == row).all(1).any()
    assert [c["name"] for c in weights.metadata["concepts"]] == ["cat", "turtle"]


def test_without_regularization(backbone, concepts, settings, tmp_path):
    alone = dataclasses.replace(concepts[0], regularization=None)
    weights = train_alone(backbone, [alone], settings, scratch=tmp_path)
    assert len(weights.metadata["losses"]) == settings.steps


def test_nan_stops_and_keeps_the_checkpoint(backbone, concepts, settings, tmp_path):
    train_alone(backbone, concepts[:1], dataclasses.replace(settings, steps=2), scratch=tmp_path)
    good = (tmp_path / "checkpoint.safetensors").read_bytes()
    features = concepts[0].features
    broken = ConceptFeatures(features.latents * float("nan"), features.masks, features.words)
    with pytest.raises(TrainingDiverged, match="cat: the loss became nan at step 3"):
        train_alone(backbone, [dataclasses.replace(concepts[0], features=broken)], settings, scratch=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == good
    assert not any(p.requires_grad for p in backbone.unet.parameters())


def test_weights_that_are_no_numbers_after_the_last_step(backbone, concepts, settings, tmp_path):
    """No loss says so any more."""
    wild = dataclasses.replace(settings, steps=1, learning_rate=1e39)
    with pytest.raises(TrainingDiverged, match=r"cat: a weight is no finite number after step 1; .*learning_rate"):
        train_alone(backbone, concepts[:1], wild, scratch=tmp_path)


def test_known_tokens_and_long_initializers_are_refused(backbone, concepts, settings, tmp_path):
    known = dataclasses.replace(concepts[0], token="cat")
    with pytest.raises(ValueError, match="'cat': the base model's tokenizer knows it already"):
        train_alone(backbone, [known], settings, scratch=tmp_path)
    long = dataclasses.replace(concepts[0], initializer="zzyzx")
    with pytest.raises(ValueError, match="initializer 'zzyzx': must be one token"):
        train_alone(backbone, [long], settings, scratch=tmp_path)


def test_seeds_of_any_size(backbone, concepts, settings, tmp_path):
    """Small ones give the numbers that they always gave."""
    assert generator(7).initial_seed() == 7 and generator(2**64 + 7).initial_seed() == 7
    for seed in (156680208700286, 2**63 - 1):
        own = dataclasses.replace(settings, steps=1, seed=seed)
        train_alone(backbone, concepts[:1], own, scratch=tmp_path / str(seed))
    image = concept_images("cat", "noto", 1, seed=0)
    concept_features(backbone, image, ["0" * 64], views=1, augment=True, seed=2**63 - 1)
    draw(backbone, ["a cat"], seeds=[2**63], steps=1, guidance=1.0)
    with pytest.raises(ValueError, match="1001 steps, but the base model's noise schedule has 1000"):
        draw(backbone, ["a cat"], seeds=[0], steps=1001, guidance=1.0)
    with pytest.raises(ValueError, match="40 tokens, but"):
        draw(backbone, ["cat " * 40], seeds=[0], steps=1, guidance=1.0)


def test_begin_of_text_takes_no_gradient():
    """K and V of position 0 are detached: a caption of which only position 0 is read trains nothing."""
    layer = StackedLinear(torch.nn.Linear(4, 3, bias=False))
    text = torch.randn(2, 5, 4, requires_grad=True)
    made = layer(text)
    assert torch.allclose(made, torch.nn.functional.linear(text, layer.weight[0]))
    made[:, 0].sum().backward(retain_graph=True) if made[:, 0].requires_grad else None
    assert layer.weight.grad is None or not layer.weight.grad.any()
    assert text.grad is None or not text.grad.any()


def test_token_rows_leave_the_table_alone(backbone):
    table = backbone.text_encoders[0].get_input_embeddings()
    ids = [table.num_embeddings + 3, 6]  # a table may be longer than the tokenizer, or the ids have gaps
    rows = TokenRows(table, torch.ones(2, table.embedding_dim), ids)
    out = rows(torch.tensor([[5, 6, 7]]))
    assert torch.equal(out[0, 0], table.weight[5]) and torch.equal(out[0, 2], table.weight[7])
    out.sum().backward()
    assert table.weight.grad is None
    assert rows.rows.grad[1].eq(1).all() and rows.rows.grad[0].eq(0).all()


@pytest.mark.parametrize(("every", "steps"), [(3, [3, 4]), (None, [])])
def test_logs_and_samples(backbone, concepts, settings, tmp_path, every, steps):
    drawn: list[int] = []
    train_alone(
        backbone,
        concepts[:1],
        dataclasses.replace(settings, steps=4, sample_every=every),
        scratch=tmp_path,
        sample=lambda _, path, step: (drawn.append(step), Image.new("RGB", (8, 8)).save(path))[0],
    )
    assert drawn == steps
    assert list((tmp_path / "tensorboard").glob("events*"))


# --- packs -----------------------------------------------------------------------------------------------


def _members(concepts, settings, folder, count=2) -> list[Member]:
    """Concepts with different numbers of images, their own seeds, learning rates and numbers of steps."""
    made = []
    for i in range(count):
        own = dataclasses.replace(
            settings,
            seed=i,
            steps=settings.steps + i % 3,
            learning_rate=settings.learning_rate / (1 + i),
            token_learning_rate=settings.learning_rate,
            max_grad_norm=0.05 * (1 + i),
        )
        concept = dataclasses.replace(concepts[i % 2], name=f"c{i}", token=f"<c{i}>", initializer=i)
        made.append(Member([concept], own, folder / f"{i}"))
    return made


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_packed_is_alone(backbone, same_weights, concepts, settings, tmp_path, count):
    members = _members(concepts, dataclasses.replace(settings, steps=20), tmp_path, count)
    packed = {member.concepts[0].name: result for member, result in train(backbone, members)}
    assert list(packed) == sorted(packed, key=lambda name: len(packed[name].metadata["losses"]))
    for member in members:
        alone = train_alone(
            backbone, member.concepts, member.settings, scratch=tmp_path / "alone" / member.scratch.name
        )
        together = packed[member.concepts[0].name]
        assert together.metadata["steps"] == member.settings.steps
        same_weights(together, alone)


@pytest.mark.parametrize("good", [0, 2])
def test_a_diverged_member_leaves_the_others_alone(backbone, same_weights, concepts, settings, tmp_path, good):
    """From its first step, or after some good ones."""
    members = _members(concepts, settings, tmp_path, 3)
    features = members[1].concepts[0].features
    own = dataclasses.replace(features, latents=features.latents.clone())
    members[1] = dataclasses.replace(members[1], concepts=[dataclasses.replace(members[1].concepts[0], features=own)])

    def break_it(member: Member, step: int, loss: float = 0.0) -> None:
        if member is members[1] and step == good:
            own.latents.fill_(float("inf"))

    break_it(members[1], 0)
    ends = {member.concepts[0].name: result for member, result in train(backbone, members, progress=break_it)}
    assert isinstance(ends["c1"], TrainingDiverged)
    assert f"c1: the loss became nan at step {good + 1}" in str(ends["c1"])
    for member in (members[0], members[2]):
        alone = train_alone(
            backbone, member.concepts, member.settings, scratch=tmp_path / "alone" / member.scratch.name
        )
        same_weights(ends[member.concepts[0].name], alone)


def test_packed_is_alone_with_8_bit_adam(backbone, same_weights, concepts, settings, tmp_path):
    members = _members(concepts, dataclasses.replace(settings, optimizer="adamw8bit"), tmp_path)
    for member, together in list(train(backbone, members)):
        alone = train_alone(
            backbone, member.concepts, member.settings, scratch=tmp_path / "alone" / member.scratch.name
        )
        same_weights(together, alone)


def test_gradient_checkpointing_changes_no_weights(backbone, same_weights, concepts, settings, tmp_path):
    """Alone and in a pack."""
    kept = [w for _, w in train(backbone, _members(concepts, settings, tmp_path / "kept"))]
    backbone.unet.enable_gradient_checkpointing()
    try:
        packed = [w for _, w in train(backbone, _members(concepts, settings, tmp_path / "packed"))]
        first = _members(concepts, settings, tmp_path / "alone")[0]
        alone = train_alone(backbone, first.concepts, first.settings, scratch=first.scratch)
    finally:
        backbone.unet.disable_gradient_checkpointing()
    for a, b in ((packed[0], kept[0]), (packed[1], kept[1]), (alone, kept[0])):
        same_weights(a, b)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="PyTorch compiles with a C++ compiler")
def test_compiling_changes_no_weights(backbone, same_weights, concepts, settings, tmp_path):
    def pack(name: str) -> list[Member]:  # of one size to its end: each size is compiled anew
        members = _members(concepts, settings, tmp_path / name)
        return [dataclasses.replace(m, settings=dataclasses.replace(m.settings, steps=3)) for m in members]

    plain = [w for _, w in train(backbone, pack("plain"))]
    counters.clear()
    with backbone.compiled():
        compiled = [w for _, w in train(backbone, pack("compiled"))]
    for a, b in zip(compiled, plain, strict=True):
        same_weights(a, b)
    blocks = [m for m in backbone.unet.modules() if isinstance(m, BasicTransformerBlock)]
    assert counters["stats"]["calls_captured"] and not counters["graph_break"]
    assert not any(block._compiled_call_impl for block in blocks)


def test_a_member_goes_on_in_another_pack(backbone, same_weights, concepts, settings, tmp_path):
    first, second, third = _members(concepts, settings, tmp_path, 3)
    whole = train_alone(backbone, first.concepts, first.settings, scratch=tmp_path / "whole")
    cut = dataclasses.replace(first, settings=dataclasses.replace(first.settings, steps=4))
    list(train(backbone, [cut, second]))
    resumed = dict((m.concepts[0].name, w) for m, w in train(backbone, [third, first]))["c0"]
    assert resumed.metadata["losses"][:4] == pytest.approx(whole.metadata["losses"][:4], rel=1e-4)
    same_weights(resumed, whole)


def test_members_that_cannot_share_a_pack(backbone, concepts, settings, tmp_path):
    first, second = _members(concepts, settings, tmp_path)
    second = dataclasses.replace(second, settings=dataclasses.replace(settings, batch_size=3))
    with pytest.raises(ValueError, match="one batch size"):
        list(train(backbone, [first, second]))
