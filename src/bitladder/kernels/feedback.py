"""Block formats with error feedback: ordinary llama.cpp blocks whose codes were chosen by GPTQ.

Columns are handled in chunks of blocks, the chunk with the most energetic inputs first. When a chunk is reached, the
importance-weighted search (``kernels.quantize``) finds scales and minima for what its weights have become by then,
moved to make up for the errors before it. Its codes are chosen column by column, the most energetic first, each
rounding error moved into the columns still to come (``gptq.py``). Blocks stay where they are in storage, so any
llama.cpp reads the result. At last codes and scales are improved in turns under the whole Hessian (``refine.py``), a
codebook's entries, signs and steps likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bitladder.formats.blocks import QTYPES
from bitladder.kernels import codebook_search, gptq, gptq_device
from bitladder.kernels.api import dequantize, quantize
from bitladder.kernels.codebook_rows import BLOCK, CODEBOOK, Found, joined, pack, part_of, values_of
from bitladder.kernels.codes import CODE_BITS, grid_of, with_codes
from bitladder.kernels.grid import F32
from bitladder.kernels.refine import refine
from bitladder.kernels.rows import Effort

U8 = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]
T = TypeVar("T")

REVISION = "8"
"""Raised whenever the bytes of fitted files change for another reason than the kernels' own revision."""
_STEPS = 8
"""In how many turns a head's rows are chosen."""
_CHUNKS = (256, 128, 64, 32)
_SWEEPS: dict[Effort, int] = {"fast": 0, "good": 2, "best": 8}
"""How often codes and scales are improved in turns: half of what they can gain comes from two (docs/log.md)."""
_CODEBOOK_SWEEPS: dict[Effort, int] = {"fast": 0, "good": 4, "best": 8}
"""The same of entries: a sweep takes a tenth of the time that finding them does."""


@dataclass(frozen=True)
class Blocks:
    """Quantized rows uint8[rows, row_bytes], and what they cost on the calibration set.

    ``cost`` is ``tr(D H D^T)`` with D the error of the weights and H the damped Hessian; ``plain_cost`` that of
    rounding to nearest with scales searched once.
    """

    data: U8
    cost: float
    plain_cost: float


def takes_feedback(qtype: str) -> bool:
    """Whether the codes of a format can be chosen apart from its scales: all block formats, no floats."""
    return qtype in CODE_BITS or qtype in CODEBOOK


def chunk_of(columns: int) -> int:
    """Columns that are handled together: 256 where rows divide into that, else whole blocks of 32."""
    return next((chunk for chunk in _CHUNKS if columns % chunk == 0), 1)


def quantize_with_feedback(
    weights: F32,
    qtype: str,
    factor: gptq.Factor,
    *,
    hessian: F32,
    importance: F32,
    effort: Effort = "good",
    threads: int = 1,
    device: str = "cpu",
) -> Blocks:
    """Store weights in a block format, rounding errors fed back into the columns not yet rounded.

    Args:
        weights: f32[rows, columns], finite; columns a multiple of the format's ``block_size``.
        qtype: a format that ``takes_feedback``.
        factor: of the Hessian of the inputs that the weights meet, with columns kept together by ``chunk_of``
            (``gptq.prepare``).
        hessian: f32[columns, columns], what was factored, undamped.
        importance: f32[columns], by which scales are searched: the inputs' energies. (The factor's pivots, what errors
            cost once others correct them, did worse: docs/log.md.)
        effort: how long to search for scales, and how often to improve codes and scales in turns.
        threads: for the search.
        device: "cpu", or another device of torch on which scales are searched for and codes chosen.

    The error is never above that of plain rounding: rows that feedback did not help are rounded plainly.
    """
    plain = quantize(weights, qtype, importance=importance, effort=effort, threads=threads, device=device)
    fed, found = _fed(weights, qtype, factor, importance, effort, threads, device)
    if _SWEEPS[effort] and qtype in CODE_BITS:
        chunk = chunk_of(weights.shape[1])
        fed = refine(fed, qtype, weights, hessian, ridge=factor.ridge, chunk=chunk, sweeps=_SWEEPS[effort])
    elif _CODEBOOK_SWEEPS[effort]:
        fed = _entries_in_turns(found, qtype, weights, hessian, factor.ridge, _CODEBOOK_SWEEPS[effort], threads)
    cost, plain_cost = (
        gptq.cost_of(factor, dequantize(data, qtype, threads=threads) - weights) for data in (fed, plain)
    )
    worse = cost > plain_cost
    fed[worse] = plain[worse]
    return Blocks(fed, float(np.minimum(cost, plain_cost).sum()), float(plain_cost.sum()))


