"""Folding separately trained concepts into one model in closed form (Custom Diffusion, equation 4).

Symbols, with d the width of the text features, s the constraint rows in all, m the regularisation rows:

    C_reg (m, d)   text features of regularisation captions, all positions stacked
    G = C_reg^T C_reg (d, d), factorised once: every layer reads the same text features
    C (s, d)       text features of the concepts' own prompts, equal rows kept once
    D_l (s, out)   what each concept's training changed at its rows: (W_i - W_0) c, the constraint minus W_0 C^T

The merged change of layer l has rank at most s, with a right factor that all layers share:

    hard   R = C G^-1                    left_l = D_l^T (C G^-1 C^T)^-1
    soft   R = C (G + mu C^T C)^-1       left_l = mu D_l^T

which are the constrained minimum of ||(W - W_0) C_reg^T|| and the minimum of ||(W - W_0) C_reg^T||^2 +
mu ||W C^T - V||^2. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.merge.factors import SHARED, MergedModel
from training.backbone import Backbone
from training.weights import ConceptWeights


@dataclass(frozen=True)
class Constraint:
    """What one concept demands of the merge.

    rows: (s_i, d) float64, text features of its prompts. changes: layer -> (s_i, out) float64, (W_i - W_0) rows.
    """

    name: str
    rows: torch.Tensor
    changes: dict[str, torch.Tensor]


@dataclass(frozen=True)
class MergeReport:
    """How well a merge did.

    residuals: concept -> worst layer's ||W^ C_i^T - V_i|| / ||V_i - W_0 C_i^T||: 0 is met exactly, 1 not at all.
    drift: ||(W^ - W_0) C_reg^T|| / ||W_0 C_reg^T|| over all layers: how far the regularisation captions moved.
    condition: of the system that was solved; rows: s.
    """

    residuals: dict[str, float]
    drift: float
    condition: float
    rows: int


@torch.no_grad()
def constraint_of(backbone: Backbone, weights: ConceptWeights, prompts: Sequence[str]) -> list[Constraint]:
    """The constraint rows of the concepts that a `ConceptWeights` holds.

    For each prompt, the positions of its words and of end-of-text; a longer prompt adds the positions from the new
    token on ("photo of a V* cat": V*, cat, end), as those before it carry nothing of the concept (authors'
    `diffusers_composenW.py`).
    """
    made = []
    with backbone.changed({}, weights.tokens):
        tokenizer = backbone.tokenizers[0]
        for described in weights.metadata["concepts"]:
            rows = []
            for prompt in prompts:
                caption = prompt.format(f"{described['token']} {described['class_word']}")
                ids = tokenizer(caption, truncation=True, max_length=tokenizer.model_max_length).input_ids
                token_id = tokenizer.convert_tokens_to_ids(described["token"])
                features = backbone.encode_text([caption]).hidden[0].cpu().double()
                rows.append(features[ids.index(token_id) : len(ids)])
            stacked = _distinct(torch.cat(rows))
            changes = {layer: stacked @ delta.double().T for layer, delta in weights.deltas.items()}
            made.append(Constraint(described["name"], stacked, changes))
    return made


@torch.no_grad()
def regularization_rows(backbone: Backbone, captions: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """C_reg: (m, d) float64, features of all positions that carry a caption (begin-of-text and padding left out)."""
    rows = []
    for start in range(0, len(captions), batch_size):
        batch = captions[start : start + batch_size]
        hidden = backbone.encode_text(batch).hidden.cpu().double()
        rows += [hidden[i, 1 : 1 + backbone.num_tokens(caption)] for i, caption in enumerate(batch)]
    return torch.cat(rows)


def damped_gram(regularization: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """G = C_reg^T C_reg (d, d) with `damping` times its mean diagonal added, and that mean before damping."""
    gram = regularization.T @ regularization
    scale = gram.diagonal().mean()
    return gram + damping * scale * torch.eye(len(gram), dtype=gram.dtype), scale


def merge(
    constraints: Sequence[Constraint],
    regularization: torch.Tensor,
    base: dict[str, torch.Tensor],
    *,
    form: Literal["hard", "soft"] = "hard",
    damping: float = 1e-6,
    penalty: float = 100.0,
) -> tuple[MergedModel, MergeReport]:
    """Solve the merge.

    Args:
        constraints: of all concepts; rows that several share are kept once (their demands must then agree).
        regularization: C_reg, (m, d) float64.
        base: layer -> W_0 (out, d), for the drift.
        damping: added to G's diagonal, relative to its mean.
        penalty: mu of the soft form, relative to the mean of G's diagonal.

    Returns: the merged model in float64 factors without tokens, and the report.
    Raises: ValueError when the hard form has more independent rows than the text features' width can meet.
    """
    C = torch.cat([c.rows for c in constraints])
    s, d = C.shape
    G, scale = damped_gram(regularization, damping)
    layers = list(constraints[0].changes)
    demands = {layer: torch.cat([c.changes[layer] for c in constraints]) for layer in layers}
    if form == "hard":
        if s > d:
            raise ValueError(
                f"merge: {s} constraint rows of {len(constraints)} concepts, but text features {d} wide can meet at "
                f"most {d} exactly; use `merge: {{form: soft}}`, or fewer concepts or constraint prompts"
            )
        right = torch.cholesky_solve(C.T, torch.linalg.cholesky(G)).T  # (s, d)
        system = right @ C.T  # (s, s), symmetric positive definite where the rows are independent
        condition = float(torch.linalg.cond(system))
        if not condition < 1e12:
            raise ValueError(
                f"merge: the constraint rows of {', '.join(c.name for c in constraints)} are not independent "
                f"(condition {condition:.1e}): two concepts nearly agree; use `merge: {{form: soft}}`"
            )
        factor = torch.linalg.cholesky(system)
        left = {layer: torch.cholesky_solve(demand, factor).T for layer, demand in demands.items()}  # (out, s)
    else:
        mu = penalty * scale
        system = G + mu * C.T @ C
        condition = float(torch.linalg.cond(system))
        right = torch.cholesky_solve(C.T, torch.linalg.cholesky(system)).T
        left = {layer: mu * demand.T for layer, demand in demands.items()}
    model = MergedModel(left, {SHARED: right}, {})
    return model, report(model, constraints, regularization, base, condition=condition)


def report(
    model: MergedModel,
    constraints: Sequence[Constraint],
    regularization: torch.Tensor,
    base: dict[str, torch.Tensor],
    *,
    condition: float = float("nan"),
) -> MergeReport:
    """Measure any factored model against constraints: residuals per concept and drift (see `MergeReport`)."""
    residuals = {}
    projected = {}
    for constraint in constraints:
        worst = 0.0
        for layer, demand in constraint.changes.items():
            left, right = model.factors(layer)
            met = (constraint.rows @ right.double().T) @ left.double().T
            worst = max(worst, float((met - demand).norm() / demand.norm().clamp(min=1e-30)))
        residuals[constraint.name] = worst
    moved = stayed = 0.0
    for layer in model.layers:
        left, right = model.factors(layer)
        if id(right) not in projected:
            projected[id(right)] = regularization @ right.double().T
        moved += float((projected[id(right)] @ left.double().T).square().sum())
        stayed += float((regularization @ base[layer].double().cpu().T).square().sum())
    return MergeReport(residuals, (moved / stayed) ** 0.5, condition, sum(len(c.rows) for c in constraints))


def _distinct(rows: torch.Tensor) -> torch.Tensor:
    """Rows without exact repetitions, in their order."""
    kept: list[torch.Tensor] = []
    for row in rows:
        if not any(torch.equal(row, other) for other in kept):
            kept.append(row)
    return torch.stack(kept)
