"""MXFP4 blocks: the bytes that gguf reads, and never more error than its own encoder's, plain or weighed."""

import gguf
import numpy as np
import pytest

from bitladder.kernels import dequantize, quantize


def of_gguf(weights):
    """As the gguf package encodes and decodes it (ggml's reference)."""
    kind = gguf.GGMLQuantizationType.MXFP4
    return gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighed", [False, True])
def test_no_block_loses_more_than_the_reference(seed, weighed):
    rng = np.random.default_rng(seed)
    weights = (rng.standard_t(3, (40, 256)) * 10.0 ** rng.uniform(-6, 3, (40, 1))).astype(np.float32)
    importance = rng.uniform(0, 4, 256).astype(np.float32) ** 3 if weighed else None
    heights = np.ones(256, np.float32) if importance is None else importance
    made = dequantize(quantize(weights, "MXFP4", importance=importance), "MXFP4")

    def errors(found):
        return (np.square(found - weights, dtype=np.float64) * heights).reshape(-1, 32).sum(axis=1)

    ours, theirs = errors(made), errors(of_gguf(weights))
    assert (ours <= theirs * (1 + 1e-6)).all()
    assert (ours < theirs * 0.99).mean() > 0.02  # powers leave little to gain


def test_values_of_the_type_come_back_as_they_are_and_threads_change_nothing():
    rng = np.random.default_rng(0)
    steps = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    signs = rng.choice(np.array([-1, 1], np.float32), (96, 64))
    weights = steps[rng.integers(0, 8, (96, 64))] * signs
    weights[:, ::32] = 6  # the largest of each block says its power
    weights *= np.repeat(2.0 ** rng.integers(-40, 40, (96, 2)), 32, axis=1).astype(np.float32)
    data = quantize(weights, "MXFP4")
    np.testing.assert_array_equal(dequantize(data, "MXFP4"), weights)
    np.testing.assert_array_equal(quantize(weights, "MXFP4", threads=3), data)
    np.testing.assert_array_equal(quantize(weights, "MXFP4", effort="fast"), data)
