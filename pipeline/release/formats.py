"""What was trained in the formats that other programs load, each loaded back before it counts as written.

| file | taken by |
| --- | --- |
| `merged.safetensors` | this project: the factors, or the whole change, as they are |
| `pytorch_custom_diffusion_weights.safetensors` | `pipe.unet.load_attn_procs(…, _pipeline=pipe)`: dense W_0 + delta |
| `<token>.safetensors` | `pipe.load_textual_inversion` |
| `pytorch_lora_weights.safetensors` | `pipe.load_lora_weights`: the factors, float16 |
| `comfyui/<name>.safetensors`, `comfyui/embeddings/` | ComfyUI, A1111 and kin: the LoRA in kohya's names, the tokens |
| `unet/`, `text_encoder/` | `from_pretrained(…, unet=…)`: whole parts, where more than text K/V layers changed |

Weights that silently do not load are the commonest complaint about files like these (diffusers#7261, #9320,
ComfyUI#1144). Hence the load-back with diffusers: it raises RuntimeError if the layers or token rows that arrive are
not those that were written.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_kohya, logging
from safetensors.torch import load_file

from pipeline.merge.factors import MergedModel
from training.backbone import Backbone
from training.checkpoint import save_tensors
from training.weights import ConceptWeights

MERGED = "merged.safetensors"
CUSTOM_DIFFUSION = "pytorch_custom_diffusion_weights.safetensors"
LORA = "pytorch_lora_weights.safetensors"
COMFYUI = "comfyui"
ENCODER_KEYS = ("clip_l", "clip_g")
"""What a textual-inversion file calls the rows of SDXL's two text encoders."""

Pipeline = Any
"""A loaded diffusers `StableDiffusionPipeline` or `StableDiffusionXLPipeline`; diffusers has no types."""

PT = {"format": "pt"}
ADAPTER = "polyconcept_check"


def write_formats(merged: MergedModel, pipe: Pipeline, folder: Path, name: str = "concepts") -> list[Path]:
    """Write every format into `folder`, and check each by loading it back over the base.

    Args:
        merged: the factors and token rows.
        pipe: the untouched base, a Stable Diffusion 1.x, 2.x or XL pipeline; as before when this returns.
        name: file name of the LoRA under `comfyui/`.

    Returns:
        the files written.

    Raises:
        ValueError: the merged model does not belong to this base (layer, shape, token known already), or is unsafe.
        RuntimeError: a file was written but does not arrive when loaded back.
    """
    check_fits(merged, pipe)
    path = folder / MERGED
    merged.save(path)
    return [
        path,
        write_custom_diffusion(merged, pipe, folder),
        *write_tokens(merged, pipe, folder),
        write_lora(merged, pipe, folder),
        *write_comfyui(merged, pipe, folder, name),
    ]


def write_whole(weights: ConceptWeights, backbone: Backbone, folder: Path) -> list[Path]:
    """Write weights that have no low-rank form, and check each file by loading it back: the parts of the model that
    changed, whole (`unet/`, `text_encoder/`, float16), and the tokens. Returns and errors as of `write_formats`.
    """
    check_tokens_fit(weights, backbone.pipe)
    path = folder / MERGED
    weights.save(path)
    paths = [path, *write_tokens(weights, backbone.pipe, folder), *write_embeddings(weights, folder)]
    with backbone.changed(weights.deltas, {}):
        for part in sorted({_part_of(name) for name in weights.deltas}):
            module = copy.deepcopy(getattr(backbone.pipe, part)).half()
            if not all(p.isfinite().all() for p in module.parameters()):
                raise ValueError(f"{part}: the weights hold NaN or infinity; nothing was written")
            if hasattr(module, "register_to_config"):
                module.register_to_config(_name_or_path="")  # where the base lay on this machine is nobody's business
            module.save_pretrained(folder / part)
            _check_part(module, folder / part)
            paths += sorted((folder / part).iterdir())
    return paths


