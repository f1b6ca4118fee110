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
from typing import Any

import fsspec
import torch

from pipeline.merge.compress import rounded
from pipeline.merge.constraints import (
    FORMS,
    PAPER_PROMPTS,
    Constraint,
    captions_beside,
    constraint_of,
    regularization_rows,
)
from pipeline.merge.factors import MergedModel
from pipeline.merge.solve import Form, MergeReport, Sums, merge, merge_sums, report
from pipeline.reading import read_lines, shown
from pipeline.release.publish import resolve
from pipeline.spec import Merge
from training.backbone import Backbone, load_backbone
from training.checkpoint import load_metadata, load_numbers
from training.tokens import spelling
from training.weights import ConceptWeights, describe, token_tensors, tokens_from

DEFAULTS = Merge()


def load_weights(path: Path) -> ConceptWeights | MergedModel:
    """Concept weights or a merged model, as the file says. Raises: ValueError when it is neither."""
    kind = describe(path, load_metadata(path)).get("kind")
    return (ConceptWeights if kind == "concept_weights" else MergedModel).load(path)


def weights_file(place: str) -> str:
    """Path or URL of the weights at a place: itself, or `merged.safetensors` of a release.

    Raises: ValueError when there is no release.
    """
    return place if place.endswith(".safetensors") else f"{resolve(place)}/merged.safetensors"


def load_change(place: str, backbone: Backbone) -> tuple[dict[str, torch.Tensor], dict[str, list[torch.Tensor]]]:
    """Parameter changes and token rows of a release (folder or URL), a merged model or concept weights.

    Raises: ValueError when there is none of these, or it does not fit the base model.
    """
    file = weights_file(place)
    try:
        path = Path(fsspec.open_local(f"simplecache::{file}") if "://" in file else file)
        weights = load_weights(path)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    check_fit(file, weights, backbone)
    return weights.deltas, weights.tokens


def check_fit(place: str | Path, weights: ConceptWeights | MergedModel, backbone: Backbone) -> None:
    """Raises: ValueError when weights were made over another base, do not say over which, or have other shapes."""
    base = weights.metadata.get("base")
    if not base:
        raise ValueError(f"{place}: does not say over which base it was made")
    if base != backbone.digest:
        raise ValueError(f"{place}: made over a base with digest {base}, but this one has {backbone.digest}")
    shapes: dict[str, tuple[int, ...]]
    if isinstance(weights, MergedModel):  # before factors are multiplied: a small file can stand for a huge matrix
        shapes = {k: (len(left), weights.factors(k)[1].shape[1]) for k, left in weights.left.items()}
    else:
        shapes = {k: tuple(delta.shape) for k, delta in weights.deltas.items()}
    for name, shape in shapes.items():
        wanted = tuple(backbone.parameters[name].shape) if name in backbone.parameters else None
        if shape != wanted:
            raise ValueError(f"{place}: {name!r} is {shape}; this base model has {wanted or 'none of this name'}")
    if missing := set(backbone.layers) - set(shapes) if shapes else ():
        raise ValueError(f"{place}: has no change of {min(missing)!r}, which this base model has")
    _check_tokens(place, weights.tokens, backbone)


def _check_tokens(place: str | Path, tokens: dict[str, list[torch.Tensor]], backbone: Backbone) -> None:
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in backbone.text_encoders]
    for token, rows in tokens.items():
        if not token.isprintable() or " " in token:
            raise ValueError(f"{place}: token {token!r}: a token is one word of characters that can be seen")
        if (found := [len(row) for row in rows]) != widths:
            raise ValueError(f"{place}: token {token!r} has rows of widths {found}; this base model's are {widths}")
        if any(len(t(token, add_special_tokens=False).input_ids) < 2 for t in backbone.tokenizers):
            raise ValueError(f"{place}: token {token!r} is a word that this base model's tokenizer knows already")
    read: dict[str, str] = {}
    for token in tokens:
        if (other := read.setdefault(spelling(token), token)) != token:
            raise ValueError(f"{place}: tokens {other!r} and {token!r} are one word to the tokenizer")


