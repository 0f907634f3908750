"""Packed Cholesky factors against NumPy's on whole matrices."""

import numpy as np
import pytest

from bitladder.kernels.cholesky import upper_factor


@pytest.mark.parametrize("n", [1, 2, 5, 6, 33, 64, 700, 1301])
def test_equals_the_factor_of_the_whole_matrix(n):
    rng = np.random.default_rng(n)
    inputs = rng.normal(size=(2 * n + 3, n)) * rng.uniform(0.1, 3, n)
    matrix = (inputs.T @ inputs).astype(np.float32)
    order = rng.permutation(n)
    coupling, pivots = upper_factor(matrix, order, 0.5)
    whole = matrix[np.ix_(order, order)].astype(np.float64) + 0.5 * np.eye(n)
    expected = np.linalg.cholesky(whole[::-1, ::-1])[::-1, ::-1]
    np.testing.assert_allclose(pivots, np.diagonal(expected), rtol=1e-9)
    assert coupling.dtype == np.float32
    np.testing.assert_allclose(coupling, np.triu(expected / np.diagonal(expected), 1), rtol=1e-5, atol=1e-7)


def test_no_factor_of_an_indefinite_matrix():
    matrix = np.diag([2.0, -1.0, 3.0])
    assert upper_factor(matrix, np.arange(3), 0.0) is None
    assert upper_factor(matrix, np.arange(3), 1.5) is not None


@pytest.mark.parametrize("n", [7, 1030])
def test_the_factor_may_take_the_matrix_place(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((2 * n, n)).astype(np.float32)
    matrix = x.T @ x
    order = rng.permutation(n)
    apart, pivots = upper_factor(matrix, order, 0.5)
    place = matrix.copy()
    within, same_pivots = upper_factor(place, order, 0.5, overwrite=True)
    assert np.shares_memory(within, place)
    assert np.array_equal(within, apart) and np.array_equal(same_pivots, pivots)


def test_a_matrix_without_a_factor_is_left_whole() -> None:
    matrix = np.diag([1, -1, 2]).astype(np.float32)
    assert upper_factor(matrix, np.arange(3), 0.0, overwrite=True) is None
    assert np.array_equal(matrix, np.diag([1, -1, 2]))
