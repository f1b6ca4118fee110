"""Seconds per training step against the floor: one bare forward of the frozen UNet and a backward that computes only
what the K/V matrices need, on the same latents and text features.

Stable Diffusion 1.4's shapes with random weights, 256-pixel images, 2 concept and 2 regularisation images a step,
float32, and bf16 where the CPU multiplies it (else those figures are null).
Aims: at most 1.10 times the floor; under 2 % of a step spent waiting for data.

`--peer DIR` also times a diffusers checkout's `examples/custom_diffusion/train_custom_diffusion.py` on the same shapes,
as the difference between a longer and a shorter run (the script itself may be named as well). Aim: at least 1.8 times
faster a step.

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import shapes
import torch
from PIL import Image

from training import loop
from training.backbone import Backbone
from training.loop import train
from training.objective import target_of

RESOLUTION, BATCH, STEPS = 256, 2, 4
PEER_STEPS = (1, 4)


def ours(backbone: Backbone) -> tuple[float, float]:
    """Seconds a step (the median, without the first), and of them those in which samples are drawn."""
    moments: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = shapes.stable_diffusion_data(RESOLUTION)
        (member,) = shapes.members(1, Path(scratch), **data, batch_size=BATCH, steps=STEPS)
        for _ in train(backbone, [member], progress=lambda *_: moments.append(time.perf_counter())):
            pass
        start = time.perf_counter()
        for step in range(50):
            loop._draw(member, step, 0, 1)
        drawing = (time.perf_counter() - start) / 50
    return statistics.median(b - a for a, b in itertools.pairwise(moments)), drawing


def floor(backbone: Backbone) -> float:
    """Seconds of the bare forward and backward (the median, without the first)."""
    side = RESOLUTION // backbone.factor
    latents, noise = torch.randn(2, 2 * BATCH, 4, side, side)
    text = torch.randn(2 * BATCH, 77, 768)
    weights = [layer.weight.requires_grad_() for layer in backbone.layers.values()]
    seconds = []
    for step in range(STEPS):
        start = time.perf_counter()
        timesteps = torch.randint(0, 1000, (2 * BATCH,))
        noisy = backbone.noise_scheduler.add_noise(latents, noise, timesteps)
        with loop._autocast(backbone):
            prediction = backbone.unet(noisy.to(backbone.dtype), timesteps, text.to(backbone.dtype)).sample
        target = target_of(backbone.noise_scheduler, latents, noise, timesteps)
        (prediction.float() - target).square().mean().backward()
        for weight in weights:
            weight.grad = None
        if step:
            seconds.append(time.perf_counter() - start)
    backbone.unet.requires_grad_(False)
    return statistics.median(seconds)


def peer(script: Path, backbone: Backbone) -> float:
    """Seconds a step of the diffusers example."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        backbone.pipe.save_pretrained(root / "model")
        for kind in ("instance", "class"):
            (root / kind).mkdir()
            for i in range(8):
                Image.effect_noise((RESOLUTION, RESOLUTION), 60 + i).convert("RGB").save(root / kind / f"{i}.png")
        took = []
        for steps in PEER_STEPS:
            command = [sys.executable, str(script), "--pretrained_model_name_or_path", str(root / "model")]
            command += ["--instance_data_dir", str(root / "instance"), "--instance_prompt", "photo of a <new1> cat"]
            command += ["--class_data_dir", str(root / "class"), "--class_prompt", "cat", "--num_class_images", "8"]
            command += ["--with_prior_preservation", "--modifier_token", "<new1>", "--initializer_token", "cat"]
            command += ["--resolution", str(RESOLUTION), "--train_batch_size", str(BATCH), "--no_safe_serialization"]
            command += ["--max_train_steps", str(steps), "--output_dir", str(root / f"out{steps}")]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")
            took.append(time.perf_counter() - start)
    return (took[1] - took[0]) / (PEER_STEPS[1] - PEER_STEPS[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, metavar="DIR", help="a checkout of diffusers")
    arguments = parser.parse_args()
    script = arguments.peer
    if script and script.is_dir():
        script = script / "examples" / "custom_diffusion" / "train_custom_diffusion.py"
    if script and not script.is_file():
        parser.error(f"--peer: {script}: no such file; name a checkout of diffusers")
    figures: dict[str, float | None] = {"floor_ratio_bf16": None}
    # `_is_avx512_bf16_supported` is what PyTorch's own tests ask
    fast_bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name == "bf16" and not fast_bf16:
            print("bf16: not measured, this CPU does not multiply it")
            continue
        backbone = shapes.stable_diffusion(dtype)
        least = floor(backbone)
        step, drawing = ours(backbone)
        print(
            f"{name}: floor {least:.2f} s, ours {step:.2f} s a step, of them {drawing:.4f} s drawing samples",
            flush=True,
        )
        figures |= {f"floor_{name}": least, f"step_{name}": step, f"floor_ratio_{name}": step / least}
        figures["waiting_share"] = drawing / step
        if script and name == "fp32":
            theirs = peer(script, backbone)
            print(f"{name}: the peer {theirs:.2f} s a step", flush=True)
            figures |= {"peer": theirs, "peer_speedup": theirs / step}
        del backbone
    print(json.dumps({k: v if v is None else round(v, 4) for k, v in figures.items()}))


if __name__ == "__main__":
    main()