def merge_files(
    paths: Sequence[Path],
    captions: Path,
    base: str | Path,
    *,
    form: Form = "soft",
    sums: Path | None = None,
    remove: Sequence[Path] = (),
    out: Path,
) -> tuple[MergedModel, MergeReport]:
    """Merge concept weight files over their base; factors, `rounded`, written to `out`. The report is of these, with
    residuals of the concepts in `paths`.

    Args:
        captions: text file of regularisation captions, one a line.
        sums: file of what is merged already (`Sums`, with the concepts' tokens): read when it is there, and written
            anew. This needs no files of the other concepts, and the soft form.
        remove: weight files of concepts to take out of `sums`.
    Raises: ValueError for weights of another base, two concepts with one token or name, an empty caption file, a
        concept to remove that is not merged or was trained again since, the paper's form with sums.
    """
    if sums and form == "paper":
        raise ValueError("merge: the paper's form needs the files of all concepts; with sums it is the soft one")
    if remove and not sums:
        raise ValueError("merge: name the sums that concepts are to be removed from")
    backbone = load_backbone(base)
    lines = [line for _, line in read_lines(captions, "file of captions, one a line")]
    if not lines:
        raise ValueError(f"{captions}: no captions in it; one a line is expected")
    weights_of_layers = {name: layer.weight.data for name, layer in backbone.layers.items()}
    merged = _Merged.load(sums, backbone) if sums and sums.exists() else _Merged(None, {}, [], {})
    for path in remove:
        merged = merged.without(path, backbone)
    constraints = []
    for path in paths:
        merged, added = merged.with_added(path, backbone, form)
        constraints += added
    if not merged.concepts:
        left = f"no concept is left; {sums} can be deleted" if remove else "no concepts; name their weights.safetensors"
        raise ValueError(f"merge: {left}")
    exact = form == "paper"
    rows = regularization_rows(backbone, lines if exact else captions_beside(lines, merged.concepts), exact=exact)
    limits = DEFAULTS.model_dump(include={"damping", "max_drift", "penalty"})
    if sums:
        parts = ([merged.sums] if merged.sums else []) + ([Sums.over(constraints)] if constraints else [])
        total: Sums = functools.reduce(operator.add, parts)
        model, result = merge_sums(total, constraints, rows, weights_of_layers, **limits)
    else:
        model, result = merge(constraints, rows, weights_of_layers, form=form, **limits)
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
        tensors, metadata = load_numbers(path)
        if "gram" not in tensors or "merged" not in metadata:
            raise ValueError(f"{path}: holds no sums of a merge; found {sorted(tensors)[:3]}")
        try:
            described, sums = json.loads(metadata["merged"]), Sums.of(tensors, metadata)
            base, concepts, demanded = described["base"], described["concepts"], described.get("demanded", {})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not what `merge --sums` writes: {error!r}") from None
        if base != backbone.digest:
            raise ValueError(f"{path}: made over a base with digest {base}, but this one has {backbone.digest}")
        _check_concepts(path, concepts)
        width = next(iter(backbone.layers.values())).weight.shape[1]
        shapes = {f"cross.{name}": (width, len(layer.weight)) for name, layer in backbone.layers.items()}
        for name, shape in (shapes | {"gram": (width, width)}).items():
            if name not in tensors or tuple(tensors[name].shape) != shape:
                raise ValueError(f"{path}: no {name!r} of the shape {shape}, as this base model has it")
        tokens = tokens_from(tensors, path)
        _check_tokens(path, tokens, backbone)
        return cls(sums, tokens, concepts, demanded)

    def save(self, path: Path, sums: Sums, backbone: Backbone) -> None:
        described = {"base": backbone.digest, "concepts": self.concepts, "demanded": self.demanded}
        sums.save(path, token_tensors(self.tokens), {"merged": json.dumps(described)})

    def with_added(self, path: Path, backbone: Backbone, form: Form) -> tuple[_Merged, list[Constraint]]:
        """With the concepts of a file, and their constraints, which are not in the sums yet."""
        weights = load_concepts(path, backbone)
        names = {concept["name"] for concept in self.concepts}
        words = {_word(concept): concept["name"] for concept in self.concepts}
        for concept in weights.metadata["concepts"]:
            if concept["name"] in names:
                raise ValueError(
                    f"{path}: a concept {concept['name']!r} is merged already; remove that one to replace it"
                )
            names.add(concept["name"])
            if (other := words.setdefault(word := _word(concept), concept["name"])) != concept["name"]:
                what = "token" if concept["token"] else "class word of a new category"
                raise ValueError(
                    f"{path}: {what} {word!r} is that of the concept {other!r} too; train one of them with another"
                )
        concepts = [*self.concepts, *weights.metadata["concepts"]]
        demanded = self.demanded | {
            concept["name"]: _digest(weights, FORMS) for concept in weights.metadata["concepts"]
        }
        try:
            constraints = constraint_of(backbone, weights, exact=form == "paper")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if not all(rows.isfinite().all() for each in constraints for rows in (each.rows, *each.changes.values())):
            raise ValueError(f"{path}: its numbers are too large: what the text encoder makes of them is not finite")
        return _Merged(self.sums, self.tokens | weights.tokens, concepts, demanded), constraints

    def without(self, path: Path, backbone: Backbone) -> _Merged:
        weights = load_concepts(path, backbone)
        gone = {concept["name"] for concept in weights.metadata["concepts"]}
        # sums of older versions are over the paper's rows
        exact = _digest(weights, PAPER_PROMPTS) in (self.demanded.get(name) for name in gone)
        digest = _digest(weights, PAPER_PROMPTS if exact else FORMS)
        if self.sums is None or any(self.demanded.get(name) != digest for name in gone):
            raise ValueError(
                f"{path}: these weights of {', '.join(sorted(gone))} are not among the concepts merged; name the very "
                "file that was added, not one trained again"
            )
        tokens = {token: rows for token, rows in self.tokens.items() if token not in weights.tokens}
        concepts = [concept for concept in self.concepts if concept["name"] not in gone]
        demanded = {name: known for name, known in self.demanded.items() if name not in gone}
        # of nothing but rounding, when no concept is left
        sums = self.sums - Sums.over(constraint_of(backbone, weights, exact=exact)) if concepts else None
        return _Merged(sums, tokens, concepts, demanded)


