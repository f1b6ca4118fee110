"""What an exporter is, and what all of them check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging

from pipeline.merge.factors import MergedModel
from training.weights import ConceptWeights

Pipeline = Any
"""A loaded diffusers `StableDiffusionPipeline` or `StableDiffusionXLPipeline`; diffusers has no types."""

PT = {"format": "pt"}


@dataclass(frozen=True)
class Snippet:
    """How the model card says that a file is loaded: Markdown around a block of code.

    title: its heading. load: the lines that give `pipe` the weights of the folder `RELEASE`. before, after: paragraphs.
    """

    title: str
    load: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Exporter:
    """A format that a merged model is written in.

    write: called with the merged model, the untouched base, the folder to write into and the batch's name; returns the
    files. It loads them back, and raises RuntimeError if something else arrives.
    """

    write: Callable[[MergedModel, Pipeline, Path, str], list[Path]]
    snippet: Snippet | None = None


def check_fits(merged: MergedModel, pipe: Pipeline) -> None:
    """Raise ValueError unless every layer and token row of `merged` has its place in the untouched base."""
    if not merged.layers:
        raise ValueError("the merged model changes no layer; nothing to write")
    if getattr(pipe.unet, "peft_config", None):
        raise ValueError("the base has adapters loaded: give the untouched base")
    for layer in merged.layers:
        left, right = merged.factors(layer)
        try:
            weight = pipe.unet.get_submodule(layer).weight
        except AttributeError:
            raise ValueError(f"layer {layer} is not in the base model: trained on another base?") from None
        if not layer.endswith((".to_k", ".to_v")):
            raise ValueError(f"layer {layer}: only .to_k and .to_v have a place in the published formats")
        if weight.shape != (left.shape[0], right.shape[1]) or left.shape[1] != right.shape[0]:
            raise ValueError(
                f"layer {layer} is {tuple(weight.shape)} in the base model, but the change is "
                f"{tuple(left.shape)} @ {tuple(right.shape)}: trained on another base?"
            )
        if not (left.isfinite().all() and right.isfinite().all()):
            raise ValueError(f"layer {layer}: the change holds NaN or infinity; nothing was written")
    check_tokens_fit(merged, pipe)


def check_tokens_fit(merged: MergedModel | ConceptWeights, pipe: Pipeline) -> None:
    """Raise ValueError unless every token row has its place in the untouched base."""
    parts = encoders(pipe)
    for token, rows in merged.tokens.items():
        if len(rows) != len(parts):
            raise ValueError(f"token {token} has {len(rows)} rows; the base has {len(parts)} text encoders")
        for row, (tokenizer, encoder) in zip(rows, parts, strict=True):
            width = encoder.get_input_embeddings().embedding_dim
            if row.shape != (width,):
                raise ValueError(
                    f"token {token} has a row of {tuple(row.shape)}; the base's text encoder has ({width},)"
                )
            if not row.isfinite().all():
                raise ValueError(f"token {token}: its row holds NaN or infinity; nothing was written")
            if token in tokenizer.get_vocab():
                raise ValueError(
                    f"token {token} is in the base's vocabulary: choose another, or give the untouched base"
                )


def encoders(pipe: Pipeline) -> list[tuple]:
    """(tokenizer, text encoder) pairs of the pipeline: one, or SDXL's two."""
    components = pipe.components
    pairs = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
    return [(components[a], components[b]) for a, b in pairs if components.get(a) is not None]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' warnings on what a file does not hold: the check says what matters."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
