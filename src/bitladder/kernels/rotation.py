"""An orthogonal matrix that is cheap to multiply with: signs, then a cosine transform over the odd part of the width
and Hadamard's over the rest of it (as QuaRot does, arXiv:2404.00456, without a table of Hadamard matrices).

    R = diag(signs) (C (x) H)        n = odd * 2^k,  C f32[odd, odd],  H f32[2^k, 2^k]

Every value of a rotated vector is a mean of all of its values with changed signs, so no channel stands out any more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

_FACTOR = 64
"""Hadamard matrices are multiplied as products of ones at most so wide."""
MOST_ODD = 2048
"""Widths whose odd part is larger are not rotated: its cosine transform is a full matrix."""


@dataclass(frozen=True)
class Rotation:
    """``R`` of a width, by its factors."""

    signs: F32
    """f32[n]."""
    factors: tuple[F32, ...]
    """Orthogonal matrices whose Kronecker product follows the signs."""

    def columns(self, values: F32) -> F32:
        """``values R`` of f32[..., n]."""
        shape = values.shape
        turned = (values * self.signs).reshape(-1, *(len(one) for one in self.factors))
        for axis, factor in enumerate(self.factors, start=1):
            turned = np.moveaxis(np.moveaxis(turned, axis, -1) @ factor, -1, axis)
        return np.ascontiguousarray(turned.reshape(shape), np.float32)

    def rows(self, values: F32) -> F32:
        """``R^T values`` of f32[n, columns]: what writes rotated vectors."""
        return np.ascontiguousarray(self.columns(np.ascontiguousarray(values.T)).T)


def odd_part(width: int) -> int:
    """What is left of a width when it is halved as often as that goes."""
    return width // (width & -width)


def rotation(width: int, *, seed: int = 0) -> Rotation:
    """The rotation of a width; ``seed`` chooses the signs.

    Raises:
        ValueError: the width is no positive number, or its odd part is above ``MOST_ODD``.
    """
    if width < 1 or odd_part(width) > MOST_ODD:
        raise ValueError(f"no rotation of {width} channels")
    signs = np.random.default_rng(seed).integers(0, 2, width).astype(np.float32) * 2 - 1
    odd = odd_part(width)
    factors = [_cosines(odd)] if odd > 1 else []
    left = width // odd
    while left > 1:
        factors.append(_hadamard(min(left, _FACTOR)))
        left //= len(factors[-1])
    return Rotation(signs, tuple(factors))


def _cosines(size: int) -> F32:
    """The orthogonal DCT-II."""
    at = np.arange(size)
    table = np.cos(np.pi * (2 * at + 1) * at[:, None] / (2 * size)) * np.sqrt(2 / size)
    table[0] /= np.sqrt(2)
    return np.asarray(table, np.float32)


def _hadamard(size: int) -> F32:
    """Sylvester's, f32[size, size] with rows of length one; ``size`` is a power of two."""
    table = np.ones((1, 1), np.float32)
    while len(table) < size:
        table = np.block([[table, table], [table, -table]])
    return np.asarray(table / np.sqrt(size), np.float32)
