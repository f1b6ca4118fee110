"""Weights from files: what `polyconcept sample` and `polyconcept merge` read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import torch

from pipeline.merge.compress import rounded
from pipeline.merge.constraints import Constraint, constraint_of, regularization_rows
from pipeline.merge.factors import MergedModel
from pipeline.merge.solve import MergeReport, Sums, merge, merge_sums, report
from pipeline.release.publish import resolve
from pipeline.spec import Merge
from training.backbone import Backbone, load_backbone
from training.checkpoint import load_metadata, load_tensors
from training.tokens import spelling
from training.weights import ConceptWeights, token_tensors, tokens_from

DEFAULTS = Merge()


def load_weights(path: Path) -> ConceptWeights | MergedModel:
    """Concept weights or a merged model, as the file says. Raises: ValueError when it is neither."""
    kind = json.loads(load_metadata(path).get("polyconcept", "{}")).get("kind")
    return (ConceptWeights if kind == "concept_weights" else MergedModel).load(path)


def load_change(place: str) -> tuple[dict[str, torch.Tensor], dict[str, list[torch.Tensor]], str]:
    """Parameter changes, token rows and base digest of a release (folder or URL), a merged model or concept weights.

    Raises: ValueError when there is none of these.
    """
    if not place.endswith(".safetensors"):
        place = f"{resolve(place)}/merged.safetensors"
    try:
        path = Path(fsspec.open_local(f"simplecache::{place}") if "://" in place else place)
        weights = load_weights(path)
    except FileNotFoundError:
        raise ValueError(f"{place}: no such file") from None
    return weights.deltas, weights.tokens, weights.metadata.get("base", "")


def merge_files(
    paths: Sequence[Path],
    captions: Path,
    base: str | Path,
    *,
    form: Literal["auto", "hard", "soft"] = "auto",
    sums: Path | None = None,
    remove: Sequence[Path] = (),
    out: Path,
) -> tuple[MergedModel, MergeReport]:
    """Merge concept weight files over their base; factors, `rounded`, written to `out`. The report is of these, with
    residuals of the concepts in `paths`.

    Args:
        captions: text file of regularisation captions, one a line.
        sums: file of what is merged already (`Sums`, with the concepts' tokens): read when it is there, and written
            anew. A model merged from sums takes the soft form, and needs no files of the other concepts.
        remove: weight files of concepts to take out of `sums`.
    Raises: ValueError for weights of another base, two concepts with one token or name, an empty caption file, a
        concept to remove that is not merged or was trained again since, the hard form with sums.
    """
    if sums and form == "hard":
        raise ValueError("merge: the hard form needs the files of all concepts; with sums it is the soft one")
    if remove and not sums:
        raise ValueError("merge: name the sums that concepts are to be removed from")
    backbone = load_backbone(base)
    lines = [line.strip() for line in captions.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{captions}: no captions in it; one a line is expected")
    rows = regularization_rows(backbone, lines)
    weights_of_layers = {name: layer.weight.data for name, layer in backbone.layers.items()}
    merged = _Merged.load(sums, backbone) if sums and sums.exists() else _Merged(None, {}, [], {})
    for path in remove:
        merged = merged.without(path, backbone)
    constraints = []
    for path in paths:
        merged, added = merged.with_added(path, backbone)
        constraints += added
    if not merged.concepts:
        left = f"no concept is left; {sums} can be deleted" if remove else "no concepts; name their weights.safetensors"
        raise ValueError(f"merge: {left}")
    if sums:
        parts = ([merged.sums] if merged.sums else []) + ([Sums.over(constraints)] if constraints else [])
        total: Sums = functools.reduce(operator.add, parts)
        model, result = merge_sums(
            total, constraints, rows, weights_of_layers, damping=DEFAULTS.damping, penalty=DEFAULTS.penalty
        )
    else:
        model, result = merge(
            constraints, rows, weights_of_layers, form=form, damping=DEFAULTS.damping, penalty=DEFAULTS.penalty
        )
    metadata = {"base": backbone.digest, "concepts": merged.concepts}
    model = rounded(dataclasses.replace(model, tokens=merged.tokens, metadata=metadata))
    written = report(model, constraints, rows, weights_of_layers)
    model.save(out)
    if sums:  # last: until it is written, the same command can be given again
        merged.save(sums, total, backbone)
    return model, dataclasses.replace(result, residuals=written.residuals, drift=written.drift)


@dataclass(frozen=True)
class _Merged:
    """Concepts that are merged: their sums (None: only files so far), tokens and descriptions.

    demanded: concept -> digest of what its file demanded of the merge, see `_digest`.
    """

    sums: Sums | None
    tokens: dict[str, list[torch.Tensor]]
    concepts: list[dict[str, Any]]
    demanded: dict[str, str]

    @classmethod
    def load(cls, path: Path, backbone: Backbone) -> _Merged:
        tensors, metadata = load_tensors(path)
        if "gram" not in tensors or "merged" not in metadata:
            raise ValueError(f"{path}: holds no sums of a merge; found {sorted(tensors)[:3]}")
        described = json.loads(metadata["merged"])
        _check_base(path, described["base"], backbone)
        return cls(
            Sums.of(tensors, metadata), tokens_from(tensors), described["concepts"], described.get("demanded", {})
        )

    def save(self, path: Path, sums: Sums, backbone: Backbone) -> None:
        described = {"base": backbone.digest, "concepts": self.concepts, "demanded": self.demanded}
        sums.save(path, token_tensors(self.tokens), {"merged": json.dumps(described)})

    def with_added(self, path: Path, backbone: Backbone) -> tuple[_Merged, list[Constraint]]:
        """With the concepts of a file, and their constraints, which are not in the sums yet."""
        weights = ConceptWeights.load(path)
        _check_base(path, weights.metadata.get("base", ""), backbone)
        names = {concept["name"] for concept in self.concepts}
        words = {_word(concept): concept["name"] for concept in self.concepts}
        for concept in weights.metadata["concepts"]:
            if concept["name"] in names:
                raise ValueError(
                    f"{path}: a concept {concept['name']!r} is merged already; remove that one to replace it"
                )
            if (other := words.setdefault(word := _word(concept), concept["name"])) != concept["name"]:
                what = "token" if concept["token"] else "class word of a new category"
                raise ValueError(
                    f"{path}: {what} {word!r} is that of the concept {other!r} too; train one of them with another"
                )
        concepts = [*self.concepts, *weights.metadata["concepts"]]
        demanded = self.demanded | {concept["name"]: _digest(weights) for concept in weights.metadata["concepts"]}
        constraints = constraint_of(backbone, weights, DEFAULTS.prompts)
        return _Merged(self.sums, self.tokens | weights.tokens, concepts, demanded), constraints

    def without(self, path: Path, backbone: Backbone) -> _Merged:
        weights = ConceptWeights.load(path)
        _check_base(path, weights.metadata.get("base", ""), backbone)
        gone = {concept["name"] for concept in weights.metadata["concepts"]}
        digest = _digest(weights)
        if self.sums is None or any(self.demanded.get(name) != digest for name in gone):
            raise ValueError(
                f"{path}: these weights of {', '.join(sorted(gone))} are not among the concepts merged; name the very "
                "file that was added, not one trained again"
            )
        tokens = {token: rows for token, rows in self.tokens.items() if token not in weights.tokens}
        concepts = [concept for concept in self.concepts if concept["name"] not in gone]
        demanded = {name: known for name, known in self.demanded.items() if name not in gone}
        # of nothing but rounding, when no concept is left
        sums = self.sums - Sums.over(constraint_of(backbone, weights, DEFAULTS.prompts)) if concepts else None
        return _Merged(sums, tokens, concepts, demanded)


def _word(concept: dict[str, Any]) -> str:
    """By which prompts know a concept."""
    return spelling(concept["token"] or concept["class_word"])


def _digest(weights: ConceptWeights) -> str:
    """sha256 of all that a file demands of a merge: its changes and tokens, and the constraint prompts.

    Not of the constraint made of them, whose rounding is that of the machine.
    """
    digest = hashlib.sha256(json.dumps(DEFAULTS.prompts).encode())
    for name, tensor in sorted((weights.deltas | token_tensors(weights.tokens)).items()):
        digest.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _check_base(path: Path, digest: str, backbone: Backbone) -> None:
    if digest != backbone.digest:
        raise ValueError(f"{path}: made over a base with digest {digest}, but this one has {backbone.digest}")
