"""What is known of a base model without loading its weights: what it is, and whether it can be taught."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTokenizer

from retrieval.regular import open_regular
from training.objective import PREDICTIONS
from training.parts import text_kv_layers
from training.tokens import Words

PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
"""Of a pipeline, what is used; without those of two encoders in models that have one."""
VARIANTS = ("fp16", "bf16", "non_ema")
"""Of weights, in their files' names; read where the plain ones are not there, in this order."""
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that are neither fetched nor loaded."""
CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", ""),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
"""Part -> library, and how the names of the classes begin that can be worked with. Never a base's own code."""
FORM = "only models of the Stable Diffusion 1.x, 2.x and XL form can be taught"
ENCODERS = ("clip_text_model", "clip")
"""Kinds of text encoders, as their configurations say them."""
MOST_LAYERS = 256
"""Of a kind in one place: SDXL's UNet has 10, its larger text encoder 32."""
MOST_LATENTS = 1024
"""Side of a picture as the UNet reads it; SDXL's is 128."""


@dataclass(frozen=True)
class Base:
    """A base model that can be taught.

    folder: where it lies here. pipeline: the class of its form, whatever it was saved as.
    resolution: side of its images, pixels. text_width: of its text features. words: its tokenizers.
    timesteps: of its noise schedule, the most steps that a drawing can have.
    weights: part -> the files that are loaded. variant: of `VARIANTS`, or empty for the plain files.
    left_out: what to tell diffusers so that the parts in `LEFT_OUT` are not loaded.
    """

    folder: Path
    pipeline: type[DiffusionPipeline]
    resolution: int
    text_width: int
    words: Words
    timesteps: int
    weights: Mapping[str, tuple[Path, ...]]
    variant: str
    left_out: Mapping[str, Any]

    @property
    def has_safety_checker(self) -> bool:
        return "safety_checker" in self.left_out


def check_base(path: str | Path) -> Base:
    """Look at a base model's configurations, tokenizers and weight files: of these no more than their headers.

    path: a diffusers folder or hub name.
    Raises: ValueError naming what is missing, broken or of another kind, and what to do.
    """
    folder = local_model(path)
    try:
        return _checked(folder, _stamps(folder))
    except ValueError as error:
        raise ValueError(f"base {str(path)!r}: {error}") from None


@functools.lru_cache(maxsize=8)
def _checked(folder: Path, _: tuple[tuple[str, int, int], ...]) -> Base:
    index = _json(folder / "model_index.json")
    two = bool(_class_of(index, "text_encoder_2"))
    parts = [part for part in PARTS if two or not part.endswith("_2")]
    _check_kinds(index, parts)
    configs = {part: _json(folder / part / "config.json") for part in parts if _is_model(part)}
    for part, described in configs.items():
        _check_config(part, described)
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    if (predicts := scheduler.get("prediction_type", "epsilon")) not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise ValueError(f"scheduler/scheduler_config.json: prediction_type is {predicts!r}, expected one of {known}")
    unet = _unet(configs["unet"])
    vae = configs["vae"]
    _check_channels(unet.config.in_channels, vae.get("latent_channels", 4))
    encoders = {part: CLIPTextConfig.from_dict(config) for part, config in configs.items() if "encoder" in part}
    width = sum(encoder.hidden_size for encoder in encoders.values())
    if unet.config.cross_attention_dim != width:
        raise ValueError(
            f"the UNet reads text features {unet.config.cross_attention_dim} wide, but {' and '.join(encoders)} make "
            f"{width}: parts of different models?"
        )
    variant = _variant_of(folder, list(configs))
    weights = {part: _weights(folder, part, variant) for part in configs}
    shapes = {part: _shapes(files) for part, files in weights.items()}
    for name, tensor in unet.state_dict().items():
        if shapes["unet"].get(name) != list(tensor.shape):
            found = f"is {shapes['unet'][name]}" if name in shapes["unet"] else "is missing"
            raise ValueError(f"unet/: {name} {found} in the weights, expected {list(tensor.shape)} by config.json")
    return Base(
        folder,
        StableDiffusionXLPipeline if two else StableDiffusionPipeline,
        unet.config.sample_size * 2 ** (len(vae["block_out_channels"]) - 1),
        width,
        Words(tuple(_tokenizer(folder / part.replace("text_encoder", "tokenizer"), c) for part, c in encoders.items())),
        scheduler.get("num_train_timesteps", 1000),
        weights,
        variant,
        dict.fromkeys((part for part in LEFT_OUT if _class_of(index, part)), None)
        | ({"requires_safety_checker": False} if index.get("requires_safety_checker") else {}),
    )


