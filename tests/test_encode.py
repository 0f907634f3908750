"""Checkpoint arrays against a reader that shares no code, and against golden words."""

import numpy as np
import pytest

from bitladder.kernels import groups
from bitladder.levels.checkpoint import parse_checkpoint
from bitladder.levels.encode import decode, encode
from reference import slow_checkpoint as slow

LEVELS = [
    "GPTQ-4bit-g32", "GPTQ-3bit-g64", "GPTQ-2bit-g32", "GPTQ-8bit-row", "GPTQ-4bit-g32-asym", "GPTQ-3bit-g32-asym",
    "GPTQ-4bit-g32-v2", "AWQ-4bit-g32", "AWQ-4bit-g64-sym", "AWQ-4bit-g32-ct", "GPTQ-3bit-g32-ct",
    "INT8-W8A16", "INT8-W8A8",
]  # fmt: skip


def made(name: str, rows: int = 32, columns: int = 64) -> tuple:
    level = parse_checkpoint(name)
    rng = np.random.default_rng(7)
    top = 2**level.bits
    shape = (rows, columns // (level.group_size or columns))
    zeros = np.full(shape, top // 2) if level.sym else rng.integers(1, top, shape)
    scales = groups.store_scale(rng.uniform(0.01, 0.2, shape).astype(np.float32) * rng.choice([-1, 1], shape))
    parameters = groups.Affine(scales, zeros.astype(np.int16), level.bits, level.group_size, columns)
    return level, rng.integers(0, top, (rows, columns)).astype(np.int16), parameters


@pytest.mark.parametrize("name", LEVELS)
def test_an_independent_reader_sees_the_same_weights(name):
    level, codes, parameters = made(name)
    arrays = encode(level, codes, parameters)
    if level.layout.startswith("gptq"):
        read = slow.gptq(arrays, level.bits, level.layout == "gptq")
    elif level.layout == "awq":
        read = slow.awq(arrays, level.group_size)
    elif level.layout == "pack-quantized":
        read = slow.pack_quantized(arrays, level.bits, level.group_size)
    else:
        read = slow.int_quantized(arrays)
    np.testing.assert_array_equal(read, parameters.decode(codes))
    np.testing.assert_array_equal(decode(level, arrays, codes.shape), read)


@pytest.mark.parametrize("name", LEVELS)
def test_one_wrong_bit_is_seen(name):
    level, codes, parameters = made(name)
    arrays = encode(level, codes, parameters)
    first = next(iter(arrays))
    damaged = arrays[first].copy()
    damaged.reshape(-1)[3] ^= 1
    assert (decode(level, {**arrays, first: damaged}, codes.shape) != parameters.decode(codes)).sum() == 1


def test_golden_zero_words():
    """Symmetric 4 bits: 0x77777777 in GPTQ's first layout, 0x88888888 in its second and in AWQ; 8 bits:
    0x7f7f7f7f."""
    words = {
        "GPTQ-4bit-g32": 0x77777777,
        "GPTQ-4bit-g32-v2": 0x88888888,
        "AWQ-4bit-g32-sym": 0x88888888,
        "GPTQ-8bit-row": 0x7F7F7F7F,
    }
    for name, word in words.items():
        level, codes, parameters = made(name)
        assert (encode(level, codes, parameters)["qzeros"].view(np.uint32) == word).all()


def test_shapes_and_dtypes_of_each_layout():
    shapes = {name: {k: (v.shape, v.dtype.name) for k, v in encode(*made(name, 64, 128)).items()} for name in LEVELS}
    assert shapes["GPTQ-4bit-g32"] == {
        "qweight": ((16, 64), "int32"), "scales": ((4, 64), "float16"), "qzeros": ((4, 8), "int32"),
        "g_idx": ((128,), "int32"),
    }  # fmt: skip
    assert shapes["AWQ-4bit-g32"] == {
        "qweight": ((128, 8), "int32"), "scales": ((4, 64), "float16"), "qzeros": ((4, 8), "int32"),
    }  # fmt: skip
    assert shapes["GPTQ-3bit-g32-ct"] == {
        "weight_packed": ((64, 12), "int32"), "weight_scale": ((64, 4), "float32"), "weight_shape": ((2,), "int64"),
    }  # fmt: skip
    assert shapes["AWQ-4bit-g32-ct"]["weight_zero_point"] == ((8, 4), "int32")
    assert shapes["INT8-W8A8"] == {"weight": ((64, 128), "int8"), "weight_scale": ((64, 1), "float32")}


def test_scales_of_another_grouping_are_refused():
    level, codes, parameters = made("GPTQ-4bit-g32")
    with pytest.raises(ValueError, match=r"scales of shape \(32, 2\), expected \(32, 1\)"):
        decode(parse_checkpoint("GPTQ-4bit-g64"), encode(level, codes, parameters), codes.shape)
