"""The merge at the shapes of Stable Diffusion 1.4 and XL, against the formula as its authors compute it.

Synthetic concepts of 7 rows each (correlated, as text features are), 2 600 regularisation rows, random weights. Ours:
from the concepts' constraint rows to the merged factors in float64, in the hard form up to the capacity. For 1 000
concepts the soft form, whose sums are added up from files in a process of its own whose peak memory is taken. Naive:
for each layer G and its LU, one solve a row, an explicit inverse of the small system, and W, in the authors' precision.
Aims at 1.4's shapes: 50 times faster for 2 concepts, 10 times for 100; 1 000 concepts under 2 GiB.

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])

import numpy as np  # noqa: E402
import scipy.linalg  # noqa: E402
import torch  # noqa: E402

from pipeline.merge.constraints import Constraint, load_constraints, save_constraints  # noqa: E402
from pipeline.merge.solve import Sums, damped_gram, report, solve_hard, solve_soft  # noqa: E402

ROWS, REGULARIZATION, DAMPING = 7, 2600, 1e-6
SD = (768, [320] * 5 + [640] * 5 + [1280] * 6)
SDXL = (2048, [640] * 10 + [1280] * 60)


def layers_of(outs: list[int]) -> dict[str, int]:
    return {f"{i}.to_{kind}": out for i, out in enumerate(outs) for kind in "kv"}


def regularization_of(width: int) -> torch.Tensor:
    """Rows with a common part and directions of falling weight, as those of captions."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(REGULARIZATION, width, generator=generator, dtype=torch.float64)
    return rows * torch.logspace(0, -2, width, dtype=torch.float64) + torch.randn(width, generator=generator).double()


def constraint(i: int, width: int, layers: dict[str, int]) -> Constraint:
    generator = torch.Generator().manual_seed(10 + i)
    rows = torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
    changes = {layer: 0.01 * torch.randn(ROWS, out, generator=generator).double() for layer, out in layers.items()}
    return Constraint(f"c{i}", rows, changes)


def naive(regularization: np.ndarray, rows: np.ndarray, wanted: dict[str, np.ndarray], base: dict[str, np.ndarray]):
    """W of each layer, one layer at a time: nothing is shared (authors' `gdupdateWexact`)."""
    merged = {}
    for layer, w0 in base.items():
        lu = scipy.linalg.lu_factor(regularization.T @ regularization)
        d = np.stack([scipy.linalg.lu_solve(lu, row) for row in rows])
        delta = (wanted[layer].T - w0 @ rows.T) @ np.linalg.inv(d @ rows.T)
        merged[layer] = w0 + delta @ d
    return merged


def hard(name: str, shape: tuple[int, list[int]], count: int) -> dict[str, float]:
    width, layers = shape[0], layers_of(shape[1])
    regularization = regularization_of(width)
    constraints = [constraint(i, width, layers) for i in range(count)]
    generator = torch.Generator().manual_seed(2)
    base = {layer: 0.02 * torch.randn(out, width, generator=generator) for layer, out in layers.items()}
    took = []
    for _ in range(5):  # the first one warms up the libraries
        start = time.perf_counter()
        gram, _ = damped_gram(regularization, DAMPING)
        model, _ = solve_hard(constraints, gram)
        took.append(time.perf_counter() - start)
    ours = statistics.median(took)
    worst = max(report(model, constraints, regularization, base).residuals.values())
    rows = torch.cat([c.rows for c in constraints]).float()
    wanted = {
        layer: (rows @ base[layer].T + torch.cat([c.changes[layer] for c in constraints]).float()).numpy()
        for layer in layers
    }
    start = time.perf_counter()
    naive(regularization.float().numpy(), rows.numpy(), wanted, {layer: w.numpy() for layer, w in base.items()})
    theirs = time.perf_counter() - start
    print(
        f"{name:6} {count:5} concepts, hard: {ours:7.3f} s, naive {theirs:7.2f} s, {theirs / ours:6.1f} times, "
        f"worst residual {worst:.1e}",
        flush=True,
    )
    suffix = f"{count}" if name == "sd" else f"{count}_{name}"
    return {
        f"seconds_{suffix}": ours,
        f"naive_seconds_{suffix}": theirs,
        f"speedup_{suffix}": theirs / ours,
        f"worst_residual_{suffix}": worst,
    }


def soft(folder: Path, count: int) -> dict[str, float]:
    """In this process: sums from constraint files, and the solve."""
    width, layers = SD[0], layers_of(SD[1])

    def stored() -> Iterator[Constraint]:
        for i in range(count):
            yield from load_constraints(folder / f"{i}.safetensors")

    start = time.perf_counter()
    sums = Sums.over(stored())
    summed = time.perf_counter() - start
    gram, scale = damped_gram(regularization_of(width), DAMPING)
    solve_soft(sums, gram, 100.0 * scale)
    seconds = time.perf_counter() - start
    # not `ru_maxrss`, which starts from the parent's
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    print(
        f"sd     {count:5} concepts, soft: {seconds:7.3f} s ({summed:.2f} of them adding up), peak {peak:.2f} GiB "
        f"in {len(layers)} layers",
        flush=True,
    )
    return {f"seconds_{count}": seconds, f"peak_gib_{count}": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soft", nargs=2, metavar=("FOLDER", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.soft:
        print(json.dumps(soft(Path(arguments.soft[0]), int(arguments.soft[1]))))
        return
    figures: dict[str, float] = {}
    for count in (2, 10, 100):
        figures |= hard("sd", SD, count)
    figures |= hard("sdxl", SDXL, 2) | hard("sdxl", SDXL, 100)
    with tempfile.TemporaryDirectory() as folder:
        layers = layers_of(SD[1])
        for i in range(1000):
            save_constraints(Path(folder) / f"{i}.safetensors", [constraint(i, SD[0], layers)])
        command = [sys.executable, __file__, "--soft", folder, "1000"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        print(done[-2])
        figures |= json.loads(done[-1])
    print(json.dumps({key: float(f"{value:.4g}") for key, value in figures.items()}))


if __name__ == "__main__":
    main()
