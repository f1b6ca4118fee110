"""The frozen text-to-image model: its text K/V layers, its text features, and new tokens."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import nn

from training.base import base_digest, check_base
from training.methods.method import UNetPart
from training.parts import short_name, text_kv_layers, unet_parameters
from training.tokens import Words, add_tokens, own_row, single_id


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
    """An embedding table with trainable rows for new ids; the table itself stays as it is.

    Only the new rows are a parameter: with the whole table in the optimizer, weight decay moves every word and its
    state costs two more tables (a fault of diffusers' train_custom_diffusion.py).
    """

    places: torch.Tensor
    """Id -> row; -1 for what the table has."""

    def __init__(self, table: nn.Embedding, rows: torch.Tensor, ids: Sequence[int]) -> None:
        """rows: (k, width), of the tokens that have the k `ids`: those the tokenizer gave, wherever the table ends."""
        super().__init__()
        self.table = table
        self.rows = nn.Parameter(rows.clone())
        places = torch.full((max(table.num_embeddings, max(ids) + 1),), -1)
        places[list(ids)] = torch.arange(len(ids))
        self.register_buffer("places", places.to(rows.device), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        place = self.places[ids]
        old = self.table(ids.masked_fill(place >= 0, 0))
        rows = self.rows[place.clamp(min=0)].to(old.dtype)
        return torch.where((place >= 0)[..., None], rows, old)


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

    @property
    def words(self) -> Words:
        """What the tokenizers make of words, with the tokens that they know by now."""
        return Words(tuple(self.tokenizers))

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
        """Text features as the pipeline's own `encode_prompt` makes them; with gradients to new token rows. Of captions
        that are too long the end is cut off: those of the web are what they are, and `Words.check_fits` is for ours."""
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
        """Teach the tokenizers new words, each starting from the embedding of a word of one token, or from a row of its
        own (`own_row`) where it is a number.

        Returns: the trainable rows, one module per text encoder, in the order of `tokens`.
        Raises: ValueError for a token that is no new word (`Words.check_new`), or an initialiser of several tokens.
        """
        words = self.words
        for token in tokens:
            words.check_new(token)
        rows = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            table = encoder.get_input_embeddings().weight.detach()
            starts = [table[single_id(tokenizer, i)] if isinstance(i, str) else own_row(table, i) for i in initializers]
            rows.append(torch.stack(starts))
        return self._add_rows(tokens, rows)

    def _add_rows(self, tokens: Sequence[str], rows: Sequence[torch.Tensor]) -> list[TokenRows]:
        modules = []
        for tokenizer, encoder, own in zip(self.tokenizers, self.text_encoders, rows, strict=True):
            ids = add_tokens(tokenizer, tokens)
            modules.append(TokenRows(encoder.get_input_embeddings(), own.float().to(self.device), ids))
            encoder.set_input_embeddings(modules[-1])
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
                self.copy_tokenizers()
                self._add_rows(list(tokens), [torch.stack(rows) for rows in zip(*tokens.values(), strict=True)])
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


def load_backbone(
    path: str | Path, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Backbone:
    """Load a diffusers model from a folder or a hub name, safetensors only, without its safety checker: that puts black
    images in the place of those it flags, which would be measured and trained on.

    Raises: ValueError as `check_base`.
    """
    base = check_base(path)
    pipe = base.pipeline.from_pretrained(
        base.folder,
        dtype=dtype,
        variant=base.variant or None,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        **base.left_out,
        # of copies: whoever has the pipeline may teach them words
        **dict(zip(("tokenizer", "tokenizer_2"), copy.deepcopy(base.words.tokenizers), strict=False)),
    )
    pipe.set_progress_bar_config(disable=True)
    return Backbone(pipe.to(device or default_device()), base_digest(path))


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
