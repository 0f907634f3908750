"""The doors of the codebook kernels: what a search decides for rows of weights, with error feedback or without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitladder.kernels.codebook_rows import BLOCK, CODEBOOK, SEARCH, Found, pack, table_of
from bitladder.kernels.compiled import Compiled
from bitladder.kernels.rows import Effort

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

_QUANTIZE = Compiled("bitladder.kernels.codebook", "quantize_codebook")
_FEED = Compiled("bitladder.kernels.codebook", "feed_codebook")


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
