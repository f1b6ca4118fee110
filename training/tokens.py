"""What a base model's tokenizers make of words: of new tokens, class words, prompts.

A tokenizer brings text into a normal form (CLIP's: lower case, one Unicode form) and finds a new token anywhere in what
it then reads: `Cow` would be every "cow", in "cowboy" and "Moscow" too.
"""

from __future__ import annotations

import copy
import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from training.methods.method import RARE_WORDS
from training.seeds import generator

MARKS = "<>_*~^|={}\\`"
"""Characters that stand in no sentence: a token with one of them is not found in other words, or at a word's end."""


def spelling(text: str) -> str:
    """One form of all spellings that a tokenizer or a file system may not tell apart: of case, Unicode and spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


@dataclass(frozen=True)
class Words:
    """The tokenizers of a base model, one for each text encoder. `model_max_length` of each is the number of positions
    that its encoder has, begin and end of text among them."""

    tokenizers: tuple[Any, ...]

    def knowing(self, tokens: Sequence[str]) -> Words:
        """With new tokens, in copies: a tokenizer cannot forget a word. Raises: ValueError as `add_tokens`."""
        copies = tuple(copy.deepcopy(tokenizer) for tokenizer in self.tokenizers)
        for tokenizer in copies:
            add_tokens(tokenizer, tokens)
        return Words(copies)

    def check_new(self, token: str) -> None:
        """Raises: ValueError for a token that is no new word: known in its normal form, or written as words are, so
        that it would be found inside others."""
        example = f"<{re.sub(r'[^a-z0-9-]', '', token.lower()) or 'new1'}>"
        if not token.isprintable():
            raise ValueError(f"token {token!r}: has a character that cannot be seen; choose another, like {example!r}")
        for tokenizer, vocabulary in zip(self.tokenizers, self._vocabularies, strict=True):
            form = normal_form(tokenizer, token)
            ids = tokenizer(token, add_special_tokens=False).input_ids
            if token in vocabulary or form in vocabulary or (len(ids) == 1 and ids != [tokenizer.unk_token_id]):
                knows = "knows it already" if form == token else f"reads it as {form!r}, which it knows already"
                raise ValueError(
                    f"token {token!r}: the base model's tokenizer {knows}; choose another, like {example!r}"
                )
            if not any(c.isalnum() for c in form) or not any(c in MARKS for c in form):
                raise ValueError(
                    f"token {token!r}: a tokenizer finds a new token inside other words too; choose one that no word "
                    f"has inside, like {example!r}"
                )

    @functools.cached_property
    def _vocabularies(self) -> tuple[dict[str, int], ...]:
        return tuple(tokenizer.get_vocab() for tokenizer in self.tokenizers)

    def check_rare(self, word: str) -> None:
        """Raises: ValueError for a word that is not known as one token."""
        for tokenizer in self.tokenizers:
            if len(pieces := tokenizer.tokenize(word)) != 1:
                raise ValueError(
                    f"token {word!r}: this method needs a word that the base model's tokenizer has as one token, this "
                    f"one is {len(pieces)}: {pieces}; choose another, like {RARE_WORDS[0]!r}"
                )

    def check_initializer(self, initializer: str | int) -> None:
        """Raises: ValueError for a word that is not one token (see `single_id`); numbers always do."""
        if isinstance(initializer, str):
            for tokenizer in self.tokenizers:
                single_id(tokenizer, initializer)

    def check_fits(self, texts: Sequence[str]) -> None:
        """Raises: ValueError for a text of more tokens than the text encoders take: what is beyond would be cut off."""
        for tokenizer in self.tokenizers if texts else ():
            most = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
            for text, ids in zip(
                texts, tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids, strict=True
            ):
                if len(ids) > most:
                    raise ValueError(
                        f"{len(ids)} tokens, but the base model's text encoder takes {most}; shorten {_short(text)!r}"
                    )


def normal_form(tokenizer: Any, text: str) -> str:
    """Text as the tokenizer reads it."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer else text


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Teach a tokenizer new words; returns their ids.

    Raises: ValueError for a token that it knew, or does not find in a text: two that differ in case only are one.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token in vocabulary:
            raise ValueError(f"token {token!r}: the base model's tokenizer knows it already; choose another")
    tokenizer.add_tokens(list(tokens))
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    for token, own in zip(tokens, ids, strict=True):
        if (found := tokenizer(token, add_special_tokens=False).input_ids) != [own]:
            pieces = " ".join(tokenizer.convert_ids_to_tokens(found))
            raise ValueError(f"token {token!r}: the base model's tokenizer reads it as {pieces!r}; choose another")
    return ids


def single_id(tokenizer: Any, word: str) -> int:
    """Id of a word of one token, or of a piece of a word: the authors' `ktn` is one.

    Raises: ValueError for a word of several tokens, or none.
    """
    found = _id_of(tokenizer, word)
    if found is None:
        pieces = tokenizer.tokenize(word)
        raise ValueError(f"initializer {word!r}: must be one token for this base model, is {len(pieces)}: {pieces}")
    return found


def own_row(table: torch.Tensor, number: int) -> torch.Tensor:
    """Where a new token starts that no word lends its embedding: drawn for this number from the spread of the rows in
    an embedding table (words, width), and as long as these are on average; (width,), dtype and device of the table.

    Concepts that start from the same few rare words, as in the authors' code, stay alike in all that the text encoder
    makes of them, and a merge can keep them apart less well.
    """
    rows = table.float().cpu()
    drawn = rows.mean(0) + rows.std(0) * torch.randn(rows.shape[1], generator=generator(number))
    return (drawn * rows.norm(dim=1).mean() / drawn.norm()).to(table)


def _id_of(tokenizer: Any, word: str) -> int | None:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return ids[0] if len(ids) == 1 else tokenizer.get_vocab().get(word)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
