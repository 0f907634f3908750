"""Paired tests, the correction for many levels, and what a workload can show."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from bitladder.stats.multiplicity import beyond, holm
from bitladder.stats.noninferiority import loss_interval, p_not_worse
from bitladder.stats.paired import mcnemar, sign_flip
from bitladder.stats.power import detection_power, smallest_visible_loss


def test_mcnemar_known_values():
    # statsmodels 0.15.0: mcnemar([[5, 10], [3, 5]], exact=True).pvalue
    assert mcnemar(6, 0) == pytest.approx(0.03125)
    assert mcnemar(10, 3) == pytest.approx(0.09228515625)
    assert mcnemar(0, 0) == 1.0


@pytest.mark.parametrize(("lost", "gained"), [(5, 0), (7, 2), (3, 3)])
def test_mcnemar_is_the_sum_over_equally_likely_outcomes(lost, gained):
    n = lost + gained
    extreme = [k for k in range(n + 1) if abs(k - n / 2) >= abs(lost - n / 2)]
    assert mcnemar(lost, gained) == pytest.approx(sum(math.comb(n, k) for k in extreme) / 2**n)


def test_mcnemar_directions():
    assert mcnemar(8, 1) == mcnemar(1, 8)
    assert mcnemar(8, 0) < mcnemar(7, 1)
    with pytest.raises(ValueError, match="counts"):
        mcnemar(-1, 2)


def test_sign_flip_of_ones_is_mcnemar():
    differences = [-1.0] * 6 + [1.0] + [0.0] * 20
    assert sign_flip(differences, np.random.default_rng(0)) == pytest.approx(mcnemar(6, 1))


def test_sign_flip_is_every_sign_pattern():
    d = [0.4, -0.1, 0.7, 0.25, -0.3]
    sums = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((-1, 1), repeat=5)]
    expected = sum(value >= abs(sum(d)) - 1e-12 for value in sums) / 32
    assert sign_flip(d, np.random.default_rng(0)) == pytest.approx(expected)


def test_sign_flip_beyond_exact_is_near_scipy():
    d = np.random.default_rng(3).normal(0.3, 1, size=40)
    theirs = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=9999, rng=1).pvalue
    assert sign_flip(d, np.random.default_rng(2)) == pytest.approx(theirs, abs=0.02)


def test_sign_flip_without_data_and_without_differences():
    assert math.isnan(sign_flip([], np.random.default_rng(0)))
    assert sign_flip([0.0, 0.0], np.random.default_rng(0)) == 1.0


def test_holm_known_values():
    # statsmodels 0.15.0: multipletests([0.01, 0.04, 0.03, 0.005], method="holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_keeps_what_is_not_estimable_out():
    adjusted = holm([0.01, math.nan, 0.5])
    assert adjusted[0] == pytest.approx(0.02)
    assert math.isnan(adjusted[1])
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([1.2])


def test_power_is_what_simulation_finds():
    rng = np.random.default_rng(5)
    lost, gained = rng.multinomial(60, [0.2, 0.05, 0.75], size=4000).T[:2]
    found = sum(a > b and mcnemar(int(a), int(b)) <= 0.05 for a, b in zip(lost, gained, strict=True)) / 4000
    assert detection_power(60, 0.2, 0.05) == pytest.approx(found, abs=0.025)


def test_power_by_hand():
    # Without gains the test rejects from 6 losses on: 2 * 2^-6 = 0.03, while 5 give 0.06.
    assert detection_power(25, 0.3) == pytest.approx(stats.binom.sf(5, 25, 0.3))
    assert detection_power(5, 1.0) == 0.0


def test_smallest_visible_loss():
    loss = smallest_visible_loss(25)
    assert 0.25 < loss < 0.35
    assert detection_power(25, loss) == pytest.approx(0.8, abs=1e-6)
    assert smallest_visible_loss(100) < loss < smallest_visible_loss(12)
    assert smallest_visible_loss(25, gained=0.1) > loss
    assert math.isnan(smallest_visible_loss(4))


def test_p_values_that_an_interval_tells():
    assert beyond(1.0, 1.0, 11) == pytest.approx(0.025)  # the limit is the interval's end
    assert beyond(2.0, 1.959964) == pytest.approx(stats.norm.sf(2.0), rel=1e-6)
    assert beyond(0.0, 1.0, 5) == 0.5
    assert beyond(-1.0, 1.0, 11) == pytest.approx(0.975)
    assert (beyond(0.1, 0.0), beyond(0.0, 0.0), beyond(-0.1, 0.0)) == (0.0, 0.0, 1.0)


def test_not_worse_says_what_its_interval_says():
    high = loss_interval(3, 1, 60)[1]
    assert p_not_worse(3, 1, 60, high) == pytest.approx(0.025, abs=1e-6)
    assert p_not_worse(3, 1, 60, high + 0.02) < 0.025 < p_not_worse(3, 1, 60, high - 0.02)
