"""Textual-inversion files: a new word each."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.merge.factors import MergedModel
from pipeline.release.formats.exporter import PT, Exporter, Pipeline, encoders
from pipeline.release.formats.names import COMFYUI, token_files
from training.checkpoint import save_tensors
from training.weights import ConceptWeights

ENCODER_KEYS = ("clip_l", "clip_g")
"""What a textual-inversion file calls the rows of SDXL's two text encoders."""


def write_tokens(merged: MergedModel | ConceptWeights, pipe: Pipeline, folder: Path, name: str) -> list[Path]:
    """Write two textual-inversion files of one name for each token (`token_files`), rows in their own dtype.

    For diffusers: with one text encoder the token is the key, the row (width,); with two (SDXL) `clip_l` and `clip_g`,
    (1, width) each. Under `comfyui/embeddings/`, for ComfyUI and A1111: `emb_params`, (1, width); of SDXL the same
    file.
    """
    files = token_files(merged.tokens, name)
    paths = []
    for token, rows in merged.tokens.items():
        one = len(rows) == 1
        by_encoder = {key: row[None] for key, row in zip(ENCODER_KEYS, rows, strict=False)}
        paths += [folder / files[token], folder / COMFYUI / "embeddings" / files[token]]
        save_tensors(paths[-2], {token: rows[0]} if one else by_encoder, PT)
        save_tensors(paths[-1], {"emb_params": rows[0][None]} if one else by_encoder, PT)
    if paths:
        _check_tokens(merged, pipe, paths[::2])
    return paths


def _check_tokens(merged: MergedModel | ConceptWeights, pipe: Pipeline, paths: list[Path]) -> None:
    tokens = list(merged.tokens)
    # on copies: diffusers' unloading does not put a tokenizer back exactly as it was
    for index, pair in enumerate(encoders(pipe)):
        tokenizer, encoder = copy.deepcopy(pair)
        rows = [load_file(path) for path in paths]
        found = [row.get(ENCODER_KEYS[index], row) for row in rows]
        # all at once: each call copies the whole table
        pipe.load_textual_inversion(found, token=tokens, tokenizer=tokenizer, text_encoder=encoder)
        table = encoder.get_input_embeddings().weight.detach().cpu()
        for (token, own), path in zip(merged.tokens.items(), paths, strict=True):
            number = tokenizer.convert_tokens_to_ids(token)
            prompt = tokenizer(f"photo of a {token} thing").input_ids
            if prompt.count(number) != 1:
                raise RuntimeError(f"{path}: the tokenizer does not find {token!r} in a prompt; choose a plainer token")
            if not torch.equal(table[number], own[index].to(table.dtype).cpu()):
                raise RuntimeError(f"{path}: the row of {token!r} did not arrive when diffusers loaded the file")


EXPORTER = Exporter(write_tokens)