def quantize_heads(
    weights: F32, qtype: str, curvature: F32, fit: Callable[[F32], Blocks], *, threads: int = 1
) -> Blocks:
    """Store weights of which errors of a head's rows cost more or less together: rows are chosen some at a time, those
    that cost most first, and what earlier rows of a head are off moves the targets of its later ones, as feedback does
    with columns (the two-sided rounding of YAQA, arXiv:2505.22988).

    Args:
        weights: f32[rows, columns], the heads one after the other.
        qtype: what ``fit`` stores them in.
        curvature: f32[heads, d, d], positive definite: of d rows each. Errors D of a head's rows cost
            ``tr(C D H D^T)``, H the Hessian of what they meet.
        fit: stores rows, as ``quantize_with_feedback`` does under H.
        threads: to read what it stored.

    ``cost`` and ``plain_cost`` are against the targets that rows had when their turn came.
    """
    heads, size, _ = curvature.shape
    by_head, wrong = weights.reshape(heads, size, -1), np.zeros_like(weights)
    found: list[Blocks] = []
    places: list[npt.NDArray[np.intp]] = []
    for turns in zip(*map(_turns, curvature.astype(np.float64)), strict=True):
        targets = [
            own[rows] - moves.astype(np.float32) @ off[done]
            for own, off, (rows, done, moves) in zip(by_head, wrong.reshape(by_head.shape), turns, strict=True)
        ]
        at = np.concatenate([head * size + rows for head, (rows, *_) in enumerate(turns)])
        found.append(fit(np.concatenate(targets)))
        places.append(at)
        wrong[at] = dequantize(found[-1].data, qtype, threads=threads) - weights[at]
    data = np.concatenate([one.data for one in found])[np.argsort(np.concatenate(places))]
    return Blocks(data, sum(one.cost for one in found), sum(one.plain_cost for one in found))


def share_left(curvature: F32) -> float:
    """What ``quantize_heads`` leaves of the cost of errors that rows have independently of one another."""
    left = 0.0
    for own in curvature.astype(np.float64):
        total = np.eye(len(own))  # errors of all rows, by the errors that each makes itself
        for rows, done, moves in _turns(own):
            total[rows] -= moves @ total[done]
        left += float(np.vdot(total, own @ total))
    return left / float(curvature.diagonal(axis1=1, axis2=2).sum(dtype=np.float64))


def _turns(curvature: F64) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], F64]]:
    """Rows of a head in their turns, those before them, and how far errors of these move their targets:
    f64[rows, rows before]."""
    order = np.argsort(-curvature.diagonal(), kind="stable")
    for step in np.array_split(np.arange(len(order)), min(len(order), _STEPS)):
        rows, done = order[step], order[: step[0]]
        moves = np.linalg.solve(curvature[np.ix_(rows, rows)], curvature[np.ix_(rows, done)])
        yield rows, done, np.asarray(moves, np.float64)


