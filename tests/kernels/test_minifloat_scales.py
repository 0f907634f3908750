"""Scales for floats of eight and four bits: what is counted is what rounding costs, and nothing costs more than plain
rounding."""

from functools import partial

import numpy as np
import pytest
import torch

from bitladder.kernels import minifloat_scales, minifloats
from bitladder.kernels.grid import Grid
from bitladder.kernels.groups import store_scale
from bitladder.kernels.minifloat_scales import E2M1, E4M3

KINDS = [E4M3, E2M1]


def hostile(rows: int = 24, columns: int = 256, seed: int = 0) -> np.ndarray:
    """Heavy tails; among the rows zeros, one spike, tiny and huge ones, and a single sign."""
    weights = np.random.default_rng(seed).standard_t(3, (rows, columns)).astype(np.float32) * 0.02
    weights[0] = 0
    weights[1] = 0
    weights[1, 17] = 1e4
    weights[2] *= np.float32(1e-30)
    weights[3] *= np.float32(1e20)
    weights[4] = np.abs(weights[4])
    weights[5, ::2] = 0
    return weights


def rounded(found, weights):
    return found.decode(found.grid().nearest(weights))


def cost(weights, decoded, importance):
    return (np.square(decoded.astype(np.float64) - weights) * importance).sum()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_steps_are_the_types_own(kind):
    assert (np.diff(kind.steps) > 0).all()
    assert np.count_nonzero(kind.steps == 0) == 1
    assert kind.steps[-1] == kind.largest == -kind.steps[0]
    if kind is E4M3:
        own = torch.from_numpy(kind.bytes_of).view(torch.float8_e4m3fn).float().numpy()
    else:
        own = minifloats.e2m1(kind.bytes_of)
    np.testing.assert_array_equal(own, kind.steps)


def test_pairs_unpack_to_what_was_packed():
    codes = np.random.default_rng(0).integers(0, 16, (5, 32)).astype(np.uint8)
    np.testing.assert_array_equal(minifloats.e2m1_pairs(minifloats.pair(codes)), minifloats.e2m1(codes))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_nearest_steps_are_nearest(kind):
    """Long tables are searched by halving; every one must give what looking at all entries gives."""
    at = np.concatenate([kind.steps, (kind.steps[1:] + kind.steps[:-1]) / 2, [1e9, -1e9, 1e-12]]).astype(np.float32)
    at = np.concatenate([at, at * np.float32(1.01), np.random.default_rng(1).normal(0, 3, 500).astype(np.float32)])
    one, none = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    grid = Grid(one, none, np.zeros(len(at), np.int32), 0, len(kind.steps) - 1, kind.steps)
    found = grid.nearest(at[None])[0]
    np.testing.assert_array_equal(found, np.abs(at[:, None] - kind.steps).argmin(axis=1))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("size", [16, 0])
def test_what_is_counted_is_what_rounding_costs(kind, size):
    """By the grid, which knows nothing of how it is counted; scales too small cut off, scales too large fall among the
    smallest steps."""
    weights = hostile()[4:]
    importance = np.random.default_rng(2).uniform(0.1, 5, weights.shape[1]).astype(np.float32)
    for share in (0.3, 1.0, 7.0, 4000.0):
        plain = minifloat_scales.peaks(weights, size) / np.float32(kind.largest)
        scales = np.maximum(plain * np.float32(share), np.float32(1e-20))
        found = minifloat_scales.FloatScales(kind, scales, weights.shape[1], size)
        wrong = np.square(rounded(found, weights).astype(np.float64) - weights) * importance
        expected = wrong.reshape(*scales.shape, -1).sum(axis=2)
        counted = minifloat_scales._errors(weights, size, importance, scales, kind)
        np.testing.assert_allclose(counted, expected, rtol=2e-4, atol=1e-9 * expected.max())


SEARCHES = {
    "free": lambda w, h, s: minifloat_scales.free(w, 0, h, partial(store_scale, dtype="bfloat16"), s),
    "blocks": lambda w, h, s: minifloat_scales.in_blocks(w, 8, h, partial(store_scale, dtype="bfloat16"), s),
}
SHARES = np.array([1, 1.2, 1.4, 1.7], np.float32)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("weighted", [True, False])
def test_free_scales_cost_less_than_plain_ones(name, weighted):
    for seed in range(3):
        weights = hostile(seed=seed)
        heights = np.random.default_rng(seed).uniform(0, 10, weights.shape[1]).astype(np.float32)
        importance = heights if weighted else None
        search = SEARCHES[name]
        plain, best = search(weights, importance, SHARES[:1]), search(weights, importance, SHARES)
        for row in range(0, len(weights), 8 if name == "blocks" else 1):
            own = slice(row, row + (8 if name == "blocks" else 1))
            mine = cost(weights[own], rounded(best, weights)[own], heights if weighted else 1)
            theirs = cost(weights[own], rounded(plain, weights)[own], heights if weighted else 1)
            assert mine <= theirs * (1 + 1e-5)
        assert np.isfinite(rounded(best, weights)).all()
        store = partial(store_scale, dtype="bfloat16")
        np.testing.assert_array_equal(store(best.scales), best.scales)


