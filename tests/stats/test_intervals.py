"""Pass-rate intervals: known values, the definition evaluated slowly, and directions."""

import math

import numpy as np
import pytest
from scipy import stats

from bitladder.stats.intervals import clopper_pearson, weighted_wilson, wilson


def test_wilson_known_values():
    # statsmodels 0.15.0: proportion_confint(20, 25, method="wilson"), (0, 10, ...)
    assert wilson(20, 25) == pytest.approx((0.6086904963, 0.9113941531), abs=1e-9)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775327999), abs=1e-9)


def test_clopper_pearson_known_values():
    # statsmodels 0.15.0: proportion_confint(20, 25, method="beta"); no passes have the closed form 1 - 0.025^(1/n)
    assert clopper_pearson(20, 25) == pytest.approx((0.5929625677, 0.9316885360), abs=1e-9)
    assert clopper_pearson(0, 10)[1] == pytest.approx(1 - 0.025 ** (1 / 10))


@pytest.mark.parametrize(("passes", "inputs"), [(3, 17), (20, 25), (1, 2)])
def test_wilson_bounds_solve_their_definition(passes, inputs):
    z = stats.norm.ppf(0.975)
    for bound in wilson(passes, inputs):
        assert abs(passes / inputs - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / inputs))


def test_directions():
    assert wilson(50, 100).low > wilson(5, 10).low
    assert wilson(5, 10, 0.99).low < wilson(5, 10, 0.9).low
    assert clopper_pearson(5, 10).low < wilson(5, 10).low


def test_no_inputs_are_not_estimable():
    assert all(map(math.isnan, wilson(0, 0)))
    assert math.isnan(weighted_wilson([], []).value)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="between 0 and the 3 inputs, got 4"):
        wilson(4, 3)
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 3, 1.0)
    with pytest.raises(ValueError, match="one length"):
        weighted_wilson([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="weights above 0"):
        weighted_wilson([1.0, 0.0], [1.0, 0.0])


def test_equal_weights_are_the_plain_interval():
    rate = weighted_wilson([1.0] * 20 + [0.0] * 5, [2.5] * 25)
    assert (rate.low, rate.high) == pytest.approx(wilson(20, 25))
    assert rate.effective_inputs == pytest.approx(25)


def test_weights_move_the_rate_and_widen_the_interval():
    equal = weighted_wilson([1, 1, 0, 0, 1, 0, 1, 0], [1] * 8)
    uneven = weighted_wilson([1, 1, 0, 0, 1, 0, 1, 0], [5, 1, 5, 1, 1, 1, 1, 1])
    assert uneven.value == pytest.approx(8 / 16)
    assert uneven.effective_inputs < 8
    assert uneven.high - uneven.low > equal.high - equal.low


def test_all_passed_with_weights_uses_kish():
    rate = weighted_wilson([1, 1, 1], [1, 1, 4])
    assert rate.effective_inputs == pytest.approx(36 / 18)
    assert rate.high == 1.0


def test_weighted_interval_covers_clustered_answers():
    """Five answers to each of 40 inputs whose own pass rates differ: pooled Wilson would cover far too little."""
    rng = np.random.default_rng(1)
    truth, covered, pooled = 0.5, 0, 0
    for _ in range(1000):
        rates = rng.beta(1, 1, size=40)
        passes = rng.binomial(5, rates)
        rate = weighted_wilson(passes / 5, np.ones(40))
        covered += rate.low <= truth <= rate.high
        low, high = wilson(int(passes.sum()), 200)
        pooled += low <= truth <= high
    assert 0.93 <= covered / 1000 <= 0.97
    assert pooled / 1000 < 0.85
