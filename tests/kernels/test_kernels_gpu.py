"""The twins on torch tensors write the bytes of the compiled kernels. Here on torch's CPU device: no GPU is needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitladder.kernels import dequantize, gpu, quantize
from bitladder.kernels.rows import AFFINE, SCALE
from kernel_samples import sample, sample_importance

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("qtype", sorted({*AFFINE, *SCALE}))
def test_twins_write_and_read_the_same_bytes(qtype: str, weighted: bool, device: str) -> None:
    x, importance = sample("heavy")[:9], sample_importance() if weighted else None
    data = quantize(x, qtype, importance=importance, effort="fast")
    on_device = "cpu:0" if device == "cpu" else device  # "cpu" itself would be the compiled kernel
    twin = quantize(x, qtype, importance=importance, effort="fast", device=on_device)
    np.testing.assert_array_equal(twin, data)
    restored = gpu.dequantize(torch.from_numpy(data).to(device), qtype)
    np.testing.assert_array_equal(restored.cpu().numpy(), dequantize(data, qtype))


def test_rounds_of_blocks_change_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    x, importance = sample("even")[:9], sample_importance()
    whole = quantize(x, "Q4_K", importance=importance)
    monkeypatch.setattr(gpu, "CHUNK_WEIGHTS", 1024)
    np.testing.assert_array_equal(quantize(x, "Q4_K", importance=importance, device="cpu:0"), whole)


def test_empty_tensors_have_no_bytes() -> None:
    assert quantize(np.zeros((0, 256), np.float32), "Q4_K", device="cpu:0").shape == (0, 144)
    assert quantize(np.zeros((2, 0), np.float32), "Q4_K", device="cpu:0").shape == (2, 0)
