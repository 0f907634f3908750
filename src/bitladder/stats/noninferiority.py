"""How much worse one thing may be than another, judged on the same inputs.

Idea: of ``inputs`` answered by both, ``lost`` were right at the reference only and ``gained`` at the level
only. The loss is ``(lost - gained) / inputs``. Its interval must not shrink to a point when nothing was lost,
as the usual standard error does: twenty-five inputs without a change still leave room for a loss of thirteen points.

Method: the score interval for a paired difference. For a supposed loss ``delta`` the statistic is

    z(delta) = (lost - gained - n delta) / sqrt(n (2 q + delta (1 - delta)))

where ``q`` is the likeliest share of gained inputs under that supposition; the interval is where ``|z|``
stays below the normal quantile. T. Tango, "Equivalence test and confidence interval for the difference in
proportions for the paired-sample design", Statistics in Medicine 17 (1998) 891-908.

What it gives up: it is an approximation (coverage near nominal even for 10 to 20 inputs, not guaranteed by
design).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import NormalDist


def repeated_counts(differences: Iterable[float], inputs: int) -> tuple[float, float, float]:
    """Lost, gained and inputs for `loss_interval` and `p_not_worse` where each input was answered several times.

    What varies independently is the input. The counts are those of a workload of single answers whose loss is the mean
    of the differences and whose spread is theirs: sum(d^2) / sum(|d|) inputs stand for one. One more input that lost
    all is counted into that ratio, since a few small differences do not rule out an input with a large one.

    Args:
        differences: the reference's pass share minus the level's, of the inputs where they differ.
        inputs: all of them.
    """
    found = list(differences)
    one = (1 + sum(d * d for d in found)) / (1 + sum(map(abs, found)))
    lost, gained = sum(d for d in found if d > 0), -sum(d for d in found if d < 0)
    return lost / one, gained / one, inputs / one


def loss_interval(lost: float, gained: float, inputs: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of the loss, as shares of the inputs; negative is a gain. ``(nan, nan)`` for no
    inputs.

    Raises:
        ValueError: counts are negative or more than the inputs.
    """
    if min(lost, gained) < 0 or lost + gained > inputs * (1 + 1e-9):
        raise ValueError(f"lost ({lost}) and gained ({gained}) must be counts among {inputs} inputs")
    if inputs == 0:
        return math.nan, math.nan
    quantile = NormalDist().inv_cdf(0.5 + confidence / 2)
    observed = (lost - gained) / inputs
    low = _bisect(lambda delta: _score(lost, gained, inputs, delta) - quantile, -1.0, observed)
    high = _bisect(lambda delta: _score(lost, gained, inputs, delta) + quantile, observed, 1.0)
    return low, high


def p_not_worse(lost: float, gained: float, inputs: float, margin: float) -> float:
    """One-sided p value of the claim that the loss is ``margin`` or more; small when it is known to be less."""
    return NormalDist().cdf(_score(lost, gained, inputs, margin))


def inputs_needed(margin: float, loss: float, changed: float, *, confidence: float = 0.95) -> int | None:
    """Inputs at which the upper bound of the loss would be under ``margin``, if shares stay as they are.

    ``loss`` is (lost - gained) / inputs and ``changed`` (lost + gained) / inputs. None when the loss itself
    is not under the margin: more inputs would not help.
    """
    if loss >= margin or margin <= 0:
        return None
    low, high = 1, 10_000_000
    while low < high:
        middle = (low + high) // 2
        lost, gained = middle * (changed + loss) / 2, middle * (changed - loss) / 2
        quantile = NormalDist().inv_cdf(0.5 + confidence / 2)
        if _score(lost, gained, middle, margin) <= -quantile:
            high = middle
        else:
            low = middle + 1
    return low


def _score(lost: float, gained: float, inputs: float, delta: float) -> float:
    """Tango's statistic; falls as ``delta`` rises."""
    b = -lost - gained + (2 * inputs - lost + gained) * delta
    c = -gained * delta * (1 - delta)
    q = (math.sqrt(max(0.0, b * b - 8 * inputs * c)) - b) / (4 * inputs)
    variance = inputs * (2 * q + delta * (1 - delta))
    distance = lost - gained - inputs * delta
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero, to 1e-12."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2