def _word(concept: dict[str, Any]) -> str:
    """By which prompts know a concept."""
    return spelling(concept["token"] or concept["class_word"])


def _digest(weights: ConceptWeights, prompts: Sequence[str]) -> str:
    """sha256 of all that a file demands of a merge: its changes and tokens, and the constraint prompts.

    Not of the constraint made of them, whose rounding is that of the machine.
    """
    digest = hashlib.sha256(json.dumps(prompts).encode())
    for name, tensor in sorted((weights.deltas | token_tensors(weights.tokens)).items()):
        digest.update(name.encode() + tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_concepts(path: Path, backbone: Backbone) -> ConceptWeights:
    """Concept weights that can be merged over this base, from a file that may be a stranger's.

    Raises: ValueError naming the file and what is wrong with it.
    """
    weights = ConceptWeights.load(path)
    check_fit(path, weights, backbone)
    _check_concepts(path, weights.metadata.get("concepts"))
    named = {concept["token"] for concept in weights.metadata["concepts"]} - {""}
    if weights.deltas and named != set(weights.tokens):
        raise ValueError(f"{path}: its concepts go by {sorted(named)}, but it holds rows of {sorted(weights.tokens)}")
    return weights


def _check_concepts(path: Path, concepts: Any) -> None:
    keys = ("name", "token", "class_word")
    if not (
        isinstance(concepts, list)
        and concepts
        and all(isinstance(c, dict) and all(isinstance(c.get(key), str) for key in keys) for c in concepts)
    ):
        raise ValueError(f"{path}: its metadata names no concepts, each with {', '.join(keys)}")
    for concept in concepts:
        for key in keys:
            if not concept[key].isprintable():
                raise ValueError(
                    f"{path}: the {key} of a concept is {shown(concept[key])}; only what can be read is one"
                )
