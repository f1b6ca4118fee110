"""Make the miniature base model and its judges from nothing:

    python -m pipeline.miniature.pretrain --out pretraining            # all stages, CPU or GPU
    python -m pipeline.miniature.pretrain --out pretraining --stage unet --steps 60000

Stages: corpus, autoencoder, clip, identity, latents, decoder, vision, unet, export. Each keeps its state in `--out`: a
run that is stopped goes on where it was, and `--steps` larger than before trains further. `export` writes the shipped
files (float16) from the states, at any time, also while a stage runs; `adopt` is its inverse: it makes states of the
shipped weights, for training them further on another machine. `preview` draws what the autoencoder makes of some
scenes.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipeline.miniature import world
from pipeline.miniature.identity import IdentityNet
from pipeline.release.formats.whole import save_text_encoder
from training.checkpoint import load_tensors, optimizer_tensors, restore_optimizer, save_tensors

PACKAGE = Path(__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LATENT_CHANNELS = 32
"""On an 8 x 8 grid: 6 numbers of an image become 1. With 16 the autoencoder stays blurred for hours."""
CONTEXT_LENGTH, TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 32, 192, 4, 4
STAGES = ("corpus", "autoencoder", "clip", "identity", "latents", "decoder", "vision", "unet", "export")
DEFAULT_STEPS = {
    "autoencoder": 20_000,
    "clip": 1_500,
    "identity": 2_500,
    "decoder": 2_000,
    "vision": 1_000,
    "unet": 60_000,
}
NUM_SCENES = 60_000


# --- the corpus ----------------------------------------------------------------------------------------


def _render_block(seed: int, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    images = np.empty((count, world.SIZE, world.SIZE, 3), np.uint8)
    coverage = np.empty((count, world.SIZE, world.SIZE), np.uint8)
    captions = []
    for i in range(count):
        scene = world.sample_scene(rng)
        image, mask = world.render(scene)
        images[i], coverage[i] = np.asarray(image), (mask * 255).astype(np.uint8)
        captions.append(scene.caption)
    return images, coverage, captions


def make_corpus(out: Path) -> None:
    if (out / "captions.json").exists():
        return
    block = 1000
    images = np.lib.format.open_memmap(out / "images.npy", "w+", np.uint8, (NUM_SCENES, 64, 64, 3))
    coverage = np.lib.format.open_memmap(out / "coverage.npy", "w+", np.uint8, (NUM_SCENES, 64, 64))
    captions: list[str] = []
    with ProcessPoolExecutor() as pool:
        seeds = range(NUM_SCENES // block)
        for k, (i, c, t) in enumerate(pool.map(_render_block, seeds, [block] * len(seeds))):
            images[k * block : (k + 1) * block], coverage[k * block : (k + 1) * block] = i, c
            captions += t
    (out / "captions.json").write_text(json.dumps(captions))


# --- one loop for all stages ---------------------------------------------------------------------------


def fit(
    name: str,
    module: nn.Module,
    loss: Callable[[int], torch.Tensor],
    *,
    out: Path,
    steps: int,
    lr: float,
    ema: nn.Module | None = None,
    save_every: int = 250,
) -> None:
    """AdamW with warm-up, clipping, an average of the weights, and a checkpoint `out/<name>.safetensors`.

    `loss(step)` draws its data from the step number alone, so resumed = uninterrupted.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    path, first = out / f"{name}.safetensors", 0
    if path.exists():
        tensors, meta = load_tensors(path)
        module.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        if ema is not None:
            ema.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
        restore_optimizer(optimizer, tensors)
        first = int(meta["step"])
        for group in optimizer.param_groups:
            group["lr"] = lr

    def save(step: int) -> None:
        tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
        if ema is not None:
            tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
        save_tensors(path, tensors | optimizer_tensors(optimizer), {"step": str(step)})

    module.train()
    start, recent = time.time(), []
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * np.cos(np.pi * step / steps) if ema is None else 1)
            )
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if ema is not None:
            decay = min(0.9995, (step + 1) / (step + 20))
            with torch.no_grad():
                for averaged, current in zip(ema.state_dict().values(), module.state_dict().values(), strict=True):
                    if averaged.is_floating_point():
                        averaged.lerp_(current, 1 - decay)
                    else:
                        averaged.copy_(current)
        recent.append(value.item())
        if (step + 1) % 100 == 0:
            rate = (step + 1 - first) / (time.time() - start)
            print(f"{name} step {step + 1}/{steps} loss {np.mean(recent):.4f} {rate:.2f} steps/s", flush=True)
            recent = []
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save(step + 1)


