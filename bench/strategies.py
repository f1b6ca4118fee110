"""Two ranks on one model: memory of each rank and seconds a step, with DDP and DeepSpeed's ZeRO stages.

Stable Diffusion 1.4's shapes with random weights, 64-pixel images (as small as the UNet takes), one concept and one
regularisation image a rank, float32, two processes on this machine over gloo. `gib` is a rank's resident memory after
the second step (loading needs the whole model for a moment, whatever the strategy), `weights_gib` the weights it holds.

The last line printed is one JSON object; `memory_saved_zero3` is the share of a DDP rank's memory that stage 3 saves.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
STEPS = 3


def measure(name: str) -> None:
    """One rank; the first prints what it found."""
    sys.path.insert(0, str(Path(__file__).parent))
    import psutil
    import shapes
    import torch
    import torch.distributed as dist

    from training.loop import train
    from training.strategies import DDP, DeepSpeed, deepspeed_config

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    backbone = shapes.stable_diffusion()
    if name == "ddp":
        strategy: DDP = DDP()
    else:
        strategy = DeepSpeed(deepspeed_config(1, 1.0, zero=int(name[-1]), offload=False))  # type: ignore[arg-type]
    moments: list[float] = []
    found: dict[str, float] = {}

    def progress(member, step: int, loss: float) -> None:
        moments.append(time.perf_counter())
        if step == 2:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            held = itertools.chain(backbone.unet.parameters(), backbone.text_encoders[0].parameters())
            found["weights_gib"] = sum(p.numel() * p.element_size() for p in held) / 2**30
            found["gib"] = psutil.Process().memory_info().rss / 2**30
            moments.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        data = shapes.stable_diffusion_data(64)
        (member,) = shapes.members(1, Path(scratch), **data, batch_size=ranks, steps=STEPS)
        for _ in train(backbone, [member], strategy=strategy, progress=progress):
            pass
    dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps(found | {"seconds": moments[-1] - moments[-2]}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=STRATEGIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    figures: dict[str, float] = {}
    for name in STRATEGIES:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run([*command, __file__, "--measure", name], stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:6} {found['gib']:5.2f} GiB a rank, {found['weights_gib']:5.2f} GiB of them weights, "
            f"{found['seconds']:6.2f} s a step",
            flush=True,
        )
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    figures["memory_saved_zero3"] = 1 - figures["zero3_gib"] / figures["ddp_gib"]
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