def _fed(
    weights: F32, qtype: str, factor: gptq.Factor, importance: F32, effort: Effort, threads: int, device: str
) -> tuple[U8, list[Found]]:
    """Blocks chunk by chunk, scales searched for weights that make up for the errors before them; of codebook formats
    also what was found for each run of 256 columns."""
    from scipy.linalg import solve_triangular

    choose = gptq_device.apply_on(device)
    rows, columns = weights.shape
    chunk, kind = chunk_of(columns), QTYPES[qtype]
    errors = np.zeros((columns, rows), np.float32)
    out = np.empty((rows, kind.row_bytes(columns)), np.uint8)
    by_column: dict[int, Found] = {}
    for start in range(0, columns, chunk):
        own = slice(start, start + chunk)
        part, first = factor.part(start, start + chunk), int(factor.order[own].min())
        stored = slice(first, first + chunk)
        targets = np.ascontiguousarray(weights[:, stored])
        if start:
            pulled = factor.coupling[:start, own].T @ errors[:start]
            within = part.coupling.T + np.eye(chunk, dtype=np.float32)
            targets[:, part.order] -= solve_triangular(within, pulled, lower=True, unit_diagonal=True).T
        if qtype in CODEBOOK:
            found = by_column[first] = _entries(part, targets, qtype, importance[stored], effort, threads)
            data, values = pack(qtype, found), values_of(qtype, found)
        else:
            data = quantize(
                targets, qtype, importance=importance[stored], effort=effort, threads=threads, device=device
            )
            grid = grid_of(data, qtype)
            codes, _ = choose(part, targets, grid)
            data, values = with_codes(data, qtype, codes), grid.values(codes)
        out[:, kind.row_bytes(first) : kind.row_bytes(first + chunk)] = data
        errors[own] = (values - weights[:, stored])[:, part.order].T
    return out, [by_column[first] for first in sorted(by_column)]


def _entries(part: gptq.Factor, targets: F32, qtype: str, importance: F32, effort: Effort, threads: int) -> Found:
    """A block of each row in a codebook format. An entry holds neighbours, so columns are handled in storage order: the
    factor is made anew of the chunk's own Hessian, all columns before it fixed."""
    unit = part.coupling + np.eye(len(part.order), dtype=np.float32)
    square = np.empty_like(unit)
    square[np.ix_(part.order, part.order)] = (unit * part.pivots.astype(np.float32)) @ unit.T
    stored = gptq.prepare(square, damp=0, act_order=False)
    pivots = stored.pivots.astype(np.float32)

    def some(rows: slice) -> Found:
        own = np.ascontiguousarray(targets[rows])
        found = codebook_search.find(own.reshape(-1), own.shape[1], qtype, importance, effort)
        return codebook_search.feed(qtype, found, own, stored.coupling, pivots)

    return joined(_in_threads(some, len(targets), threads))


def _entries_in_turns(
    found: Sequence[Found], qtype: str, weights: F32, hessian: F32, ridge: float, sweeps: int, threads: int
) -> U8:
    """The blocks of whole rows, of what was found for each run of 256 columns, improved in turns as in ``refine.py``.
    ``found`` changes in place."""
    values = np.concatenate([values_of(qtype, one) for one in found], axis=1)
    errors, added = values - weights, np.float32(ridge)
    for at in list(range(len(found))) * sweeps:
        columns = slice(BLOCK * at, BLOCK * (at + 1))
        gradients = np.asarray(errors @ hessian[:, columns] + added * errors[:, columns], np.float32)
        square = np.asarray(hessian[columns, columns] + added * np.eye(BLOCK, dtype=np.float32), np.float32)
        own = np.ascontiguousarray(values[:, columns])
        turn = partial(
            _entries_improved, qtype, found[at], own, gradients, square, codebook_search.Groups.of(square, qtype)
        )
        values[:, columns] = np.concatenate(_in_threads(turn, len(weights), threads))
        errors[:, columns] = values[:, columns] - weights[:, columns]
    return np.concatenate([pack(qtype, one) for one in found], axis=1)


def _entries_improved(
    qtype: str, found: Found, values: F32, gradients: F32, square: F32, groups: codebook_search.Groups, rows: slice
) -> F32:
    return codebook_search.refine(qtype, part_of(found, rows), values[rows], gradients[rows], square, groups)


def _in_threads(work: Callable[[slice], T], rows: int, threads: int) -> list[T]:
    """What comes of runs of rows, in their order."""
    step = max(1, rows // max(4 * threads, 1))
    with ThreadPoolExecutor(max_workers=max(threads, 1)) as pool:
        return list(pool.map(work, (slice(start, start + step) for start in range(0, rows, step))))