def averaged(name: str, module: nn.Module, out: Path) -> Any:
    """The module with the weights that the stage ended with (the averaged ones where it keeps an average)."""
    tensors, _ = load_tensors(out / f"{name}.safetensors")
    prefix = "ema." if any(k.startswith("ema.") for k in tensors) else "model."
    module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    return module.eval().to(DEVICE)


def _to_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).to(DEVICE).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


# --- autoencoder ---------------------------------------------------------------------------------------


def build_autoencoder() -> AutoencoderKL:
    channels = (16, 32, 64, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


def _differences(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def _windows(out: Path) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """step -> (pixels, coverage): mostly 32-pixel windows with objects in them, the same work on pixels but more
    different ones a step."""
    images, coverage = np.load(out / "images.npy", mmap_mode="r"), np.load(out / "coverage.npy", mmap_mode="r")

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng([1, step])
        window, count = (64, 8) if step % 8 == 0 else (32, 32)
        picks, masks = [], []
        for i in rng.integers(len(images), size=count):
            places = rng.integers(0, 65 - window, size=(3, 2))
            sums = [int(coverage[i, y : y + window, x : x + window].sum()) for y, x in places]
            y, x = places[int(np.argmax(sums))]
            pick = images[i, y : y + window, x : x + window]
            picks.append(pick[..., rng.permutation(3)] if rng.random() < 0.3 else pick)
            masks.append(coverage[i, y : y + window, x : x + window])
        return _to_tensor(np.stack(picks)), torch.from_numpy(np.stack(masks)).to(DEVICE).float()[:, None] / 255

    return batch


def _reconstruction_error(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    error = ((1 + 2 * mask) * ((y - x).abs() + (y - x).square())).mean()
    for a, b in zip(_differences(x), _differences(y), strict=True):
        # edges are few pixels and all of the sharpness
        error = error + ((1 + 4 * a.abs()) * (a - b).abs()).mean()
    return error


def train_autoencoder(out: Path, steps: int) -> None:
    module, batch = build_autoencoder().to(DEVICE), _windows(out)

    def loss(step: int) -> torch.Tensor:
        x, mask = batch(step)
        torch.manual_seed(step)
        posterior = module.encode(x).latent_dist
        y = module.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return _reconstruction_error(x, y, mask) + 1e-4 * kl

    fit("autoencoder", module, loss, out=out, steps=steps, lr=1.5e-3, ema=copy.deepcopy(module))


def train_decoder(out: Path, steps: int) -> None:
    """The decoder goes on alone, so the latents stay what they are; the inner features of the identity judge tell it
    which details matter (as perceptual losses do)."""
    vae, batch = trained_autoencoder(out), _windows(out)
    judge = averaged("identity", IdentityNet(), out).requires_grad_(False)
    module = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})

    def features(images: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for layer in judge.trunk[:15]:  # to the end of the third level, an eighth of the side
            images = layer(images)
            if isinstance(layer, nn.ReLU):
                found.append(images)
        return found[1:]

    def loss(step: int) -> torch.Tensor:
        x, mask = batch(step)
        torch.manual_seed(step)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.sample()
        y = module["decoder"](module["post_quant_conv"](z))
        error = _reconstruction_error(x, y, mask)
        for real, made in zip(features(x), features(y), strict=True):
            error = error + 0.5 * (real - made).abs().mean() / real.abs().mean()
        return error

    fit("decoder", module, loss, out=out, steps=steps, lr=8e-4, ema=copy.deepcopy(module))


def trained_autoencoder(out: Path) -> AutoencoderKL:
    """With the decoder of its own stage, where that was trained."""
    vae = averaged("autoencoder", build_autoencoder(), out)
    if (out / "decoder.safetensors").exists():
        averaged("decoder", nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}), out)
    return vae


