"""95 % intervals of the measures, by bootstrap over images (scipy.stats.bootstrap) or, of shares, by Wilson's formula.

Images are resampled, concepts and prompts are not: an interval says how far the value may move with other seeds, not
with other concepts or prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest, bootstrap


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % interval (NaN where one sample cannot say) and the number of samples."""

    value: float
    low: float
    high: float
    samples: int


def mean(values: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean of (n,) values with its percentile bootstrap interval.

    Raises:
        ValueError: no values, or some that are not finite.
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"expected a list of finite values, found {values.size} of shape {values.shape}")
    average = float(values.mean())
    if len(values) == 1:
        return Estimate(average, np.nan, np.nan, 1)
    interval = bootstrap(
        (values,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed), batch=100
    ).confidence_interval
    return Estimate(average, float(interval.low), float(interval.high), len(values))


def of_statistic(
    statistic: Callable[..., float], samples: Sequence[np.ndarray], *, resamples: int = 300, seed: int = 0
) -> Estimate:
    """`statistic(*samples)` with the interval value ± 1.96 bootstrap standard errors, for means over pairs of images.

    A resample holds images twice, and the kernel or distance of an image with its own copy is extreme: percentiles of
    such a statistic lie to one side of it. Its spread does not suffer.

    Args:
        samples: arrays of (n_i, d) rows, resampled independently of each other.
    """
    value = float(statistic(*samples))
    rows = [np.arange(len(sample)) for sample in samples]
    error = bootstrap(
        rows,
        lambda *chosen: statistic(*(sample[i] for sample, i in zip(samples, chosen, strict=True))),
        n_resamples=resamples,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).standard_error
    return Estimate(value, float(value - 1.96 * error), float(value + 1.96 * error), len(samples[0]))


def share(count: int, total: int) -> Estimate:
    """`count / total` with its Wilson interval. Raises ValueError where total is 0."""
    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return Estimate(count / total, float(interval.low), float(interval.high), total)


def summarize(scores: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """Means of scores per method: overall, per concept and per prompt of a concept.

    Args:
        scores: a row per image with the columns `method`, `concept`, `prompt` and those of `measures`.

    Returns:
        Columns `method`, `concept`, `prompt`, `measure`, `value`, `low`, `high`, `samples`; an empty prompt stands for
        all prompts, an empty concept for all concepts.
    """
    rows = []
    for level in (["method"], ["method", "concept"], ["method", "concept", "prompt"]):
        for key, group in scores.groupby(level, sort=False):
            place = {"method": "", "concept": "", "prompt": ""} | dict(zip(level, key, strict=True))
            rows += [place | {"measure": m} | asdict(mean(group[m].to_numpy())) for m in measures]
    return pd.DataFrame(rows)
