"""Folding separately trained concepts into one model in closed form (Custom Diffusion, equation 4).

Symbols, with d the width of the text features, s the constraint rows in all, m the regularisation rows:

    C_reg (m, d)   text features of regularisation captions, all positions stacked
    G = C_reg^T C_reg (d, d), factorised once: every layer reads the same text features
    C (s, d)       text features of the concepts' own prompts
    D_l (s, out)   what each concept's training changed at its rows: (W_i - W_0) c, the constraint minus W_0 C^T

The merged change of layer l has rank at most s, with a right factor that all layers share:

    hard   R = (C G^-1 C^T)^-1 C G^-1        left_l = D_l^T
    soft   R = U^T (G + mu C^T C)^-1         left_l = mu (U^T C^T D_l)^T, U an orthonormal basis of the rows of C

which are the constrained minimum of ||(W - W_0) C_reg^T|| and the minimum of ||(W - W_0) C_reg^T||^2 +
mu ||W C^T - V||^2. The soft form needs of the concepts only the sums C^T C and C^T D_l, of one size for any number of
concepts. Everything is float64.
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
constraints as the hard one does; at the lower end it changes next to nothing."""


class Dependent(ValueError):
    """Constraint rows that cannot all be met exactly. fact: why, without what to do."""

    def __init__(self, fact: str) -> None:
        super().__init__(f"merge: {fact}; use `merge: {{form: soft}}`, or fewer concepts or constraint prompts")
        self.fact = fact


@dataclass(frozen=True)
class MergeReport:
    """How well a merge did.

    form: that was solved; why: that one. penalty: of the soft form, relative to the mean of G's diagonal; else None.
    residuals: concept -> worst layer's ||W^ C_i^T - V_i|| / ||V_i - W_0 C_i^T||: 0 is met exactly, 1 not at all.
    drift: ||(W^ - W_0) C_reg^T|| / ||W_0 C_reg^T|| over all layers: how far the regularisation captions moved.
    condition: of the system that was solved; rows: s.
    """

    form: Literal["hard", "soft", "none"]
    why: str
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
    form: Literal["auto", "hard", "soft"] = "auto",
    damping: float = 1e-6,
    max_drift: float = 0.1,
    penalty: float | None = None,
) -> tuple[MergedModel, MergeReport]:
    """Solve the merge.

    Args:
        constraints: of all concepts.
        regularization: C_reg, (m, d) float64.
        base: layer -> W_0 (out, d), for the drift.
        form: `auto` takes the hard form while the rows are independent (no more than d, and `INDEPENDENT`) and meeting
            them exactly keeps to `max_drift`. Two concepts that nearly agree in their rows and not in what they demand
            of them can be met exactly, but at the cost of everything else.
        damping: added to G's diagonal, relative to its mean.
        max_drift: how far the regularisation captions may move, see `MergeReport.drift`.
        penalty: mu of the soft form, relative to the mean of G's diagonal; None: the largest that keeps to `max_drift`.

    Returns: the merged model in float64 factors without tokens, and the report.
    Raises: ValueError when the hard form is asked for and the rows are not independent, or G is singular.
    """
    gram, _ = damped_gram(regularization, damping)
    why = "asked for"
    if form != "soft":
        try:
            model, condition = solve_hard(constraints, gram)
        except Dependent as error:
            if form == "hard":
                raise
            why = error.fact
        else:
            measured = report(model, constraints, regularization, base, form="hard", why=why, condition=condition)
            moved = f"meeting all constraints exactly moves the regularisation captions by {measured.drift:.2g}"
            if form == "hard":
                return model, measured
            if measured.drift <= max_drift:
                return model, dataclasses.replace(
                    measured, why=f"{moved} of their size, at most {max_drift:g} is allowed"
                )
            why = f"{moved} of their size, more than the {max_drift:g} that are allowed"
    return merge_sums(
        Sums.over(constraints),
        constraints,
        regularization,
        base,
        damping=damping,
        max_drift=max_drift,
        penalty=penalty,
        why=why,
    )


