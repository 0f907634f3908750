"""Codebook formats (IQ1 to IQ3) against the ``gguf`` package, ggml's own quantizers and a slow plain definition."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from bitladder.formats.blocks import QTYPES
from bitladder.kernels import dequantize, gptq, quantize
from bitladder.kernels.codebook_rows import CODEBOOK, pack, table_of, values_of
from bitladder.kernels.codebook_search import find
from bitladder.kernels.feedback import quantize_with_feedback
from kernel_samples import sample, sample_importance, squared_error

# errors of ggml's own quantizers (libgguf 0.2.2) under the importance, on each sample
GGML_ERRORS = {
    "IQ2_XXS": {"even": 1.0328, "heavy": 15892.3, "tiny": 4.53264e-05},
    "IQ2_XS": {"even": 0.798736, "heavy": 11228.5, "tiny": 3.44167e-05},
    "IQ2_S": {"even": 0.678144, "heavy": 9872.61, "tiny": 2.9107e-05},
    "IQ3_XXS": {"even": 0.247621, "heavy": 3711.05, "tiny": 1.1031e-05},
    "IQ3_S": {"even": 0.179618, "heavy": 3324.64, "tiny": 7.93292e-06},
    "IQ1_S": {"even": 2.5207, "heavy": 11410.3, "tiny": 0.000109936},
    "IQ1_M": {"even": 1.68368, "heavy": 7794.01, "tiny": 7.307e-05},
}
DIGEST = "3171c938e89a0f3b"


def as_gguf(data: np.ndarray, qtype: str) -> np.ndarray:
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[qtype]).astype(np.float32)


@pytest.mark.parametrize("qtype", CODEBOOK)
def test_gguf_reads_what_the_search_meant(qtype: str) -> None:
    x, importance = sample("even")[:4], sample_importance()
    found = find(x.reshape(-1), x.shape[1], qtype, importance / importance.max(), "good")
    data = pack(qtype, found).reshape(len(x), -1)
    assert data.shape == (len(x), QTYPES[qtype].row_bytes(x.shape[1]))
    np.testing.assert_array_equal(as_gguf(data, qtype), values_of(qtype, found).reshape(x.shape))
    np.testing.assert_array_equal(data, quantize(x, qtype, importance=importance))


@pytest.mark.parametrize("qtype", CODEBOOK)
def test_every_entry_is_the_nearest_at_its_step(qtype: str) -> None:
    """Against all entries one by one, signs as chosen."""
    row, x = CODEBOOK[qtype], sample("even")[:1]
    weights = sample_importance() / sample_importance().max()
    found = find(x.reshape(-1), x.shape[1], qtype, weights, "good")
    step = found.scale[:, None] * (2 * found.whole + 1) * (row.unit / 8)
    negative = np.unpackbits(found.signs, axis=1, bitorder="little").reshape(-1)
    signed = np.where(negative, -x.reshape(-1), x.reshape(-1)).reshape(-1, row.width)
    heights = np.tile(weights, len(x)).reshape(-1, row.width)
    steps = np.repeat(step.reshape(-1), row.size // row.width)
    variants = np.repeat(found.variants.reshape(-1), row.size // row.width)
    for at, entry in enumerate(found.entries.reshape(-1)):
        wrong = steps[at] * table_of(qtype)[variants[at]] - signed[at][:, None]
        costs = (heights[at][:, None].astype(np.float64) * wrong**2).sum(axis=0)
        assert costs[entry] <= costs.min() * 1.001 + 1e-12


@pytest.mark.parametrize("qtype", CODEBOOK)
def test_signs_are_even_where_seven_are_stored(qtype: str) -> None:
    found = find(sample("heavy").reshape(-1), 512, qtype, None, "fast")
    if CODEBOOK[qtype].even:
        assert not (np.unpackbits(found.signs, axis=1).reshape(-1, 8).sum(axis=1) % 2).any()
    elif not CODEBOOK[qtype].signed:
        np.testing.assert_array_equal(
            np.unpackbits(found.signs, axis=1, bitorder="little").reshape(sample("heavy").shape), sample("heavy") < 0
        )


@pytest.mark.parametrize("qtype", CODEBOOK)
@pytest.mark.parametrize("kind", ["even", "heavy"])
def test_efforts_only_help(qtype: str, kind: str) -> None:
    x, importance = sample(kind), sample_importance()
    errors = [
        squared_error(x, dequantize(quantize(x, qtype, importance=importance, effort=effort), qtype), importance)
        for effort in ("fast", "good", "best")
    ]
    assert errors[1] <= errors[0] * 1.0005
    assert errors[2] <= errors[1] * 1.0005


@pytest.mark.parametrize("qtype", CODEBOOK)
def test_feedback_costs_less_and_counts_right(qtype: str) -> None:
    rng = np.random.default_rng(5)
    inputs = rng.normal(size=(2000, 512)) @ (rng.normal(size=(512, 512)) / 20 + np.diag(np.exp(rng.normal(size=512))))
    hessian = np.asarray(inputs.T @ inputs / 2000, np.float32)
    weights = np.asarray(rng.standard_t(5, (24, 512)) * 0.02, np.float32)
    factor = gptq.prepare(hessian, damp=1e-6, together=256)
    energy = np.diagonal(hessian).copy()
    cost = {}
    for effort in ("fast", "good", "best"):
        found = quantize_with_feedback(weights, qtype, factor, hessian=hessian, importance=energy, effort=effort)
        wrong = (as_gguf(found.data, qtype) - weights).astype(np.float64)
        assert found.cost == pytest.approx(float(np.einsum("ij,jk,ik->", wrong, hessian, wrong)), rel=1e-3)
        assert found.cost < 0.92 * found.plain_cost
        cost[effort] = found.cost
        threads = quantize_with_feedback(
            weights, qtype, factor, hessian=hessian, importance=energy, effort=effort, threads=3
        )
        np.testing.assert_array_equal(threads.data, found.data)
    assert cost["good"] < 0.95 * cost["fast"]  # entries, signs and steps in turns: 0.83 to 0.9 here
    assert cost["best"] < cost["good"]


@pytest.mark.parametrize("qtype", CODEBOOK)
def test_columns_that_nothing_depends_on_and_rows_of_zeros_stand_still(qtype: str) -> None:
    rng = np.random.default_rng(6)
    inputs = rng.normal(size=(600, 512)) * (np.arange(512) % 8 != 3)
    inputs[:, 256:] = 0
    hessian = np.asarray(inputs.T @ inputs, np.float32)
    weights = np.asarray(rng.normal(size=(5, 512)) * 0.02, np.float32)
    weights[2] = 0
    factor = gptq.prepare(hessian, damp=0.01, together=256)
    found = quantize_with_feedback(weights, qtype, factor, hessian=hessian, importance=np.diagonal(hessian).copy())
    back = dequantize(found.data, qtype)
    assert np.isfinite(back).all()
    assert not back[2].any()
    assert found.cost <= found.plain_cost


@pytest.mark.parametrize("qtype", CODEBOOK)
def test_it_loses_less_than_ggml(qtype: str) -> None:
    for kind, error in GGML_ERRORS[qtype].items():
        x, importance = sample(kind), sample_importance()
        own = squared_error(x, dequantize(quantize(x, qtype, importance=importance), qtype), importance)
        assert own <= 0.8 * error


@pytest.mark.parametrize("qtype", CODEBOOK)
def test_odd_blocks_come_back_finite(qtype: str) -> None:
    outlier = np.full(256, 0.01, np.float32)
    outlier[77] = 30000
    assert not dequantize(quantize(np.zeros((1, 256), np.float32), qtype), qtype).any()
    for row in (
        outlier,
        np.full(256, -3.0, np.float32),
        np.full(256, 1e-42, np.float32),
        np.full(256, 65504.0, np.float32),
    ):
        back = dequantize(quantize(row[None], qtype), qtype)
        assert np.isfinite(back).all()
        assert np.abs(back - row).max() <= np.abs(row).max()


def digest() -> str:
    """Of all formats' bytes, fed ones too."""
    found = hashlib.sha256()
    for qtype in CODEBOOK:
        for kind in ("even", "heavy", "tiny"):
            found.update(quantize(sample(kind)[:6], qtype, importance=sample_importance()).tobytes())
        found.update(quantize(sample("even")[:6], qtype, effort="fast").tobytes())
    return found.hexdigest()[:16]


def test_bytes_of_this_revision_on_any_processor(tmp_path: Path) -> None:
    """With this one's instructions, and with those of the oldest x86-64 (or plain aarch64)."""
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    beside = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    code = "import test_codebooks; print(test_codebooks.digest())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **plain, "PYTHONPATH": beside},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == digest() == DIGEST
