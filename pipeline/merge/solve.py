"""Folding separately trained concepts into one model in closed form (Custom Diffusion, equation 4).

Symbols, with d the width of the text features, s the constraint rows in all, m the regularisation rows:

    C_reg (m, d)   text features of regularisation captions, all positions stacked
    G = C_reg^T C_reg (d, d), factorised once: every layer reads the same text features
    C (s, d)       text features of the concepts' own prompts
    D_l (s, out)   what each concept's training changed at its rows: (W_i - W_0) c, the constraint minus W_0 C^T

The merged change of layer l has rank at most s, with a right factor that all layers share:

    paper  R = (C G^-1 C^T)^-1 C G^-1        left_l = D_l^T
    soft   R = U^T (G + mu C^T C)^-1         left_l = mu (U^T C^T D_l)^T, U an orthonormal basis of the rows of C

which are the constrained minimum of ||(W - W_0) C_reg^T|| (equation 4: every row is met exactly) and the minimum of
||(W - W_0) C_reg^T||^2 + mu ||W C^T - V||^2. The soft form needs of the concepts only the sums C^T C and C^T D_l, of
one size for any number of concepts and prompts. Everything is float64.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pipeline.merge.constraints import Constraint
from pipeline.merge.factors import SHARED, MergedModel
from training.checkpoint import load_tensors, save_tensors

INDEPENDENT = 1e12
"""Condition of C G^-1 C^T up to which rows count as independent: then four of float64's sixteen digits are left."""
PENALTIES = (1e-6, 100.0)
"""Between which a penalty is chosen, relative to the mean of G's diagonal. At the upper end the soft form meets its
constraints as the paper's does; at the lower end it changes next to nothing."""

Form = Literal["soft", "paper"]


@dataclass(frozen=True)
class MergeReport:
    """How well a merge did.

    form: that was solved. penalty: of the soft form, relative to the mean of G's diagonal; else None.
    residuals: concept -> worst layer's ||W^ C_i^T - V_i|| / ||V_i - W_0 C_i^T||: 0 is met exactly, 1 not at all.
    drift: ||(W^ - W_0) C_reg^T|| / ||W_0 C_reg^T|| over all layers: how far the regularisation captions moved.
    condition: of the system that was solved; rows: s.
    """

    form: Literal["soft", "paper", "none"]
    residuals: dict[str, float]
    drift: float
    condition: float
    rows: int
    penalty: float | None = None


@dataclass(frozen=True)
class Sums:
    """All that the soft form needs of any number of concepts. Sums add up in any order; a concept's are subtracted to
    take it out.

    gram: C^T C, (d, d). cross: layer -> C^T D_l, (d, out). names: of the concepts; rows: s. float64.
    """

    gram: torch.Tensor
    cross: dict[str, torch.Tensor]
    names: tuple[str, ...]
    rows: int

    @classmethod
    def over(cls, constraints: Iterable[Constraint]) -> Sums:
        """The sums of many, few in memory at a time. Raises: ValueError for none."""
        total: Sums | None = None
        waiting: list[Constraint] = []

        def add() -> Sums:
            rows = torch.cat([c.rows for c in waiting])
            changes = {layer: torch.cat([c.changes[layer] for c in waiting]) for layer in waiting[0].changes}
            names = tuple(c.name for c in waiting)
            if total is None:
                cross = {layer: rows.T @ change for layer, change in changes.items()}
                return cls(rows.T @ rows, cross, names, len(rows))
            total.gram.addmm_(rows.T, rows)
            for layer, change in changes.items():
                total.cross[layer].addmm_(rows.T, change)
            return cls(total.gram, total.cross, total.names + names, total.rows + len(rows))

        for constraint in constraints:
            waiting.append(constraint)
            if len(waiting) == 32:  # each addition reads and writes all of the sums
                total = add()
                waiting.clear()
        if waiting:
            total = add()
        if total is None:
            raise ValueError("merge: no concepts")
        return total

    def __add__(self, other: Sums) -> Sums:
        cross = {layer: value + other.cross[layer] for layer, value in self.cross.items()}
        return Sums(self.gram + other.gram, cross, self.names + other.names, self.rows + other.rows)

    def __sub__(self, other: Sums) -> Sums:
        """Without concepts that are among them. Raises: ValueError when one is not."""
        if missing := set(other.names) - set(self.names):
            raise ValueError(f"merge: {min(missing)!r} is not among the {len(self.names)} concepts merged")
        cross = {layer: value - other.cross[layer] for layer, value in self.cross.items()}
        names = tuple(name for name in self.names if name not in other.names)
        return Sums(self.gram - other.gram, cross, names, self.rows - other.rows)

    def save(
        self, path: Path, beside: dict[str, torch.Tensor] | None = None, metadata: dict[str, str] | None = None
    ) -> None:
        """beside, metadata: what else the file should hold."""
        tensors = {"gram": self.gram} | {f"cross.{layer}": value for layer, value in self.cross.items()}
        own = {"names": json.dumps(self.names), "rows": str(self.rows)}
        save_tensors(path, tensors | (beside or {}), own | (metadata or {}))

    @classmethod
    def load(cls, path: Path) -> Sums:
        return cls.of(*load_tensors(path))

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Sums:
        """From a file's content."""
        cross = {k.removeprefix("cross."): v for k, v in tensors.items() if k.startswith("cross.")}
        return cls(tensors["gram"], cross, tuple(json.loads(metadata["names"])), int(metadata["rows"]))


