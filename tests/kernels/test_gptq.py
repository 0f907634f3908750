"""GPTQ against brute force, an independent textbook version, and answers known in advance."""

import itertools

import numpy as np
import pytest

from bitladder.kernels import gptq, groups
from bitladder.kernels.grid import Grid, contiguous_groups
from reference.plain_rounding import round_to_nearest
from reference.textbook_gptq import textbook_gptq


def inputs_with(columns: int, tokens: int, seed: int, rank: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(rank or columns, columns)) * rng.uniform(0.1, 3, columns)
    return (rng.normal(size=(tokens, rank or columns)) @ mixing).astype(np.float32)


def quadratic(difference: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    return np.einsum("rk,kl,rl->r", difference, hessian, difference)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [6, 64, 100, 200])
def test_equals_the_textbook_form_with_the_inverse(columns, act_order):
    rng = np.random.default_rng(columns)
    x = inputs_with(columns, 4 * columns, columns)
    weights = rng.normal(size=(9, columns)).astype(np.float32)
    parameters = groups.search(weights, 3, 0)
    factor = gptq.prepare(x.T @ x, damp=0.01, act_order=act_order)
    codes, cost = gptq.apply(factor, weights, parameters.grid())
    expected = textbook_gptq(
        weights, x.astype(np.float64).T @ x, parameters.scales, parameters.zeros, 3, 0.01, act_order
    )
    assert (codes != expected).mean() < 0.002  # a target on the very edge between two codes may fall either way
    damped = x.astype(np.float64).T @ x
    damped[np.diag_indices(columns)] += 0.01 * np.diagonal(damped).mean()
    np.testing.assert_allclose(cost, quadratic(parameters.decode(codes) - weights, damped), rtol=2e-3)


def test_near_the_best_of_all_codes_on_tiny_problems():
    """Greedy feedback stays within a few percent of exhaustive search, where plain rounding does not."""
    rng = np.random.default_rng(5)
    ours, plain, best = 0.0, 0.0, 0.0
    for _ in range(30):
        x = inputs_with(5, 40, int(rng.integers(1 << 30)), rank=3) + rng.normal(size=(40, 5)).astype(np.float32) * 0.1
        hessian = (x.T @ x).astype(np.float64)
        weights = rng.normal(size=(1, 5)).astype(np.float32)
        parameters = groups.search(weights, 2, 0, sym=False)
        grid = parameters.grid()
        every = np.array(list(itertools.product(range(4), repeat=5)), np.int16)
        values = np.concatenate([grid.values(code[None]) for code in every])
        best += quadratic(values - weights, hessian).min()
        codes, _ = gptq.apply(gptq.prepare(hessian, damp=1e-6), weights, grid)
        ours += quadratic(grid.values(codes) - weights, hessian)[0]
        plain += quadratic(grid.values(grid.nearest(weights)) - weights, hessian)[0]
    assert best <= ours < 2.5 * best
    assert plain > 2 * ours


def test_weights_on_the_grid_keep_their_codes():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 16, (7, 128)).astype(np.int16)
    parameters = groups.Affine(
        groups.store_scale(rng.uniform(0.01, 0.1, (7, 2)).astype(np.float32)),
        np.full((7, 2), 8, np.int16),
        4,
        64,
        128,
    )
    x = inputs_with(128, 300, 1)
    codes, cost = gptq.apply(gptq.prepare(x.T @ x), parameters.decode(truth), parameters.grid())
    assert (codes == truth).all()
    assert cost.max() < 1e-6


def test_two_identical_inputs_share_their_rounding_errors():
    """Two columns that always see the same input: only the sum of their weights matters, so 0.4 + 0.4 becomes
    1 + 0 (or 0 + 1)."""
    grid = Grid(np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32), contiguous_groups(2, 0), -8, 7)
    hessian = np.array([[1.0, 1.0], [1.0, 1.0]])
    codes, _ = gptq.apply(gptq.prepare(hessian, damp=1e-6), np.array([[0.4, 0.4]], np.float32), grid)
    assert codes.sum() == 1
    assert grid.nearest(np.array([[0.4, 0.4]], np.float32)).sum() == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 0])
