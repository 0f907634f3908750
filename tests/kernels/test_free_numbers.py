"""The numbers of blocks by themselves: blocks decode to them times what they multiply, whatever the format."""

import numpy as np
import pytest

from bitladder.formats.blocks import QTYPES
from bitladder.kernels import dequantize, quantize
from bitladder.kernels.codebook_rows import CODEBOOK
from bitladder.kernels.codes import CODE_BITS
from bitladder.kernels.free_numbers import basis_of, free_fields, numbers_of, slopes, with_numbers

FORMATS = [name for name in (*CODE_BITS, *CODEBOOK) if free_fields(name)]


def _blocks(qtype):
    weights = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    return quantize(weights, qtype, effort="fast")


def _summed(basis, numbers):
    each = basis.reshape(len(basis), len(numbers), numbers.shape[1], -1)
    return np.einsum("krbc,rbk->rbc", each, numbers).reshape(len(numbers), -1)


@pytest.mark.parametrize("qtype", FORMATS)
def test_a_block_is_its_numbers_times_what_they_multiply(qtype):
    data = _blocks(qtype)
    numbers, basis = numbers_of(data, qtype), basis_of(data, qtype)
    np.testing.assert_allclose(_summed(basis, numbers), dequantize(data, qtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("qtype", FORMATS)
def test_other_numbers_change_nothing_else(qtype):
    data = _blocks(qtype)
    numbers, basis = numbers_of(data, qtype), basis_of(data, qtype)
    other = (numbers * np.random.default_rng(1).uniform(0.5, 2, numbers.shape)).astype(np.float16).astype(np.float32)
    changed = with_numbers(data, qtype, other)
    np.testing.assert_allclose(dequantize(changed, qtype), _summed(basis, other), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(with_numbers(changed, qtype, numbers), data)


@pytest.mark.parametrize("qtype", ["Q2_K", "Q3_K", "Q4_1", "IQ2_XS"])
def test_slopes_are_those_of_the_weights(qtype):
    data = _blocks(qtype)
    numbers, basis = numbers_of(data, qtype), basis_of(data, qtype)
    gradient = np.random.default_rng(2).standard_normal(basis.shape[1:]).astype(np.float32)
    found = slopes(basis, gradient, numbers.shape[1])
    for place in np.ndindex(2, numbers.shape[1], numbers.shape[2]):
        moved = numbers.astype(np.float64).copy()
        moved[place] += 1
        by = (_summed(basis, moved) - _summed(basis, numbers.astype(np.float64))).ravel() @ gradient.ravel()
        assert found[place] == pytest.approx(by, rel=1e-4, abs=1e-4)


def test_what_no_float16_can_hold_is_stored_as_the_largest():
    data = _blocks("Q4_K")
    numbers = np.full_like(numbers_of(data, "Q4_K"), 1e9)
    assert np.isfinite(dequantize(with_numbers(data, "Q4_K", numbers), "Q4_K")).all()


@pytest.mark.parametrize("qtype", ["F16", "F32", "MXFP4", "NVFP4", "IQ1_M"])
def test_formats_without_such_numbers(qtype):
    assert QTYPES[qtype] and free_fields(qtype) == ()
