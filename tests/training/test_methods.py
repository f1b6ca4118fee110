"""Each method trains what it declares and nothing else, and what it made is loaded, drawn and resumed alike."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from pipeline.sampling import draw
from training.backbone import Backbone, load_backbone
from training.base import check_base
from training.loop import train
from training.methods import METHODS
from training.run import Member, TrainingDiverged
from training.weights import ConceptWeights

PLACES = {
    "text_kv": lambda name: name.startswith("unet.") and (".attn2.to_k" in name or ".attn2.to_v" in name),
    "cross_attention": lambda name: name.startswith("unet.") and ".attn2." in name,
    "all": lambda name: name.startswith("unet."),
    "none": lambda name: False,
}
"""What each part of a UNet is, by the names of Stable Diffusion's layers: `Backbone` finds them by what they are."""


def _member(concepts, settings, scratch, method: str, **changes) -> Member:
    """The first concept, as a method wants it."""
    (concept,) = concepts[:1]
    if METHODS[method].token == "rare":
        concept = dataclasses.replace(concept, token="pll")
    if METHODS[method].regularization == "none":
        concept = dataclasses.replace(concept, regularization=None)
    return Member([concept], dataclasses.replace(settings, method=method, steps=3, **changes), scratch)


def _train(backbone: Backbone, member: Member) -> ConceptWeights:
    ((_, result),) = train(backbone, [member])
    if isinstance(result, TrainingDiverged):
        raise result
    return result


def _state(backbone: Backbone) -> dict[str, torch.Tensor]:
    """All numbers of the model, by full name."""
    parts = {"unet": backbone.unet, "vae": backbone.vae, "text_encoder": backbone.text_encoders[0]}
    return {f"{p}.{k}": v.clone() for p, module in parts.items() for k, v in module.state_dict().items()}


@pytest.mark.parametrize(
    ("method", "text_encoder"), [(name, False) for name in METHODS] + [("dreambooth", True)], ids=str
)
def test_trains_what_it_declares(backbone, concepts, settings, tmp_path, monkeypatch, method, text_encoder):
    """By name, in both directions: while it trains, in what comes out, and in the model that is made of it."""
    member = _member(concepts, settings, tmp_path, method, train_text_encoder=text_encoder)
    training: set[str] = set()
    adamw = torch.optim.AdamW

    def spy(groups, **options):
        # before the member's own parameters are put in place: those of the optimizer are what counts
        training.add(str(sum(p.numel() for group in groups for p in group["params"])))
        return adamw(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    before = _state(backbone)
    weights = _train(backbone, member)
    untouched = _state(backbone)
    assert all(torch.equal(before[name], untouched[name]) for name in before)
    assert not any(p.requires_grad for p in backbone.unet.parameters())

    tables = {f"text_encoder.{n}." for n, m in backbone.text_encoders[0].named_modules() if isinstance(m, nn.Embedding)}

    def declared(name: str) -> bool:
        if name.startswith("text_encoder."):
            return text_encoder and not name.startswith(tuple(tables))
        return PLACES[METHODS[method].unet](name)

    parameters = {f"unet.{n}" for n, _ in backbone.unet.named_parameters()}
    parameters |= {f"text_encoder.{n}" for n, _ in backbone.text_encoders[0].named_parameters()}
    with backbone.changed(weights.deltas, {}):
        after = _state(backbone)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in parameters if declared(name)}
    rows = [row for rows in weights.tokens.values() for row in rows]
    assert bool(rows) == (METHODS[method].token == "new")
    assert training == {str(sum(before[name].numel() for name in changed) + sum(row.numel() for row in rows))}
    for row in rows:
        assert not (backbone.text_encoders[0].get_input_embeddings().weight == row).all(1).any()
    assert weights.metadata["method"] == method


@pytest.mark.parametrize("method", METHODS)
def test_loaded_weights_draw_the_same(backbone, concepts, settings, tmp_path, method):
    member = _member(concepts, settings, tmp_path / "run", method, learning_rate=1e-3, token_learning_rate=1e-1)
    weights = _train(backbone, member)
    weights.save(tmp_path / "weights.safetensors")
    loaded = ConceptWeights.load(tmp_path / "weights.safetensors")
    assert loaded.deltas.keys() == weights.deltas.keys() and loaded.tokens.keys() == weights.tokens.keys()
    prompt = settings.prompt.format(member.concepts[0].phrase)
    images = []
    for change in (weights, loaded):
        with backbone.changed(change.deltas, change.tokens):
            images += draw(backbone, [prompt], seeds=[0], steps=3, guidance=3.0)
    images += draw(backbone, ["photo of a cat"], seeds=[0], steps=3, guidance=3.0)
    assert images[0].tobytes() == images[1].tobytes() != images[2].tobytes()


@pytest.mark.parametrize("method", ["custom_diffusion_all", "dreambooth", "textual_inversion"])
def test_resumed_is_uninterrupted(backbone, concepts, settings, tmp_path, method):
    """Convolutions too, whose memory format a checkpoint does not keep."""
    encoder = {"train_text_encoder": True} if method == "dreambooth" else {}
    whole = _member(concepts, settings, tmp_path / "whole", method, checkpoint_every=1, **encoder)
    cut = dataclasses.replace(whole, scratch=tmp_path / "cut")
    _train(backbone, dataclasses.replace(cut, settings=dataclasses.replace(cut.settings, steps=2)))
    resumed, expected = _train(backbone, cut), _train(backbone, whole)
    assert resumed.metadata == expected.metadata
    for name, delta in expected.deltas.items():
        assert torch.equal(resumed.deltas[name], delta), name
    for token, rows in expected.tokens.items():
        assert torch.equal(resumed.tokens[token][0], rows[0])