def merge_sums(
    sums: Sums,
    constraints: Iterable[Constraint],
    regularization: torch.Tensor,
    base: dict[str, torch.Tensor],
    *,
    damping: float,
    max_drift: float,
    penalty: float | None = None,
    why: str = "",
) -> tuple[MergedModel, MergeReport]:
    """As `merge`, in the soft form, from sums; `constraints` are those that the report measures, none are needed.

    why: this form was taken; by default, that there are only sums.
    """
    gram, scale = damped_gram(regularization, damping)
    if penalty is None:
        penalty = allowed_penalty(sums, gram, base, max_drift) / float(scale)
    model, condition = solve_soft(sums, gram, penalty * scale)
    if not why:
        why = _too_many(sums.rows, sums.names, len(gram)) if sums.rows > len(gram) else "solved from sums"
    measured = report(model, constraints, regularization, base, form="soft", why=why, condition=condition)
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


def solve_hard(constraints: Sequence[Constraint], gram: torch.Tensor) -> tuple[MergedModel, float]:
    """The hard form, and the condition of its system. gram: G, damped.

    Raises: Dependent when there are more rows than the text features are wide, or they nearly depend on one another;
        ValueError when G is singular.
    """
    C = torch.cat([c.rows for c in constraints])
    s, width = C.shape
    if s > width:
        raise Dependent(_too_many(s, constraints, width))
    d = torch.cholesky_solve(C.T, gram_factor(gram)).T  # C G^-1, (s, d)
    system = d @ C.T  # (s, s), symmetric positive definite where the rows are independent
    condition = _condition(system)
    if not condition < INDEPENDENT:
        raise Dependent(
            f"the constraint rows of {', '.join(c.name for c in constraints)} are not independent "
            f"(condition {condition:.1e}): two concepts nearly agree"
        )
    # the small system belongs to the shared side: the layers' side is what the concepts demand, as it is
    right = torch.cholesky_solve(d, torch.linalg.cholesky(system))
    left = {layer: torch.cat([c.changes[layer] for c in constraints]).T for layer in constraints[0].changes}
    return MergedModel(left, {SHARED: right}, {}), condition


def _condition(system: torch.Tensor) -> float:
    """Of a symmetric matrix; infinite where it is not positive definite, but for rounding."""
    values = torch.linalg.eigvalsh(system)
    return float(values[-1] / values[0]) if values[0] > 0 else float("inf")


def _too_many(rows: int, concepts: Sequence[object], width: int) -> str:
    return (
        f"{rows} constraint rows of {len(concepts)} concepts, but text features {width} wide can meet at most {width} "
        "exactly"
    )


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
    form: Literal["hard", "soft", "none"] = "none",
    why: str = "",
    condition: float = float("nan"),
) -> MergeReport:
    """Measure any factored model against constraints, one in memory at a time (see `MergeReport`)."""
    residuals, rows = {}, 0
    projected = {}
    for constraint in constraints:
        missed = []
        for layer, demand in constraint.changes.items():
            left, right = model.factors(layer)
            met = (constraint.rows @ right.double().T) @ left.double().T
            missed.append((met - demand).norm() / demand.norm().clamp(min=1e-30))
        residuals[constraint.name] = float(torch.stack(missed).max())  # NaN where one is
        rows += len(constraint.rows)
    moved = stayed = 0.0
    for layer in model.layers:
        left, right = model.factors(layer)
        if id(right) not in projected:
            projected[id(right)] = regularization @ right.double().T
        moved += float((projected[id(right)] @ left.double().T).square().sum())
        stayed += float((regularization @ base[layer].double().cpu().T).square().sum())
    return MergeReport(form, why, residuals, (moved / stayed) ** 0.5, condition, rows)
