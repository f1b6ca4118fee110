"""What each concept demands of a merge, and what the merge should leave alone: rows of text features."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.backbone import Backbone
from training.checkpoint import load_tensors, save_tensors
from training.weights import ConceptWeights

FORMS = (
    "{}",
    "a {}",
    "photo of a {}",
    "a photo of the {}",
    "picture of my {} on a table",
    "close up of {}",
    "a small {}",
    "a red {}",
    "{} at the beach",
    "a {} in the city",
    "the {} under water",
    "painting of a {} in the forest",
    "a dog and a {}",
    "a {} and a cat",
)
"""The prompts that a merge holds its concepts to when it is told none: many forms, so that it holds them to what people
write, not to two sentences."""

PAPER_PROMPTS = ("{}", "photo of a {}")
"""Of the exact form, where each costs room (authors' `composenW.py`)."""

UNSEEN = (
    "photo of a {} on the beach",
    "a {} in the snow",
    "a very small {} at sunset",
    "two dogs beside a {} in the rain",
    "close up photo of a {} in a flower field",
    "a {} and a pizza on the grass",
    "my {} in the night sky",
    "an old {} beside a river",
    "{} with a red hat",
    "the {} and a dog under water",
    "a drawing of a {}",
    "{} in front of a brick wall",
    "a {} made of wood",
    "a bowl of fruit next to a {}",
    "the {} on top of a mountain",
    "three {} in a garden",
    "a {} at night, black and white",
    "the back of a {}",
    "a cup with a {} on it",
    "a {} in the style of a comic",
)
"""Prompts that no merge is held to by default: what people write, to judge it by."""

NOUNS = ("dog", "cat", "house", "car", "tree", "woman", "bottle", "chair", "flower", "boat")
"""Of captions that speak of no concept, in the forms of `UNSEEN`."""

OWN_PADDING, OTHER_PADDING = 0.4, 2.0
"""What the padding behind a prompt of a concept, and behind a regularisation caption, counts beside the words. On the
miniature image positions attend to it three quarters as much as to all words; but what a training changes there is
mostly no matter of its concept: the more the merge leaves padding alone, the more of the concepts it keeps."""

KEPT = 0.99
"""Share of a concept's rows, in squares, that its principal rows keep. The rest is what one prompt differs from the
others in; holding that, too, takes room from other concepts."""


@dataclass(frozen=True)
class Constraint:
    """What one concept demands of the merge: small beside its weights, and all that the merge needs of it.

    rows: (s_i, d) float64, text features of its prompts. changes: layer -> (s_i, out) float64, (W_i - W_0) rows.
    """

    name: str
    rows: torch.Tensor
    changes: dict[str, torch.Tensor]

    def to(self, dtype: torch.dtype) -> Constraint:
        changes = {layer: change.to(dtype) for layer, change in self.changes.items()}
        return Constraint(self.name, self.rows.to(dtype), changes)


def constraint_of(
    backbone: Backbone, weights: ConceptWeights, prompts: Sequence[str] | None = None, *, exact: bool = False
) -> list[Constraint]:
    """The constraints of the concepts that a `ConceptWeights` holds.

    For each prompt, the positions from the concept's first word (its token, or its class word where it has none) to
    end-of-text ("photo of a V* cat": V*, cat, end), as those before it carry nothing of the concept (authors'
    `diffusers_composenW.py`). Beside them the padding behind, which image positions attend to as well (`OWN_PADDING`);
    of all these rows, divided by the number of prompts, the principal ones (`KEPT`).

    Args:
        prompts: `{}` stands for the concept; by default `FORMS`, or `PAPER_PROMPTS`. Those that are too long with the
            concept in them are left out, but for the first.
        exact: the rows themselves, without padding, as equation 4 has them.
    Raises: ValueError for weights that are not changes of the text K/V layers, all of them and nothing else, and where
        the first prompt is too long.
    """
    made = []
    for name, words, padding in _rows(backbone, weights, prompts or (PAPER_PROMPTS if exact else FORMS)):
        if exact:
            rows = _distinct(torch.cat(words))
        else:
            beside = [_weighed(rows, OWN_PADDING * len(own)) for own, rows in zip(words, padding, strict=True)]
            rows = _principal(torch.cat([*words, *beside]) / len(words) ** 0.5)
        made.append(_demanded(name, rows, weights))
    return made


def unseen_of(backbone: Backbone, weights: ConceptWeights) -> list[tuple[Constraint, Constraint]]:
    """Of each concept, what its weights do on prompts that no merge is held to (`UNSEEN`): at the positions from its
    first word to end-of-text, and at padding; principal rows of each, to be judged with `pipeline.merge.solve.missed`.

    Raises: as `constraint_of`.
    """
    made = []
    for name, *parts in _rows(backbone, weights, UNSEEN):
        words, padding = (_demanded(name, _principal(torch.cat(part)), weights) for part in parts)
        made.append((words, padding))
    return made


@torch.no_grad()
def _rows(
    backbone: Backbone, weights: ConceptWeights, forms: Sequence[str]
) -> Iterator[tuple[str, list[torch.Tensor], list[torch.Tensor]]]:
    """Of each concept its name, and for each form that fits its rows from its first word to end-of-text, and those of
    padding."""
    if set(weights.deltas) != set(backbone.layers):
        raise ValueError(
            f"weights made by {weights.metadata.get('method', 'another method')} cannot be merged: only changes of the "
            "base's text K/V layers can (custom_diffusion)"
        )
    with backbone.changed({}, weights.tokens):
        tokenizer = backbone.tokenizers[0]
        for described in weights.metadata["concepts"]:
            phrase = f"{described['token']} {described['class_word']}".strip()
            words, padding = [], []
            for form in forms:
                caption = form.format(phrase)
                try:
                    backbone.words.check_fits([caption])
                except ValueError:
                    if form == forms[0]:
                        raise
                    continue
                first = len(tokenizer(form.partition("{}")[0]).input_ids) - 1  # without its end-of-text
                end = backbone.num_tokens(caption) + 1
                features = backbone.encode_text([caption]).hidden[0].cpu().double()
                words.append(features[first:end])
                padding.append(features[end:])
            yield described["name"], words, padding


def _weighed(rows: torch.Tensor, as_many: float) -> torch.Tensor:
    """Rows of padding, all alike, that count in squares as so many others."""
    return rows * (as_many / max(1, len(rows))) ** 0.5


def _demanded(name: str, rows: torch.Tensor, weights: ConceptWeights) -> Constraint:
    return Constraint(name, rows, {layer: rows @ delta.double().T for layer, delta in weights.deltas.items()})


def _principal(rows: torch.Tensor) -> torch.Tensor:
    """The fewest rows R with R^T R = rows^T rows but for 1 - `KEPT` of its trace: singular vectors by their values."""
    if not rows.isfinite().all():
        return rows[:1]  # the caller names the file
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    energy = values.square().cumsum(0)
    count = int((energy < KEPT * energy[-1]).sum()) + 1
    return values[:count, None] * vectors[:count]


def row_count(tokenizer, prompts: Sequence[str], class_word: str) -> int:
    """How many rows the exact `constraint_of` makes of a concept, at most, without its weights."""
    words = [f"{class_word}{prompt.partition('{}')[2]}" for prompt in prompts]
    return sum(1 + len(tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in words)  # V*, words, end


def captions_beside(captions: Sequence[str], concepts: Sequence[dict[str, Any]]) -> list[str]:
    """Regularisation captions without those that name a new category of the concepts (`token`, `class_word`): its word
    is to change, and leaving it alone would undo that. Where none are left, captions of everyday things."""
    taught = [re.escape(c["class_word"]) for c in concepts if not c["token"]]
    if not taught:
        return list(captions)
    named = re.compile(rf"\b(?:{'|'.join(taught)})\b", re.IGNORECASE)
    everyday = [form.format(noun) for noun in NOUNS for form in FORMS]
    return [c for c in captions if not named.search(c)] or [c for c in everyday if not named.search(c)]


@torch.no_grad()
def regularization_rows(
    backbone: Backbone, captions: Sequence[str], batch_size: int = 64, *, exact: bool = False
) -> torch.Tensor:
    """C_reg: (m, d) float64, features of the captions' words and end-of-text.

    Beside them begin-of-text, the padding (`OTHER_PADDING`) and the empty prompt, which guidance multiplies, once for
    ten captions: every image attends to these, and no caption's words hold them where they are (SPEED, arXiv
    2503.07392).
    exact: the words and end-of-text alone, as the authors have it.
    """
    rows = []
    texts = list(captions) if exact else [*captions, *[""] * (len(captions) // 10 + 1)]
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        hidden = backbone.encode_text(batch).hidden.cpu().double()
        for i, text in enumerate(batch):
            end = 1 + backbone.num_tokens(text)
            rows += [hidden[i, 1:end]] if exact else [hidden[i, :end], _weighed(hidden[i, end:], OTHER_PADDING * end)]
    return torch.cat(rows)


@torch.no_grad()
def held_out_rows(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Rows to judge by what a merge moves that it should leave alone: `words`, `padding` and `empty`, each (m, d)
    float64, of captions that speak of no concept and stand in no merge, and of the empty prompt."""
    captions = [form.format(noun) for noun in NOUNS for form in UNSEEN[:5]]
    hidden = backbone.encode_text(captions).hidden.cpu().double()
    ends = [1 + backbone.num_tokens(caption) for caption in captions]
    return {
        "words": torch.cat([h[1:end] for h, end in zip(hidden, ends, strict=True)]),
        "padding": torch.cat([h[end:] for h, end in zip(hidden, ends, strict=True)]),
        "empty": backbone.encode_text([""]).hidden[0].cpu().double(),
    }


def save_constraints(path: Path, constraints: Sequence[Constraint]) -> None:
    tensors = {}
    for i, constraint in enumerate(constraints):
        tensors[f"rows.{i}"] = constraint.rows
        tensors |= {f"change.{i}.{layer}": change for layer, change in constraint.changes.items()}
    save_tensors(path, tensors, {"names": json.dumps([c.name for c in constraints])})


def load_constraints(path: Path) -> list[Constraint]:
    tensors, metadata = load_tensors(path)
    made = []
    for i, name in enumerate(json.loads(metadata["names"])):
        mark = f"change.{i}."
        changes = {k.removeprefix(mark): v for k, v in tensors.items() if k.startswith(mark)}
        made.append(Constraint(name, tensors[f"rows.{i}"], changes))
    return made


def _distinct(rows: torch.Tensor) -> torch.Tensor:
    """Rows without exact repetitions, in their order."""
    kept: list[torch.Tensor] = []
    for row in rows:
        if not any(torch.equal(row, other) for other in kept):
            kept.append(row)
    return torch.stack(kept)
