"""`ConceptWeights`: what training makes, and its file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import load_numbers, save_tensors


@dataclass(frozen=True)
class ConceptWeights:
    """The change that training made to a frozen backbone.

    deltas: name of a parameter (`Backbone.parameters`; a layer's name stands for its weight) -> W - W_0, of its shape,
        float32; float16 in a release. Of all that the method trains, so empty where only tokens were made.
    tokens: new token -> its embedding rows, one per text encoder, each (width,) float32.
    metadata: where they came from (base digest, method, concept names, class words, steps, losses), JSON values.
    """

    deltas: dict[str, torch.Tensor]
    tokens: dict[str, list[torch.Tensor]]
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        save_tensors(
            path,
            {f"delta.{k}": v for k, v in self.deltas.items()} | token_tensors(self.tokens),
            {"polyconcept": json.dumps({"kind": "concept_weights", **self.metadata})},
        )

    @classmethod
    def load(cls, path: Path) -> ConceptWeights:
        """Raises: ValueError naming the file when it is damaged, holds something else, or what is not finite."""
        tensors, metadata = load_numbers(path)
        deltas = {k.removeprefix("delta."): v for k, v in tensors.items() if k.startswith("delta.")}
        described = describe(path, metadata)
        if described.get("kind") != "concept_weights":
            raise ValueError(f"{path}: holds no concept weights; found {sorted(tensors)[:3]}")
        return cls(deltas, tokens_from(tensors, path), described)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are."""
        rows = [row for rows in self.tokens.values() for row in rows]
        return sum(t.numel() * t.element_size() for t in [*self.deltas.values(), *rows])


def token_tensors(tokens: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Token rows as named tensors: `token.<encoder index>.<token>`."""
    return {f"token.{i}.{token}": row for token, rows in tokens.items() for i, row in enumerate(rows)}


def tokens_from(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, list[torch.Tensor]]:
    """The inverse of `token_tensors`; other keys are ignored. path: of their file, for the message.

    Raises: ValueError for a token that lacks the row of an encoder, or has something else than rows.
    """
    found: dict[str, dict[int, torch.Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith("token."):
            continue
        named = re.fullmatch(r"token\.([0-9])\.(.+)", key, re.DOTALL)
        if not named or value.ndim != 1:
            raise ValueError(f"{path}: {key!r} of shape {tuple(value.shape)} is no row of a token")
        found.setdefault(named[2], {})[int(named[1])] = value
    for token, rows in found.items():
        if sorted(rows) != list(range(len(rows))):
            raise ValueError(f"{path}: token {token!r} has rows of the text encoders {sorted(rows)} only")
    return {token: [rows[i] for i in sorted(rows)] for token, rows in found.items()}


def describe(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """What a file of weights says of itself; empty when it is none of ours. path: for the message.

    Raises: ValueError when that is no JSON object.
    """
    try:
        described = json.loads(metadata.get("polyconcept", "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata 'polyconcept' is no JSON: {error}") from None
    if not isinstance(described, dict):
        raise ValueError(f"{path}: its metadata 'polyconcept' is no JSON object")
    return described
