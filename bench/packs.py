"""Concept packs against one concept at a time: memory and speed at the shapes of Stable Diffusion 1.4.

A process each for packs of 1, 2, 4 and 8 concepts, random weights, 64-pixel images (as small as the UNet takes),
batches of 1 + 1, float32: its peak resident memory and seconds a step; and packs of 1 and 8 on the miniature, batches
of 4 + 4.
Aims: 8 concepts in at most 1.6 times the memory of one (8 processes take 8 times), nowhere slower per concept than
alone, on the miniature faster.

The last line printed is one JSON object; `throughput_ratio_8` is the concept-steps a second of the pack of 8 over those
of concepts alone, one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = (1, 2, 4, 8)


def measure(base: str, count: int) -> dict[str, float]:
    """Train a pack of `count` in this process: seconds a step (the median), peak resident bytes."""
    sys.path.insert(0, str(Path(__file__).parent))
    import shapes  # after the arguments are known: it imports torch

    from pipeline.spec import MINIATURE
    from training.attention import use_attention
    from training.backbone import load_backbone
    from training.loop import train

    moments: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        if base == "sd":
            backbone = shapes.stable_diffusion()
            data = shapes.stable_diffusion_data(64)
            pack = shapes.members(count, Path(scratch), **data, batch_size=1, steps=4)
        else:
            backbone = load_backbone(MINIATURE / "model")
            use_attention(backbone.unet, "sdpa")
            pack = shapes.members(count, Path(scratch), **shapes.MINIATURE_DATA, batch_size=4, steps=12)

        def progress(member, step: int, loss: float) -> None:
            if member is pack[-1]:
                moments.append(time.perf_counter())

        for _ in train(backbone, pack, progress=progress):
            pass
    intervals = sorted(b - a for a, b in itertools.pairwise(moments))
    return {
        "seconds": intervals[len(intervals) // 2],
        # not `ru_maxrss`, which starts from the parent's
        "bytes": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("BASE", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        base, count = arguments.measure
        print(json.dumps(measure(base, int(count))))
        return
    figures: dict[str, float] = {}
    for base, sizes in (("sd", SIZES), ("miniature", (1, 8))):
        for count in sizes:
            command = [sys.executable, __file__, "--measure", base, str(count)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            speed = count / found["seconds"]
            print(
                f"{base:10} pack of {count}: {found['bytes'] / 2**30:5.2f} GiB, {speed:6.2f} concept-steps/s",
                flush=True,
            )
            figures |= {f"{base}_gib_{count}": found["bytes"] / 2**30, f"{base}_speed_{count}": speed}
    figures |= {
        "memory_ratio_8": figures["sd_gib_8"] / figures["sd_gib_1"],
        "throughput_ratio_8": figures["sd_speed_8"] / figures["sd_speed_1"],
        "miniature_throughput_ratio_8": figures["miniature_speed_8"] / figures["miniature_speed_1"],
    }
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