def _class_of(index: Mapping[str, Any], part: str) -> str:
    """What a pipeline has as a part; empty for nothing."""
    described = index.get(part)
    if not isinstance(described, list) or len(described) != 2 or not isinstance(described[1], str):
        return ""
    return described[1]


def _is_model(part: str) -> bool:
    return not part.startswith(("scheduler", "tokenizer"))


def _check_kinds(index: Mapping[str, Any], parts: list[str]) -> None:
    if not str(index.get("_class_name")).startswith("StableDiffusion"):
        raise ValueError(f"model_index.json: _class_name is {index.get('_class_name')!r}: {FORM}")
    for part in sorted(parts, key=lambda part: list(CLASSES).index(part.removesuffix("_2"))):
        library, name = CLASSES[part.removesuffix("_2")]
        if not (found := _class_of(index, part)):
            raise ValueError(f"model_index.json names no {part}: a model without it cannot be taught")
        if index[part][0] != library or not found.startswith(name):
            raise ValueError(
                f"model_index.json: {part} is {'.'.join(map(str, index[part]))}, expected {library}.{name or '…'}: "
                f"{FORM}"
            )


def _check_config(part: str, config: dict[str, Any]) -> None:
    """Raises: ValueError for a text encoder of another kind, and sizes that no model has: making it would not end."""
    kind = config.get("model_type", ENCODERS[0])
    if part.startswith("text_encoder") and kind not in ENCODERS:
        raise ValueError(f"{part}/config.json: model_type is {kind!r}, expected {ENCODERS[0]!r}: {FORM}")
    for key, value in config.items():
        most = max(_numbers(value), default=0) if key.endswith(("layers_per_block", "num_hidden_layers")) else 0
        if most > MOST_LAYERS:
            raise ValueError(f"{part}/config.json: {key} is {most}, expected at most {MOST_LAYERS}")
    if part == "unet":
        side = config.get("sample_size")
        if type(side) is not int or not 1 <= side <= MOST_LATENTS:
            raise ValueError(
                f"unet/config.json: sample_size is {side!r}, expected a whole number from 1 to {MOST_LATENTS}"
            )


def _numbers(value: Any) -> Iterator[float]:
    """All in lists of lists."""
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int | float):
        yield value


def _unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """With shapes only. Raises: ValueError where there is no text cross-attention."""
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
    except Exception as error:  # of many kinds, for what people write there
        raise ValueError(f"unet/config.json: makes no UNet: {error}") from None
    text_kv_layers(unet)
    return unet


def _check_channels(takes: int, makes: int) -> None:
    if takes != makes:
        raise ValueError(
            f"unet/config.json: in_channels is {takes}, but the autoencoder makes {makes}: a model for inpainting or "
            "another that takes a picture beside the noise; name the text-to-image model that it was made from"
        )


def _tokenizer(folder: Path, encoder: CLIPTextConfig) -> CLIPTokenizer:
    """Of a text encoder, which says how long a text may be, and for how many words it has rows."""
    files = {file.name: file for file in folder.glob("*")}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= set(files):
        raise ValueError(f"{folder.name}/: neither tokenizer.json nor vocab.json and merges.txt there")
    for file in files.values():
        _check_whole(file)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises its own
        raise ValueError(f"{folder.name}/: cannot be read: {error}") from None
    if len(tokenizer) > encoder.vocab_size:
        raise ValueError(
            f"{folder.name}/: knows {len(tokenizer)} words, but its text encoder has rows for {encoder.vocab_size}"
        )
    # some tokenizers have no length of their own
    tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.max_position_embeddings)
    return tokenizer


# --- weights -------------------------------------------------------------------------------------------


