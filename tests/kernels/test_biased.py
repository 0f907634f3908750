"""Groups with a scale and a bias: plain rounding by its definition, and a search that is never worse."""

import numpy as np
import pytest
import torch

from bitladder.kernels import biased


def weights_of(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (0.03 * np.random.default_rng(seed).standard_t(4, (rows, columns))).astype(np.float32)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype)).float().numpy()


def plain(weights: np.ndarray, bits: int, size: int, dtype: str) -> np.ndarray:
    """Decoded weights after rounding between each group's least and largest weight, the pair rounded as stored."""
    grouped = weights.reshape(len(weights), -1, size)
    low, high = grouped.min(-1), grouped.max(-1)
    scale, bias = stored((high - low) / (2**bits - 1), dtype)[..., None], stored(low, dtype)[..., None]
    codes = np.clip(np.rint((grouped - bias) / scale), 0, 2**bits - 1)
    return (codes * scale + bias).reshape(weights.shape)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("size", [32, 128])
def test_search_never_costs_more_than_plain_rounding_as_it_is_stored(bits, dtype, size):
    weights = weights_of(70, 256, bits)
    importance = np.random.default_rng(1).uniform(0.01, 10, 256).astype(np.float32)
    found = biased.search(weights, bits, size, importance=importance, scale_dtype=dtype)
    best = found.decode(found.grid().nearest(weights))
    assert np.array_equal(stored(found.scales, dtype), found.scales)
    assert np.array_equal(stored(found.biases, dtype), found.biases)

    def cost(decoded: np.ndarray) -> np.ndarray:
        return ((decoded - weights) ** 2 * importance).reshape(70, -1, size).sum(axis=2, dtype=np.float64)

    mine, theirs = cost(best), cost(plain(weights, bits, size, dtype))
    assert (mine <= theirs * (1 + 1e-4) + 1e-12).all()
    assert mine.sum() < (0.9 if bits <= 4 else 0.97) * theirs.sum()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_on_a_grid_are_found_again(bits):
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 2**bits, (40, 128))
    codes[:, ::64], codes[:, 1::64] = 0, 2**bits - 1  # both ends occur, so the range shows the scale
    scales = stored(rng.uniform(0.01, 0.3, (40, 2)), "float16")
    biases = stored(rng.uniform(-3, 3, (40, 2)), "float16")
    original = biased.decode(codes, scales, biases, 64)
    found = biased.search(original, bits, 64)
    np.testing.assert_allclose(found.decode(found.grid().nearest(original)), original, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [0.0, 0.37, -1e-9, 3e4])
def test_groups_of_one_value(dtype, value):
    weights = np.full((3, 64), value, np.float32)
    found = biased.search(weights, 4, 32, importance=np.zeros(64, np.float32), scale_dtype=dtype)
    decoded = found.decode(found.grid().nearest(weights))
    np.testing.assert_allclose(decoded, weights, rtol=1e-2, atol=1e-4)
    assert (found.scales > 0).all()


def test_what_float16_cannot_hold_is_refused():
    large = np.full((2, 64), 1e5, np.float32)
    with pytest.raises(ValueError, match=r"a bias of 100000 does not fit float16"):
        biased.search(large, 4, 64)
    wide = np.where(np.arange(64) % 2, 4e6, -4e4).astype(np.float32)[None]
    with pytest.raises(ValueError, match=r"a scale of .* does not fit float16"):
        biased.search(wide, 4, 64)
    for held in (
        biased.search(large, 4, 64, scale_dtype="bfloat16"),
        biased.search(wide, 4, 64, scale_dtype="float32"),
    ):
        assert np.isfinite(held.scales).all()


def test_rows_are_those_of_the_whole():
    weights = weights_of(8, 64)
    found = biased.search(weights, 3, 32)
    codes = found.grid().nearest(weights)
    np.testing.assert_array_equal(found.rows(slice(2, 5)).decode(codes[2:5]), found.decode(codes)[2:5])
