"""Codes inside blocks: taken out and put back they give the same bytes, and the grid tells what they decode to."""

import numpy as np
import pytest

from bitladder.kernels import dequantize, quantize
from bitladder.kernels.codes import CODE_BITS, grid_of, with_codes


@pytest.fixture
def weights():
    return np.random.default_rng(0).standard_t(4, (7, 512)).astype(np.float32)


@pytest.mark.parametrize("qtype", CODE_BITS)
def test_nearest_codes_of_decoded_weights_give_the_same_bytes(qtype, weights):
    data = quantize(weights, qtype)
    codes = grid_of(data, qtype).nearest(dequantize(data, qtype))
    np.testing.assert_array_equal(dequantize(with_codes(data, qtype, codes), qtype), dequantize(data, qtype))


@pytest.mark.parametrize("qtype", CODE_BITS)
def test_any_codes_decode_to_what_the_grid_says(qtype, weights):
    data = quantize(weights, qtype)
    grid = grid_of(data, qtype)
    codes = np.random.default_rng(1).integers(grid.lowest, grid.highest + 1, weights.shape).astype(np.int16)
    np.testing.assert_allclose(dequantize(with_codes(data, qtype, codes), qtype), grid.values(codes), rtol=1e-6)


@pytest.mark.parametrize("qtype", CODE_BITS)
def test_scales_stay(qtype, weights):
    data = quantize(weights, qtype)
    grid = grid_of(data, qtype)
    changed = with_codes(data, qtype, np.full(weights.shape, grid.lowest, np.int16))
    np.testing.assert_array_equal(grid_of(changed, qtype).scale, grid.scale)
    np.testing.assert_array_equal(grid_of(changed, qtype).offset, grid.offset)
