"""Each lane operation against numpy's, on the values that are easy to get wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitladder.kernels import lanes
from bitladder.kernels.affine import quantize_affine
from bitladder.kernels.lanes import kernel

SPECIAL = np.array(
    [0.0, -0.0, 0.5, 1.5, 2.5, -2.5, 1e-42, 6e-8, 2.9e-8, 3e-8, 6.1e-5, 65504.0, 65519.0, 65520.0, 1e30, -1e30],
    np.float32,
)


@kernel
def apply_each(x, y, out, bytes_out):
    a, b = lanes.load(x, 0), lanes.load(y, 0)
    lanes.store(out, 0, a + b)
    lanes.store(out, 16, a - b)
    lanes.store(out, 32, a * b)
    lanes.store(out, 48, lanes.where((a > b) & (a > lanes.splat(0.0)), a, b))
    lanes.store(out, 64, lanes.minimum(a, b))
    lanes.store(out, 80, lanes.maximum(a, b))
    lanes.store(out, 96, lanes.magnitude(a))
    lanes.store(out, 112, lanes.reciprocal(a))
    half = lanes.to_f16(a)
    lanes.store(out, 128, half)
    lanes.store_f16(bytes_out, 0, half)
    lanes.store_u8(bytes_out, 32, lanes.nearest(lanes.minimum(lanes.maximum(b, lanes.splat(-9.0)), lanes.splat(200.0))))


@pytest.mark.parametrize("seed", range(4))
def test_operations_equal_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = SPECIAL if seed == 0 else (rng.standard_normal(16) * 10.0 ** rng.integers(-9, 5, 16)).astype(np.float32)
    y = (rng.standard_normal(16) * 100).astype(np.float32)
    out, raw = np.zeros(144, np.float32), np.zeros(48, np.uint8)
    apply_each(x, y, out, raw)
    with np.errstate(all="ignore"):
        half = np.clip(x.astype(np.float16), -65504, 65504)
        inverse = np.where(np.abs(x) > 1e-37, 1 / x, 0).astype(np.float32)
        expected = [x + y, x - y, x * y, np.where((x > y) & (x > 0), x, y), np.minimum(x, y), np.maximum(x, y),
                    np.abs(x), inverse, half.astype(np.float32)]  # fmt: skip
    for got, want in zip(out.reshape(9, 16), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.stack([raw[:16], raw[16:32]], 1).view(np.float16)[:, 0], half)
    np.testing.assert_array_equal(raw[32:], np.rint(np.clip(y, -9, 200)).astype(np.int32).astype(np.uint8))


def test_to_f16_equals_numpy_on_every_exponent() -> None:
    bits = np.random.default_rng(1).integers(0, 0x477FE000, 16 * 4096, dtype=np.uint32)
    x, out, raw = bits.view(np.float32), np.zeros(144, np.float32), np.zeros(48, np.uint8)
    for start in range(0, x.size, 16):
        apply_each(x[start : start + 16], x[:16], out, raw)
        np.testing.assert_array_equal(out[128:], x[start : start + 16].astype(np.float16).astype(np.float32))


@kernel
def turn(x, starts, tile, byte_tile, out, targets):
    lanes.load_transposed(x, starts, 1, tile, 16)
    lanes.store_transposed(byte_tile, 16, out, targets, 1)


def test_transposing_moves_every_element_to_its_lane() -> None:
    x = np.arange(16 * 20, dtype=np.float32)
    starts = np.arange(16, dtype=np.int64)[::-1].copy() * 20
    tile, byte_tile, out = np.zeros(16 * 17, np.float32), np.arange(16 * 17) % 251, np.zeros(16 * 20, np.uint8)
    byte_tile = byte_tile.astype(np.uint8)
    turn(x, starts, tile, byte_tile, out, starts)
    for lane in range(16):
        start = starts[lane]
        np.testing.assert_array_equal(tile[16:].reshape(16, 16)[:, lane], x[start + 1 : start + 17])
        np.testing.assert_array_equal(out[start + 1 : start + 17], byte_tile[16:].reshape(16, 16)[:, lane])


def test_stored_machine_code_is_stamped_with_all_kernel_sources() -> None:
    """numba looks at one file's date only; a kernel must be compiled anew when a helper's file changes."""
    stamp = quantize_affine._cache._cache_file._source_stamp
    assert stamp == lanes._stamp()
    assert len(stamp) == 64
    assert {"lanes.py", "pack.py", "affine.py"} <= {p.name for p in Path(lanes.__file__).parent.glob("*.py")}


def test_a_kernel_without_a_place_to_store_it_still_compiles() -> None:
    made: dict = {}
    exec("def double(x):\n    return x + x", made)  # a function of no file, which numba cannot store
    assert kernel(made["double"])(21) == 42
