"""Looking at the evidence as often as one likes, without paying for it in false findings.

The idea is a bet. Against the claim "the mean of values in [0, 1] is at most m" someone starts with a wealth
of 1 and before each value stakes a fraction of it:

    wealth_t = wealth_{t-1} * (1 + lambda (x_t - m)),   0 <= lambda < 1 / m.

If the claim is true no bet is favourable, so the wealth is a supermartingale, and by Ville's inequality it ever
reaches 1 / alpha with probability at most alpha, however often one looks and whenever one stops. So: stop when it
does, and reject the claim. We hold a fixed portfolio of four stakes lambda and add their wealths; the best stake need
not be known. The claim "at least m" is bet against with 1 - x. Source: Waudby-Smith and Ramdas, JRSS B 86 (2024)
1-27.

Exact for bounded values (passes, pass shares, top-1 agreement). KL divergence has no bound: where a run looks at its
intervals more than once, each look spends a part of the error rate (``spent``), planned by how much of the text it saw.
"""

from __future__ import annotations

import math
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from bitladder.stats.intervals import Bounds

F64 = NDArray[np.float64]

STAKES = np.array([0.05, 0.2, 0.4, 0.8])
"""As shares of the largest stake that cannot lose more than everything. Few, because each further one costs
its share of the starting wealth; the large ones win where levels differ on few inputs, the small ones where
on many.
"""


class Standing(StrEnum):
    """What is known of a level against a bar."""

    MEETS = "meets"
    FAILS = "fails"
    UNLIKELY = "unlikely"
    """Not known to fail, but to go on would hardly ever show that it meets."""
    OPEN = "open"


def spent(share: float, alpha: float = 0.05) -> float:
    """How much of an error rate all looks up to a share of the evidence, 0 to 1, may use: ``alpha * share**2``.

    A look at ``share`` has an interval of coverage ``1 - (spent(share) - spent(the look before))``. By Bonferroni's
    inequality the chance that any interval of any look misses is at most ``alpha``, whatever the figure, and whenever
    one stops. Early looks use little, so the last one's interval is hardly wider than a single look's. Source: Kim and
    DeMets, Biometrika 74 (1987) 149-154, with power 2.

    Raises:
        ValueError: the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share lies between 0 and 1, got {share}")
    return alpha * share**2


def log_wealth_above(values: ArrayLike, mean: float) -> F64:
    """Logarithm of the wealth after each value of a bet against "the mean is at most ``mean``", f64[n].

    Args:
        values: f64[n], each in 0 to 1.
        mean: the claimed mean.

    Raises:
        ValueError: values outside 0 to 1.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size and (x.min() < 0 or x.max() > 1):
        raise ValueError(f"values must lie between 0 and 1, got {x.min():g} to {x.max():g}")
    if mean >= 1:
        return np.zeros(x.size)  # every claim of 1 or more holds for values up to 1
    if mean < 0:
        return np.full(x.size, np.inf)
    stakes = STAKES / mean if mean > 0 else STAKES * 1e6
    growth = np.cumsum(np.log1p(stakes[:, None] * (x - mean)[None, :]), axis=1)
    wealth: F64 = logsumexp(growth, axis=0) - math.log(len(stakes))
    return wealth


def standing(differences: ArrayLike, margin: float, alpha: float = 0.05, *, beta: float | None = None) -> Standing:
    """Whether a level's mean difference from the reference is known to be better or worse than ``-margin``.

    Valid however often it is asked, and what was known once stays known. A level that fails is called
    ``meets`` with probability at most ``alpha``, and one that meets is called ``fails`` with at most
    ``alpha``, ``unlikely`` with at most ``beta``.

    Args:
        differences: f64[n] in the order they were measured, level minus reference, each in -1 to 1.
        margin: the loss that the bar allows, as a share.
        alpha: error rate of ``meets`` and ``fails``.
        beta: error rate of ``unlikely``; None never says it.
    """
    x = (np.asarray(differences, dtype=np.float64) + 1) / 2
    bar = (1 - margin) / 2
    above, below = log_wealth_above(x, bar), log_wealth_above(1 - x, 1 - bar)
    meets, fails = _first(above, alpha), _first(below, alpha)
    doubted = _first(below, beta) if beta is not None else x.size
    first = min(meets, fails, doubted)
    if first == x.size:
        return Standing.OPEN
    if first == meets:
        return Standing.MEETS
    return Standing.FAILS if fails < x.size else Standing.UNLIKELY


def _first(log_wealth: F64, alpha: float) -> int:
    """The first place where the wealth reaches 1 / alpha; the length when it never does."""
    reached = log_wealth >= -math.log(alpha)
    return int(np.argmax(reached)) if reached.any() else log_wealth.size


def confidence_sequence(values: ArrayLike, alpha: float = 0.05, *, low: float = 0.0, high: float = 1.0) -> Bounds:
    """An interval of the mean of bounded values that may be looked at after every value; NaN for no values.

    The claims "at most m" that are not rejected reach down to ``low``'s bound, those of "at least m" up to
    the high one; each side has ``alpha / 2``. Bounds of earlier looks hold too, so the tightest are returned.

    Args:
        values: f64[n] between ``low`` and ``high``.
        alpha: chance that the mean ever leaves the interval.
        low: least possible value.
        high: greatest possible value.
    """
    x = (np.asarray(values, dtype=np.float64) - low) / (high - low)
    if x.size == 0:
        return Bounds(math.nan, math.nan)
    least = _reach(x, alpha / 2)
    greatest = 1 - _reach(1 - x, alpha / 2)
    return Bounds(low + least * (high - low), low + greatest * (high - low))


def _reach(x: F64, alpha: float) -> float:
    """The largest m for which "the mean is at most m" was rejected at some time; 0 if none was."""
    below, above = 0.0, 1.0
    for _ in range(30):
        middle = (below + above) / 2
        if np.max(log_wealth_above(x, middle)) >= -math.log(alpha):
            below = middle
        else:
            above = middle
    return below
