"""GPTQ's method in checkpoints: shrunk by few tokens, and weights that make up for what was lost before them."""

import numpy as np
import pytest

from bitladder.kernels import gptq
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.levels.methods import GPTQ, relative_error

FORM = parse_checkpoint("W4A16-g32").format


def _read(tokens, columns=96, seed=0):
    """Inputs f32[tokens, columns] that are related."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, 8)) @ rng.standard_normal((8, columns))
    return (mixed + 0.5 * rng.standard_normal((tokens, columns))).astype(np.float32)


def _weights(rows=24, columns=96):
    return np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)


def test_few_tokens_are_trusted_less():
    few, other, weights = _read(64), _read(4000, seed=2), _weights()
    others = other.T @ other

    def lost(**known):
        found = GPTQ.apply(FORM, GPTQ.prepare(few.T @ few, **known), weights)
        return relative_error(found.decoded - weights, weights, others)

    assert lost(tokens=64) < 0.97 * lost()


def test_a_given_matrix_is_left_alone_unless_it_may_be_overwritten():
    gram = (x := _read(64)).T @ x
    before = gram.copy()
    kept = GPTQ.prepare(gram, tokens=64)
    np.testing.assert_array_equal(gram, before)
    taken = GPTQ.prepare(gram, tokens=64, overwrite=True)
    np.testing.assert_array_equal(kept.factor.coupling, taken.factor.coupling)
    np.testing.assert_allclose(kept.added, 1.5 * np.diagonal(before) + kept.factor.ridge, rtol=1e-5)


def test_the_loss_is_that_of_the_inputs_seen_without_what_was_added():
    gram, weights = (x := _read(200)).T @ x, _weights()
    found = GPTQ.apply(FORM, GPTQ.prepare(gram, tokens=200), weights)
    assert found.loss == pytest.approx(relative_error(found.decoded - weights, weights, gram), rel=1e-3)


def test_weights_make_up_by_half_for_what_was_lost_before():
    """What is read in the level is the source's, turned a little: the whole of that could be undone."""
    source, weights = _read(3000), _weights()
    turn = np.eye(96) + 0.1 * np.random.default_rng(3).standard_normal((96, 96)) / np.sqrt(96)
    level = (source @ turn).astype(np.float32)
    gram, drift = level.T @ level, (source - level).T @ level
    undone = weights @ np.linalg.inv(turn).T
    eight = parse_checkpoint("W8A16-g32").format
    found = GPTQ.apply(eight, GPTQ.prepare(gram, drift=drift, damp=1e-6), weights)
    np.testing.assert_allclose(found.decoded, (weights + undone) / 2, atol=0.06)

    def lost(decoded):
        return float(np.square(level @ decoded.T - source @ weights.T).sum())

    assert lost(found.decoded) < 0.4 * lost(GPTQ.apply(eight, GPTQ.prepare(gram, damp=1e-6), weights).decoded)


def test_solving_by_a_factor_is_dividing_by_its_matrix():
    gram, right = (x := _read(500)).T @ x, _weights()
    factor = gptq.prepare(gram, damp=0.01)
    damped = gram.astype(np.float64) + factor.ridge * np.eye(96)
    np.testing.assert_allclose(gptq.solve(factor, right), right @ np.linalg.inv(damped), rtol=2e-3, atol=1e-6)
