"""What each concept demands of a merge, and what the merge should leave alone: rows of text features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from training.backbone import Backbone
from training.checkpoint import load_tensors, save_tensors
from training.weights import ConceptWeights


@dataclass(frozen=True)
class Constraint:
    """What one concept demands of the merge: small beside its weights, and all that the merge needs of it.

    rows: (s_i, d) float64, text features of its prompts. changes: layer -> (s_i, out) float64, (W_i - W_0) rows.
    """

    name: str
    rows: torch.Tensor
    changes: dict[str, torch.Tensor]


@torch.no_grad()
def constraint_of(backbone: Backbone, weights: ConceptWeights, prompts: Sequence[str]) -> list[Constraint]:
    """The constraint rows of the concepts that a `ConceptWeights` holds.

    For each prompt, the positions from the concept's first word (its token, or its class word where it has none) to
    end-of-text ("photo of a V* cat": V*, cat, end), as those before it carry nothing of the concept (authors'
    `diffusers_composenW.py`).

    Raises: ValueError for weights that are not changes of the text K/V layers, all of them and nothing else, and for
        prompts that are too long.
    """
    if set(weights.deltas) != set(backbone.layers):
        raise ValueError(
            f"weights made by {weights.metadata.get('method', 'another method')} cannot be merged: only changes of the "
            "base's text K/V layers can (custom_diffusion)"
        )
    made = []
    with backbone.changed({}, weights.tokens):
        tokenizer = backbone.tokenizers[0]
        for described in weights.metadata["concepts"]:
            rows = []
            for prompt in prompts:
                caption = prompt.format(f"{described['token']} {described['class_word']}".strip())
                backbone.words.check_fits([caption])
                first = len(tokenizer(prompt.partition("{}")[0]).input_ids) - 1  # without its end-of-text
                features = backbone.encode_text([caption]).hidden[0].cpu().double()
                rows.append(features[first : backbone.num_tokens(caption) + 1])
            stacked = _distinct(torch.cat(rows))
            changes = {layer: stacked @ delta.double().T for layer, delta in weights.deltas.items()}
            made.append(Constraint(described["name"], stacked, changes))
    return made


def row_count(tokenizer, prompts: Sequence[str], class_word: str) -> int:
    """How many rows `constraint_of` makes of a concept, at most, without its weights."""
    words = [f"{class_word}{prompt.partition('{}')[2]}" for prompt in prompts]
    return sum(1 + len(tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in words)  # V*, words, end


@torch.no_grad()
def regularization_rows(backbone: Backbone, captions: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """C_reg: (m, d) float64, features of all positions that carry a caption (begin-of-text and padding left out)."""
    rows = []
    for start in range(0, len(captions), batch_size):
        batch = captions[start : start + batch_size]
        hidden = backbone.encode_text(batch).hidden.cpu().double()
        rows += [hidden[i, 1 : 1 + backbone.num_tokens(caption)] for i, caption in enumerate(batch)]
    return torch.cat(rows)


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
