"""What the miniature's tokenizer makes of words; it reads them as all of CLIP's kind do."""

from __future__ import annotations

import pytest
import torch

from pipeline.spec import MINIATURE
from training.base import check_base
from training.tokens import Words, add_tokens, spelling


@pytest.fixture(scope="module")
def words() -> Words:
    return check_base(MINIATURE / "model").words


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("cow", "'cow': the base model's tokenizer knows it already; choose another, like '<cow>'"),
        ("Cow", "'Cow': the base model's tokenizer reads it as 'cow', which it knows already"),
        ("COW</w>", "reads it as 'cow</w>', which it knows already"),
        ("<|endoftext|>", "knows it already"),
        ("ow", "knows it already"),  # a piece of words
        ("owbo", "finds a new token inside other words too; .* like '<owbo>'"),
        ("cow.", "inside other words too"),
        ("(cow)", "inside other words too"),
        ("***", "inside other words too; .* like '<new1>'"),
        ("<cow\u200b>", "a character that cannot be seen"),
    ],
)
def test_tokens_that_are_no_new_words(words, token, message):
    with pytest.raises(ValueError, match=message):
        words.check_new(token)


@pytest.mark.parametrize("token", ["<cow>", "<new1>", "<outlined-cat>", "V*", "<корова>", "my_cow"])
def test_new_words_are_found_alone(words, token):
    words.check_new(token)
    (tokenizer,) = words.knowing([token]).tokenizers
    (own,) = add_tokens(*words.knowing([]).tokenizers, [token])
    text = "photo of a cow, a cowboy in Moscow: new1 <new10>"
    assert tokenizer(text).input_ids == words.tokenizers[0](text).input_ids
    assert tokenizer(f"a {token} cow").input_ids.count(own) == 1


def test_two_tokens_that_a_tokenizer_takes_for_one(words):
    for tokens in (["<new1>", "<NEW1>"], ["<caf\u00e9>", "<cafe\u0301>"]):
        with pytest.raises(ValueError, match=r"the base model's tokenizer reads it as"):
            words.knowing(tokens)
        assert len({spelling(token) for token in tokens}) == 1
    assert len({spelling(token) for token in ("<new1>", "<new10>", "<n\u00e9w1>")}) == 3
    assert spelling(" Moon\u00a0 GATE") == "moon gate"


def test_rows_go_by_the_ids_of_the_tokenizer(backbone):
    """Not by the place among the tokens: a known word has an id of its own, far from those of the new ones."""
    width = backbone.text_encoders[0].get_input_embeddings().embedding_dim
    rows = {token: [torch.full((width,), value)] for token, value in (("<b>", 2.0), ("<a>", 1.0))}
    with backbone.changed({}, rows):
        ids = backbone.tokenizers[0]("<a> <b>", add_special_tokens=False, return_tensors="pt").input_ids
        assert backbone.text_encoders[0].get_input_embeddings()(ids)[0, :, 0].tolist() == [1.0, 2.0]
    before = backbone.tokenizers
    known = backbone.changed({}, {"cat": rows["<a>"], "<new1>": rows["<b>"]})
    with pytest.raises(ValueError, match="'cat': the base model's tokenizer knows it"), known:
        pass
    assert backbone.tokenizers == before and "<new1>" not in before[0].get_vocab()


def test_a_prompt_is_as_long_as_the_text_encoder_takes(words):
    known = words.knowing(["<outlined-cat>"])
    prompt = " ".join(["cow"] * 29)
    known.check_fits([prompt, f"<outlined-cat> {prompt}"])
    with pytest.raises(ValueError, match=r"31 tokens, but the base model's text encoder takes 30; shorten 'a cow"):
        known.check_fits(["a cow", f"a cow {prompt}"])
    with pytest.raises(ValueError, match="36 tokens"):  # what is no token yet is several
        words.check_fits([f"<outlined-cat> {prompt}"])
