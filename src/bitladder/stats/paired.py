"""Tests of a level against the reference on the same inputs.

``mcnemar`` looks only at the inputs where the two differ: if neither were better, each of them would be a
loss with probability one half, so the p-value is the exact two-sided binomial one (McNemar, Psychometrika 12
(1947) 153-157, in its exact form). ``sign_flip`` is for differences of any size (several answers per input,
weights, similarity): if neither were better, each difference would be as likely with the other sign (Fisher's
permutation argument).
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

EXACT_UP_TO = 12
"""Differences that are not zero up to which ``sign_flip`` tries every combination of signs."""
DRAWS = 9999


@functools.cache
def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of McNemar's exact test; 1 when nothing differs.

    Raises:
        ValueError: a count is negative.
    """
    if min(lost, gained) < 0:
        raise ValueError(f"lost and gained must be counts, got {lost} and {gained}")
    if lost + gained == 0:
        return 1.0
    return float(stats.binomtest(lost, lost + gained, 0.5).pvalue)


@functools.cache
def more_often(appeared: int, vanished: int) -> float:
    """One-sided p-value of the sign test: chance of so many inputs that something appeared in, among those where it
    appeared or vanished, if either were as likely; 1 when nothing differs.

    Raises:
        ValueError: a count is negative.
    """
    if min(appeared, vanished) < 0:
        raise ValueError(f"appeared and vanished must be counts, got {appeared} and {vanished}")
    if appeared == 0:
        return 1.0
    return float(stats.binom.sf(appeared - 1, appeared + vanished, 0.5))


def sign_flip(differences: ArrayLike, rng: np.random.Generator) -> float:
    """Two-sided p-value of the paired permutation test of mean difference 0; NaN without any difference to look at.

    With up to ``EXACT_UP_TO`` differences that are not zero the value is exact; beyond, ``DRAWS`` random sign
    patterns are drawn and the observed one is counted among them, so that the test keeps its level.

    Args:
        differences: f64[inputs], level minus reference.
        rng: draws the sign patterns.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.size == 0:
        return math.nan
    d = d[d != 0]  # a zero is zero under either sign
    if d.size == 0:
        return 1.0
    observed = abs(d.sum()) * (1 - 1e-12)  # sums in another order differ in their last bits
    if d.size <= EXACT_UP_TO:
        patterns = (np.arange(2**d.size)[:, None] >> np.arange(d.size)) & 1
        return float(np.mean(np.abs((1 - 2.0 * patterns) @ d) >= observed))
    signs = rng.integers(0, 2, size=(DRAWS, d.size), dtype=np.int8)
    extreme = np.count_nonzero(np.abs((1 - 2.0 * signs) @ d) >= observed)
    return float((extreme + 1) / (DRAWS + 1))


def differs(first: ArrayLike, second: ArrayLike, weights: ArrayLike, *, confidence: float = 0.95) -> bool:
    """Whether two weighted means over the same units differ by more than chance: Student's test of the paired
    differences, whose error is that of a ratio of sums.

    Args:
        first: f64[units].
        second: f64[units], the same units.
        weights: f64[units], positive.
        confidence: one minus the chance to say so of means that are equal.
    """
    w = np.asarray(weights, dtype=np.float64)
    differences = (np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)) * w
    mean = differences.sum() / w.sum()
    rest = differences - mean * w
    error = math.sqrt(w.size / (w.size - 1) * float(rest @ rest)) / float(w.sum())
    return abs(float(mean)) > _student(0.5 + confidence / 2, w.size - 1) * error


@functools.cache
def _student(share: float, freedom: int) -> float:
    return float(stats.t.ppf(share, freedom))


def ratio_interval(first: ArrayLike, second: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Ratio of two positive figures measured in the same rounds, with its interval.

    The geometric mean of the rounds' ratios, and Student's interval on their logarithms: what slows a whole round down
    falls out of its ratio.

    Args:
        first: f64[rounds], positive.
        second: the same rounds of the other.
        confidence: of the interval.

    Returns:
        Ratio first / second, low and high; with fewer than two rounds, or some that are no rates, 0 and infinity.

    Raises:
        ValueError: the numbers of rounds differ.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"rounds must be pairs, got {a.size} and {b.size}")
    if a.size == 0 or not all(np.all((one > 0) & (one < np.inf)) for one in (a, b)):
        return math.nan, 0.0, math.inf
    logs = np.log(a) - np.log(b)
    ratio = math.exp(logs.mean())
    if logs.size < 2:
        return ratio, 0.0, math.inf
    half = _student(0.5 + confidence / 2, logs.size - 1) * float(logs.std(ddof=1)) / math.sqrt(logs.size)
    return ratio, ratio * math.exp(-half), ratio * math.exp(half)


def product_interval(*factors: tuple[float, float, float]) -> tuple[float, float, float]:
    """Product of positive figures that were measured independently of each other, with its interval.

    On the logarithmic scale, where the ends of a sum lie as far from it as the root of the summed squares of its parts'
    distances from theirs (MOVER; Zou and Donner, Statistics in Medicine 27 (2008) 1693-1702).

    Args:
        factors: value, low and high of each; low may be 0 and high infinity.

    Returns:
        Product, low and high.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.asarray(factors, dtype=np.float64))
        value, low, high = logs[:, 0], logs[:, 1], logs[:, 2]
        middle = value.sum()
        ends = middle - np.sqrt(((value - low) ** 2).sum()), middle + np.sqrt(((high - value) ** 2).sum())
        return float(np.exp(middle)), float(np.exp(ends[0])), float(np.exp(ends[1]))


def ratio_above_one(first: ArrayLike, second: ArrayLike) -> float:
    """P-value of "the ratio of two positive figures is at most 1" (Student's test on the logarithms of paired ratios,
    one-sided); NaN where nothing can be told: fewer than two pairs, or some that are no rates.

    Args:
        first: f64[rounds], positive.
        second: the same rounds of the other.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.size < 2 or not all(np.all((one > 0) & (one < np.inf)) for one in (a, b)):
        return math.nan
    logs = np.log(a) - np.log(b)
    error = float(logs.std(ddof=1)) / math.sqrt(logs.size)
    if error == 0:
        return 0.0 if logs[0] > 0 else 1.0
    return float(stats.t.sf(float(logs.mean()) / error, logs.size - 1))
