"""Intervals for a share of passes.

``wilson`` inverts the score test: its bounds are the rates p0 for which ``|p - p0| = z sqrt(p0 (1 - p0) /
n)``. It holds its level on average over p and is what tables show. ``clopper_pearson`` inverts the exact
binomial test: it never covers less than its level and is wider. ``weighted_wilson`` is Wilson's interval at
the *effective* number of inputs, for inputs that count differently or were asked several times: answers to
one input are no independent evidence.

Sources: Wilson, JASA 22 (1927) 209-212; Clopper and Pearson, Biometrika 26 (1934) 404-413; Korn and Graubard,
Survey Methodology 24 (1998) 193-201 for the effective number. No inputs: NaN, "not estimable".
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Bounds(NamedTuple):
    """Low and high end of an interval; NaN when not estimable."""

    low: float
    high: float


class Rate(NamedTuple):
    """A share with its interval and the number of independent inputs that this much certainty amounts to."""

    value: float
    low: float
    high: float
    effective_inputs: float


def wilson(passes: int, inputs: int, confidence: float = 0.95) -> Bounds:
    """Wilson's score interval of a pass rate.

    Raises:
        ValueError: more passes than inputs, or a confidence outside 0 to 1.
    """
    return _binomial(passes, inputs, confidence, "wilson")


def clopper_pearson(passes: int, inputs: int, confidence: float = 0.95) -> Bounds:
    """The exact interval of a pass rate.

    Raises:
        ValueError: more passes than inputs, or a confidence outside 0 to 1.
    """
    return _binomial(passes, inputs, confidence, "exact")


def weighted_wilson(shares: ArrayLike, weights: ArrayLike, confidence: float = 0.95) -> Rate:
    """Weighted mean of per-input pass shares, with Wilson's interval at the effective number of inputs.

    With ``p = sum(w x) / sum(w)`` the effective number is ``p (1 - p) / var(p)``, where ``var(p)`` is the
    linearised ``sum(w^2 (x - p)^2) / sum(w)^2``. Equal weights and one answer each give the plain Wilson
    interval. Where all inputs agree there is no spread to learn from, and the number is Kish's ``sum(w)^2 /
    sum(w^2)``.

    Args:
        shares: f64[inputs], the share of an input's answers that passed, each 0 to 1.
        weights: f64[inputs], above 0.
        confidence: of the interval.

    Raises:
        ValueError: shares outside 0 to 1, weights not above 0, or lengths that differ.
    """
    x, w = np.asarray(shares, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if x.shape != w.shape or x.ndim != 1:
        raise ValueError(f"shares and weights must be two lists of one length, got {x.shape} and {w.shape}")
    if x.size == 0:
        return Rate(math.nan, math.nan, math.nan, 0.0)
    if np.any((x < 0) | (x > 1)) or np.any(w <= 0):
        raise ValueError("shares must lie between 0 and 1 and weights above 0")
    p = float(w @ x / w.sum())
    variance = float((w**2) @ (x - p) ** 2 / w.sum() ** 2)
    kish = float(w.sum() ** 2 / (w @ w))
    n = p * (1 - p) / variance if variance > 0 else kish
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Rate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def _binomial(passes: int, inputs: int, confidence: float, method: Literal["wilson", "exact"]) -> Bounds:
    if not 0 <= passes <= inputs:
        raise ValueError(f"passes must lie between 0 and the {inputs} inputs, got {passes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if inputs == 0:
        return Bounds(math.nan, math.nan)
    interval = stats.binomtest(passes, inputs).proportion_ci(confidence, method)
    return Bounds(float(interval.low), float(interval.high))
