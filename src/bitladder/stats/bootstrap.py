"""Intervals for sums over clusters: mean KL divergence per token, perplexity ratio, top-1 agreement.

Tokens of one document are not independent, so documents (clusters) are resampled, never tokens. A figure is a
ratio of sums, r = sum(x) / sum(w) over clusters, for instance nats over tokens. Its standard error is the
jackknife's,

    se^2 = (n - 1) / n * sum(((x_i - r w_i) / (W - w_i))^2),    W = sum(w),

which unlike the linearised one allows for clusters of very different weight.

``ratio_interval`` is the studentised bootstrap (bootstrap-t; Davison and Hinkley 1997, section 5.2): clusters
are drawn with replacement, t* = (g(r*) - g(r)) / se(g(r*)) is computed for each draw, and its quantiles
replace those of the normal distribution. ``g`` is the logarithm for positive figures such as KL, whose spread
grows with their size, and the identity for differences. With few clusters t* is itself badly known: draws
exist that miss the cluster which matters, and draws with hardly any spread. So each quantile is held between
one and three times Student's, with n - 1 degrees of freedom. The interval is never narrower than Student's,
and with two clusters it is Student's.

No resampling can draw a cluster that the sample does not hold, and the next one may be worse than most: where
one document in seven is three times worse than the rest, eight documents hold none in three samples of ten. So
the end of the interval towards damage (``worse``) is moved by what the worst cluster, met once more, would do
to the figure: (worst - r) w / (W + w) at the mean weight w. It shrinks with 1/n, faster than the interval.

``benchmarks/interval_coverage.py`` measures what this gives and what simpler intervals give: the percentile
bootstrap's 95% intervals cover about 86% with eight documents.

One cluster has no spread to learn from: the interval is then NaN, "not estimable", never zero.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SEED = 20240229
"""Of whatever is drawn: a figure and its interval are the same in every run on the same scores."""

F64 = NDArray[np.float64]

DRAWS = 2000
"""Enough for quantiles whose own noise is small beside the interval's width."""
_WIDEST = 3.0
_CHUNK = 1 << 21


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds; NaN bounds are not estimable."""

    value: float
    low: float
    high: float


def _ratio_and_error(counts: F64, x: F64, w: F64) -> tuple[F64, F64]:
    """r and its jackknife standard error for each row of cluster counts f64[draws, n]; a cluster drawn twice
    is two."""
    n = counts.shape[1]
    weight = (counts @ w)[:, None]
    ratio = (counts @ x)[:, None] / weight
    # A draw of one cluster alone leaves nothing when that is left out; it is dropped by the caller.
    left = np.where(weight > w, weight - w, np.inf)
    change = (x - ratio * w) / left
    return ratio[:, 0], np.sqrt((counts * change**2).sum(axis=1) * (n - 1) / n)


def resampled_counts(rng: np.random.Generator, clusters: int, draws: int) -> F64:
    """How often each cluster is drawn, f64[draws, clusters]."""
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws).astype(np.float64)


def _draws_of(rng: np.random.Generator, clusters: int, draws: int) -> Iterator[F64]:
    """So many draws in pieces, those of one cluster alone left out."""
    step = max(1, _CHUNK // clusters)
    for start in range(0, draws, step):
        counts = resampled_counts(rng, clusters, min(step, draws - start))
        yield counts[(counts > 0).sum(axis=1) > 1]


def _studentised(x: F64, w: F64, drawn: Iterable[F64], *, log: bool) -> F64:
    """t* of draws that hold at least two different clusters."""
    value = x.sum() / w.sum()
    parts = []
    for counts in drawn:
        ratio, error = _ratio_and_error(counts, x, w)
        usable = (error > 0) & ((ratio > 0) if log else np.isfinite(ratio))
        ratio, error = ratio[usable], error[usable]
        parts.append(np.log(ratio / value) * ratio / error if log else (ratio - value) / error)
    return np.concatenate(parts)


def ratio_interval(
    x: F64,
    w: F64,
    rng: np.random.Generator,
    *,
    scale: Literal["plain", "log"] = "plain",
    worse: Literal["more", "less", ""] = "",
    level: float = 0.95,
    draws: int = DRAWS,
    counts: F64 | None = None,
) -> Interval:
    """sum(x) / sum(w) with a bootstrap-t interval that resamples clusters.

    Args:
        x: f64[clusters], what is summed in each cluster.
        w: f64[clusters], its weight there (tokens), positive.
        rng: the randomness; the same generator state gives the same interval.
        scale: ``log`` for figures that cannot be negative; a figure of zero is treated as ``plain``.
        worse: which direction is damage; that end allows for the worst cluster once more. Empty: neither.
        level: coverage.
        draws: bootstrap samples.
        counts: f64[draws, clusters], how often each sample draws each cluster, at least two of them; for many intervals
            over as many clusters. Drawn by ``rng`` by default.

    Raises:
        ValueError: no cluster, or a weight that is not positive.
    """
    if not len(x) or len(x) != len(w) or not (w > 0).all():
        raise ValueError(f"clusters must have one positive weight each. Got {len(x)} sums and weights {w!r} instead.")
    value = float(x.sum() / w.sum())
    if len(x) < 2:
        return Interval(value, np.nan, np.nan)
    log = scale == "log" and value > 0
    _, error = _ratio_and_error(np.ones((1, len(x))), x, w)
    own_error = float(error[0]) / (value if log else 1.0)
    if own_error == 0:
        return Interval(value, value, value)
    tail = (1 - level) / 2
    normal = _student(1 - tail, len(x) - 1)
    drawn = _draws_of(rng, len(x), draws) if counts is None else (counts,)
    t = _studentised(x, w, drawn, log=log)
    high_t, low_t = np.quantile(t, [1 - tail, tail]) if len(t) else (normal, -normal)
    high_t = float(np.clip(high_t, normal, _WIDEST * normal))
    low_t = float(np.clip(low_t, -_WIDEST * normal, -normal))
    down, up = high_t * own_error, -low_t * own_error
    if worse:
        again = _worst_once_more(x, w, more=worse == "more")
        change = float(np.log(again / value)) if log and again > 0 else again - value
        down, up = (down, up + change) if worse == "more" else (down - change, up)
    if log:
        return Interval(value, value * float(np.exp(-down)), value * float(np.exp(up)))
    return Interval(value, value - down, value + up)


@functools.cache
def _student(share: float, freedom: int) -> float:
    from scipy.stats import t as student

    return float(student.ppf(share, freedom))


def _worst_once_more(x: F64, w: F64, *, more: bool) -> float:
    """The figure, had the worst cluster been met once more at the mean weight."""
    rates, weight = x / w, w.mean()
    worst = rates.max() if more else rates.min()
    return float((x.sum() + worst * weight) / (w.sum() + weight))


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

    Percentile intervals are too narrow with few clusters, and for extreme quantiles: read them as a rough
    range.

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