def _part_of(parameter: str) -> str:
    """Which part of a pipeline has a parameter (`Backbone.parameters`)."""
    part = parameter.partition(".")[0]
    return part if part in ("text_encoder", "text_encoder_2") else "unet"


def _check_part(module: Any, path: Path) -> None:
    arrived = type(module).from_pretrained(path).state_dict()
    for key, tensor in module.state_dict().items():
        if key not in arrived or not torch.equal(arrived[key].half().cpu(), tensor.cpu()):
            raise RuntimeError(f"{path}: {key} did not arrive when it was loaded")


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
    encoders = _encoders(pipe)
    for token, rows in merged.tokens.items():
        if len(rows) != len(encoders):
            raise ValueError(f"token {token} has {len(rows)} rows; the base has {len(encoders)} text encoders")
        for row, (tokenizer, encoder) in zip(rows, encoders, strict=True):
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' warnings on what a file does not hold: the check says what matters."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


# --- Custom Diffusion ----------------------------------------------------------------------------------


def write_custom_diffusion(merged: MergedModel, pipe: Pipeline, folder: Path) -> Path:
    """Write the established diffusers Custom Diffusion file: dense W_0 + delta of every text K/V layer, float16.

    Keys are those of `unet.save_attn_procs`: `<attention>.processor.to_k_custom_diffusion.weight`. Self-attention has
    an empty tensor under its processor's name: the loader wants one entry for each attention layer, which
    diffusers' own safetensors writer leaves out, so that its files do not load (diffusers#9320).
    """
    deltas, tensors = merged.deltas, {}
    touched = {layer.rpartition(".")[0] for layer in merged.layers}
    for processor in pipe.unet.attn_processors:
        attention = processor.removesuffix(".processor")
        if attention not in touched:
            tensors[processor] = torch.empty(0, dtype=torch.float16)
            continue
        for part in ("to_k", "to_v"):
            weight = pipe.unet.get_submodule(f"{attention}.{part}").weight.detach().float().cpu()
            delta = deltas.get(f"{attention}.{part}")
            # contiguous copies: safetensors refuses tensors that share memory
            tensors[f"{processor}.{part}_custom_diffusion.weight"] = (
                weight if delta is None else weight + delta.cpu()
            ).half()
    path = folder / CUSTOM_DIFFUSION
    save_tensors(path, tensors, PT)
    _check_custom_diffusion(pipe, path, tensors)
    return path


@_quiet()
def _check_custom_diffusion(pipe: Pipeline, path: Path, expected: dict[str, torch.Tensor]) -> None:
    before = pipe.unet.attn_processors
    try:
        # without `_pipeline` diffusers reads the file and installs nothing (diffusers#9320)
        pipe.unet.load_attn_procs(path.parent, weight_name=path.name, _pipeline=pipe)
        arrived = pipe.unet.state_dict()
    finally:
        pipe.unet.set_attn_processor(before)
    for key, tensor in expected.items():
        if tensor.numel() and (
            key not in arrived or not torch.equal(arrived[key].cpu(), tensor.to(arrived[key].dtype))
        ):
            raise RuntimeError(f"{path}: {key} did not arrive when diffusers loaded the file")


# --- tokens --------------------------------------------------------------------------------------------


def write_tokens(merged: MergedModel | ConceptWeights, pipe: Pipeline, folder: Path) -> list[Path]:
    """Write one textual-inversion file per token, named by `token_files`, rows in their own dtype.

    One text encoder: the token is the key, the row (width,). Two (SDXL): `clip_l` and `clip_g`, (1, width) each.
    """
    files = token_files(merged.tokens)
    for token, rows in merged.tokens.items():
        tensors = {token: rows[0]} if len(rows) == 1 else _rows_by_encoder(rows)
        save_tensors(folder / files[token], tensors, PT)
    paths = [folder / file for file in files.values()]
    _check_tokens(merged, pipe, paths)
    return paths


