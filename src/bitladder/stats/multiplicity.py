"""Many levels, one error rate: Holm's step-down correction (Scandinavian Journal of Statistics 6 (1979) 65-70).

It keeps the chance of any false finding among all levels under the stated rate, whatever their dependence,
and is never weaker than Bonferroni's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the given order; NaN (not estimable) stays NaN and does not count as a test.

    Raises:
        ValueError: a value lies outside 0 to 1.
    """
    for p in p_values:
        if not (math.isnan(p) or 0 <= p <= 1):
            raise ValueError(f"a p-value lies between 0 and 1, got {p}")
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def tarone(p_values: Sequence[float], least: Sequence[float], *, level: float = 0.05) -> list[float]:
    """Adjusted p-values of tests with few possible outcomes, corrected only for those that could find something.

    A test whose smallest possible p-value lies above ``level / k`` can never be found among k, so it takes no part in
    the correction: k is the smallest number for which at most k tests could be found at ``level / k`` (R. E. Tarone,
    Biometrics 46 (1990) 515-522). The chance of any false finding at this level stays under it.

    Args:
        p_values: of each test.
        least: the smallest p-value that each test could have given what it is conditioned on.
        level: that the adjusted values are held against.

    Returns:
        f64[tests]: p times k, at most 1; 1 for tests that take no part.
    """
    smallest = sorted(least)
    k = 1
    while k < len(smallest) and smallest[k] <= level / k:
        k += 1
    return [min(1.0, k * p) if one <= level / k else 1.0 for p, one in zip(p_values, least, strict=True)]


def beyond(distance: float, half_width: float, freedom: float = math.inf) -> float:
    """One-sided p value of a limit that lies ``distance`` from the estimate, from a 95% interval's half width.

    The interval's end lies Student's 97.5% quantile of errors away; so its width, however it was found, says
    what an error is. 0.025 when the limit is the interval's end.

    Args:
        distance: of the limit from the estimate, positive on the side where the claim holds.
        half_width: of the interval, towards the limit; 0 for a value without error, or at the end of its scale, where a
            limit cannot lie beyond it.
        freedom: degrees of freedom of the interval's quantile.
    """
    if half_width <= 0:
        return 0.0 if distance >= 0 else 1.0
    quantile = float(stats.t.ppf(0.975, freedom))
    return float(stats.t.sf(distance / half_width * quantile, freedom))
