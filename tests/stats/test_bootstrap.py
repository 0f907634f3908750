"""Intervals for sums over clusters: known answers, an independent definition, and coverage by simulation."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from bitladder.stats.bootstrap import quantile_interval, ratio_interval


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_estimate_is_the_ratio_of_sums_not_the_mean_of_ratios():
    found = ratio_interval(np.array([1.0, 30.0]), np.array([10.0, 100.0]), rng())
    assert found.value == pytest.approx(31 / 110)
    assert found.low < found.value < found.high


def test_one_cluster_is_not_estimable():
    found = ratio_interval(np.array([3.0]), np.array([10.0]), rng())
    assert found.value == 0.3
    assert np.isnan([found.low, found.high]).all()
    quantile = quantile_interval(np.array([1.0, 2.0, 3.0]), np.zeros(3, np.int64), 0.5, rng())
    assert quantile.value == 2.0
    assert np.isnan([quantile.low, quantile.high]).all()


def test_two_equal_weights_give_students_interval():
    """With two clusters of equal weight the jackknife error is the usual one and the bootstrap adds
    nothing."""
    found = ratio_interval(np.array([1.0, 3.0]), np.ones(2), rng())
    half = scipy_stats.t.ppf(0.975, 1) * np.std([1.0, 3.0], ddof=1) / np.sqrt(2)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_many_clusters_give_students_interval_of_the_mean():
    x = rng(1).normal(5, 1, 2000)
    found = ratio_interval(x, np.ones(2000), rng())
    expected = scipy_stats.t.interval(0.95, 1999, x.mean(), scipy_stats.sem(x))
    assert (found.low, found.high) == (
        pytest.approx(expected[0], abs=0.01),
        pytest.approx(expected[1], abs=0.01),
    )


def test_error_equals_leaving_each_cluster_out():
    """The jackknife by its definition, cluster by cluster; 20 even clusters, so that Student's floor is what
    binds."""
    x, w = rng(2).normal(5, 1, 20), np.linspace(0.99, 1.01, 20)
    left = np.array([(x.sum() - x[at]) / (w.sum() - w[at]) for at in range(20)])
    error = np.sqrt(19 / 20 * ((left - x.sum() / w.sum()) ** 2).sum())
    found = ratio_interval(x, w, rng())
    floor = scipy_stats.t.ppf(0.975, 19) * error
    assert found.value - found.low >= floor * (1 - 1e-9)
    assert found.high - found.value >= floor * (1 - 1e-9)
    assert found.high - found.low < 2.6 * floor


def test_no_spread_is_a_point_and_positive_figures_stay_positive():
    same = ratio_interval(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]), rng())
    assert (same.low, same.high) == (2.0, 2.0)
    zero = ratio_interval(np.zeros(3), np.ones(3), rng(), scale="log")
    assert (zero.value, zero.low, zero.high) == (0.0, 0.0, 0.0)
    skewed = ratio_interval(np.array([0.001, 0.002, 3.0]), np.ones(3), rng(), scale="log")
    assert 0 < skewed.low < skewed.value < skewed.high


def test_same_generator_same_interval():
    x = rng(3).exponential(1, 9)
    one, again, other = (ratio_interval(x, np.ones(9), rng(seed), scale="log") for seed in (5, 5, 6))
    assert one == again != other


def test_weights_must_be_positive():
    with pytest.raises(ValueError, match=r"one positive weight each. Got 2 sums"):
        ratio_interval(np.ones(2), np.array([1.0, 0.0]), rng())


def test_quantile_is_the_smallest_value_that_covers_the_share():
    values, clusters = np.array([5.0, 1.0, 4.0, 2.0, 3.0]), np.array([0, 0, 1, 1, 1])
    for q, expected in ((0.2, 1.0), (0.5, 3.0), (0.6, 3.0), (0.99, 5.0), (1.0, 5.0)):
        assert quantile_interval(values, clusters, q, rng()).value == expected


def test_quantile_resamples_clusters_whole():
    """Two documents, one all low and one all high: the median of a draw is one or the other, never
    between."""
    values, clusters = np.repeat([1.0, 9.0], 50), np.repeat([0, 1], 50)
    found = quantile_interval(values, clusters, 0.5, rng())
    assert (found.low, found.high) == (1.0, 9.0)


def documents(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """KL-like sums of n documents: skewed tokens, a level of its own for each document, lengths that
    differ."""
    tokens = generator.integers(100, 350, n)
    level = generator.normal(-3, 0.5, n)
    sums = [np.exp(generator.normal(own, 1.5, count)).sum() for own, count in zip(level, tokens, strict=True)]
    return np.array(sums), tokens.astype(float)


@pytest.mark.parametrize("n", [4, 8, 16])
def test_intervals_cover_what_they_say(n: int):
    """400 simulated texts; benchmarks/interval_coverage.py has more shapes and more of them."""
    truth = np.exp(-3 + 0.5**2 / 2 + 1.5**2 / 2)
    generator = rng(n)
    intervals = [ratio_interval(*documents(generator, n), generator, scale="log", draws=500) for _ in range(400)]
    covered = np.mean([one.low <= truth <= one.high for one in intervals])
    assert 0.92 <= covered <= 0.98


def test_the_worst_cluster_once_more_moves_the_end_towards_damage():
    x, w = np.array([1.0, 2.0, 3.0, 12.0]), np.array([10.0, 10.0, 10.0, 10.0])
    plain = ratio_interval(x, w, rng())
    more, less = (ratio_interval(x, w, rng(), worse=worse) for worse in ("more", "less"))
    # Sums 18 and 40 become 18 + 12 and 40 + 10, or 18 + 1 and 40 + 10.
    assert (more.low, more.high - plain.high) == (plain.low, pytest.approx(30 / 50 - 18 / 40))
    assert (less.high, less.low - plain.low) == (plain.high, pytest.approx(19 / 50 - 18 / 40))
    logs, log_more = (ratio_interval(x, w, rng(), scale="log", worse=worse) for worse in ("", "more"))
    assert log_more.high / logs.high == pytest.approx((30 / 50) / (18 / 40))
    assert log_more.low == logs.low
