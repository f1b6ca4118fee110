"""Smaller factors for a given error: a rank budget spread by what each singular value is worth on text features."""

from __future__ import annotations

import torch

from pipeline.merge.factors import SHARED, MergedModel
from pipeline.merge.solve import gram_factor


def weighted_factors(
    deltas: dict[str, torch.Tensor], gram: torch.Tensor, *, max_rank: int | None = None, max_bytes: int | None = None
) -> tuple[MergedModel, float]:
    """Best low-rank factors of changes, one rank per layer, under a budget, in the norm of text features.

    What matters of a change dW is what it does to text features: ||dW C_reg^T|| = ||dW G^(1/2)||. So singular values
    are those of dW G^(1/2), and the budget goes to the largest per byte over all layers (peers cut each layer's bare
    weights at a share of its own sum).

    Args:
        deltas: layer -> (out, d). gram: G (d, d) float64, positive definite.
        max_rank: upper bound of every layer's rank. max_bytes: of all factors together at 2 bytes a number.

    Returns: the factors (float32), and the relative error ||(dW - L R) G^(1/2)|| / ||dW G^(1/2)|| over all layers.
    Raises: ValueError when max_bytes does not even pay for one rank of every layer, or G is singular.
    """
    factor = gram_factor(gram)  # G = F F^T, ||dW F|| = ||dW G^(1/2)||
    spectra = {}
    worth: list[tuple[float, int, str]] = []
    total = 0.0
    for layer, delta in deltas.items():
        u, values, vh = torch.linalg.svd(delta.double() @ factor, full_matrices=False)
        spectra[layer] = (u, values, vh)
        total += float(values.square().sum())
        price = 2 * sum(delta.shape)
        worth += [(float(v) ** 2 / price, price, layer) for v in values[:max_rank]]
    worth.sort(key=lambda w: -w[0])
    # one rank for every layer first: loaders know no layer of rank 0
    firsts = [next(w for w in worth if w[2] == layer) for layer in deltas]
    ranks = dict.fromkeys(deltas, 1)
    spent, kept = sum(price for _, price, _ in firsts), sum(value * price for value, price, _ in firsts)
    if max_bytes is not None and spent > max_bytes:
        raise ValueError(f"compress.max_bytes is {max_bytes}, but one rank of every layer costs {spent} bytes")
    for entry in worth:
        value, price, layer = entry
        if entry in firsts or (max_bytes is not None and spent + price > max_bytes):
            continue
        spent, kept, ranks[layer] = spent + price, kept + value * price, ranks[layer] + 1
    left, right = {}, {}
    for layer, (u, values, vh) in spectra.items():
        r = ranks[layer]
        left[layer] = (u[:, :r] * values[:r]).float()
        right[layer] = torch.linalg.solve_triangular(factor.T, vh[:r].T, upper=True).T.float()  # vh F^-1
    return MergedModel(left, right, {}), max(0.0, 1 - kept / total) ** 0.5 if total else 0.0


def truncated_factors(
    deltas: dict[str, torch.Tensor], gram: torch.Tensor, spectrum: float
) -> tuple[MergedModel, float]:
    """The authors' compression (`src/compress.py` of adobe-research/custom-diffusion), to compare with: of each bare
    matrix the largest singular values that hold a share of their sum, but always one.

    Args:
        deltas, gram: as for `weighted_factors`. spectrum: the share, in (0, 1].

    Returns: as `weighted_factors`, the error measured alike.
    """
    factor = gram_factor(gram)
    left, right = {}, {}
    lost = total = 0.0
    for layer, delta in deltas.items():
        u, values, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        held = values.cumsum(0) / values.sum().clamp(min=1e-30)
        r = min(int((held < spectrum).sum()) + 1, len(values))
        left[layer], right[layer] = (u[:, :r] * values[:r]).float(), vh[:r].float()
        lost += float(((u[:, r:] * values[r:]) @ (vh[r:] @ factor)).square().sum())
        total += float((delta.double() @ factor).square().sum())
    return MergedModel(left, right, {}), (lost / total) ** 0.5 if total else 0.0


def shared_factors(model: MergedModel, gram: torch.Tensor, max_rank: int) -> tuple[MergedModel, float]:
    """The best right factor of a lower rank that all layers of a merged model still share.

    Stacking the layers, [left_1; …; left_L] right G^(1/2) is one matrix of rank at most s; its leading right singular
    vectors are the shared basis. Arguments and returns as for `weighted_factors`.
    """
    factor = gram_factor(gram)
    right = model.right[SHARED].double()
    stacked = torch.cat([left.double() for left in model.left.values()])  # (sum of out, s)
    # QR of the thin side keeps the SVD at s x d, however many layers there are
    q, triangle = torch.linalg.qr(stacked)
    u, values, vh = torch.linalg.svd(triangle @ right @ factor, full_matrices=False)
    r = min(max_rank, len(values))
    basis = torch.linalg.solve_triangular(factor.T, vh[:r].T, upper=True).T
    compressed = ((q @ u)[:, :r] * values[:r]).split([len(left) for left in model.left.values()])
    error = float((values[r:].square().sum() / values.square().sum()).sqrt())
    return MergedModel(dict(zip(model.left, compressed, strict=True)), {SHARED: basis}, model.tokens), error


def rounded(model: MergedModel) -> MergedModel:
    """The factors as they are published: float16, so scaled that neither under- nor overflows, but float32 a right
    factor that all layers share. Tokens stay as they are.

    A shared right factor is made orthonormal first, as the solved one's rows are nearly alike. It is small beside the
    left ones, and the text features it meets have a large common part that has to cancel: in float16 constraints would
    be missed by some percent, as they are by any model whose weights are float16.
    """
    left, right = {}, {}
    if SHARED in model.right:
        basis, triangle = torch.linalg.qr(model.right[SHARED].double().T)
        right[SHARED] = basis.T.float()
        left = {layer: (value.double() @ triangle.T).half() for layer, value in model.left.items()}
    else:
        for layer in model.left:
            norms = model.right[layer].double().norm(dim=1).clamp(min=1e-30)
            right[layer] = (model.right[layer].double() / norms[:, None]).half()
            left[layer] = (model.left[layer].double() * norms).half()
    for layer, value in left.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"merge: the change of {layer} is too large for float16: a concept's training went wrong, or concepts "
                "nearly agree; look at their samples, or use `merge: {form: soft}`"
            )
    return MergedModel(left, right, model.tokens, model.metadata)
