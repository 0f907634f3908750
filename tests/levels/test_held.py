"""What a type cannot hold is refused with the tensor, the weight and where the type ends; what it can comes back."""

import numpy as np
import pytest

from bitladder.errors import BadWeights
from bitladder.formats.blocks import QTYPES
from bitladder.kernels import QUANTIZABLE, dequantize, quantize
from bitladder.kernels.codebook_rows import CODEBOOK
from bitladder.kernels.reach import reach_of
from bitladder.levels.held import require_held, vanishes

ENDING = sorted(QUANTIZABLE - {"F32"})


def with_one(value: float, qtype: str) -> np.ndarray:
    weights = np.zeros((2, 2 * max(32, QTYPES[qtype].block_size)), np.float32)
    weights[1, 5] = value
    return weights


@pytest.mark.parametrize("qtype", ENDING)
def test_a_weight_at_the_end_comes_back_and_one_beyond_is_refused(qtype):
    reach = reach_of(qtype)
    for end in (reach.lowest, reach.highest):
        weights = with_one(end, qtype)
        assert require_held(weights, [qtype], "w") == abs(np.float32(end))
        if qtype not in CODEBOOK:  # whose entries bear eight weights at once
            assert dequantize(quantize(weights, qtype), qtype)[1, 5] == pytest.approx(end, rel=0.02)
        if abs(end) < 1e38:
            beyond = with_one(1.01 * end, qtype)
            with pytest.raises(
                BadWeights, match=rf"w holds a weight of .*; {qtype} ends at {end:.6g}\.".replace("+", r"\+")
            ):
                require_held(beyond, ["F32", qtype], "w")
            assert abs(dequantize(quantize(beyond, qtype), qtype)[1, 5]) < 1.01 * abs(end)


def test_types_that_reach_further_are_named():
    with pytest.raises(BadWeights) as error:
        require_held(with_one(-1e7, "Q4_0"), ["Q4_0"], "w")
    assert error.value.do.startswith("Ask for a level in which this tensor has one of: ")
    named = error.value.do.rstrip(".").partition(": ")[2].split(", ")
    assert {"BF16", "F32", "MXFP4", "Q6_K"} <= set(named)
    assert not {"F16", "Q4_0", "Q4_1", "Q8_0"} & set(named)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_named_by_its_place(value):
    with pytest.raises(BadWeights, match=r"w holds -?(nan|inf) in row 11, column 5\."):
        require_held(with_one(value, "Q8_0"), [], "w", 10)


@pytest.mark.parametrize("qtype", sorted(QUANTIZABLE))
def test_a_tensor_of_which_nothing_is_left(qtype):
    for size, gone in ((1e-12, qtype not in ("F32", "BF16", "MXFP4")), (1e-3, False)):
        weights = np.full((2, 512), size, np.float32)
        assert vanishes(quantize(weights, qtype), qtype, size) == gone
    assert not vanishes(quantize(np.zeros((2, 512), np.float32), qtype), qtype, 0.0)
