"""The merge at the shapes of Stable Diffusion 1.4 and XL, against the formula as its authors compute it.

Synthetic concepts of 7 rows each (correlated, as text features are), 2 600 regularisation rows, random weights; each
case in a process of its own, whose peak memory is taken before it does what is not ours. Up to 100 concepts in the hard
form, from the concepts' constraint rows to the merged factors in float64. Naive: for each layer G and its LU, one solve
a row, an explicit inverse of the small system, and W, in the authors' precision. 1 000 concepts in the soft form, whose
sums are added up from files; there the formula has no inverse.
Aims at 1.4's shapes: 50 times faster for 2 concepts, 10 times for 100; 1 000 concepts under 2 GiB.

The last line printed is one JSON object. Files of 12 GB are written to the folder for temporary ones, and removed.
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
from pipeline.merge.solve import Sums, damped_gram, report, solve_exactly, solve_soft  # noqa: E402

ROWS, REGULARIZATION, DAMPING = 7, 2600, 1e-6
SHAPES = {"sd": (768, [320] * 5 + [640] * 5 + [1280] * 6), "sdxl": (2048, [640] * 10 + [1280] * 60)}
"""Width of the text features, and of the keys of each cross-attention layer."""


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


def hard(name: str, count: int) -> dict[str, float]:
    width, layers = SHAPES[name][0], layers_of(SHAPES[name][1])
    regularization = regularization_of(width)
    constraints = [constraint(i, width, layers) for i in range(count)]
    took = []
    for _ in range(5):  # the first one warms up the libraries
        start = time.perf_counter()
        gram, _ = damped_gram(regularization, DAMPING)
        model, _ = solve_exactly(constraints, gram)
        took.append(time.perf_counter() - start)
    figures = {"seconds": statistics.median(took), "peak_gib": peak_gib()}
    generator = torch.Generator().manual_seed(2)
    base = {layer: 0.02 * torch.randn(out, width, generator=generator) for layer, out in layers.items()}
    figures["worst_residual"] = max(report(model, constraints, regularization, base).residuals.values())
    rows = torch.cat([c.rows for c in constraints]).float()
    wanted = {
        layer: (rows @ base[layer].T + torch.cat([c.changes[layer] for c in constraints]).float()).numpy()
        for layer in layers
    }
    start = time.perf_counter()
    naive(regularization.float().numpy(), rows.numpy(), wanted, {layer: w.numpy() for layer, w in base.items()})
    figures["naive_seconds"] = time.perf_counter() - start
    return figures | {"speedup": figures["naive_seconds"] / figures["seconds"]}


def soft(name: str, count: int) -> dict[str, float]:
    """Sums from constraint files, and the solve. The worst residual is of the first ten concepts: with more rows than
    the text features are wide, none can be met."""
    width, layers = SHAPES[name][0], layers_of(SHAPES[name][1])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.safetensors" for i in range(count)]
        for i, file in enumerate(files):
            save_constraints(file, [constraint(i, width, layers)])

        def stored(files: list[Path]) -> Iterator[Constraint]:
            for file in files:
                yield from load_constraints(file)

        start = time.perf_counter()
        sums = Sums.over(stored(files))
        added = time.perf_counter() - start
        regularization = regularization_of(width)
        gram, scale = damped_gram(regularization, DAMPING)
        model, _ = solve_soft(sums, gram, 100.0 * scale)
        figures = {"seconds": time.perf_counter() - start, "adding_up": added, "peak_gib": peak_gib()}
        base = {layer: torch.ones(out, width) for layer, out in layers.items()}
        residuals = report(model, stored(files[:10]), regularization[:10], base).residuals
        return figures | {"worst_residual": max(residuals.values())}


def peak_gib() -> float:
    """Of this process so far; not `ru_maxrss`, which starts from the parent's."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=2, metavar=("SHAPES", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        name, count = arguments.case[0], int(arguments.case[1])
        print(json.dumps((soft if count > 100 else hard)(name, count)))
        return
    figures: dict[str, float] = {}
    for name in SHAPES:
        for count in (2, 10, 100, 1000):
            command = [sys.executable, __file__, "--case", name, str(count)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:5} {count:5} concepts:", ", ".join(f"{k} {v:.3g}" for k, v in found.items()), flush=True)
            suffix = f"{count}" if name == "sd" else f"{count}_{name}"
            figures |= {f"{key}_{suffix}": value for key, value in found.items()}
    print(json.dumps({key: float(f"{value:.4g}") for key, value in figures.items()}))


if __name__ == "__main__":
    main()
