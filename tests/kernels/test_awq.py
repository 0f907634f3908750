"""AWQ: what it must leave alone, what it must improve, and inputs that must not break it."""

import numpy as np
import pytest

from bitladder.kernels import awq
from reference.plain_rounding import round_to_nearest


def rounder(bits: int = 4, group_size: int = 32) -> awq.RoundTrip:
    def round_trip(weights: np.ndarray, importance: np.ndarray) -> np.ndarray:
        codes, parameters = round_to_nearest(weights, bits, group_size, sym=False)
        return parameters.decode(codes)

    return round_trip


def problem(seed: int = 0, columns: int = 64, outliers: int = 3) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(500, columns)).astype(np.float32)
    x[:, rng.choice(columns, outliers, replace=False)] *= 30
    return x, [
        rng.normal(size=(80, columns)).astype(np.float32),
        rng.normal(size=(40, columns)).astype(np.float32),
    ]


def test_the_closed_form_is_the_error_of_the_outputs():
    x, weights = problem()
    found = awq.prepare(x.T @ x, weights, [rounder()] * 2)
    rows = np.concatenate([part[::4] for part in weights])
    rounded = rounder()(rows * found.factors, None) / found.factors
    direct = ((x @ (rounded - rows).T) ** 2).sum() / ((x @ rows.T) ** 2).sum()
    assert found.loss == pytest.approx(direct, rel=1e-3)


def test_outlier_channels_are_scaled_up_and_the_error_falls():
    x, weights = problem()
    found = awq.prepare(x.T @ x, weights, [rounder()] * 2)
    loud = np.argsort(np.abs(x).max(axis=0))[-3:]
    assert found.loss < 0.7 * found.plain_loss
    assert found.factors[loud].min() > np.delete(found.factors, loud).max()


def test_folding_changes_nothing_before_rounding():
    rng = np.random.default_rng(1)
    x, (weight, _) = problem()
    norm, bias = rng.normal(size=64).astype(np.float32), rng.normal(size=(64, 10)).astype(np.float32)
    factors = awq.prepare(x.T @ x, [weight], [rounder()]).factors
    scales = awq.Scales(factors, 0, False, 0, 0)
    np.testing.assert_allclose(
        awq.apply(scales, weight) @ awq.absorb(factors, norm), weight @ norm, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        awq.apply(scales, weight) @ awq.absorb(factors, bias), weight @ bias, rtol=1e-4, atol=1e-4
    )


def test_the_search_does_not_depend_on_units():
    """Louder inputs by a factor, in any direction of the same problem, choose the same scales."""
    x, weights = problem()
    one = awq.prepare(x.T @ x, weights, [rounder()] * 2)
    louder = awq.prepare(x.T @ x * 1e4, weights, [rounder()] * 2)
    np.testing.assert_allclose(one.factors, louder.factors, rtol=1e-4)


def test_tied_channels_share_a_scale():
    x, weights = problem()
    tied = np.arange(64) // 2
    factors = awq.prepare(x.T @ x, weights, [rounder()] * 2, tied=tied).factors
    assert (factors[::2] == factors[1::2]).all()
    assert len(np.unique(factors)) > 1


@pytest.mark.parametrize("case", ["silent", "dead channels", "huge", "constant weights"])
def test_nothing_turns_into_nan(case):
    x, weights = problem()
    if case == "silent":
        x = np.zeros_like(x)
    elif case == "dead channels":
        x[:, 5:20] = 0
    elif case == "huge":
        x = x * np.float32(1e12)
    else:
        weights = [np.zeros_like(part) for part in weights]
    found = awq.prepare((x.T @ x).astype(np.float32), weights, [rounder()] * 2)
    assert np.isfinite(found.factors).all()
    assert found.factors.min() > 0
    assert found.loss <= found.plain_loss


def test_inputs_that_are_nan_are_refused():
    x, weights = problem()
    x[3, 4] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        awq.prepare(x.T @ x, weights, [rounder()] * 2)


def test_smoothing_moves_outliers_into_the_weights():
    x, weights = problem()
    largest = np.abs(x).max(axis=0)
    factors = awq.smooth_factors(largest, weights)
    after = largest / factors
    assert after.max() / np.median(after) < 0.3 * largest.max() / np.median(largest)
    assert awq.smooth_factors(np.zeros(64, np.float32), weights).min() > 0
