"""Many levels, one error rate: Holm's step-down correction (Scandinavian Journal of Statistics 6 (1979) 65-70).

It keeps the chance of any false finding among all levels under the stated rate, whatever their dependence,
and is never weaker than Bonferroni's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


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
