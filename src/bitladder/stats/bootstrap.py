"""Intervals for figures that are sums over clusters: mean KL divergence per token, perplexity ratio, top-1
agreement.

Tokens of one document are not independent, so documents (clusters) are resampled, never tokens. A figure is
a ratio of sums, r = sum(x) / sum(w) over clusters, for instance nats over tokens. Its standard error is the
linearised one, with the small-sample factor n / (n - 1),

    se^2 = n / (n - 1) * sum((x_i - r w_i)^2) / (sum w)^2.

``ratio_interval`` is the studentised bootstrap (bootstrap-t; Davison and Hinkley 1997, section 5.2):
clusters are drawn with replacement, t* = (g(r*) - g(r)) / se(g(r*)) is computed for each draw, and its
quantiles replace those of the normal distribution. ``g`` is the logarithm for positive figures such as KL,
whose spread grows with their size, and the identity for differences. With few clusters draws exist whose
spread is near zero and whose t* is wild, so the quantiles are bounded by a multiple of Student's t with n - 1
degrees of freedom; ``benchmarks/interval_coverage.py`` shows the coverage that this gives.

One cluster has no spread to learn from: the interval is then NaN, "not estimable", never zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

DRAWS = 2000
"""Enough for quantiles whose own noise is small beside the interval's width."""
_T_BOUND = 3.0


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds; NaN bounds are not estimable."""

    value: float
    low: float
    high: float


def _ratio_and_error(counts: F64, x: F64, w: F64) -> tuple[F64, F64]:
    """r and its linearised standard error for each row of cluster counts f64[draws, n]."""
    n = counts.shape[1]
    weight = counts @ w
    ratio = (counts @ x) / weight
    squares = counts @ (x * x) - 2 * ratio * (counts @ (x * w)) + ratio**2 * (counts @ (w * w))
    return ratio, np.sqrt(np.maximum(squares, 0) * n / (n - 1)) / weight


def resampled_counts(rng: np.random.Generator, clusters: int, draws: int) -> F64:
    """How often each cluster is drawn, f64[draws, clusters]."""
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws).astype(np.float64)


def ratio_interval(
    x: F64,
    w: F64,
    rng: np.random.Generator,
    *,
    scale: Literal["plain", "log"] = "plain",
    level: float = 0.95,
    draws: int = DRAWS,
) -> Interval:
    """sum(x) / sum(w) with a bootstrap-t interval that resamples clusters.

    Args:
        x: f64[clusters], what is summed in each cluster.
        w: f64[clusters], its weight there (tokens), positive.
        rng: the randomness; the same generator state gives the same interval.
        scale: ``log`` for figures that cannot be negative; falls back to ``plain`` when the figure is zero.
        level: coverage.
        draws: bootstrap samples.

    Raises:
        ValueError: no cluster, or a weight that is not positive.
    """
    from scipy.stats import t as student

    if not len(x) or len(x) != len(w) or not (w > 0).all():
        raise ValueError(
            f"clusters must have one positive weight each. Got {len(x)} sums, weights {w!r} instead."
        )
    n = len(x)
    value = float(x.sum() / w.sum())
    if n < 2:
        return Interval(value, np.nan, np.nan)
    log = scale == "log" and value > 0
    _, error = _ratio_and_error(np.ones((1, n)), x, w)
    own_error = float(error[0]) / (value if log else 1.0)
    if own_error == 0:
        return Interval(value, value, value)
    ratio, errors = _ratio_and_error(resampled_counts(rng, n, draws), x, w)
    usable = (errors > 0) & ((ratio > 0) if log else np.isfinite(ratio))
    ratio, errors = ratio[usable], errors[usable]
    t = (np.log(ratio / value) * ratio / errors) if log else (ratio - value) / errors
    tail = (1 - level) / 2
    bound = _T_BOUND * float(student.ppf(1 - tail, n - 1))
    low_t, high_t = np.clip(np.quantile(t, [1 - tail, tail]), -bound, bound)
    if log:
        return Interval(
            value, value * float(np.exp(-low_t * own_error)), value * float(np.exp(-high_t * own_error))
        )
    return Interval(value, value - float(low_t) * own_error, value - float(high_t) * own_error)


def quantile_interval(
    values: F64,
    clusters: NDArray[np.int64],
    q: float,
    rng: np.random.Generator,
    *,
    level: float = 0.95,
    draws: int = 1000,
) -> Interval:
    """A quantile over all values with a percentile bootstrap interval that resamples clusters.

    Args:
        values: f64[values], one per token.
        clusters: int64[values], the cluster (0 to n - 1) of each.
        q: which quantile, 0 to 1: the smallest value with at least that share of values at or below it.
        rng: the randomness.
        level: coverage.
        draws: bootstrap samples.
    """
    order = np.argsort(values, kind="stable")
    ranked, owner = values[order], clusters[order]
    n = int(clusters.max()) + 1
    value = float(ranked[max(0, int(np.ceil(q * len(ranked))) - 1)])
    if n < 2:
        return Interval(value, np.nan, np.nan)
    found = np.empty(draws)
    for draw, counts in enumerate(resampled_counts(rng, n, draws)):
        weight = np.cumsum(counts[owner])
        found[draw] = ranked[np.searchsorted(weight, q * weight[-1])]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
