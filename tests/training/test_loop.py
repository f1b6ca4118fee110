"""Training changes what it should and nothing else; resumed = uninterrupted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from training.backbone import Backbone, TokenRows
from training.features import ConceptFeatures
from training.loop import TrainingDiverged, train


def _state(backbone: Backbone) -> dict[str, torch.Tensor]:
    parts = {"unet": backbone.unet, "vae": backbone.vae, "text": backbone.text_encoders[0]}
    return {f"{p}.{k}": v.clone() for p, module in parts.items() for k, v in module.state_dict().items()}


def test_only_text_kv_and_new_rows_train(backbone, concepts, settings, tmp_path, monkeypatch):
    seen = {}
    adamw = torch.optim.AdamW

    def spy(groups, **options):
        seen["ids"] = {id(p) for group in groups for p in group["params"]}
        seen["names"] = {n for n, p in backbone.unet.named_parameters() if id(p) in seen["ids"]}
        seen["requires"] = {n for n, p in backbone.unet.named_parameters() if p.requires_grad}
        encoder = backbone.text_encoders[0]
        seen["text"] = {n for n, p in encoder.named_parameters() if p.requires_grad}
        return adamw(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    weights = train(backbone, concepts[:1], settings, scratch=tmp_path)
    expected = {f"{name}.weight" for name in backbone.layers}
    assert expected and all(".attn2.to_" in name for name in expected)
    assert seen["names"] == seen["requires"] == expected
    assert len(seen["text"]) == 1 and next(iter(seen["text"])).endswith("rows")
    assert set(weights.deltas) == set(backbone.layers)
    assert all(delta.abs().max() > 0 for delta in weights.deltas.values())
    assert list(weights.tokens) == ["<new1>"]


def test_backbone_is_left_as_it_was(backbone, concepts, settings, tmp_path):
    before, words = _state(backbone), len(backbone.tokenizers[0])
    train(backbone, concepts, settings, scratch=tmp_path)
    after = _state(backbone)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert len(backbone.tokenizers[0]) == len(backbone.pipe.tokenizer) == words
    assert not any(p.requires_grad for p in backbone.unet.parameters())


def test_resumed_is_uninterrupted(backbone, concepts, settings, tmp_path):
    whole = train(backbone, concepts[:1], settings, scratch=tmp_path / "whole")
    train(backbone, concepts[:1], dataclasses.replace(settings, steps=4), scratch=tmp_path / "cut")
    resumed = train(backbone, concepts[:1], settings, scratch=tmp_path / "cut")
    assert resumed.metadata == whole.metadata
    assert all(torch.equal(resumed.deltas[k], whole.deltas[k]) for k in whole.deltas)
    assert torch.equal(resumed.tokens["<new1>"][0], whole.tokens["<new1>"][0])


def test_every_jointly_trained_concept_trains(backbone, concepts, settings, tmp_path):
    """The last concept too: peers' masks got that wrong twice (diffusers #7294, custom-diffusion #41)."""
    start = [backbone.text_encoders[0].get_input_embeddings().weight]
    weights = train(backbone, concepts, settings, scratch=tmp_path)
    assert list(weights.tokens) == ["<new1>", "<new2>"]
    for (row,) in weights.tokens.values():
        assert not (start[0] == row).all(1).any()
    assert [c["name"] for c in weights.metadata["concepts"]] == ["cat", "turtle"]


def test_without_regularization(backbone, concepts, settings, tmp_path):
    alone = dataclasses.replace(concepts[0], regularization=None)
    weights = train(backbone, [alone], settings, scratch=tmp_path)
    assert len(weights.metadata["losses"]) == settings.steps


def test_nan_stops_and_keeps_the_checkpoint(backbone, concepts, settings, tmp_path):
    train(backbone, concepts[:1], dataclasses.replace(settings, steps=2), scratch=tmp_path)
    good = (tmp_path / "checkpoint.safetensors").read_bytes()
    features = concepts[0].features
    broken = ConceptFeatures(features.latents * float("nan"), features.masks, features.words)
    with pytest.raises(TrainingDiverged, match="cat: the loss became nan at step 3"):
        train(backbone, [dataclasses.replace(concepts[0], features=broken)], settings, scratch=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == good
    assert not any(p.requires_grad for p in backbone.unet.parameters())


def test_known_tokens_and_long_initializers_are_refused(backbone, concepts, settings, tmp_path):
    known = dataclasses.replace(concepts[0], token="cat")
    with pytest.raises(ValueError, match="'cat': the base model's tokenizer knows it already"):
        train(backbone, [known], settings, scratch=tmp_path)
    long = dataclasses.replace(concepts[0], initializer="zzyzx")
    with pytest.raises(ValueError, match="initializer 'zzyzx': must be one token"):
        train(backbone, [long], settings, scratch=tmp_path)


def test_begin_of_text_takes_no_gradient(backbone, concepts, settings, tmp_path, monkeypatch):
    """K and V of position 0 are detached: a caption of which only position 0 is read trains nothing."""
    import training.loop as loop

    captured = []

    def spy(module, inputs, output):
        result = original(module, inputs, output)
        if result.requires_grad:
            captured.append(
                torch.autograd.grad(result[:, 0].sum(), module.weight, retain_graph=True, allow_unused=True)[0]
            )
        return result

    original = loop._detach_begin_of_text
    monkeypatch.setattr(loop, "_detach_begin_of_text", spy)
    train(backbone, concepts[:1], dataclasses.replace(settings, steps=1), scratch=tmp_path)
    assert captured and all(g is None or not g.any() for g in captured)


def test_token_rows_leave_the_table_alone(backbone):
    table = backbone.text_encoders[0].get_input_embeddings()
    rows = TokenRows(table, torch.ones(2, table.embedding_dim))
    ids = torch.tensor([[5, table.num_embeddings + 1, 7]])
    out = rows(ids)
    assert torch.equal(out[0, 0], table.weight[5]) and torch.equal(out[0, 2], table.weight[7])
    out.sum().backward()
    assert table.weight.grad is None
    assert rows.rows.grad[1].eq(1).all() and rows.rows.grad[0].eq(0).all()


def test_logs_and_samples(backbone, concepts, settings, tmp_path):
    drawn: list[int] = []
    train(
        backbone,
        concepts[:1],
        dataclasses.replace(settings, sample_every=3),
        scratch=tmp_path,
        sample=lambda path, step: (drawn.append(step), Image.new("RGB", (8, 8)).save(path))[0],
    )
    assert drawn == [3, 6]
    assert list((tmp_path / "tensorboard").glob("events*"))