# --- CLIP ----------------------------------------------------------------------------------------------


def make_tokenizer(out: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with the first 4 000 merges and those that make the world's words, and the rare words of
    the Custom Diffusion authors, one token each."""
    from open_clip.tokenizer import SimpleTokenizer

    folder = out / "tokenizer"
    if not folder.exists():
        full = SimpleTokenizer()
        ranks = sorted(full.bpe_ranks, key=full.bpe_ranks.get)
        parts = {"".join(pair): pair for pair in reversed(ranks)}
        words = " ".join([*world.CLASSES, *world.BACKGROUNDS, *world.SMALL_WORDS, *world.LARGE_WORDS])
        needed, todo = set(), [f"{w}</w>" for w in (words + " photo painting picture style ktn pll ucd").split()]
        while todo:
            piece = todo.pop()
            if piece in parts and parts[piece] not in needed:
                needed.add(parts[piece])
                todo += parts[piece]
        merges = [pair for i, pair in enumerate(ranks) if i < 4000 or pair in needed]
        characters = list(full.byte_encoder.values())
        tokens = characters + [c + "</w>" for c in characters] + ["".join(pair) for pair in merges]
        vocab = {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT_LENGTH).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def clip_config(vocab_size: int) -> dict:
    return {
        "embed_dim": 192,
        "vision_cfg": {"image_size": world.SIZE, "layers": [1, 2, 2, 1], "width": 24, "head_width": 24},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": TEXT_WIDTH,
            "heads": TEXT_HEADS,
            "layers": TEXT_LAYERS,
            "hf_tokenizer_name": ".",
        },
    }


def build_clip(tokenizer: CLIPTokenizer) -> open_clip.CLIP:
    config = clip_config(len(tokenizer))
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
    ).input_ids.to(DEVICE)


def _encode_text(clip: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """open_clip's `encode_text` for captions shorter than its context length: (N, L) -> (N, embed_dim), unit rows."""
    length = tokens.shape[1]
    x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(x)), tokens.argmax(1)] @ clip.text_projection, dim=1)