def _variant_of(folder: Path, parts: list[str]) -> str:
    """Empty where every part has plain weights, else the first variant that those without have."""
    without = [part for part in parts if not _weights(folder, part)]
    for variant in ("", *VARIANTS):
        if all(_weights(folder, part, variant) for part in without):
            return variant
    part = without[0]
    pickles = sorted(f.name for f in (folder / part).iterdir() if f.suffix in (".bin", ".ckpt", ".pt"))
    if pickles:
        raise ValueError(
            f"{part}/: has {', '.join(pickles)}, but no safetensors, and only these are read: the others can run code. "
            "If you trust whoever made it, let diffusers write it anew: "
            "DiffusionPipeline.from_pretrained(BASE).save_pretrained(FOLDER)"
        )
    raise ValueError(f"{part}/: no weights there (a .safetensors file)")


def _weights(folder: Path, part: str, variant: str = "") -> tuple[Path, ...]:
    """The files that diffusers loads as a part's weights: of a variant, where it has that, else the plain ones."""
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    for dot in dict.fromkeys((f".{variant}" if variant else "", "")):
        if (whole := folder / part / f"{stem}{dot}.safetensors").is_file():
            return (whole,)
        if (index := folder / part / f"{stem}.safetensors.index{dot}.json").is_file():
            return tuple(folder / part / name for name in sorted(set(_json(index)["weight_map"].values())))
    return ()


def _shapes(files: Sequence[Path]) -> dict[str, list[int]]:
    """Of all tensors in them, by their names, from the headers."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        place = f"{file.parent.name}/{file.name}"
        if not file.is_file():
            raise ValueError(f"{place}: missing, though the index of the weights names it")
        _check_whole(file)
        try:
            with safe_open(file, framework="pt") as weights:
                shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 (a file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{place}: not a whole safetensors file: {error}") from None
    return shapes


def _check_whole(file: Path) -> None:
    """Raises: ValueError for what Git LFS leaves in a file's place."""
    if file.is_file():
        with file.open("rb") as f:
            if f.read(42).startswith(b"version https://git-lfs.github.com/spec/"):
                raise ValueError(
                    f"{file.parent.name}/{file.name}: a pointer of Git LFS, not the file; run `git lfs pull` there"
                )


def _json(file: Path) -> dict[str, Any]:
    place = f"{file.parent.name}/{file.name}" if file.name != "model_index.json" else file.name
    _check_whole(file)
    try:
        with open_regular(file) as f:
            content = json.loads(f.read().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{place}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{place}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{place}: expected a mapping, found {type(content).__name__}")
    return content


# --- identity ------------------------------------------------------------------------------------------


def base_digest(path: str | Path) -> str:
    """Hash of a base model's files (weights, configs, tokenizer): a base is what it holds, not what it is called.

    Only the parts that are used, and of weights in several precisions only those that are loaded: the others come and
    go in a hub's cache.
    Raises: ValueError as `check_base`.
    """
    base = check_base(path)
    return _digest_of(base.folder, _stamps(base.folder), base.variant)


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of all files that a base may be made of."""
    files = [folder / "model_index.json"]
    for part in PARTS:
        files += sorted(p for p in (folder / part).glob("*") if p.is_file())
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)


@functools.lru_cache(maxsize=8)
def _digest_of(folder: Path, stamps: tuple[tuple[str, int, int], ...], variant: str) -> str:
    digest = hashlib.sha256()
    for file in (Path(name) for name, _, _ in stamps):
        if file.suffix not in (".json", ".txt", ".safetensors"):
            continue
        if variant and file.suffix == ".safetensors":
            unused = file not in _weights(folder, file.parent.name, variant)
        else:
            unused = any(f".{other}" in file.name for other in VARIANTS)
        if unused:
            continue
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


def local_model(path: str | Path) -> Path:
    """Folder of a diffusers model: the path itself, or the hub's copy in the local cache, downloaded if need be.

    Raises: ValueError when there is no such model.
    """
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists() or str(path).startswith((".", "/")):
        raise ValueError(f"base {str(path)!r}: no diffusers model there (a folder with model_index.json is one)")
    return _from_hub(str(path))


def _from_hub(name: str) -> Path:
    problem: Exception | None = None
    for variant in (None, *VARIANTS):
        try:
            left_out: dict[str, Any] = dict.fromkeys(LEFT_OUT)
            return Path(DiffusionPipeline.download(name, use_safetensors=True, variant=variant, **left_out))
        except Exception as error:  # the hub client raises a dozen kinds
            problem = problem or error
            if "safetensors" not in str(error):  # not for want of plain files
                break
    raise ValueError(f"base {name!r}: neither a folder nor to be had from the hub: {problem}") from None