def token_files(tokens: Iterable[str]) -> dict[str, str]:
    """File name of each token: `<new1>` -> `<new1>.safetensors`.

    A token with characters that file systems or URLs may refuse, one that starts with a dot, and one that would hide
    another file (also where upper and lower case are the same) gets those characters replaced and a hash appended.
    """
    taken = {Path(name).stem for name in (MERGED, CUSTOM_DIFFUSION, LORA)}
    files = {}
    for token in tokens:
        stem = re.sub(r"[^A-Za-z0-9<>_+.-]", "_", token)[:80].lstrip(".")
        # `load_lora_weights(folder)` takes any file whose name ends like the LoRA's
        if stem != token or stem.lower() in taken or stem.lower().endswith(Path(LORA).stem):
            stem = f"{stem}-{hashlib.sha256(token.encode()).hexdigest()[:8]}"
        taken.add(stem.lower())
        files[token] = f"{stem}.safetensors"
    return files


def _rows_by_encoder(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: row[None] for key, row in zip(ENCODER_KEYS, rows, strict=True)}


def _check_tokens(merged: MergedModel | ConceptWeights, pipe: Pipeline, paths: list[Path]) -> None:
    # on copies: diffusers' unloading does not put a tokenizer back exactly as it was
    for index, pair in enumerate(_encoders(pipe)):
        tokenizer, encoder = copy.deepcopy(pair)
        for (token, rows), path in zip(merged.tokens.items(), paths, strict=True):
            if len(rows) == 1:
                pipe.load_textual_inversion(
                    path.parent, weight_name=path.name, tokenizer=tokenizer, text_encoder=encoder
                )
            else:
                row = load_file(path)[ENCODER_KEYS[index]]
                pipe.load_textual_inversion(row, token=token, tokenizer=tokenizer, text_encoder=encoder)
        table = encoder.get_input_embeddings().weight.detach().cpu()
        for (token, rows), path in zip(merged.tokens.items(), paths, strict=True):
            number = tokenizer.convert_tokens_to_ids(token)
            prompt = tokenizer(f"photo of a {token} thing").input_ids
            if prompt.count(number) != 1:
                raise RuntimeError(f"{path}: the tokenizer does not find {token!r} in a prompt; choose a plainer token")
            if not torch.equal(table[number], rows[index].to(table.dtype).cpu()):
                raise RuntimeError(f"{path}: the row of {token!r} did not arrive when diffusers loaded the file")


def _encoders(pipe: Pipeline) -> list[tuple]:
    """(tokenizer, text encoder) pairs of the pipeline: one, or SDXL's two."""
    components = pipe.components
    pairs = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
    return [(components[a], components[b]) for a, b in pairs if components.get(a) is not None]


# --- LoRA ----------------------------------------------------------------------------------------------


def write_lora(merged: MergedModel, pipe: Pipeline, folder: Path) -> Path:
    """Write the LoRA that `pipe.load_lora_weights(folder)` takes: lora_B = left (out, r), lora_A = right (r, d).

    The scale is 1 and nothing but digits is lost: a merged model is a LoRA by nature. The right factor is repeated for
    each layer; float16, as of models that are float16 themselves no more would be left.
    """
    pipe.save_lora_weights(
        folder, unet_lora_layers=_lora_tensors(merged), unet_lora_adapter_metadata=_lora_config(merged)
    )
    path = folder / LORA
    _check_lora(merged, pipe, path)
    return path