@pytest.mark.parametrize("block", [0, 64])
def test_scales_of_many_weights_are_found_by_a_part_of_them(block, monkeypatch):
    """Never dearer than the plain one, and more than half of what the best of all saves."""
    rng = np.random.default_rng(5)
    weights = rng.standard_t(4, (128, 2048)).astype(np.float32) * rng.uniform(0.01, 0.1, (128, 1)).astype(np.float32)
    heights = rng.uniform(0.1, 3, 2048).astype(np.float32)
    store, shares = (
        partial(store_scale, dtype="bfloat16"),
        np.array([1, 1.09, 1.19, 1.3, 1.41, 1.54, 1.68, 1.83], np.float32),
    )

    def costs(tried):
        if block:
            found = minifloat_scales.in_blocks(weights, block, heights, store, tried)
        else:
            found = minifloat_scales.free(weights, 0, heights, store, tried)
        lost = np.square(rounded(found, weights).astype(np.float64) - weights) * heights
        return lost.reshape(128 // (block or 1), block or 1, -1, block or 2048).sum(axis=(1, 3))

    plain, found = costs(shares[:1]), costs(shares)
    monkeypatch.setattr(minifloat_scales, "_SCREENED", 10**9)
    best = costs(shares)
    assert (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < best.sum() + 0.5 * (plain.sum() - best.sum())
    assert (found > best * (1 + 1e-5)).any()  # a part was looked at


def test_scales_that_cannot_be_held_are_refused_and_candidates_that_cannot_are_left_out():
    weights = np.full((2, 8), 60000 * 448, np.float32)
    found = minifloat_scales.free(weights, 0, None, store_scale, SHARES)
    assert (found.scales == 60000).all()
    with pytest.raises(ValueError, match="does not fit float16"):
        minifloat_scales.free(weights * 2, 0, None, store_scale, SHARES)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_powers_of_two(kind):
    """The plain code by its definition in bits; what is chosen is the cheapest of it and its neighbours."""
    weights = hostile()[3:]
    weights[5, :32] = [1.74] + [0.1] * 31
    weights[6, :32] = [1.75] + [0.1] * 31
    heights = np.random.default_rng(0).uniform(0.1, 5, 256).astype(np.float32)
    found = minifloat_scales.powers_of_two(weights, kind, 32, heights)
    peak = np.abs(weights.reshape(len(weights), -1, 32)).max(axis=2)
    bumped = (peak.view(np.uint32) + np.uint32(1 << 21)) >> np.uint32(23)  # rounded up from a fraction of 1.75 on
    plain = bumped.astype(int) - {"E2M1": 2, "E4M3": 8}[kind.name]
    assert (np.abs(found.codes.astype(int) - plain) <= 1).all()
    np.testing.assert_array_equal(found.scales, minifloats.e8m0(found.codes))

    def costs(codes):
        own = minifloat_scales.FloatScales(kind, minifloats.e8m0(codes.astype(np.uint8)), 256, 32)
        return (
            (np.square(rounded(own, weights).astype(np.float64) - weights) * heights)
            .reshape(*codes.shape, 32)
            .sum(axis=2)
        )

    best = np.minimum.reduce([costs(plain + by) for by in (-1, 0, 1)])
    np.testing.assert_allclose(costs(found.codes), best, rtol=1e-3)
    usual = slice(1, None)  # not the huge one, which is most of the sum
    assert best[usual].sum() <= (0.99 if kind is E2M1 else 1.0) * costs(plain)[usual].sum()


def test_two_levels_of_scales():
    """Scales are E4M3 codes by one number, cost less than the plain ones, and are never zero."""
    weights = hostile()
    weights = np.delete(weights, [1, 3], axis=0)  # whose spikes would leave all others below the smallest scale
    heights = np.random.default_rng(0).uniform(0.1, 5, 256).astype(np.float32)
    divisor = float(np.float32(6 * 448) / np.abs(weights).max())
    plain, dear = minifloat_scales.two_levels(weights, 16, heights, divisor, around=(0,))
    found, cheap = minifloat_scales.two_levels(weights, 16, heights, divisor, around=tuple(range(-4, 7)))
    assert cheap < 0.95 * dear
    assert cheap == pytest.approx(cost(weights, rounded(found, weights), heights), rel=1e-3)
    assert found.codes.min() >= 1
    assert found.codes.max() <= 126
    own = torch.from_numpy(found.codes).view(torch.float8_e4m3fn).float().numpy() / np.float32(divisor)
    np.testing.assert_array_equal(own, found.scales)
    wanted = torch.from_numpy(np.abs(weights.reshape(len(weights), -1, 16)).max(axis=2) * np.float32(divisor / 6))
    exact = wanted.clamp(max=448).to(torch.float8_e4m3fn).float().numpy()
    held = minifloats.e4m3(plain.codes)
    nonzero = exact > 0
    np.testing.assert_allclose(held[nonzero], exact[nonzero], rtol=0.13)  # ties may fall to either side
    assert np.mean(held[nonzero] == exact[nonzero]) > 0.99


def test_rows_are_those_of_the_rows():
    weights = hostile()
    found = minifloat_scales.powers_of_two(weights, E2M1, 32, None)
    codes = found.grid().nearest(weights)
    np.testing.assert_array_equal(found.rows(slice(3, 9)).decode(codes[3:9]), found.decode(codes)[3:9])
    np.testing.assert_array_equal(found.grid().values(codes), found.decode(codes))
