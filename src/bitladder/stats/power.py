"""What a workload of a given size can show at all.

``detection_power`` is the chance that McNemar's exact two-sided test finds a loss: with shares ``lost`` and
``gained`` of inputs that change, the number that changes is Binomial(n, lost + gained), and of those the
losses are Binomial(changed, lost / (lost + gained)); the test rejects from a critical number of losses on.
``smallest_visible_loss`` turns it round. It says the sentence a user needs: "with 25 inputs a loss under 30
points will usually go unseen".
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats


def detection_power(inputs: int, lost: float, gained: float = 0.0, *, alpha: float = 0.05) -> float:
    """Chance that a loss of ``lost - gained`` is found (p-value at most ``alpha``, in the direction of a loss).

    Raises:
        ValueError: shares that are negative or sum to more than 1.
    """
    if min(lost, gained) < 0 or lost + gained > 1:
        raise ValueError(f"lost and gained are shares of the inputs, got {lost} and {gained}")
    if inputs < 1 or lost == 0:
        return 0.0
    changed = np.arange(inputs + 1)
    # Two-sided exact p-value of c losses among k changed, c > k / 2, is 2 P(Bin(k, 1/2) >= c); the least c
    # with p <= alpha:
    critical = stats.binom.isf(alpha / 2, changed, 0.5) + 1
    reject = np.where(critical > changed, 0.0, stats.binom.sf(critical - 1, changed, lost / (lost + gained)))
    return float(stats.binom.pmf(changed, inputs, lost + gained) @ reject)


def smallest_visible_loss(inputs: int, gained: float = 0.0, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest loss (as a share) that is found with chance ``power``; NaN where even losing all is not enough.

    ``gained`` is the share of inputs that change for the better at the same time: noise in the answers, which
    hides losses.
    """
    highest = 1 - gained
    if detection_power(inputs, highest, gained, alpha=alpha) < power:
        return math.nan
    low, high = 0.0, highest
    for _ in range(40):
        middle = (low + high) / 2
        if detection_power(inputs, middle, gained, alpha=alpha) < power:
            low = middle
        else:
            high = middle
    return high - gained