def write_comfyui(merged: MergedModel, pipe: Pipeline, folder: Path, name: str = "concepts") -> list[Path]:
    """Write what ComfyUI and the A1111 family read.

    `comfyui/<name>.safetensors` is the LoRA in kohya's names (`lora_unet_…_to_k.lora_down.weight`); the tokens are as
    `write_embeddings` writes them.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"name {name!r}: expected letters, digits, '.', '_' and '-'")
    path = folder / COMFYUI / f"{name}.safetensors"
    tensors = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in _lora_tensors(merged).items()})
    # one alpha for all layers: diffusers drops alphas that differ and then loads some layers at a wrong scale
    rank = max(left.shape[1] for left in merged.left.values())
    for key in [k for k in tensors if k.endswith(".alpha")]:
        up = key.replace(".alpha", ".lora_up.weight")
        tensors[up] = (tensors[up].float() * (tensors[up].shape[1] / rank)).to(tensors[up].dtype)
        tensors[key] = torch.tensor(float(rank))
    save_tensors(path, tensors, PT)
    _check_lora(merged, pipe, path)
    return [path, *write_embeddings(merged, folder)]


def write_embeddings(merged: MergedModel | ConceptWeights, folder: Path) -> list[Path]:
    """Write the tokens under `comfyui/embeddings/` (`emb_params`, or `clip_l` and `clip_g` for SDXL; (1, width)).

    There a token goes by its file's name: `embedding:<name>` in ComfyUI, the bare name in A1111.
    """
    paths = []
    for token, file in embedding_files(merged.tokens).items():
        rows = merged.tokens[token]
        paths.append(folder / COMFYUI / "embeddings" / file)
        save_tensors(paths[-1], {"emb_params": rows[0][None]} if len(rows) == 1 else _rows_by_encoder(rows), PT)
    return paths


def embedding_files(tokens: Iterable[str]) -> dict[str, str]:
    """File name of each token under `comfyui/embeddings/`: `<new1>` -> `new1.safetensors`.

    There the file's name is what the user types, and both programs read `<`, `>`, `(`, `:` as syntax of their own.
    """
    tokens = list(tokens)
    plain = {token: re.sub(r"[^A-Za-z0-9_-]", "", token) for token in tokens}
    names = [name.lower() for name in plain.values()]
    return {
        token: f"{name}.safetensors"
        if name and names.count(name.lower()) == 1
        else f"{name}{hashlib.sha256(token.encode()).hexdigest()[:8]}.safetensors"
        for token, name in plain.items()
    }


def _lora_tensors(merged: MergedModel) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in merged.layers:
        left, right = merged.factors(layer)
        # copies: safetensors refuses the right factor shared by all layers
        tensors[f"{layer}.lora_A.weight"] = right.detach().cpu().half().contiguous().clone()
        tensors[f"{layer}.lora_B.weight"] = left.detach().cpu().half().contiguous().clone()
    return tensors


def _lora_config(merged: MergedModel) -> dict:
    """Ranks and alphas for peft: older diffusers, if it has to guess, gives a wrong scale to layers whose rank is not
    the commonest. Only settings that peft has long had: it refuses unknown ones."""
    ranks = {layer: merged.factors(layer)[0].shape[1] for layer in merged.layers}
    rank = max(ranks.values())
    others = {layer: r for layer, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
    }


@_quiet()
def _check_lora(merged: MergedModel, pipe: Pipeline, path: Path) -> None:
    arrived = {}
    try:
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=ADAPTER)
        for layer in merged.layers:
            module = pipe.unet.get_submodule(layer)
            if ADAPTER in getattr(module, "active_adapters", ()):
                arrived[layer] = module.get_delta_weight(ADAPTER).detach().double().cpu()
    finally:
        pipe.delete_adapters(ADAPTER)
        pipe.unload_lora_weights()
    for layer, delta in merged.deltas.items():
        if layer not in arrived:
            raise RuntimeError(f"{path}: {layer} did not arrive when diffusers loaded the file")
        # the loader multiplies in the base's precision
        if (arrived[layer] - delta.double().cpu()).norm() > 1e-2 * delta.double().norm() + 1e-8:
            raise RuntimeError(f"{path}: {layer} arrived changed when diffusers loaded the file (a wrong scale?)")
