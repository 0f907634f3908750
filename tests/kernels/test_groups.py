"""Affine groups: plain rounding by its definition, and a search that is never worse under its own weights."""

import numpy as np
import pytest

from bitladder.kernels import groups
from reference.plain_rounding import round_to_nearest


def weights_of(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)


def test_plain_rounding_by_hand():
    """scale = max|w| / 7.5 in f32, halves to even, codes -8..7 stored with 8 added."""
    row = np.array([[7.5, -7.5, 0.5, 1.5, -0.5, 2.4]], np.float32)
    codes, parameters = round_to_nearest(row, 4, 6)
    assert parameters.scales.tolist() == [[1.0]]
    assert (codes - 8).tolist() == [[7, -8, 0, 2, 0, 2]]


def test_plain_asymmetric_rounding_reaches_both_ends():
    row = np.array([[-1.0, 2.0, 0.0, 0.6]], np.float32)
    codes, parameters = round_to_nearest(row, 4, 4, sym=False)
    assert parameters.zeros.tolist() == [[5]]
    np.testing.assert_allclose(parameters.decode(codes), [[-1.0, 2.0, 0.0, 0.6]], atol=0.11)
    assert parameters.decode(codes)[0, 2] == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 0])
def test_search_costs_less_than_plain_rounding(bits, sym, group_size):
    weights = weights_of(70, 192, bits)
    importance = np.random.default_rng(1).uniform(0.01, 10, 192).astype(np.float32)
    codes, plain = round_to_nearest(weights, bits, group_size, sym=sym)
    found = groups.search(weights, bits, group_size, sym=sym, importance=importance, scale_dtype="float32")
    best = found.decode(found.grid().nearest(weights))

    def cost(decoded: np.ndarray) -> np.ndarray:
        return ((decoded - weights) ** 2 * importance).sum(axis=1)

    assert cost(best).sum() < (0.999 if bits == 8 else 0.95) * cost(plain.decode(codes)).sum()


@pytest.mark.parametrize("sym", [True, False])
def test_weights_on_a_grid_are_found_again(sym):
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 16, (40, 128))
    truth[:, ::64], truth[:, 1::64] = 0, 15  # both ends occur, so the range shows the scale
    zeros = np.full((40, 2), 8) if sym else rng.integers(1, 15, (40, 2))
    scales = groups.store_scale(rng.uniform(0.01, 0.3, (40, 2)).astype(np.float32))
    original = groups.Affine(scales, zeros.astype(np.int16), 4, 64, 128).decode(truth)
    found = groups.search(original, 4, 64, sym=sym)
    np.testing.assert_allclose(found.decode(found.grid().nearest(original)), original, rtol=1e-3, atol=1e-6)


def test_the_larger_side_gets_the_extra_step():
    """+8 needs the code that symmetric grids have only below zero: the scale turns negative."""
    row = np.array([[8.0, 7.0, 3.0, -7.0]], np.float32)
    found = groups.search(row, 4, 4)
    assert found.scales[0, 0] == -1
    assert found.decode(found.grid().nearest(row)).tolist() == row.tolist()


def test_zeros_keep_off_zero_for_the_first_gptq_layout():
    weights = np.abs(weights_of(50, 64))  # all positive: the natural zero point is 0
    assert groups.search(weights, 4, 32, sym=False).zeros.min() == 0
    assert groups.search(weights, 4, 32, sym=False, least_zero=1).zeros.min() == 1


@pytest.mark.parametrize("sym", [True, False])
def test_constant_zero_and_silent_groups(sym):
    weights = np.zeros((3, 96), np.float32)
    weights[1, :32] = 0.25
    importance = np.ones(96, np.float32)
    importance[64:] = 0
    found = groups.search(weights, 4, 32, sym=sym, importance=importance)
    assert np.isfinite(found.scales).all()
    np.testing.assert_allclose(found.decode(found.grid().nearest(weights)), weights, atol=1e-3)


def test_stored_scales_round_like_the_dtype():
    torch = pytest.importorskip("torch")
    scales = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert (groups.store_scale(scales, "bfloat16") == torch.from_numpy(scales).bfloat16().float().numpy()).all()
    assert (groups.store_scale(scales, "float16") == scales.astype(np.float16)).all()
    assert groups.store_scale(np.array([1e-30, -1e-30], np.float32)).tolist() == [2.0**-14, -(2.0**-14)]
    with pytest.raises(ValueError, match="float8"):
        groups.store_scale(scales, "float8")


@pytest.mark.parametrize("sym", [True, False])
def test_rows_are_searched_a_few_at_a_time(sym, monkeypatch):
    """Whatever rows stand beside them, the last few included."""
    weights = weights_of(70, 96)
    whole = groups.search(weights, 4, 32, sym=sym)
    monkeypatch.setattr(groups, "_SEARCHED_AT_ONCE", 96 * 33)
    parts = groups.search(weights, 4, 32, sym=sym)
    np.testing.assert_array_equal(parts.scales, whole.scales)
    np.testing.assert_array_equal(parts.zeros, whole.zeros)
