"""Quantize and dequantize against the ``gguf`` package, ggml's own quantizers and a slow plain definition."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitladder.formats.blocks import QTYPES
from bitladder.kernels import QUANTIZABLE, REVISION, dequantize, first_nonfinite, quantize
from bitladder.kernels.codebook_rows import CODEBOOK
from bitladder.kernels.rows import AFFINE, EFFORTS, SCALE
from kernel_samples import KINDS, bytes_digest, sample, sample_importance, squared_error

BLOCK_FORMATS = sorted({*AFFINE, *SCALE})
DECODABLE = sorted(set(QTYPES) - {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0"})
BYTES = json.loads((Path(__file__).parents[1] / "fixtures" / "kernel_bytes.json").read_text())
GGML = json.loads((Path(__file__).parents[1] / "fixtures" / "ggml_errors.json").read_text())["errors"]


def as_gguf(data: np.ndarray, qtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[qtype]).astype(np.float32)


def restored(weights: np.ndarray, qtype: str, **options) -> np.ndarray:
    return dequantize(quantize(weights, qtype, **options), qtype)


# --- dequantize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype", DECODABLE)
def test_dequantize_equals_gguf_bit_for_bit_on_random_bytes(qtype: str) -> None:
    row = QTYPES[qtype]
    data = np.random.default_rng(3).integers(0, 256, (33, 3 * row.type_size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        got = dequantize(data, qtype, threads=2)
    want = as_gguf(data, qtype)
    same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
    assert same.all(), f"{(~same).sum()} of {same.size} weights differ, first at {np.argwhere(~same)[0]}"


@pytest.mark.parametrize("qtype", sorted(QUANTIZABLE - {*CODEBOOK}))
def test_gguf_reads_what_quantize_wrote(qtype: str) -> None:
    """The bytes mean to the gguf package what the search meant: its error is as small as ours."""
    x = sample("even")
    data = quantize(x, qtype)
    assert data.shape == (len(x), QTYPES[qtype].row_bytes(x.shape[1]))
    np.testing.assert_array_equal(as_gguf(data, qtype), dequantize(data, qtype))
    assert squared_error(x, as_gguf(data, qtype), None) < 0.12 * squared_error(x, 0 * x, None)


# --- error ---------------------------------------------------------------------------------------------------------

# largest share of ggml's error, by effort; tests/fixtures/ggml_errors.json says what ggml's is
ERROR_BUDGET = {"fast": 1.00, "good": 0.98, "best": 0.955}
# plain rounding like ggml's, at full speed: Q8_0 at good too
PLAIN_BUDGET = 1.0005


def budget(qtype: str, effort: str, weighted: bool) -> float:
    plain = qtype == "Q8_0" or (effort == "fast" and not weighted and QTYPES[qtype].block_size == 32)
    return PLAIN_BUDGET if plain and effort != "best" else ERROR_BUDGET[effort]


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("case", sorted(GGML))
def test_error_is_within_its_share_of_ggml(case: str, effort: str) -> None:
    qtype, kind, *weighted = case.split()
    importance = sample_importance() if weighted else None
    x = sample(kind)
    error = squared_error(x, restored(x, qtype, importance=importance, effort=effort), importance)
    assert error <= budget(qtype, effort, bool(weighted)) * GGML[case], f"{error / GGML[case]:.4f} of ggml's"


def inverse(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(np.abs(x) > 1e-37, np.float32(1) / x, np.float32(0)).astype(np.float32)


def half(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)


def plain(x: np.ndarray, qtype: str) -> np.ndarray:
    """Round to nearest with scales from the range of the weights alone: what a block costs without a search."""
    row = AFFINE.get(qtype) or SCALE[qtype]
    parts = x.reshape(-1, row.parts, row.size)
    if qtype in AFFINE:
        bound = np.float32(0) if row.scale_high else np.float32(np.inf)
        low = np.minimum(parts.min(-1, keepdims=True), bound)
        high = np.maximum(parts.max(-1, keepdims=True), -bound)
        d, m = (high - low) / np.float32(row.high), -low
        if row.scale_high:
            top = np.float32(row.scale_high)
            block_d, block_m = half(d.max(1, keepdims=True) / top), half(m.max(1, keepdims=True) / top)
            d = block_d * np.rint(np.minimum(d * inverse(block_d), top))
            m = block_m * np.rint(np.minimum(m * inverse(block_m), top))
        else:
            d, m = half(d), half(m)
        return (np.clip(np.rint((parts + m) * inverse(d)), 0, row.high) * d - m).reshape(x.shape)
    at = np.abs(parts).argmax(-1, keepdims=True)
    d = np.take_along_axis(parts, at, -1) / np.float32(row.low)
    if row.scale_high:
        at = np.abs(d).argmax(1, keepdims=True)
        block_d = half(np.take_along_axis(d, at, 1) / np.float32(row.scale_low))
        d = block_d * np.rint(np.clip(d * inverse(block_d), row.scale_low, row.scale_high))
    else:
        d = half(d)
    scaled = parts * inverse(d)
    if row.table:
        values = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
        codes = values[np.searchsorted((values[1:] + values[:-1]) / 2, scaled)]
    else:
        codes = np.clip(np.rint(scaled), row.low, row.high)
    return (codes * d).reshape(x.shape)


blocks = hnp.arrays(
    np.float32,
    (1, 256),
    elements=st.floats(-4, 4, width=32) | st.sampled_from([0.0, 1e-6, -3e-5, 0.02, 1000.0, -60000.0]),
    fill=st.nothing(),
)


@pytest.mark.parametrize("qtype", BLOCK_FORMATS)
@given(x=blocks)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_error_is_never_above_plain_rounding(qtype: str, x: np.ndarray) -> None:
    ours = squared_error(x, restored(x, qtype), None)
    assert ours <= squared_error(x, plain(x, qtype), None) * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_0", "Q4_1", "Q2_K", "Q4_K", "Q6_K"])
@given(x=blocks)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_weight_within_its_block_range_comes_back_within_half_a_step(qtype: str, x: np.ndarray) -> None:
    data = quantize(x, qtype)
    row, fmt = AFFINE.get(qtype) or SCALE[qtype], QTYPES[qtype]
    raw = data.reshape(-1, fmt.type_size)

    def field(name: str, size: int) -> np.ndarray:
        return raw[:, fmt.offset(name) : fmt.offset(name) + size]

    def number(name: str) -> np.ndarray:
        return field(name, 2).copy().view(np.float16).astype(np.float32)

    d, m = number("d"), np.zeros((len(raw), 1), np.float32)
    if qtype == "Q4_1":
        m = -number("m")
    if qtype == "Q6_K":
        d = d * field("scales", 16).view(np.int8)
    if qtype == "Q2_K":
        d, m = d * (field("scales", 16) & 15), number("dmin") * (field("scales", 16) >> 4)
    if qtype == "Q4_K":
        s, low = gguf.quants.Q4_K.get_scale_min(field("scales", 12))
        d, m = d * s, number("dmin") * low
    parts = x.reshape(len(raw), -1, row.size)
    ends = np.sort([d * row.low - m, d * row.high - m], axis=0)[..., None]
    inside = (parts >= ends[0]) & (parts <= ends[1])
    missed = np.abs(dequantize(data, qtype).reshape(parts.shape) - parts)
    # rounding of a product near m or the largest code is not part of the step
    slack = 1e-6 * (np.abs(ends[0]) + np.abs(ends[1]))
    assert (missed <= 0.5 * np.abs(d)[..., None] + slack)[inside].all()


# --- the same bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype", BLOCK_FORMATS)
def test_order_threads_chunks_and_strides_change_no_byte(qtype: str) -> None:
    x, importance = sample("heavy"), sample_importance()
    fmt = QTYPES[qtype]
    whole = quantize(x, qtype, importance=importance)
    np.testing.assert_array_equal(quantize(x, qtype, importance=importance, threads=3), whole)
    parts = [quantize(x[a:b], qtype, importance=importance) for a, b in ((0, 1), (1, 30), (30, 48))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    wide = np.repeat(x, 2, axis=1)[:, ::2]
    wide.flags.writeable = False
    np.testing.assert_array_equal(quantize(wide, qtype, importance=importance), whole)
    order = np.random.default_rng(1).permutation(x.size // fmt.block_size)
    shuffled = x.reshape(-1, fmt.block_size)[order].reshape(x.shape)
    moved = quantize(x, qtype).reshape(-1, fmt.type_size)[order]
    np.testing.assert_array_equal(quantize(shuffled, qtype).reshape(moved.shape), moved)
    np.testing.assert_array_equal(dequantize(whole, qtype, threads=3), dequantize(whole, qtype))


def test_many_chunks_on_many_threads_change_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample("even")
    whole, back = quantize(x, "Q4_K"), restored(x, "Q4_K")
    monkeypatch.setattr("bitladder.kernels.api.CHUNK_WEIGHTS", 1024)
    np.testing.assert_array_equal(quantize(x, "Q4_K", threads=4), whole)
    np.testing.assert_array_equal(dequantize(whole, "Q4_K", threads=4), back)


@pytest.mark.parametrize("case", sorted(BYTES["digests"]))
def test_bytes_of_this_revision(case: str) -> None:
    """A level is kept while its method has the same name, which names the revision: bytes may not change alone."""
    assert bytes_digest(*case.split()) == BYTES["digests"][case], (
        "the bytes changed: raise REVISION in kernels/rows.py, then python benchmarks/kernel_golden.py --bytes"
    )


def test_every_format_and_effort_has_its_bytes_on_record() -> None:
    assert BYTES["revision"] == REVISION
    assert set(BYTES["digests"]) == {f"{qtype} {effort}" for qtype in BLOCK_FORMATS for effort in EFFORTS}


def digest_of_all_formats() -> str:
    digest = hashlib.sha256()
    for qtype in BLOCK_FORMATS:
        for kind in KINDS:
            digest.update(quantize(sample(kind), qtype).tobytes())
            digest.update(quantize(sample(kind), qtype, importance=sample_importance()).tobytes())
    return digest.hexdigest()


def test_a_cpu_without_wide_vectors_writes_the_same_bytes(tmp_path: Path) -> None:
    """The oldest x86-64 (or plain aarch64): no AVX, no FMA, no float16 instructions."""
    code = "import test_kernels; print(test_kernels.digest_of_all_formats())"
    beside = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    plain_cpu = {
        "PYTHONPATH": beside,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, **plain_cpu},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest_of_all_formats()


# --- odd input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("qtype", sorted(QUANTIZABLE - {*CODEBOOK}))
def test_odd_blocks_come_back_finite_and_near(qtype: str, effort: str) -> None:
    outlier = np.full(256, 0.01, np.float32)
    outlier[77] = 30000
    for name, row, tolerance in (
        ("zero", np.zeros(256, np.float32), 0.0),
        ("constant", np.full(256, 0.75, np.float32), 0.02),
        ("negative constant", np.full(256, -3.0, np.float32), 0.08),
        ("denormal", np.full(256, 1e-42, np.float32), 1e-41),
        ("largest float16", np.where(np.arange(256) % 2, 65504, -65504).astype(np.float32), 8200),
        ("one outlier", outlier, 2800),
    ):
        back = restored(row[None], qtype, effort=effort)
        assert np.isfinite(back).all(), name
        assert np.abs(back - row).max() <= tolerance, name


@pytest.mark.parametrize("qtype", sorted(QUANTIZABLE))
def test_numbers_beyond_the_format_are_held_at_its_end(qtype: str) -> None:
    x = np.array([[3e38, -3e38] * 128], np.float32)
    back = restored(x, qtype)
    assert np.isfinite(back).all()
    assert (np.sign(back) == np.sign(x)).mean() >= 0.5


@pytest.mark.parametrize("qtype", sorted(QUANTIZABLE))
def test_empty_and_single_rows(qtype: str) -> None:
    fmt = QTYPES[qtype]
    assert quantize(np.zeros((0, 256), np.float32), qtype).shape == (0, fmt.row_bytes(256))
    assert quantize(np.zeros((3, 0), np.float32), qtype).shape == (3, 0)
    assert dequantize(np.zeros((0, fmt.type_size), np.uint8), qtype).shape == (0, fmt.block_size)
    x = sample("even")[:1, :256]
    np.testing.assert_array_equal(quantize(x, qtype), quantize(np.repeat(x, 40, 0), qtype)[17:18])


def test_importance_shifts_error_to_columns_that_matter_less() -> None:
    x, importance = sample("even"), sample_importance()
    plainly, weighted = restored(x, "Q2_K"), restored(x, "Q2_K", importance=importance)
    assert squared_error(x, weighted, importance) < 0.8 * squared_error(x, plainly, importance)
    np.testing.assert_array_equal(quantize(x, "Q2_K", importance=importance * np.float32(2.0**40)),
                                  quantize(x, "Q2_K", importance=importance))  # fmt: skip


HARD = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "cauchy": lambda rng, shape: rng.standard_cauchy(shape),
    "student": lambda rng, shape: rng.standard_t(1.5, shape),
    "one in a block": lambda rng, shape: np.where(rng.random(shape) < 1 / 256, 1.0, 1e-3 * rng.standard_normal(shape)),
    "columns of all sizes": lambda rng, shape: rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 4, shape[1]),
    "one sign": lambda rng, shape: np.abs(rng.standard_cauchy(shape)),
    "near the smallest scale": lambda rng, shape: 3e-7 * rng.standard_normal(shape),
}
LOPSIDED = {
    "none": None,
    "mild": np.random.default_rng(5).uniform(0.5, 2, 1024),
    "wide": 10.0 ** np.random.default_rng(5).uniform(-6, 0, 1024),
    "one column of each block": np.where(np.arange(1024) % 256 == 7, 1.0, 1e-7),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("qtype", BLOCK_FORMATS)
def test_no_effort_is_worse_than_one_below_it(qtype: str, kind: str) -> None:
    """By the error that all of them minimise, heavy tails and lopsided importance included."""
    x = HARD[kind](np.random.default_rng(1), (16, 1024)).astype(np.float32)
    for name, importance in LOPSIDED.items():
        counted = None if importance is None else importance.astype(np.float32)
        floored = None if counted is None else np.maximum(counted / counted.max(), np.float32(1e-9))
        errors = [
            squared_error(x, restored(x, qtype, importance=counted, effort=effort), floored) for effort in EFFORTS
        ]
        assert errors[1] <= errors[0] * (1 + 1e-6), f"good, importance {name}: {errors[1] / errors[0]}"
        assert errors[2] <= errors[1] * (1 + 1e-6), f"best, importance {name}: {errors[2] / errors[1]}"


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("qtype", BLOCK_FORMATS)
def test_small_weights_do_not_vanish_with_their_scale(qtype: str, effort: str) -> None:
    """A step of 2^-24 is the smallest that a float16 scale gives: what is larger comes back to within half of it, as
    far as the codes reach, and nothing is ever worse than zeros."""
    bell = np.random.default_rng(2).standard_normal((16, 1024)).astype(np.float32)
    for size in (1e-9, 1e-8, 3e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5):
        for x in (bell * np.float32(size), -np.abs(bell) * np.float32(size), np.full_like(bell, size)):
            for importance in (None, np.ones(1024, np.float32)):
                error = squared_error(x, restored(x, qtype, importance=importance, effort=effort), None)
                assert error <= squared_error(x, 0 * x, None) * (1 + 1e-6), size
    steps = 2 if qtype.startswith("IQ4") else 1  # those of its table are ten apart
    x = bell * np.float32(1e-5)
    assert squared_error(x, restored(x, qtype, effort=effort), None) < 0.1 * steps * squared_error(x, 0 * x, None)


def test_columns_of_no_importance_still_come_back() -> None:
    x, importance = sample("even"), np.ones(512, np.float32)
    importance[:256] = 0
    error = np.abs(restored(x, "Q4_K", importance=importance) - x)
    assert error[:, :256].max() < 0.02
    np.testing.assert_array_equal(quantize(x, "Q4_K", importance=0 * importance), quantize(x, "Q4_K"))


def test_first_nonfinite_names_the_place() -> None:
    x = sample("even")
    assert first_nonfinite(x) is None
    for bad in (np.nan, np.inf, -np.inf):
        y = x.copy()
        y[7, 301] = y[30, 2] = bad
        assert first_nonfinite(y) == (7, 301)


@pytest.mark.parametrize("qtype", sorted(QUANTIZABLE))
def test_results_go_where_the_caller_says(qtype: str) -> None:
    x = sample("even")
    data = quantize(x, qtype)
    room, weights = np.full_like(data, 0xA5), np.full_like(x, np.nan)
    assert quantize(x, qtype, out=room) is room
    assert dequantize(room, qtype, out=weights) is weights
    np.testing.assert_array_equal(room, data)
    np.testing.assert_array_equal(weights, dequantize(data, qtype))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quantize(x, "Q4_K", out=np.empty((4, 288), np.int8)), r"out must be uint8\[\d+, 288\], contiguous"),
        (lambda x: quantize(x, "Q4_K", out=np.empty((288, len(x)), np.uint8).T), "contiguous"),
        (lambda x: dequantize(quantize(x, "Q8_0"), "Q8_0", out=x[:, :32]), "contiguous"),
        (lambda x: quantize(x, "Q9_Z"), "unknown qtype 'Q9_Z'"),
        (lambda x: quantize(x, "TQ1_0"), "TQ1_0 can be read but not written"),
        (lambda x: quantize(x[:, :100], "Q4_K"), "a row of 100 weights is not a multiple of Q4_K's block of 256"),
        (lambda x: quantize(x, "Q4_K", effort="most"), "must be one of fast, good, best. Got 'most' instead."),
        (lambda x: quantize(x[0], "Q4_K"), r"Got shape \(512,\) instead"),
        (lambda x: quantize(x, "Q4_K", importance=x[0, :7]), r"shape \(512,\), one per column. Got \(7,\) instead"),
        (lambda x: quantize(x, "Q4_K", importance=x[0] - 9), "finite and not negative. Got -[0-9.]+ at column 0"),
        (
            lambda x: dequantize(np.zeros((1, 145), np.uint8), "Q4_K"),
            "145 bytes is not a multiple of Q4_K's type size of 144",
        ),
        (lambda x: dequantize(np.zeros((1, 292), np.uint8), "Q8_K"), "Q8_K cannot be decoded"),
    ],
)
def test_wrong_arguments_say_what_was_found(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(sample("even"))
