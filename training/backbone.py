"""The frozen text-to-image model: its text K/V layers, its text features, and new tokens."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import AutoTokenizer

from training.methods.method import RARE_WORDS, UNetPart


@dataclass(frozen=True)
class TextFeatures:
    """Condition of a batch of captions.

    hidden: (B, n, d), what cross-attention reads.
    pooled: (B, p) of models that want it beside (SDXL), else None.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None

    def rows(self, index: Sequence[int] | torch.Tensor) -> TextFeatures:
        index = torch.as_tensor(index)
        return TextFeatures(self.hidden[index], None if self.pooled is None else self.pooled[index])

    def to(self, other: TextFeatures) -> TextFeatures:
        """On the device and in the dtype of others."""
        return TextFeatures(self.hidden.to(other.hidden), None if self.pooled is None else self.pooled.to(other.hidden))

    @staticmethod
    def cat(parts: Sequence[TextFeatures]) -> TextFeatures:
        pooled = [p.pooled for p in parts if p.pooled is not None]
        return TextFeatures(torch.cat([p.hidden for p in parts]), torch.cat(pooled) if pooled else None)


class TokenRows(nn.Module):
    """An embedding table with trainable rows behind its end; the table itself stays as it is.

    Only the new rows are a parameter: with the whole table in the optimizer, weight decay moves every word and its
    state costs two more tables (a fault of diffusers' train_custom_diffusion.py).
    """

    def __init__(self, table: nn.Embedding, rows: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        self.first = table.num_embeddings
        self.rows = nn.Parameter(rows.clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        new = ids >= self.first
        old = self.table(ids.masked_fill(new, 0))
        # clamped first: out-of-range indices are masked afterwards
        rows = self.rows[(ids - self.first).clamp(min=0)].to(old.dtype)
        return torch.where(new[..., None], rows, old)


class Backbone:
    """A diffusers text-to-image pipeline, frozen, with its parts found by what they are.

    pipe: the loaded pipeline (Stable Diffusion 1.x, 2.x or XL form).
    layers: name -> Linear, the K and V projections of every cross-attention layer that reads text.
    parameters: name -> parameter, of the UNet (`conv_in.bias`) and the text encoders (`text_encoder.….bias`,
        `text_encoder_2.…`). The name of a layer stands for its weight: `….attn2.to_k` in `layers` and here.
    """

    def __init__(self, pipe: DiffusionPipeline, digest: str) -> None:
        self.pipe, self.digest = pipe, digest
        self.unet, self.vae = pipe.unet, pipe.vae
        # of its own: the pipeline's scheduler is set to the steps of the last drawing, and may scale noise otherwise
        self.noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.text_encoders = [e for e in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if e is not None]
        self.tokenizers = [t for t in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)) if t is not None]
        for module in (self.unet, self.vae, *self.text_encoders):
            module.requires_grad_(False).eval()
        self.unet.to(memory_format=torch.channels_last)  # a step a fifth faster on a CPU, as on tensor cores
        self.layers = text_kv_layers(self.unet)
        self.dtype: torch.dtype = self.unet.dtype  # of what is frozen; what trains is float32
        modules = {"": self.unet, "text_encoder.": pipe.text_encoder}
        if len(self.text_encoders) == 2:
            modules["text_encoder_2."] = self.text_encoders[1]
        self._places = {
            prefix + short_name(name): (module, name)
            for prefix, module in modules.items()
            for name, _ in module.named_parameters()
        }
        self.parameters = {name: module.get_parameter(full) for name, (module, full) in self._places.items()}

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def place(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds a parameter, and what it calls it."""
        module, full = self._places[name]
        owner, _, attribute = full.rpartition(".")
        return module.get_submodule(owner), attribute

    def trained(self, unet: UNetPart, *, text_encoder: bool) -> list[str]:
        """Names of the parameters that a method trains. Of the text encoders all but the embedding tables: a step sees
        a dozen of their rows, and Adam's weight decay would move the others too."""
        names = unet_parameters(self.unet, unet)
        if text_encoder:
            tables = {id(e.weight) for t in self.text_encoders for e in t.modules() if isinstance(e, nn.Embedding)}
            names += [
                name
                for name, parameter in self.parameters.items()
                if name.startswith(("text_encoder.", "text_encoder_2.")) and id(parameter) not in tables
            ]
        return names

    @property
    def factor(self) -> int:
        """Pixels a latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """Side of the images the model was trained on, pixels."""
        return self.unet.config.sample_size * self.factor

    # --- images ---

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(B, 3, s, s) in [-1, 1] -> scaled latents (B, c, s/f, s/f), sampled from the posterior."""
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        return (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    # --- text ---

    def encode_text(self, captions: Sequence[str]) -> TextFeatures:
        """Text features as the pipeline's own `encode_prompt` makes them; with gradients to new token rows."""
        if len(self.text_encoders) == 1:
            return TextFeatures(self.text_encoders[0](self._ids(self.tokenizers[0], captions))[0])
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            output = encoder(self._ids(tokenizer, captions), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = output[0]  # of the last encoder, the one with a projection
        return TextFeatures(torch.cat(hidden, -1), pooled)

    def _ids(self, tokenizer, captions: Sequence[str]) -> torch.Tensor:
        ids = tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        return ids.to(self.device)

    def num_tokens(self, caption: str) -> int:
        """Positions of a caption that carry it: words and end-of-text, without begin-of-text and padding."""
        tokenizer = self.tokenizers[0]
        return len(tokenizer(caption, truncation=True, max_length=tokenizer.model_max_length).input_ids) - 1

    def add_tokens(self, tokens: Sequence[str], initializers: Sequence[str | int]) -> list[TokenRows]:
        """Teach the tokenizers new words, each starting from the embedding of a word of one token; a number takes
        that one of `RARE_WORDS`, in turn.

        Returns: the trainable rows, one module per text encoder, in the order of `tokens`.
        Raises: ValueError for a token the tokenizer already knows, or an initialiser of several tokens.
        """
        modules = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            table = encoder.get_input_embeddings()
            rows = []
            for token, word in zip(tokens, initializers, strict=True):
                _check_new(tokenizer, token)
                rows.append(table.weight[_single_id(tokenizer, word)].detach())
            if tokenizer.add_tokens(list(tokens)) != len(tokens):
                raise ValueError(f"tokens {list(tokens)}: the tokenizer took only some of them; choose others")
            module = TokenRows(table, torch.stack(rows).float())
            encoder.set_input_embeddings(module)
            modules.append(module)
        return modules

    # --- denoising ---

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, text: TextFeatures) -> torch.Tensor:
        """The model's prediction (noise, or velocity for v-prediction models), shape of `latents`."""
        added = None
        if text.pooled is not None:
            side = latents.shape[-1] * self.factor
            time_ids = torch.tensor([[side, side, 0, 0, side, side]], device=latents.device, dtype=text.pooled.dtype)
            added = {"text_embeds": text.pooled, "time_ids": time_ids.expand(len(latents), -1)}
        return self.unet(latents, timesteps, text.hidden, added_cond_kwargs=added).sample

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """Inside the block the UNet's transformer blocks are compiled, each shape of them once when it is first called:
        half a minute where all of the UNet takes many (diffusers' regional compilation)."""
        self.unet.compile_repeated_blocks()
        try:
            yield
        finally:
            for module in self.unet.modules():
                module._compiled_call_impl = None

    @contextlib.contextmanager
    def changed(self, deltas: dict[str, torch.Tensor], tokens: dict[str, list[torch.Tensor]]) -> Iterator[None]:
        """Inside the block the parameters hold W_0 + delta and the tokenizers know the tokens.

        Args:
            deltas: name in `parameters` -> change of that shape; all of `layers` are among them where there are any.
            tokens: new token -> its rows, one per text encoder.
        Raises: ValueError when the change names parameters this model has not, has other shapes, or leaves layers out.
        """
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        odd = sorted(n for n in deltas if shapes.get(n) != deltas[n].shape)
        odd += sorted(set(self.layers) - set(deltas)) if deltas else []
        if odd:
            raise ValueError(f"weights do not fit the base model: {len(odd)} layers differ, first {odd[0]!r}")
        kept = {name: self.parameters[name].data for name in deltas}
        tables = [encoder.get_input_embeddings() for encoder in self.text_encoders]
        tokenizers = self.pipe.tokenizer, getattr(self.pipe, "tokenizer_2", None)
        try:
            for name, delta in deltas.items():
                value = kept[name].double() + delta.to(kept[name].device).double()
                self.parameters[name].data = value.to(kept[name].dtype)
            if tokens:
                self._load_tokens(tokens)
            yield
        finally:
            for name, weight in kept.items():
                self.parameters[name].data = weight
            for encoder, table in zip(self.text_encoders, tables, strict=True):
                encoder.set_input_embeddings(table)
            self.pipe.tokenizer = tokenizers[0]
            if tokenizers[1] is not None:
                self.pipe.tokenizer_2 = tokenizers[1]
            self.tokenizers = [t for t in tokenizers if t is not None]

    def copy_tokenizers(self) -> None:
        """Put copies in the tokenizers' place: a tokenizer cannot forget a word. `changed` puts the originals back."""
        self.tokenizers = [copy.deepcopy(t) for t in self.tokenizers]
        self.pipe.tokenizer = self.tokenizers[0]
        if len(self.tokenizers) == 2:
            self.pipe.tokenizer_2 = self.tokenizers[1]

    def _load_tokens(self, tokens: dict[str, list[torch.Tensor]]) -> None:
        self.copy_tokenizers()
        for i, (tokenizer, encoder) in enumerate(zip(self.tokenizers, self.text_encoders, strict=True)):
            if tokenizer.add_tokens(list(tokens)) != len(tokens):
                raise ValueError(f"tokens {list(tokens)}: the base model's tokenizer knows some already")
            rows = torch.stack([rows[i].float() for rows in tokens.values()])
            encoder.set_input_embeddings(TokenRows(encoder.get_input_embeddings(), rows.to(self.device)))


@dataclass(frozen=True)
class Base:
    """What is known of a base model without its weights: side of its images, pixels; width of its text features;
    its tokenizers, one or two."""

    resolution: int
    text_width: int
    tokenizers: tuple[Any, ...]

    def check_new(self, token: str, initializer: str | int) -> None:
        """Raises: ValueError when a token cannot be taught: it is known, or its initialiser is not one token."""
        for tokenizer in self.tokenizers:
            _check_new(tokenizer, token)
            _single_id(tokenizer, initializer)

    def check_rare(self, word: str) -> None:
        """Raises: ValueError when a word is not known as one token."""
        for tokenizer in self.tokenizers:
            if len(pieces := tokenizer.tokenize(word)) != 1:
                raise ValueError(
                    f"token {word!r}: this method needs a word that the base model's tokenizer has as one token, this "
                    f"one is {len(pieces)}: {pieces}; choose another, like {RARE_WORDS[0]!r}"
                )


def check_base(path: str | Path) -> Base:
    """Look at a base model's configurations and tokenizers, without its weights.

    Raises: ValueError when it has no text cross-attention.
    """
    folder = local_model(path)
    try:
        unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    except FileNotFoundError as error:
        raise ValueError(f"base {str(path)!r}: no UNet with text cross-attention in it ({error.filename})") from None
    with torch.device("meta"):
        text_kv_layers(UNet2DConditionModel.from_config(unet))
    places = [folder / "tokenizer", *folder.glob("tokenizer_2")]
    return Base(
        unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1),
        unet["cross_attention_dim"],
        tuple(AutoTokenizer.from_pretrained(place) for place in places),
    )


def _check_new(tokenizer, token: str) -> None:
    if token in tokenizer.get_vocab() or token + "</w>" in tokenizer.get_vocab():
        raise ValueError(f"token {token!r}: the base model's tokenizer knows it already; choose another")


def _single_id(tokenizer, word: str | int) -> int:
    """Id of a word of one token, or of a piece of a word: the authors' `ktn` is one."""
    if isinstance(word, int):
        known = [rare for rare in RARE_WORDS if _ids_of(tokenizer, rare) is not None]
        if not known:
            raise ValueError(f"none of {RARE_WORDS} is one token for this base model; give each concept an initializer")
        word = known[word % len(known)]
    found = _ids_of(tokenizer, word)
    if found is None:
        pieces = tokenizer.tokenize(word)
        raise ValueError(f"initializer {word!r}: must be one token for this base model, is {len(pieces)}: {pieces}")
    return found


def _ids_of(tokenizer, word: str) -> int | None:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return ids[0] if len(ids) == 1 else tokenizer.get_vocab().get(word)


def text_kv_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """K and V projections that read text, by module name, in the order of the model.

    Raises: ValueError when the model has none.
    """
    layers = {}
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            layers[f"{name}.to_k"], layers[f"{name}.to_v"] = module.to_k, module.to_v
    if not layers:
        raise ValueError(f"the base model ({type(unet).__name__}) has no text cross-attention: nothing to train")
    return layers


def unet_parameters(unet: nn.Module, part: UNetPart) -> list[str]:
    """Names of the parameters of a part of a UNet, as in `Backbone.parameters`; those of `text_kv` are the layers'."""
    if part == "none":
        return []
    if part == "text_kv":
        return list(text_kv_layers(unet))
    names = [short_name(name) for name, _ in unet.named_parameters()]
    if part == "all":
        return names
    found = [n for n, m in unet.named_modules() if isinstance(m, Attention) and m.is_cross_attention]
    return [name for name in names if name.startswith(tuple(f"{n}." for n in found))]


def short_name(parameter: str) -> str:
    """`conv_in.weight` -> `conv_in`: a layer's name stands for its weight."""
    return parameter.removesuffix(".weight")


def base_digest(path: str | Path) -> str:
    """Hash of a base model's files (weights, configs, tokenizer): a base is what it holds, not what it is called.

    Only the parts that are used, and not their variants in other precisions, which come and go in a hub's cache.
    Raises: ValueError when there is no such model.
    """
    folder = local_model(path)
    files = [folder / "model_index.json"]
    for part in ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae"):
        found = sorted(p for p in (folder / part).glob("*") if p.suffix in (".json", ".txt", ".safetensors"))
        files += [p for p in found if not any(f".{variant}" in p.name for variant in ("fp16", "bf16", "non_ema"))]
    stamps = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return _digest_of(str(folder), stamps)


@functools.lru_cache(maxsize=8)
def _digest_of(folder: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in stamps:
        digest.update(Path(name).relative_to(folder).as_posix().encode())
        with open(name, "rb") as f:
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
    try:
        return Path(DiffusionPipeline.download(str(path), use_safetensors=True))
    except Exception as error:  # the hub client raises a dozen kinds
        raise ValueError(f"base {str(path)!r}: neither a folder nor to be had from the hub: {error}") from None


def load_backbone(
    path: str | Path, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Backbone:
    """Load a diffusers model from a folder or a hub name, safetensors only.

    Raises: ValueError when it is missing, has no UNet, or no text cross-attention.
    """
    folder = local_model(path)
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    if getattr(pipe, "unet", None) is None or getattr(pipe, "text_encoder", None) is None:
        raise ValueError(f"base {str(path)!r}: {type(pipe).__name__} has no UNet with a text encoder: nothing to train")
    pipe.set_progress_bar_config(disable=True)
    return Backbone(pipe.to(device or default_device()), base_digest(path))


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
