"""What was trained in the formats that other programs load, each loaded back before it counts as written.

| file | taken by |
| --- | --- |
| `merged.safetensors` | this project: the factors, or the whole change, as they are |
| `pytorch_custom_diffusion_weights.safetensors` | `pipe.unet.load_attn_procs(…, _pipeline=pipe)`: dense W_0 + delta |
| `<batch>-<token>.safetensors` | `pipe.load_textual_inversion` |
| `pytorch_lora_weights.safetensors` | `pipe.load_lora_weights`: the factors, float16 |
| `adapter_config.json`, `adapter_model.safetensors` | `PeftModel.from_pretrained(pipe.unet, …)`: the same factors |
| `comfyui/<batch>.safetensors`, `comfyui/embeddings/` | ComfyUI, A1111 and kin: the LoRA in kohya's names, the tokens |
| `unet/`, `text_encoder/` | `from_pretrained(…, unet=…)`: whole parts, where more than text K/V layers changed |

Weights that silently do not load are the commonest complaint about files like these (diffusers#7261, #9320,
ComfyUI#1144). Hence the load-back with diffusers and peft: it raises RuntimeError if the layers or token rows that
arrive are not those that were written. Equal weights give equal files, byte for byte.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import logging
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
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
LONGEST = 80
"""Letters of a name within a file's name."""
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""What Windows takes for a device, whatever the suffix."""


def write_formats(merged: MergedModel, pipe: Pipeline, folder: Path, name: str) -> list[Path]:
    """Write every format into `folder`, and check each by loading it back over the base.

    Args:
        merged: the factors and token rows.
        pipe: the untouched base, a Stable Diffusion 1.x, 2.x or XL pipeline; as before when this returns.
        name: of the batch; letters, digits, `.`, `_` and `-`. Files that people put together with those of other
            batches are named after it.

    Returns:
        the files written.

    Raises:
        ValueError: the merged model does not belong to this base (layer, shape, token known already), or is unsafe; a
            name of other characters.
        RuntimeError: a file was written but does not arrive when loaded back.
    """
    check_fits(merged, pipe)
    file_stem(name)
    path = folder / MERGED
    merged.save(path)
    return [
        path,
        write_custom_diffusion(merged, pipe, folder),
        *write_tokens(merged, pipe, folder, name),
        write_lora(merged, pipe, folder),
        *write_peft(merged, pipe, folder),
        write_kohya(merged, pipe, folder, name),
    ]


def write_whole(weights: ConceptWeights, backbone: Backbone, folder: Path, name: str) -> list[Path]:
    """Write weights that have no low-rank form, and check each file by loading it back: the parts of the model that
    changed, whole (`unet/`, `text_encoder/`, float16), and the tokens. Arguments, returns and errors as of
    `write_formats`.
    """
    check_tokens_fit(weights, backbone.pipe)
    file_stem(name)
    path = folder / MERGED
    weights.save(path)
    paths = [path, *write_tokens(weights, backbone.pipe, folder, name)]
    with backbone.changed(weights.deltas, {}):
        for part in sorted({_part_of(name) for name in weights.deltas}):
            module = copy.deepcopy(getattr(backbone.pipe, part)).half()
            if not all(p.isfinite().all() for p in module.parameters()):
                raise ValueError(f"{part}: the weights hold NaN or infinity; nothing was written")
            if part == "unet":
                module.register_to_config(_name_or_path="")  # where the base lay on this machine is nobody's business
                module.save_pretrained(folder / part)
            else:
                save_text_encoder(module, folder / part)
            _check_part(module, folder / part)
            paths += sorted((folder / part).iterdir())
    return paths


def _part_of(parameter: str) -> str:
    """Which part of a pipeline has a parameter (`Backbone.parameters`)."""
    part = parameter.partition(".")[0]
    return part if part in ("text_encoder", "text_encoder_2") else "unet"


def save_text_encoder(encoder: Any, folder: Path) -> None:
    """Write a CLIP text encoder as versions 4 and 5 of transformers both load it.

    5 writes `CLIPTextModel`'s weights without the prefix `text_model.`. 4 finds none of them by these names, and fills
    the model with random numbers; it only warns. 5 takes both.
    """
    encoder.save_pretrained(folder)
    tensors = {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": tensor
        for key, tensor in encoder.state_dict().items()
    }
    save_tensors(folder / "model.safetensors", tensors, PT)


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


# --- names ---------------------------------------------------------------------------------------------


def file_stem(name: str) -> str:
    """A batch's name as part of a file's name: the same, unless some system refuses it or takes it for a device; then
    with a hash. Raises: ValueError for a name that is no batch's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"name {name!r}: expected letters, digits, '.', '_' and '-', a letter or digit first")
    if len(name) <= LONGEST and not RESERVED.fullmatch(name):
        return name
    return f"{name[: LONGEST - 9].replace('.', '_')}_{_short_hash(name)}"


