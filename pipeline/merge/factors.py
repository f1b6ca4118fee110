"""`MergedModel`: a change of all text K/V layers as low-rank factors, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import load_numbers, save_tensors
from training.weights import describe, token_tensors, tokens_from

SHARED = "shared"


@dataclass(frozen=True)
class MergedModel:
    """Change of layer l = left[l] @ right, with a right factor shared by all layers or one for each.

    left: layer name -> (out, r).
    right: {"shared": (r, d)}, or layer name -> (r_l, d). All layers read the same text features, which is why the
        merge has a shared one (method.md section 2).
    tokens: new token -> embedding rows, one (width,) per text encoder.
    metadata: concepts (name, token, class word), base digest, residuals, …
    """

    left: dict[str, torch.Tensor]
    right: dict[str, torch.Tensor]
    tokens: dict[str, list[torch.Tensor]]
    metadata: dict[str, Any] = field(default_factory=dict)

    def factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, r) and (r, d) of a layer."""
        return self.left[layer], self.right[SHARED if SHARED in self.right else layer]

    @property
    def layers(self) -> list[str]:
        return list(self.left)

    @property
    def deltas(self) -> dict[str, torch.Tensor]:
        """Layer name -> (out, d) float32, multiplied out in float64."""
        products = {}
        for layer in self.left:
            left, right = self.factors(layer)
            products[layer] = (left.double() @ right.double()).float()
        return products

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are."""
        rows = [row for rows in self.tokens.values() for row in rows]
        return sum(t.numel() * t.element_size() for t in [*self.left.values(), *self.right.values(), *rows])

    def save(self, path: Path) -> None:
        tensors = {f"left.{k}": v for k, v in self.left.items()} | {f"right.{k}": v for k, v in self.right.items()}
        save_tensors(
            path,
            tensors | token_tensors(self.tokens),
            {"polyconcept": json.dumps({"kind": "merged_model", **self.metadata})},
        )

    @classmethod
    def load(cls, path: Path) -> MergedModel:
        """Raises: ValueError naming the file when it is damaged, holds something else, values that are not finite, or
        factors that do not go together."""
        tensors, metadata = load_numbers(path)
        left = {k.removeprefix("left."): v for k, v in tensors.items() if k.startswith("left.")}
        right = {k.removeprefix("right."): v for k, v in tensors.items() if k.startswith("right.")}
        if not left or not right:
            raise ValueError(f"{path}: holds no merged model (no 'left.*' and 'right.*'); found {sorted(tensors)[:3]}")
        model = cls(left, right, tokens_from(tensors, path), describe(path, metadata))
        for layer in left:
            factors = (left[layer], right.get(SHARED, right.get(layer, torch.empty(0))))
            if not (factors[0].ndim == factors[1].ndim == 2 and factors[0].shape[1] == len(factors[1]) > 0):
                shapes = " and ".join(str(tuple(factor.shape)) for factor in factors)
                raise ValueError(f"{path}: the factors of {layer!r}, {shapes}, do not go together")
        return model