def test_the_loss_falls(backbone, concepts, settings, tmp_path):
    """Of the whole UNet, on the same few latents: it can learn them by heart."""
    member = _member(concepts, settings, tmp_path, "custom_diffusion_all", learning_rate=3e-3)
    member = dataclasses.replace(member, settings=dataclasses.replace(member.settings, steps=60, checkpoint_every=60))
    losses = _train(backbone, member).metadata["losses"]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_bfloat16_keeps_float32_weights(pico, concepts, settings, tmp_path):
    backbone = load_backbone(pico, dtype=torch.bfloat16)
    member = _member(concepts, settings, tmp_path, "dreambooth", train_text_encoder=True, learning_rate=1e-5)
    weights = _train(backbone, member)
    assert all(delta.dtype == torch.float32 and delta.any() for delta in weights.deltas.values())
    assert {p.dtype for p in backbone.unet.parameters()} == {torch.bfloat16}
    # and a pack's members are what they are alone
    settings = dataclasses.replace(settings, steps=3)
    members = [Member([concept], settings, tmp_path / concept.name) for concept in concepts]
    for member, packed in list(train(backbone, members)):
        alone = _train(backbone, dataclasses.replace(member, scratch=tmp_path / f"{member.scratch.name}-alone"))
        for name, delta in alone.deltas.items():
            assert delta.any() and (packed.deltas[name] - delta).norm() < 0.01 * delta.norm()


# --- tokens ----------------------------------------------------------------------------------------------


def test_tokens_train_in_packs(backbone, concepts, settings, tmp_path):
    """Members of textual inversion share the model whole."""
    settings = dataclasses.replace(settings, method="textual_inversion", steps=3)
    members = [Member([concept], settings, tmp_path / concept.name) for concept in concepts]
    packed = {m.concepts[0].name: result for m, result in train(backbone, members)}
    for member in members:
        alone = _train(backbone, dataclasses.replace(member, scratch=tmp_path / f"{member.scratch.name}-alone"))
        (token,) = alone.tokens
        row, expected = packed[member.concepts[0].name].tokens[token][0], alone.tokens[token][0]
        assert (row - expected).norm() < 1e-5 * expected.norm()


def test_a_new_category_has_no_token(backbone, concepts, settings, tmp_path):
    concept = dataclasses.replace(concepts[0], token="")
    captions: list[str] = []
    encode = backbone.encode_text
    words = len(backbone.tokenizers[0])

    def listen(given):
        captions.extend(given)
        assert len(backbone.tokenizers[0]) == words
        return encode(given)

    backbone.encode_text = listen
    try:
        weights = _train(backbone, Member([concept], dataclasses.replace(settings, steps=2), tmp_path))
    finally:
        del backbone.encode_text
    assert set(weights.deltas) == set(backbone.layers) and not weights.tokens
    assert {caption.partition("photo of a ")[2] for caption in captions} == {"cat"}


def test_new_categories_and_new_tokens_share_a_pack(backbone, same_weights, concepts, settings, tmp_path):
    settings = dataclasses.replace(settings, steps=3, learning_rate=3e-5, token_learning_rate=3e-5)
    category = dataclasses.replace(concepts[0], token="")
    members = [Member([c], settings, tmp_path / f"{i}") for i, c in enumerate([concepts[1], category])]
    first, second = dict((m.scratch.name, r) for m, r in train(backbone, members)).values()
    assert list(first.tokens) == ["<new2>"] and not second.tokens
    same_weights(second, _train(backbone, dataclasses.replace(members[1], scratch=tmp_path / "alone")))


def test_dreambooth_takes_a_word_of_the_tokenizer(pico):
    words = check_base(pico).words
    words.check_rare("pll")
    with pytest.raises(ValueError, match=r"token 'zzyzx': .*as one token, this one is \d"):
        words.check_rare("zzyzx")


# --- what is refused -------------------------------------------------------------------------------------


def test_what_cannot_be_trained(backbone, concepts, settings, tmp_path):
    members = [_member(concepts, settings, tmp_path / n, "dreambooth") for n in ("a", "b")]
    with pytest.raises(ValueError, match="dreambooth trains one member at a time"):
        list(train(backbone, members))
    other = _member(concepts, settings, tmp_path / "c", "custom_diffusion")
    with pytest.raises(ValueError, match="one method"):
        list(train(backbone, [members[0], other]))
    nothing = _member(concepts, settings, tmp_path / "d", "textual_inversion")
    nothing = dataclasses.replace(nothing, concepts=[dataclasses.replace(nothing.concepts[0], token="")])
    with pytest.raises(ValueError, match="nothing to train"):
        list(train(backbone, [nothing]))


def test_weights_that_do_not_fit(backbone):
    name = "conv_in"
    whole = {n: torch.zeros(p.shape) for n, p in backbone.parameters.items() if not n.startswith("text_encoder")}
    for deltas in (whole | {"conv_nowhere": torch.zeros(1)}, whole | {name: torch.zeros(1)}, {name: whole[name]}):
        with pytest.raises(ValueError, match="weights do not fit the base model"), backbone.changed(deltas, {}):
            pass
