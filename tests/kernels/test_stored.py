"""Quantized matrices told by their arrays, and decoded as an independent reader decodes them."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from bitladder.kernels import minifloats
from bitladder.levels.checkpoints.stored import belongs_to, packed_matrices, unscaled

RNG = np.random.default_rng(0)
NAMES = {
    "float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8",
}  # fmt: skip


@dataclass(frozen=True)
class Held:
    dtype: str
    shape: tuple[int, ...]


def found(configuration, arrays, types=None):
    """The matrices of some arrays; ``types``: what a header calls arrays of codes."""
    headers = {
        name: Held((types or {}).get(name, NAMES[str(array.dtype)]), array.shape) for name, array in arrays.items()
    }
    matrices = packed_matrices(configuration, headers, arrays.__getitem__)
    return {one.name: one for one in matrices}


def decoded(matrix, arrays):
    return matrix.decode({role: arrays[name] for role, name in matrix.arrays.items()})


def e4m3_by_hand(code):
    code = int(code)
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    size = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return (-1) ** sign * size


def test_eight_and_four_bits():
    import torch

    codes = np.arange(256, dtype=np.uint8)
    for ours, kind in ((minifloats.e4m3, torch.float8_e4m3fn), (minifloats.e5m2, torch.float8_e5m2)):
        np.testing.assert_array_equal(ours(codes), torch.from_numpy(codes).view(kind).float().numpy())
    np.testing.assert_array_equal(minifloats.e8m0(codes), torch.from_numpy(codes).view(torch.float8_e8m0fnu).float())
    assert [float(one) for one in minifloats.e4m3(codes[:127])] == [e4m3_by_hand(code) for code in codes[:127]]
    pairs = minifloats.e2m1_pairs(np.array([[0x21, 0xF7]], np.uint8))
    np.testing.assert_array_equal(pairs, [[0.5, 1.0, 6.0, -6.0]])


def stream(values, bits):
    """Packed words of a row of codes, bit by bit."""
    words = [0] * -(-len(values) * bits // 32)
    for number, value in enumerate(values):
        for bit in range(bits):
            place = number * bits + bit
            words[place // 32] |= (int(value) >> bit & 1) << place % 32
    return np.array(words, np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [True, False, None])
def test_gptq_of_every_width(bits, layout, ordered):
    outputs, inputs, size = 32, 64, 16
    codes = RNG.integers(0, 2**bits, (outputs, inputs))
    zeros = RNG.integers(1, 2**bits, (outputs, inputs // size))
    scales = RNG.normal(size=(outputs, inputs // size)).astype(np.float16)
    group = np.arange(inputs) // size if ordered is not False else RNG.permutation(inputs) // size
    kept = (zeros - (layout == "gptq")) & (2**bits - 1)
    arrays = {
        "l.q.qweight": np.stack([stream(row, bits) for row in codes], axis=1),
        "l.q.qzeros": np.stack([stream(column, bits) for column in kept.T]),
        "l.q.scales": scales.T.copy(),
    }
    if ordered is not None:
        arrays["l.q.g_idx"] = group.astype(np.int32)
    # another layer at other bits, as mixed checkpoints have it: what the configuration says is one number
    configuration = {"quant_method": "gptq", "bits": 5, "group_size": 1, "checkpoint_format": layout}
    matrix = found(configuration, arrays)["l.q.weight"]
    assert matrix.shape == (outputs, inputs)
    want = (codes - zeros[:, group]).astype(np.float32) * scales.astype(np.float32)[:, group]
    np.testing.assert_array_equal(decoded(matrix, arrays), want)
    assert all(belongs_to(name, {matrix.name: matrix}) for name in arrays)
    assert not belongs_to("l.q.bias", {matrix.name: matrix})
    assert not belongs_to("l.k.qweight", {matrix.name: matrix})


@pytest.mark.parametrize(
    "configuration",
    [
        {"quant_method": "awq", "version": "gemm"},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
    ],
)
def test_awq(configuration):
    outputs, inputs, size = 16, 64, 32
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes = RNG.integers(0, 16, (outputs, inputs))
    zeros = RNG.integers(0, 16, (outputs, inputs // size))
    scales = RNG.normal(size=(outputs, inputs // size)).astype(np.float16)

    def packed(matrix):  # slot i of word c holds output 8 c + order[i]
        rows = []
        for row in matrix:
            rows.append(stream([row[at // 8 * 8 + order[at % 8]] for at in range(len(row))], 4))
        return np.stack(rows)

    arrays = {"q.qweight": packed(codes.T), "q.qzeros": packed(zeros.T), "q.scales": scales.T.copy()}
    matrix = found(configuration, arrays)["q.weight"]
    group = np.arange(inputs) // size
    want = (codes - zeros[:, group]).astype(np.float32) * scales.astype(np.float32)[:, group]
    np.testing.assert_array_equal(decoded(matrix, arrays), want)


def groups_of(*weights):
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {f"group_{n}": {"targets": ["re:(a+)+$"], "weights": one} for n, one in enumerate(weights)},
    }


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("ordered", [True, False])
def test_several_groups_of_compressed_tensors(asymmetric, ordered):
    arrays, want = {}, {}
    for bits, size in ((4, 16), (8, 64), (3, 32)):
        outputs, inputs = 32, 64
        codes = RNG.integers(0, 2**bits, (outputs, inputs))
        scales = RNG.random((outputs, inputs // size)).astype(np.float32)
        zeros = np.full((outputs, inputs // size), 2 ** (bits - 1))
        group = np.arange(inputs) // size
        name = f"m{bits}.weight"
        arrays |= {
            f"{name}_packed": np.stack([stream(row, bits) for row in codes]),
            f"{name}_scale": scales,
            f"{name}_shape": np.array([outputs, inputs]),
        }
        if not ordered:
            group = RNG.permutation(group)
            arrays[f"{name}_g_idx"] = group.astype(np.int32)
        if asymmetric:
            zeros = RNG.integers(0, 2**bits, (outputs, inputs // size))
            arrays[f"{name}_zero_point"] = np.stack([stream(column, bits) for column in zeros.T], axis=1)
        want[name] = (codes - zeros[:, group]).astype(np.float32) * scales[:, group]
    configuration = groups_of({"num_bits": 4}, {"num_bits": 8}, {"num_bits": 3})
    matrices = found(configuration, arrays)
    assert matrices.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(decoded(matrices[name], arrays), values)


@pytest.mark.parametrize("held", [(), (1,), (1, 1), (24,), (24, 1), (24, 4), (3, 4)])
@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "I8", "I8 with zeros"])
def test_scales_of_every_shape(held, kind):
    shape = (24, 64)
    codes = RNG.integers(0, 120, shape).astype(np.uint8)
    scales = RNG.random(held).astype(np.float32)
    arrays = {"a.weight": codes, "a.weight_scale": scales}
    if kind.startswith("I8"):
        arrays["a.weight"] = codes.view(np.int8)
        values = codes.astype(np.float32)
        if kind.endswith("zeros"):
            arrays["a.weight_zero_point"] = np.full(held, 7, np.int8)
            values = values - 7
        matrices = found(groups_of({"num_bits": 8}), arrays)
    else:
        if kind == "F8_E4M3":
            values = np.vectorize(e4m3_by_hand)(codes).astype(np.float32)
        else:
            values = (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
        matrices = found({"quant_method": "fbgemm_fp8"}, arrays, {"a.weight": kind})
    want = np.empty(shape, np.float32)
    for row in range(shape[0]):
        for column in range(shape[1]):
            at = [
                size and index * size // whole for index, size, whole in zip((row, column), held, shape, strict=False)
            ]
            want[row, column] = values[row, column] * scales[tuple(at)]
    np.testing.assert_array_equal(decoded(matrices["a.weight"], arrays), want)


def test_blocks_that_do_not_divide():
    shape, block = (200, 300), (128, 128)
    codes = RNG.integers(0, 120, shape).astype(np.uint8)
    exponents = RNG.integers(120, 130, (2, 3)).astype(np.uint8)
    arrays = {"a.weight": codes, "a.weight_scale_inv": exponents}
    types = {"a.weight": "F8_E4M3", "a.weight_scale_inv": "F8_E8M0"}
    configuration = {"quant_method": "fp8", "weight_block_size": list(block)}
    matrix = found(configuration, arrays, types)["a.weight"]
    want = (
        np.vectorize(e4m3_by_hand)(codes)
        * 2.0 ** (exponents.astype(int) - 127)[np.arange(200)[:, None] // 128, np.arange(300)[None] // 128]
    )
    np.testing.assert_array_equal(decoded(matrix, arrays), want.astype(np.float32))
    with pytest.raises(ValueError, match=r"a\.weight: scales of shape \(2, 3\) for a matrix of \(200, 300\)"):
        found({"quant_method": "fp8"}, arrays, types)


@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4 by compressed-tensors", "NVFP4 by ModelOpt"])
def test_four_bit_floats(kind):
    outputs, inputs, size = 8, 96, 32 if kind == "MXFP4" else 16
    codes = RNG.integers(0, 16, (outputs, inputs))
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes]
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    raw = RNG.integers(100, 126, (outputs, inputs // size)).astype(np.uint8)
    group = np.arange(inputs) // size
    name = "a.weight" if kind.endswith("ModelOpt") else "a.weight_packed"
    arrays, types = {name: packed, "a.weight_scale": raw}, {}
    if kind == "MXFP4":
        scales = 2.0 ** (raw.astype(int) - 127)
    else:
        types["a.weight_scale"] = "F8_E4M3"
        scales = np.vectorize(e4m3_by_hand)(raw).astype(np.float32)
        factor = np.array([3.0], np.float32)
        arrays["a.weight_scale_2" if kind.endswith("ModelOpt") else "a.weight_global_scale"] = factor
        scales = scales * factor if kind.endswith("ModelOpt") else scales / factor
    matrix = found({}, arrays, types)["a.weight"]
    assert matrix.kind == kind.partition(" ")[0]
    np.testing.assert_array_equal(decoded(matrix, arrays), (values * scales[:, group]).astype(np.float32))


def gptq(**changed):
    arrays = {
        "q.qweight": np.zeros((8, 32), np.int32),
        "q.qzeros": np.zeros((2, 4), np.int32),
        "q.scales": np.ones((2, 32), np.float16),
        "q.g_idx": np.repeat([0, 1], 32).astype(np.int32),
    }
    return {name: array for name, array in (arrays | changed).items() if array is not None}


def packed_ct(**changed):
    arrays = {
        "q.weight_packed": np.zeros((32, 8), np.int32),
        "q.weight_scale": np.ones((32, 2), np.float32),
        "q.weight_shape": np.array([32, 64]),
    }
    return {name: array for name, array in (arrays | changed).items() if array is not None}


GPTQ, CT = {"quant_method": "gptq"}, groups_of({"num_bits": 4})


@pytest.mark.parametrize(
    ("configuration", "arrays", "match"),
    [
        (GPTQ, gptq(**{"q.scales": None}), "q.scales is missing"),
        (GPTQ, gptq(**{"q.scales": np.ones((2, 31), np.float16)}), "scales for 31 outputs of 32"),
        (GPTQ, gptq(**{"q.qzeros": np.zeros((2, 5), np.int32)}), "zero points in 5 words for 32 outputs"),
        (GPTQ, gptq(**{"q.scales": np.ones((3, 32), np.float16)}), "3 groups do not divide rows of 64"),
        (GPTQ, gptq(**{"q.scales": np.ones((0, 32), np.float16)}), "of shape \\(0, 32\\)"),
        (GPTQ, gptq(**{"q.qweight": np.zeros(8, np.int32)}), "of shape \\(8,\\)"),
        (GPTQ | {"checkpoint_format": "marlin"}, gptq(), "a layout called 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, gptq(), "only GEMM is read"),
        ({"quant_method": "awq"}, gptq(), "codes of 4 bits in 32 words for 32 outputs"),
        (CT, packed_ct(**{"q.weight_shape": np.array([2**40, 64])}), "for \\(1099511627776, 64\\)"),
        (CT, packed_ct(**{"q.weight_shape": np.array([32, -64])}), "for \\(32, -64\\)"),
        (CT, packed_ct(**{"q.weight_shape": np.array([32, 64, 1])}), "a shape of \\(3,\\) numbers"),
        (CT, packed_ct(**{"q.weight_shape": None}), "q.weight_shape"),
        (groups_of({"num_bits": 8}), packed_ct(), "which no number of bits of its fills"),
        (groups_of({"num_bits": True}, {"num_bits": 1 << 40}, "four"), packed_ct(), "which no number of bits"),
        ({"config_groups": [1]}, packed_ct(), "which no number of bits"),
    ],
)
def test_arrays_that_contradict_one_another(configuration, arrays, match):
    with pytest.raises(ValueError, match=match):
        found(configuration, arrays)


@pytest.mark.parametrize(
    ("configuration", "arrays"),
    [
        (GPTQ, gptq(**{"q.g_idx": np.full(64, 2, np.int32)})),
        (GPTQ, gptq(**{"q.g_idx": np.full(64, -1, np.int32)})),
        (GPTQ, gptq(**{"q.g_idx": np.zeros(63, np.int32)})),
        (CT, packed_ct(**{"q.weight_g_idx": np.full(64, 9, np.int32)})),
        (CT, packed_ct(**{"q.weight_zero_point": np.zeros((7, 2), np.int32)})),
    ],
)
def test_values_that_contradict_one_another(configuration, arrays):
    (matrix,) = found(configuration, arrays).values()
    with pytest.raises(ValueError, match=r"groups|words|expected"):
        decoded(matrix, arrays)


@pytest.mark.parametrize(
    ("others", "lacking"),
    [
        ({}, True),
        ({"a.input_scale": "F32"}, True),
        ({"a.activation_scale": "F32", "b.weight_scale": "F32"}, True),
        ({"a.weight_scale": "F32"}, False),
        ({"a.weight_scale_inv": "F32"}, False),
        ({"a.scale": "F8_E8M0"}, False),  # DeepSeek V4
        ({"a.qscale_weight": "F32"}, False),  # Mistral
    ],
)
def test_eight_bits_without_a_scale_are_noticed(others, lacking):
    tensors = {"a.weight": Held("F8_E4M3", (4, 4)), "norm.weight": Held("BF16", (4,))}
    tensors |= {name: Held(dtype, ()) for name, dtype in others.items()}
    assert unscaled(tensors) == ("a.weight" if lacking else None)
    assert unscaled({"a.weight_scale": Held("F8_E4M3", (4, 4))}) is None  # NVFP4's scales are no weights


def test_configurations_of_any_kind_break_nothing():
    for text in (
        "[]",
        "{}",
        '{"quant_method": 3}',
        '{"config_groups": {"a": null}}',
        '{"weight_block_size": [0, "x"]}',
    ):
        configuration = json.loads(text)
        if isinstance(configuration, dict):
            assert found(configuration, {"a.weight": np.zeros((4, 4), np.float32)}) == {}