def token_files(tokens: Iterable[str], name: str) -> dict[str, str]:
    """File of each token, `<batch>-<token>.safetensors`: `<our-cat>` of the batch `pets` -> `pets-our_cat.safetensors`.

    Outside of diffusers a token goes by its file's name, wherever that stands in a prompt, and the files of all batches
    lie in one folder. Hence a name that is no word, that two batches do not share (the last `-` ends the batch's name),
    that every system takes, and without what programs read as syntax, like `<` and `AND`. Where nothing is left of a
    token, or two have the same left, a hash is appended.
    """
    plain = {token: re.sub(r"[^a-z0-9]+", "_", token.lower()).strip("_")[:LONGEST] for token in tokens}
    counts = Counter(plain.values())
    files = {}
    for token, word in plain.items():
        # `load_lora_weights(folder)` takes any file whose name ends like the LoRA's
        if not word or counts[word] > 1 or word.endswith(Path(LORA).stem):
            word = f"{word}_{_short_hash(token)}".lstrip("_")
        files[token] = f"{file_stem(name)}-{word}.safetensors"
    return files


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# --- tokens --------------------------------------------------------------------------------------------


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
    for index, pair in enumerate(_encoders(pipe)):
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
    path = folder / LORA
    config = {f"unet.{key}": value for key, value in _lora_config(merged).items()}
    save_tensors(
        path,
        {f"unet.{key}": tensor for key, tensor in _lora_tensors(merged).items()},
        PT | {LORA_ADAPTER_METADATA_KEY: json.dumps(config, sort_keys=True)},
    )
    _check_lora(merged, pipe, path)
    return path


def write_peft(merged: MergedModel, pipe: Pipeline, folder: Path) -> list[Path]:
    """Write the LoRA that `PeftModel.from_pretrained(pipe.unet, folder)` takes."""
    weights, described = folder / SAFETENSORS_WEIGHTS_NAME, folder / CONFIG_NAME
    save_tensors(weights, {f"base_model.model.{key}": tensor for key, tensor in _lora_tensors(merged).items()}, PT)
    config = {"peft_type": "LORA", "task_type": None, "inference_mode": True, "base_model_name_or_path": None}
    described.write_text(json.dumps(config | _lora_config(merged), indent=1))
    _check_peft(merged, pipe, folder)
    return [weights, described]


def write_kohya(merged: MergedModel, pipe: Pipeline, folder: Path, name: str) -> Path:
    """Write `comfyui/<name>.safetensors`, the LoRA that ComfyUI, the A1111 family and kohya's scripts read, in kohya's
    names (`lora_unet_…_to_k.lora_down.weight`), with the metadata by which A1111 shows it beside its base.
    """
    stem = file_stem(name)
    path = folder / COMFYUI / f"{stem}.safetensors"
    # one alpha for all layers: diffusers drops alphas that differ and then loads some layers at a wrong scale
    rank = max(left.shape[1] for left in merged.left.values())
    factors = _lora_tensors(merged)
    tensors = {}
    for layer in merged.layers:
        down, up = factors[f"{layer}.lora_A.weight"], factors[f"{layer}.lora_B.weight"]
        key = kohya_name(layer, pipe.unet.config)
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = (up.float() * (down.shape[0] / rank)).to(up.dtype)
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_tensors(path, tensors, PT | kohya_metadata(pipe, stem, rank))
    _check_lora(merged, pipe, path)
    return path