def test_never_worse_than_plain_rounding_on_the_calibration_set(bits, sym, group_size):
    x = inputs_with(192, 400, bits, rank=60)
    weights = np.random.default_rng(bits).normal(size=(40, 192)).astype(np.float32)
    hessian = x.T @ x
    factor = gptq.prepare(hessian)
    parameters = groups.search(weights, bits, group_size, sym=sym, importance=factor.importance)
    codes, _ = gptq.apply(factor, weights, parameters.grid())
    plain_codes, plain = round_to_nearest(weights, bits, group_size, sym=sym)
    ours = quadratic(parameters.decode(codes) - weights, hessian)
    rounded = quadratic(plain.decode(plain_codes) - weights, hessian)
    assert ours.sum() < 0.5 * rounded.sum()
    assert (ours < rounded).mean() > 0.95  # feedback is greedy: a single row may be unlucky


def test_singular_hessians_are_rescued_and_reported():
    x = inputs_with(64, 5, 3)
    factor = gptq.prepare(-1e-3 * np.eye(64) + x.T @ x + 2e-3 * np.eye(64), damp=0.0)
    assert factor.damp < 1e-6
    indefinite = x.T @ x
    indefinite[0, 1] = indefinite[1, 0] = 1.5 * np.sqrt(indefinite[0, 0] * indefinite[1, 1])
    factor = gptq.prepare(indefinite, damp=0.01)
    assert factor.rescued > 0
    assert factor.damp > 0.01


def test_columns_without_input_are_rounded_plainly():
    x = inputs_with(64, 200, 4)
    x[:, 10:20] = 0
    weights = np.random.default_rng(2).normal(size=(8, 64)).astype(np.float32)
    parameters = groups.search(weights, 4, 32)
    factor = gptq.prepare(x.T @ x)
    codes, _ = gptq.apply(factor, weights, parameters.grid())
    assert factor.dead == 10
    assert (codes[:, 10:20] == parameters.grid().nearest(weights)[:, 10:20]).all()


def test_a_layer_that_no_token_reached_is_rounded_plainly():
    weights = np.random.default_rng(2).normal(size=(8, 64)).astype(np.float32)
    parameters = groups.search(weights, 4, 32)
    factor = gptq.prepare(np.zeros((64, 64)))
    assert factor.dead == 64
    assert (gptq.apply(factor, weights, parameters.grid())[0] == parameters.grid().nearest(weights)).all()


@pytest.mark.parametrize("broken", [np.full((4, 4), np.nan), np.ones((3, 4)), -np.eye(4)])
def test_what_is_no_hessian_is_refused(broken):
    with pytest.raises(ValueError, match="Hessian"):
        gptq.prepare(broken)


def test_uneven_steps_take_the_nearest_entry():
    steps = np.array([-3, -1, 0.5, 4], np.float32)
    grid = Grid(np.full((1, 1), 2, np.float32), np.full((1, 1), 1, np.float32), contiguous_groups(4, 0), 0, 3, steps)
    weights = np.array([[-4.0, -0.4, 1.6, 30.0]], np.float32)
    assert grid.nearest(weights).tolist() == [[0, 1, 2, 3]]
    codes, _ = gptq.apply(gptq.prepare(np.eye(4)), weights, grid)
    assert codes.tolist() == [[0, 1, 2, 3]]
    assert grid.values(codes).tolist() == [[-5, -1, 2, 9]]


def test_rows_are_worked_on_a_few_at_a_time(monkeypatch):
    """As many as leave room for wide inputs: each is as it would be beside all others."""
    rng = np.random.default_rng(11)
    weights, x = rng.normal(size=(21, 160)).astype(np.float32), inputs_with(160, 640, 12)
    factor, grid = gptq.prepare(x.T @ x, act_order=True), groups.search(weights, 3, 32).grid()
    codes, cost = gptq.apply(factor, weights, grid)
    monkeypatch.setattr(gptq, "_AT_ONCE", 4 * 160)
    parts, own = gptq.apply(factor, weights, grid)
    assert np.array_equal(parts, codes)
    np.testing.assert_allclose(own, cost, rtol=1e-5)


def test_rows_make_up_a_few_at_a_time(monkeypatch):
    inputs = inputs_with(64, 300, 1)
    drift = (0.1 * np.random.default_rng(2).standard_normal(inputs.shape).astype(np.float32)).T @ inputs
    factor = gptq.prepare(inputs.T @ inputs)
    weights = np.random.default_rng(3).standard_normal((40, 64)).astype(np.float32)
    whole = gptq.making_up(factor, weights, drift)
    monkeypatch.setattr(gptq, "_AT_ONCE", 64 * 9)
    np.testing.assert_allclose(gptq.making_up(factor, weights, drift), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="differ"):
        gptq.making_up(factor, weights, drift * np.float32(np.inf))
