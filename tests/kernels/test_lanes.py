"""Each lane operation against numpy's, on the values that are easy to get wrong."""

from __future__ import annotations

import numpy as np
import pytest

from bitladder.kernels import lanes
from bitladder.kernels.compiled import Compiled
from bitladder.kernels.lanes import kernel

SPECIAL = np.array(
    [0.0, -0.0, 0.5, 1.5, 2.5, -2.5, 1e-42, 6e-8, 2.9e-8, 3e-8, 6.1e-5, 65504.0, 65519.0, 65520.0, 1e30, -1e30],
    np.float32,
)


@kernel
def each_operation(x, y, out, bytes_out):
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


apply_each = Compiled(__name__, "each_operation")


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
def both_turns(x, starts, tile, byte_tile, out, targets):
    lanes.load_transposed(x, starts, 1, tile, 16)
    lanes.store_transposed(byte_tile, 16, out, targets, 1)


turn = Compiled(__name__, "both_turns")


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


@kernel
def reduced_rows(x, starts, out, bits):
    lowest, highest = lanes.lowest_of_rows(x, starts), lanes.highest_of_rows(x, starts)
    lanes.store(out, 0, lowest)
    lanes.store(out, 16, highest)
    lanes.store_bits(bits, 1, highest > lanes.splat(2.0))


reduce_rows = Compiled(__name__, "reduced_rows")


def test_extremes_of_rows_and_bits_of_a_mask() -> None:
    x = np.random.default_rng(2).standard_normal(16 * 40).astype(np.float32)
    starts = np.random.default_rng(3).permutation(16) * 40 + np.arange(16) % 8
    out, bits = np.zeros(32, np.float32), np.zeros(4, np.uint8)
    reduce_rows(x, starts, out, bits)
    rows = np.stack([x[start : start + 32] for start in starts])
    np.testing.assert_array_equal(out, np.concatenate([rows.min(1), rows.max(1)]))
    np.testing.assert_array_equal(bits, [0, *np.packbits(rows.max(1) > 2, bitorder="little"), 0])