def _contrastive(logits: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """CLIP's loss; a caption that is twice in the batch is right twice."""
    same = torch.tensor([[a == b for b in texts] for a in texts], device=DEVICE).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(out: Path, steps: int) -> None:
    images = np.load(out / "images.npy", mmap_mode="r")
    captions = np.array(json.loads((out / "captions.json").read_text()))
    tokenizer = make_tokenizer(out)
    module = build_clip(tokenizer).to(DEVICE)

    def loss(step: int) -> torch.Tensor:
        rows = np.sort(np.random.default_rng([2, step]).choice(len(images), 192, replace=False))
        texts = captions[rows].tolist()
        tokens = tokenize(tokenizer, texts)
        # attention is causal: what follows the longest caption of the batch changes nothing
        length = int((tokens != tokenizer.pad_token_id).sum(1).max()) + 1
        image = module.encode_image(_to_tensor(images[rows]), normalize=True)
        text = _encode_text(module, tokens[:, :length])
        logits = module.logit_scale.exp() * image @ text.T
        return _contrastive(logits, texts)

    fit("clip", module, loss, out=out, steps=steps, lr=1.5e-3, ema=copy.deepcopy(module))


def train_vision(out: Path, steps: int) -> None:
    """CLIP's image tower goes on alone, so the UNet's text features stay what they are: on objects recoloured,
    outlined and faded, so that it also knows them in art styles it was never shown."""
    images, coverage = np.load(out / "images.npy", mmap_mode="r"), np.load(out / "coverage.npy", mmap_mode="r")
    captions = np.array(json.loads((out / "captions.json").read_text()))
    tokenizer = make_tokenizer(out)
    clip = trained_clip(out, tokenizer).requires_grad_(False)
    module = clip.visual.requires_grad_(True)

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([6, step])
        rows = np.sort(rng.choice(len(images), 192, replace=False))
        texts = captions[rows].tolist()
        pixels = _to_tensor(images[rows])
        mask = torch.from_numpy(coverage[rows]).to(DEVICE).float()[:, None] / 255
        image = F.normalize(module(_redrawn(pixels, mask, step)), dim=1)
        with torch.no_grad():
            text = _encode_text(clip, tokenize(tokenizer, texts))
        logits = clip.logit_scale.exp() * image @ text.T
        return _contrastive(logits, texts)

    fit("vision", module, loss, out=out, steps=steps, lr=5e-4, ema=copy.deepcopy(module))


def _redrawn(images: torch.Tensor, mask: torch.Tensor, seed: int) -> torch.Tensor:
    """Two of three objects with other colours (contrast, saturation, brightness, a tint) and, half of them, with a
    line around them. images: (N, 3, s, s) in [-1, 1]; mask: (N, 1, s, s), the objects' coverage."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float, channels: int = 1) -> torch.Tensor:
        return (low + (high - low) * torch.rand(len(images), channels, 1, 1, generator=generator)).to(images.device)

    grey = images.mean(1, keepdim=True)
    other = grey + draw(0, 1.6) * (images - grey)
    other = draw(0.5, 1.4) * other + draw(-0.3, 0.3) + draw(-0.25, 0.25, 3)
    wide = F.max_pool2d(mask, 3, 1, 1)
    narrow = -F.max_pool2d(-mask, 3, 1, 1)
    line = (wide - narrow).clamp(0, 1) * (draw(0, 1) < 0.5)
    other = (1 - line) * other + line * draw(-1, -0.3, 3)
    area = wide * (draw(0, 1) < 2 / 3)
    return (area * other + (1 - area) * images).clamp(-1, 1)


def trained_clip(out: Path, tokenizer: CLIPTokenizer) -> open_clip.CLIP:
    """With the image tower of the stage `vision`, where that was trained."""
    clip = averaged("clip", build_clip(tokenizer), out)
    if (out / "vision.safetensors").exists():
        averaged("vision", clip.visual, out)
    return clip


def text_encoder_from(clip: open_clip.CLIP, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """open_clip's text tower as the transformers model that Stable Diffusion pipelines use."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_HEADS,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=192,
    )
    source = {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    target = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    for layer in range(TEXT_LAYERS):
        old, new = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            q, k, v = source[f"{old}attn.in_proj_{kind}"].chunk(3)
            target |= {f"{new}self_attn.{n}_proj.{kind}": t for n, t in (("q", q), ("k", k), ("v", v))}
            for a, b in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                target[f"{new}{b}.{kind}"] = source[f"{old}{a}.{kind}"]
    model = CLIPTextModel(config)
    own = model.state_dict()
    prefix = "text_model." if any(k.startswith("text_model.") for k in own) else ""
    model.load_state_dict({prefix + k: v for k, v in target.items()}, strict=False)
    missing = {k for k in own if "position_ids" not in k} - {prefix + k for k in target}
    if missing:
        raise RuntimeError(f"text encoder weights without a source: {sorted(missing)}")
    return model.eval()


# --- identity judge ------------------------------------------------------------------------------------


def train_identity(out: Path, steps: int) -> None:
    """Two scenes of each sprite in a batch must find one another; a sprite with rotated colours is another sprite."""
    module = IdentityNet().to(DEVICE)
    pairs = [(c, s) for c in world.CLASSES for s in world.styles_of(c)]
    backgrounds = list(world.BACKGROUNDS)

    def scene(rng: np.random.Generator, cls: str, style: str, colours: np.ndarray) -> np.ndarray:
        size = rng.uniform(28, 58)
        room = max(3.0, (world.SIZE - size) / 2)
        x, y = world.SIZE / 2 + rng.uniform(-room, room, 2)
        sprite = world.Sprite(cls, style, size, x, y, rng.uniform(-15, 15), bool(rng.random() < 0.5))
        background = backgrounds[rng.integers(len(backgrounds))]
        image, mask = world.render(world.Scene((sprite,), background, int(rng.integers(2**31)), ""))
        pixels = np.asarray(image, np.float32)
        return np.where(mask[..., None] > 0.5, pixels[..., colours], pixels).astype(np.uint8)

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([3, step])
        half: list[np.ndarray] = []
        other: list[np.ndarray] = []
        # half of the batch are styles of a few classes: the hard negatives
        few = {str(c) for c in rng.choice(list(world.CLASSES), 6, replace=False)}
        hard = [p for p in pairs if p[0] in few]
        easy = [pairs[i] for i in rng.choice(len(pairs), 34, replace=False) if pairs[i][0] not in few]
        for cls, style in hard + easy:
            colours = rng.permutation(3) if rng.random() < 0.3 else np.arange(3)
            half.append(scene(rng, cls, style, colours))
            other.append(scene(rng, cls, style, colours))
        a, b = module(_to_tensor(np.stack(half + other))).chunk(2)
        logits = 16 * a @ b.T
        target = torch.arange(len(a), device=DEVICE)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit("identity", module, loss, out=out, steps=steps, lr=1e-3)


# --- UNet ----------------------------------------------------------------------------------------------


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(128, 192),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


@torch.no_grad()
def make_latents(out: Path) -> None:
    if (out / "latents.json").exists():
        return
    images = np.load(out / "images.npy", mmap_mode="r")
    vae = averaged("autoencoder", build_autoencoder(), out)
    latents = np.lib.format.open_memmap(out / "latents.npy", "w+", np.float16, (len(images), LATENT_CHANNELS, 8, 8))
    for i in range(0, len(images), 100):
        latents[i : i + 100] = vae.encode(_to_tensor(images[i : i + 100])).latent_dist.mean.half().cpu().numpy()
    scale = 1 / float(np.asarray(latents[:5000], np.float32).std())
    (out / "latents.json").write_text(json.dumps({"scaling_factor": scale}))


def train_unet(out: Path, steps: int) -> None:
    """v-prediction; one caption in ten is empty, for guidance.

    No min-SNR weights (arXiv 2303.09556), and twice as many noisy samples as an even choice of timesteps would give:
    on a grid as small as this, nearly all that the caption tells about the image is told at signal-to-noise ratios
    below 0.1, where min-SNR hardly looks (measured as the loss with the caption against that without).
    """
    latents = np.load(out / "latents.npy", mmap_mode="r")
    scale = json.loads((out / "latents.json").read_text())["scaling_factor"]
    captions = json.loads((out / "captions.json").read_text())
    unique, index = np.unique(captions, return_inverse=True)
    tokenizer = make_tokenizer(out)
    encoder = text_encoder_from(averaged("clip", build_clip(tokenizer), out), tokenizer).to(DEVICE)
    with torch.no_grad():
        texts = torch.cat(
            [encoder(tokenize(tokenizer, unique[i : i + 256].tolist()))[0].half() for i in range(0, len(unique), 256)]
        )
        empty = encoder(tokenize(tokenizer, [""]))[0]
    alphas = build_scheduler().alphas_cumprod.to(DEVICE)
    module = build_unet().to(DEVICE, memory_format=torch.channels_last)  # a quarter faster on CPUs

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([4, step])
        rows = np.sort(rng.integers(len(latents), size=64))
        x = torch.from_numpy(latents[rows]).to(DEVICE).float() * scale
        text = texts[torch.from_numpy(index[rows])].float()
        text[torch.from_numpy(rng.random(len(rows)) < 0.1)] = empty
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(x.shape, generator=generator).to(DEVICE)
        u = torch.rand(len(x), generator=generator)
        t = (1000 * 2 * u / (1 + u)).long().clamp(max=999).to(DEVICE)
        a = alphas[t][:, None, None, None]
        v = module(a.sqrt() * x + (1 - a).sqrt() * noise, t, text).sample
        return (v - (a.sqrt() * noise - (1 - a).sqrt() * x)).square().mean()

    fit("unet", module, loss, out=out, steps=steps, lr=8e-4, ema=copy.deepcopy(module))


# --- export --------------------------------------------------------------------------------------------


def export(out: Path, package: Path = PACKAGE) -> None:
    """Write `model/` (diffusers), `clip/` (open_clip) and `identity/` in float16 from the states at hand."""
    tokenizer = make_tokenizer(out)
    clip, vae = trained_clip(out, tokenizer), trained_autoencoder(out)
    vae.register_to_config(scaling_factor=json.loads((out / "latents.json").read_text())["scaling_factor"])
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder_from(clip, tokenizer),
        tokenizer=tokenizer,
        unet=averaged("unet", build_unet(), out),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.half()
    shutil.rmtree(package / "model", ignore_errors=True)
    pipe.save_pretrained(package / "model")
    save_text_encoder(pipe.text_encoder, package / "model" / "text_encoder")
    save_vocabulary(package / "model" / "tokenizer")
    (package / "clip").mkdir(exist_ok=True)
    save_tensors(
        package / "clip" / "open_clip_model.safetensors",
        {k: v.half() if v.is_floating_point() else v for k, v in clip.state_dict().items()},
    )
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
    config = {"model_cfg": clip_config(len(tokenizer)), "preprocess_cfg": preprocess}
    (package / "clip" / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    tokenizer.save_pretrained(package / "clip")
    identity = averaged("identity", IdentityNet(), out)
    save_tensors(
        package / "identity" / "model.safetensors",
        {k: v.half() if v.is_floating_point() else v for k, v in identity.state_dict().items()},
    )


def save_vocabulary(folder: Path) -> None:
    """Write a tokenizer's vocabulary once more as `vocab.json` and `merges.txt`: what `CLIPTokenizer` reads in version
    4 of transformers, of which version 5 writes neither."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


def adopt(out: Path, package: Path = PACKAGE) -> None:
    """Start from the shipped weights where a stage has no state yet, so that training goes on from them."""
    shutil.copytree(package / "model" / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    for name, file in {
        "autoencoder": "model/vae/diffusion_pytorch_model.safetensors",
        "clip": "clip/open_clip_model.safetensors",
        "identity": "identity/model.safetensors",
        "unet": "model/unet/diffusion_pytorch_model.safetensors",
    }.items():
        if not (out / f"{name}.safetensors").exists():
            tensors, _ = load_tensors(package / file)
            tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
            averages = {} if name == "identity" else {f"ema.{k}": v.clone() for k, v in tensors.items()}
            current = {f"model.{k}": v for k, v in tensors.items()}
            save_tensors(out / f"{name}.safetensors", current | averages, {"step": "0"})


@torch.no_grad()
def preview(out: Path) -> None:
    """`autoencoder.png`: scenes above, their reconstructions below."""
    images = np.load(out / "images.npy", mmap_mode="r")[:16]
    vae = trained_autoencoder(out)
    again = vae(_to_tensor(images)).sample.clamp(-1, 1).add(1).mul(127.5).byte().permute(0, 2, 3, 1).cpu().numpy()
    Image.fromarray(np.concatenate([np.concatenate(list(images), 1), np.concatenate(list(again), 1)])).save(
        out / "autoencoder.png"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the states of the stages are kept")
    parser.add_argument("--stage", choices=(*STAGES, "adopt", "preview"), help="only this stage (default: all)")
    parser.add_argument("--steps", type=int, help="with --stage: train to this many steps in all")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    functions: dict[str, Callable[..., None]] = {
        "corpus": make_corpus,
        "autoencoder": train_autoencoder,
        "clip": train_clip,
        "identity": train_identity,
        "latents": make_latents,
        "decoder": train_decoder,
        "vision": train_vision,
        "unet": train_unet,
        "export": export,
        "adopt": adopt,
        "preview": preview,
    }
    for stage in [arguments.stage] if arguments.stage else STAGES:
        print(f"== {stage}", flush=True)
        steps = [arguments.steps or DEFAULT_STEPS[stage]] if stage in DEFAULT_STEPS else []
        functions[stage](arguments.out, *steps)


if __name__ == "__main__":
    main()
