"""Codes inside blocks: taken out and put back they give the same bytes, and the grid tells what they decode to."""

from dataclasses import replace

import numpy as np
import pytest

from bitladder.kernels import dequantize, quantize
from bitladder.kernels.codes import CODE_BITS, grid_of, with_codes
from bitladder.kernels.scales import units_of, with_scales


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


@pytest.mark.parametrize("qtype", CODE_BITS)
def test_scales_put_back_give_the_same_bytes(qtype, weights):
    data = quantize(weights, qtype)
    np.testing.assert_array_equal(with_scales(data, qtype, grid_of(data, qtype)), data)


@pytest.mark.parametrize("qtype", CODE_BITS)
def test_any_scales_decode_to_what_the_grid_says(qtype, weights):
    data = quantize(weights, qtype)
    grid, units = grid_of(data, qtype), units_of(data, qtype)
    rng = np.random.default_rng(2)

    def drawn(unit, least):
        counts = rng.integers(least, units.most + 1, unit.shape)
        free = rng.standard_normal(unit.shape).astype(np.float16)
        return np.where(unit != 0, unit * counts, free).astype(np.float32)

    changed = replace(grid, scale=drawn(units.scale, units.least))
    if units.has_offset:
        changed = replace(changed, offset=drawn(units.offset, 0))
    other = with_scales(data, qtype, changed)
    np.testing.assert_array_equal(grid_of(other, qtype).scale, changed.scale)
    np.testing.assert_allclose(grid_of(other, qtype).offset, changed.offset, rtol=1e-6)
    codes = grid.nearest(dequantize(data, qtype))
    np.testing.assert_allclose(dequantize(other, qtype), changed.values(codes), rtol=1e-5, atol=1e-6)
