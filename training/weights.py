"""`ConceptWeights`: what training makes, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import load_tensors, save_tensors


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
        tensors, metadata = load_tensors(path)
        deltas = {k.removeprefix("delta."): v for k, v in tensors.items() if k.startswith("delta.")}
        described = json.loads(metadata.get("polyconcept", "{}"))
        if described.get("kind") != "concept_weights":
            raise ValueError(f"{path}: holds no concept weights; found {sorted(tensors)[:3]}")
        return cls(deltas, tokens_from(tensors), described)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are."""
        rows = [row for rows in self.tokens.values() for row in rows]
        return sum(t.numel() * t.element_size() for t in [*self.deltas.values(), *rows])


def token_tensors(tokens: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Token rows as named tensors: `token.<encoder index>.<token>`."""
    return {f"token.{i}.{token}": row for token, rows in tokens.items() for i, row in enumerate(rows)}


def tokens_from(tensors: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """The inverse of `token_tensors`; other keys are ignored."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("token."):
            _, index, token = key.split(".", 2)
            found.setdefault(token, {})[int(index)] = value
    return {token: [rows[i] for i in sorted(rows)] for token, rows in found.items()}
