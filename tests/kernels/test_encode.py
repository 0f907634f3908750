"""Checkpoint arrays against a reader that shares no code, and against golden words."""

import numpy as np
import pytest

from bitladder.kernels import groups
from bitladder.levels.checkpoints import parse_checkpoint
from reference import slow_checkpoint as slow

LEVELS = [
    "GPTQ-4bit-g32", "GPTQ-3bit-g64", "GPTQ-2bit-g32", "GPTQ-8bit-row", "GPTQ-4bit-g32-asym", "GPTQ-3bit-g32-asym",
    "GPTQ-4bit-g32-v2", "AWQ-4bit-g32", "AWQ-4bit-g64-sym", "AWQ-4bit-g32-ct", "GPTQ-3bit-g32-ct",
    "INT8-W8A16", "INT8-W8A8",
]  # fmt: skip


def made(name: str, rows: int = 32, columns: int = 64) -> tuple:
    form = parse_checkpoint(name).format
    rng = np.random.default_rng(7)
    top = 2**form.bits
    shape = (rows, columns // (form.group_size or columns))
    zeros = np.full(shape, top // 2) if form.sym else rng.integers(1, top, shape)
    scales = groups.store_scale(rng.uniform(0.01, 0.2, shape).astype(np.float32) * rng.choice([-1, 1], shape))
    parameters = groups.Affine(scales, zeros.astype(np.int16), form.bits, form.group_size, columns)
    return form, rng.integers(0, top, (rows, columns)).astype(np.int16), parameters


@pytest.mark.parametrize("name", LEVELS)
def test_an_independent_reader_sees_the_same_weights(name):
    form, codes, parameters = made(name)
    arrays = form.encode(codes, parameters)
    if form.layout.startswith("gptq"):
        read = slow.gptq(arrays, form.bits, form.layout == "gptq")
    elif form.layout == "awq":
        read = slow.awq(arrays, form.group_size)
    elif form.layout == "pack-quantized":
        read = slow.pack_quantized(arrays, form.bits, form.group_size)
    else:
        read = slow.int_quantized(arrays)
    np.testing.assert_array_equal(read, parameters.decode(codes))
    np.testing.assert_array_equal(form.decode(arrays), read)


@pytest.mark.parametrize("name", LEVELS)
def test_one_wrong_bit_is_seen(name):
    form, codes, parameters = made(name)
    arrays = form.encode(codes, parameters)
    first = next(iter(arrays))
    damaged = arrays[first].copy()
    damaged.reshape(-1)[3] ^= 1
    assert (form.decode({**arrays, first: damaged}) != parameters.decode(codes)).sum() == 1


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
        form, codes, parameters = made(name)
        assert (form.encode(codes, parameters)["qzeros"].view(np.uint32) == word).all()


def test_shapes_and_dtypes_of_each_layout():
    shapes = {}
    for name in LEVELS:
        form, codes, parameters = made(name, 64, 128)
        shapes[name] = {k: (v.shape, v.dtype.name) for k, v in form.encode(codes, parameters).items()}
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
    form, codes, parameters = made("GPTQ-4bit-g32")
    with pytest.raises(ValueError, match=r"scales of shape \(32, 2\), expected \(32, 1\)"):
        parse_checkpoint("GPTQ-4bit-g64").format.decode(form.encode(codes, parameters))


@pytest.mark.parametrize(
    ("name", "suffix", "found"),
    [
        ("GPTQ-4bit-g32", "qweight", np.zeros(8, np.int32)),
        ("GPTQ-4bit-g32", "qweight", np.zeros((9, 32), np.int32)),
        ("GPTQ-4bit-g32", "qzeros", np.zeros((2, 5), np.int32)),
        ("GPTQ-4bit-g32", "qzeros", np.zeros((1, 4), np.int32)),
        ("GPTQ-4bit-g32", "scales", np.zeros((1, 32), np.float16)),
        ("AWQ-4bit-g32", "qweight", np.zeros((), np.int32)),
        ("AWQ-4bit-g32", "qweight", np.zeros((70, 4), np.int32)),
        ("AWQ-4bit-g32", "qzeros", None),
        ("AWQ-4bit-g32-ct", "weight_shape", np.array([32, 1 << 50])),
        ("AWQ-4bit-g32-ct", "weight_shape", np.array([1 << 50, 64])),
        ("AWQ-4bit-g32-ct", "weight_shape", np.array([-32, -64])),
        ("AWQ-4bit-g32-ct", "weight_shape", np.array(64)),
        ("AWQ-4bit-g32-ct", "weight_packed", np.zeros((32, 9), np.int32)),
        ("AWQ-4bit-g32-ct", "weight_zero_point", np.zeros((9, 2), np.int32)),
        ("INT8-W8A8", "weight", np.zeros(64, np.int8)),
        ("INT8-W8A8", "weight_scale", np.zeros((1, 64), np.float32)),
        ("INT8-W8A8", "weight_scale", np.zeros((1 << 20, 1, 1), np.float32)),
    ],
)
def test_arrays_that_contradict_one_another_are_refused(name, suffix, found):
    """Without an index error, and without room for what a file only claims."""
    form, codes, parameters = made(name)
    arrays = {**form.encode(codes, parameters), suffix: found}
    if found is None:
        del arrays[suffix]
    with pytest.raises((ValueError, KeyError)):
        form.decode(arrays)
