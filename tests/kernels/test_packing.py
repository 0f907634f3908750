"""Packed words: literal golden words, an independent bit-by-bit definition, and every refusal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitladder.kernels.packing import pack, unpack, words_for
from bitladder.levels.checkpoints.awq import ORDER as AWQ_ORDER


def words_by_definition(codes: list[int], bits: int) -> list[int]:
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(count)]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@given(data=st.data())
def test_words_follow_the_definition_and_return(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=100))
    packed = pack(np.array(codes), bits)
    assert packed.dtype == np.int32
    assert packed.view(np.uint32).tolist() == words_by_definition(codes, bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


def test_golden_words():
    """Zero points 8 of symmetric 4-bit files: 0x77777777 in GPTQ's first layout (zero - 1), 0x88888888 in the
    second."""
    assert pack(np.full(8, 7), 4).view(np.uint32).tolist() == [0x77777777]
    assert pack(np.full(8, 8), 4).view(np.uint32).tolist() == [0x88888888]
    assert pack(np.arange(8), 4).view(np.uint32).tolist() == [0x76543210]
    assert pack(np.arange(8), 4, AWQ_ORDER).view(np.uint32).tolist() == [0x75316420]
    assert pack(np.array([1, 2, 3, 255]), 8).view(np.uint32).tolist() == [0xFF030201]
    # the eleventh 3-bit code straddles: two bits in the first word, one in the second
    assert pack(np.array([0] * 10 + [5] + [0] * 21), 3).view(np.uint32).tolist() == [0x40000000, 1, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_matrices_return_along_the_last_axis(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 5, 64))
    order = AWQ_ORDER if bits == 4 else None
    packed = pack(codes, bits, order)
    assert packed.shape == (3, 5, 2 * bits)
    assert (unpack(packed, bits, 64, order) == codes).all()


def test_awq_order_is_its_own_permutation_not_its_inverse():
    codes = np.random.default_rng(0).integers(0, 16, 32)
    assert (unpack(pack(codes, 4, AWQ_ORDER), 4, 32, AWQ_ORDER) == codes).all()
    assert (unpack(pack(codes, 4, AWQ_ORDER), 4, 32) != codes).any()


def test_refusals():
    with pytest.raises(ValueError, match="codes run from 0 to 16, and 4 bits hold 0 to 15"):
        pack(np.array([0, 16]), 4)
    with pytest.raises(ValueError, match="-1"):
        pack(np.array([-1, 3]), 4)
    with pytest.raises(ValueError, match="9 codes are not a multiple"):
        pack(np.arange(9), 4, AWQ_ORDER)
    with pytest.raises(ValueError, match="2 words cannot hold 8 codes"):
        unpack(np.zeros(2, np.int32), 4, 8)
    assert words_for(33, 3) == 4
