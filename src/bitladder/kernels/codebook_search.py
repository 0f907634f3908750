"""The doors of the codebook kernels: what a search decides for rows of weights, with error feedback or without."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bitladder.kernels.codebook_rows import BLOCK, CODEBOOK, SEARCH, Found, pack, table_of
from bitladder.kernels.compiled import Compiled
from bitladder.kernels.rows import Effort

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

_QUANTIZE = Compiled("bitladder.kernels.codebook", "quantize_codebook")
_FEED = Compiled("bitladder.kernels.codebook", "feed_codebook")
_REFINE = Compiled("bitladder.kernels.codebook", "refine_codebook")


def find(weights: F32, columns: int, qtype: str, importance: F32 | None, effort: Effort) -> Found:
    """What the search decides.

    Args:
        weights: f32[rows * columns], contiguous, finite.
        columns: of a row; a multiple of 256.
        qtype: a key of ``CODEBOOK``.
        importance: f32[columns], what a squared error of each column costs; None: all the same.
        effort: how long to look.
    """
    row, blocks = CODEBOOK[qtype], weights.size // BLOCK
    heights = np.empty(0, np.float32) if importance is None else importance
    found = Found(
        np.zeros(blocks, np.float32), np.zeros((blocks, row.parts), np.int64), np.zeros((blocks, row.parts), np.int64),
        np.zeros((blocks, row.groups), np.int64), np.zeros((blocks, BLOCK // 8), np.uint8),
    )  # fmt: skip
    _QUANTIZE(
        weights, columns, heights, table_of(qtype).reshape(-1), row, SEARCH[effort],
        np.empty(row.scratch, np.float32), np.empty(720, np.float32), np.empty(64, np.int64),
        found.scale, found.whole.reshape(-1), found.variants.reshape(-1), found.entries.reshape(-1),
        found.signs.reshape(-1),
    )  # fmt: skip
    return found


def encode(weights: F32, columns: int, qtype: str, importance: F32 | None, effort: Effort, out: U8) -> None:
    """Write the blocks of ``weights`` f32[rows * columns] to ``out``, flat bytes; arguments as those of ``find``."""
    np.copyto(out, pack(qtype, find(weights, columns, qtype, importance, effort)).reshape(-1))


def feed(qtype: str, found: Found, weights: F32, coupling: F32, pivots: F32) -> Found:
    """The same float16s and steps, entries and signs chosen one after another, each error moved into the weights still
    to come (``gptq.py``; here one entry rounds several columns, and counts what their errors do to one another).

    Args:
        qtype: a key of ``CODEBOOK``.
        found: of the weights, a block for each row.
        weights: f32[rows, 256].
        coupling: f32[256, 256], above the diagonal, in storage order.
        pivots: f32[256], likewise.
    """
    row = CODEBOOK[qtype]
    entries, signs = np.zeros_like(found.entries), np.zeros_like(found.signs)
    _FEED(
        np.ascontiguousarray(weights, np.float32).reshape(-1), np.ascontiguousarray(coupling, np.float32).reshape(-1),
        np.ascontiguousarray(pivots, np.float32), table_of(qtype).reshape(-1), row,
        found.scale, found.whole.reshape(-1), found.variants.reshape(-1),
        np.empty(176, np.float32), np.empty(2 * BLOCK, np.float32), entries.reshape(-1), signs.reshape(-1),
    )  # fmt: skip
    return replace(found, entries=entries, signs=signs)


def refine(qtype: str, found: Found, values: F32, gradients: F32, square: F32, own: Groups) -> F32:
    """What blocks stand for, f32[rows, 256], after each step, entry and sign has been set to what is best while all
    else stays; ``found`` changes in place, and what was ``values`` before is overwritten.

    Args:
        qtype: a key of ``CODEBOOK``.
        found: a block for each row; contiguous.
        values: f32[rows, 256], what it stands for.
        gradients: f32[rows, 256], the whole Hessian times the errors of whole rows; overwritten.
        square: f32[256, 256], the Hessian of these columns.
        own: of ``square``.
    """
    row = CODEBOOK[qtype]
    _REFINE(
        gradients.reshape(-1), values.reshape(-1), square.reshape(-1), own.inverse, own.coupling, own.pivots,
        table_of(qtype).reshape(-1), row, found.scale, found.whole.reshape(-1), found.variants.reshape(-1),
        np.empty(176, np.float32), np.empty(576, np.float32), found.entries.reshape(-1), found.signs.reshape(-1),
    )  # fmt: skip
    return values


@dataclass(frozen=True)
class Groups:
    """Of the square of each group of columns that is one entry: its inverse, and its factor as the kernels take it."""

    inverse: F32
    coupling: F32
    pivots: F32

    @staticmethod
    def of(square: F32, qtype: str) -> Groups:
        """Of a Hessian f32[256, 256], positive semidefinite up to rounding: a hundred-thousandth of each group's mean
        diagonal is added. It only ranks candidates; whether one is better is decided by the Hessian itself."""
        width = CODEBOOK[qtype].width
        starts = np.arange(0, BLOCK, width)
        each = starts[:, None] + np.arange(width)
        squares = square[each[:, :, None], each[:, None, :]].astype(np.float64)
        means = np.trace(squares, axis1=1, axis2=2) / width + np.finfo(np.float32).tiny
        squares += 1e-5 * means[:, None, None] * np.eye(width)
        upper = np.linalg.cholesky(squares[:, ::-1, ::-1])[:, ::-1, ::-1]
        diagonal = np.diagonal(upper, axis1=1, axis2=2)
        coupling = np.zeros((BLOCK, BLOCK), np.float32)
        coupling[each[:, :, None], each[:, None, :]] = upper / diagonal[:, None, :] - np.eye(width)
        inverse = np.linalg.inv(squares).astype(np.float32)
        return Groups(inverse.reshape(-1), coupling.reshape(-1), (diagonal**2).astype(np.float32).reshape(-1))
