"""Weights from files: what `polyconcept sample` and `polyconcept merge` read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import fsspec
import torch

from pipeline.merge.compress import in_half
from pipeline.merge.constraints import constraint_of, regularization_rows
from pipeline.merge.factors import MergedModel
from pipeline.merge.solve import MergeReport, merge
from pipeline.release.publish import resolve
from training.backbone import load_backbone
from training.checkpoint import load_tensors
from training.weights import ConceptWeights


def load_change(place: str) -> tuple[dict[str, torch.Tensor], dict[str, list[torch.Tensor]], str]:
    """Layer changes, token rows and base digest of a release (folder or URL), a merged model or concept weights.

    Raises: ValueError when there is none of these.
    """
    if not place.endswith(".safetensors"):
        place = f"{resolve(place)}/merged.safetensors"
    try:
        path = Path(fsspec.open_local(f"simplecache::{place}") if "://" in place else place)
        tensors, _ = load_tensors(path)
    except FileNotFoundError:
        raise ValueError(f"{place}: no such file") from None
    kind = ConceptWeights if any(k.startswith("delta.") for k in tensors) else MergedModel
    weights = kind.load(path)
    return weights.deltas, weights.tokens, weights.metadata.get("base", "")


def merge_files(
    paths: Sequence[Path], captions: Path, base: str | Path, *, form: Literal["auto", "hard", "soft"]
) -> tuple[MergedModel, MergeReport]:
    """Merge concept weight files over their base; float16 factors.

    Args:
        captions: text file of regularisation captions, one a line.
    Raises: ValueError for weights of another base, two concepts with one token or name, or an empty caption file.
    """
    backbone = load_backbone(base)
    loaded = [ConceptWeights.load(path) for path in paths]
    tokens: dict[str, list[torch.Tensor]] = {}
    concepts: list[dict] = []
    for path, weights in zip(paths, loaded, strict=True):
        if weights.metadata.get("base") != backbone.digest:
            raise ValueError(
                f"{path}: trained over base {weights.metadata.get('base')}, not {backbone.digest} ({base})"
            )
        if twice := set(tokens) & set(weights.tokens):
            raise ValueError(f"{path}: token {min(twice)!r} is another file's too; each concept needs its own")
        tokens |= weights.tokens
        concepts += weights.metadata["concepts"]
    lines = [line.strip() for line in captions.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{captions}: no captions in it; one a line is expected")
    constraints = []
    for weights in loaded:
        constraints += constraint_of(backbone, weights, ("{}", "photo of a {}"))
    model, report = merge(
        constraints,
        regularization_rows(backbone, lines),
        {name: layer.weight.data for name, layer in backbone.layers.items()},
        form=form,
    )
    metadata = {"base": backbone.digest, "concepts": concepts}
    return in_half(dataclasses.replace(model, tokens=tokens, metadata=metadata)), report