def damped_gram(regularization: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """G = C_reg^T C_reg (d, d) with `damping` times its mean diagonal added, and that mean before damping."""
    width, block = regularization.shape[1], 192
    gram = regularization.new_empty(width, width)
    for i in range(0, width, block):  # the lower half: PyTorch has no product that knows it is symmetric
        gram[i:, i : i + block] = regularization[:, i:].T @ regularization[:, i : i + block]
    gram = gram.tril() + gram.tril(-1).T
    scale = gram.diagonal().mean()
    gram.diagonal().add_(damping * scale)
    return gram, scale


def merge(
    constraints: Sequence[Constraint],
    regularization: torch.Tensor,
    base: dict[str, torch.Tensor],
    *,
    form: Form = "soft",
    damping: float = 1e-6,
    max_drift: float = 0.1,
    penalty: float | None = None,
) -> tuple[MergedModel, MergeReport]:
    """Solve the merge.

    Args:
        constraints: of all concepts.
        regularization: C_reg, (m, d) float64.
        base: layer -> W_0 (out, d), for the drift.
        form: `soft`; or `paper`, which meets every row exactly, whatever that moves.
        damping: added to G's diagonal, relative to its mean.
        max_drift: of the soft form, how far the regularisation captions may move, see `MergeReport.drift`.
        penalty: mu of the soft form, relative to the mean of G's diagonal; None: the largest that keeps to `max_drift`.

    Returns: the merged model in float64 factors without tokens, and the report.
    Raises: ValueError when the paper's form is asked for and the rows are not independent, or G is singular.
    """
    if form == "soft":
        return merge_sums(
            Sums.over(constraints),
            constraints,
            regularization,
            base,
            damping=damping,
            max_drift=max_drift,
            penalty=penalty,
        )
    model, condition = solve_exactly(constraints, damped_gram(regularization, damping)[0])
    return model, report(model, constraints, regularization, base, form="paper", condition=condition)


def merge_sums(
    sums: Sums,
    constraints: Iterable[Constraint],
    regularization: torch.Tensor,
    base: dict[str, torch.Tensor],
    *,
    damping: float,
    max_drift: float,
    penalty: float | None = None,
) -> tuple[MergedModel, MergeReport]:
    """As `merge`, in the soft form, from sums; `constraints` are those that the report measures, none are needed."""
    gram, scale = damped_gram(regularization, damping)
    if penalty is None:
        penalty = allowed_penalty(sums, gram, base, max_drift) / float(scale)
    model, condition = solve_soft(sums, gram, penalty * scale)
    measured = report(model, constraints, regularization, base, form="soft", condition=condition)
    return model, dataclasses.replace(measured, rows=sums.rows, penalty=penalty)


def allowed_penalty(sums: Sums, gram: torch.Tensor, base: dict[str, torch.Tensor], max_drift: float) -> float:
    """The largest mu, absolute, with which the soft form drifts by `max_drift` at most; within `PENALTIES`.

    With G = F F^T and F^-1 C^T C F^-T = U diag(a) U^T, the soft form moves the regularisation captions by

        ||(W^ - W_0) C_reg^T||^2 = sum_j (mu / (1 + mu a_j))^2 ||(U^T F^-1 C^T D)_j||^2,

    which grows with mu: one eigenvalue problem, whatever the number of concepts, and then a search in one number.

    Args:
        gram: G (d, d), damped. base: layer -> W_0 (out, d). max_drift: relative, see `MergeReport.drift`.
    Raises: ValueError when G is singular.
    """
    factor = gram_factor(gram)

    def divided(matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(factor, matrix, upper=False)

    values, vectors = torch.linalg.eigh(divided(divided(sums.gram).T))
    values = values.clamp(min=0)
    demanded = sum((vectors.T @ divided(cross)).square().sum(1) for cross in sums.cross.values())
    stayed = sum(((w0 := weight.double().cpu()) @ gram * w0).sum() for weight in base.values())
    scale = float(gram.diagonal().mean())
    low, high = (math.log(relative * scale) for relative in PENALTIES)

    def drift(logarithm: float) -> float:
        mu = math.exp(logarithm)
        return float(((mu / (1 + mu * values)).square() * demanded).sum() / stayed) ** 0.5

    if drift(high) <= max_drift:
        return math.exp(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if drift(middle) <= max_drift else (low, middle)
    return math.exp(low)


def solve_exactly(constraints: Sequence[Constraint], gram: torch.Tensor) -> tuple[MergedModel, float]:
    """The paper's form, and the condition of its system. gram: G, damped.

    Raises: ValueError when there are more rows than the text features are wide, they nearly depend on one another, or G
        is singular.
    """
    C = torch.cat([c.rows for c in constraints])
    s, width = C.shape
    if s > width:
        raise ValueError(
            f"merge: {s} constraint rows of {len(constraints)} concepts, but text features {width} wide can meet at "
            f"most {width} exactly; {_OTHERWISE}"
        )
    d = torch.cholesky_solve(C.T, gram_factor(gram)).T  # C G^-1, (s, d)
    system = d @ C.T  # (s, s), symmetric positive definite where the rows are independent
    condition = _condition(system)
    if not condition < INDEPENDENT:
        raise ValueError(
            f"merge: the constraint rows of {', '.join(c.name for c in constraints)} are not independent (condition "
            f"{condition:.1e}): two concepts nearly agree; {_OTHERWISE}"
        )
    # the small system belongs to the shared side: the layers' side is what the concepts demand, as it is
    right = torch.cholesky_solve(d, torch.linalg.cholesky(system))
    left = {layer: torch.cat([c.changes[layer] for c in constraints]).T for layer in constraints[0].changes}
    return MergedModel(left, {SHARED: right}, {}), condition


_OTHERWISE = "use `merge: {form: soft}`, or fewer concepts or constraint prompts"


def _condition(system: torch.Tensor) -> float:
    """Of a symmetric matrix; infinite where it is not positive definite, but for rounding."""
    values = torch.linalg.eigvalsh(system)
    return float(values[-1] / values[0]) if values[0] > 0 else float("inf")


def gram_factor(gram: torch.Tensor) -> torch.Tensor:
    """F with G = F F^T, lower triangular. Raises: ValueError when G is singular but for rounding."""
    factor = _factor(gram)
    pivots = factor.diagonal().square()
    if not pivots.min() > len(gram) * torch.finfo(gram.dtype).eps * pivots.max():
        raise ValueError(_OPEN)
    return factor


def _factor(matrix: torch.Tensor) -> torch.Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise ValueError(_OPEN)
    return factor


_OPEN = (
    "merge.damping: the regularisation captions leave some directions of the text features open, so that the merge has "
    "no single solution; raise merge.damping (1e-6 is usual)"
)


def solve_soft(sums: Sums, gram: torch.Tensor, mu: float | torch.Tensor) -> tuple[MergedModel, float]:
    """The soft form, and the condition of its system. gram: G, damped; mu: the penalty, absolute.

    Raises: ValueError when the system is singular.
    """
    system = gram + mu * sums.gram
    values, vectors = torch.linalg.eigh(sums.gram)
    basis = vectors[:, values > values[-1] * 1e-14][:, -sums.rows :]  # of the rows' span: (d, r), r at most s
    right = torch.cholesky_solve(basis, _factor(system)).T
    left = {layer: mu * (basis.T @ cross).T for layer, cross in sums.cross.items()}
    return MergedModel(left, {SHARED: right}, {}), _condition(system)


def report(
    model: MergedModel,
    constraints: Iterable[Constraint],
    regularization: torch.Tensor,
    base: dict[str, torch.Tensor],
    *,
    form: Literal["soft", "paper", "none"] = "none",
    condition: float = float("nan"),
) -> MergeReport:
    """Measure any factored model against constraints, one in memory at a time (see `MergeReport`)."""
    residuals, rows = {}, 0
    for constraint in constraints:
        missed_of = [norm / max(own, 1e-30) for norm, own in _missed(model, constraint).values()]
        residuals[constraint.name] = float(torch.tensor(missed_of).max())  # NaN where one is
        rows += len(constraint.rows)
    return MergeReport(form, residuals, moved(model, regularization, base), condition, rows)


def missed(model: MergedModel, demanded: Constraint) -> float:
    """||(W^ - W_i) C^T|| / ||(W_i - W_0) C^T|| over all layers: 0, the merged model does at these rows what the
    concept's own does; 1, it does nothing, or as much else."""
    pairs = torch.tensor(list(_missed(model, demanded).values())).square().sum(0)
    return float((pairs[0] / pairs[1].clamp(min=1e-60)).sqrt())


def _missed(model: MergedModel, constraint: Constraint) -> dict[str, tuple[float, float]]:
    """Layer -> norm of what is missed, and of what is demanded."""
    pairs = {}
    for layer, demand in constraint.changes.items():
        left, right = model.factors(layer)
        met = (constraint.rows @ right.double().T) @ left.double().T
        pairs[layer] = float((met - demand).norm()), float(demand.norm())
    return pairs


def moved(model: MergedModel, rows: torch.Tensor, base: dict[str, torch.Tensor]) -> float:
    """||(W^ - W_0) C^T|| / ||W_0 C^T|| over all layers: how far the keys and values at these rows, (m, d), move."""
    changed = stayed = 0.0
    projected: dict[int, torch.Tensor] = {}
    for layer in model.layers:
        left, right = model.factors(layer)
        if id(right) not in projected:
            projected[id(right)] = rows @ right.double().T
        changed += float((projected[id(right)] @ left.double().T).square().sum())
        stayed += float((rows @ base[layer].double().cpu().T).square().sum())
    return (changed / stayed) ** 0.5