def kohya_name(layer: str, unet: Any) -> str:
    """A UNet's layer as kohya's scripts name it: diffusers' name, but of SDXL that of Stability's own code, which
    counts blocks and the layers in them in one: `down_blocks.1.attentions.0.…` -> `lora_unet_input_blocks_4_1_…`.

    unet: its configuration.
    """
    if unet.addition_embed_type == "text_time":
        each = unet.layers_per_block + 1
        layer = re.sub(
            r"^down_blocks\.(\d+)\.attentions\.(\d+)",
            lambda m: f"input_blocks.{each * int(m[1]) + int(m[2]) + 1}.1",
            layer,
        )
        layer = re.sub(r"^mid_block\.attentions\.0", "middle_block.1", layer)
        layer = re.sub(
            r"^up_blocks\.(\d+)\.attentions\.(\d+)",
            lambda m: f"output_blocks.{each * int(m[1]) + int(m[2])}.1",
            layer,
        )
    return f"lora_unet_{layer.replace('.', '_')}"


def kohya_metadata(pipe: Pipeline, name: str, rank: int) -> dict[str, str]:
    """What kohya's scripts write beside a LoRA's tensors, as far as programs act on it. Without `ss_base_model_version`
    and `ss_v2` A1111 takes every file for one of Stable Diffusion 1 and hides it beside other bases."""
    is_xl = pipe.unet.config.addition_embed_type == "text_time"
    is_v2 = not is_xl and pipe.unet.config.cross_attention_dim == 1024
    is_v = pipe.scheduler.config.prediction_type == "v_prediction"
    if is_xl:
        version, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    elif is_v2:
        version, architecture = (
            ("sd_v2_v", "stable-diffusion-v2-768-v") if is_v else ("sd_v2", "stable-diffusion-v2-512")
        )
    else:
        version, architecture = "sd_v1_v" if is_v else "sd_v1", "stable-diffusion-v1"
    return {
        "ss_base_model_version": version,
        "ss_v2": str(is_v2),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if is_xl else "diffusers",
        "modelspec.title": name,
        "modelspec.prediction_type": "v" if is_v else "epsilon",
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
    _check_arrived(merged, arrived, path, "diffusers")


def _check_peft(merged: MergedModel, pipe: Pipeline, folder: Path) -> None:
    arrived = {}
    trainable = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    model = PeftModel.from_pretrained(pipe.unet, folder)
    try:
        for layer in merged.layers:
            module = pipe.unet.get_submodule(layer)
            if getattr(module, "active_adapters", ()):
                arrived[layer] = module.get_delta_weight(module.active_adapters[0]).detach().double().cpu()
    finally:
        model.unload()
        for parameter, was in zip(pipe.unet.parameters(), trainable, strict=True):
            parameter.requires_grad_(was)
    _check_arrived(merged, arrived, folder / SAFETENSORS_WEIGHTS_NAME, "peft")


def _check_arrived(merged: MergedModel, arrived: dict[str, torch.Tensor], path: Path, by: str) -> None:
    for layer, delta in merged.deltas.items():
        if layer not in arrived:
            raise RuntimeError(f"{path}: {layer} did not arrive when {by} loaded the file")
        # the loader multiplies in the base's precision
        if (arrived[layer] - delta.double().cpu()).norm() > 1e-2 * delta.double().norm() + 1e-8:
            raise RuntimeError(f"{path}: {layer} arrived changed when {by} loaded the file (a wrong scale?)")
