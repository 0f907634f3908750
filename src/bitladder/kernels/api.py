"""The doors of the kernels: check the arguments, split the rows over threads, call the format's kernel."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitladder.formats.blocks import QTYPES, QType

F32Array = NDArray[np.float32]
U8Array = NDArray[np.uint8]
Effort = Literal["fast", "good", "best"]

_EFFORTS: tuple[Effort, ...] = ("fast", "good", "best")

QUANTIZABLE: frozenset[str] = frozenset(
    "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()
)


def quantize(
    weights: F32Array,
    qtype: str,
    *,
    importance: F32Array | None = None,
    effort: Effort = "good",
    threads: int = 1,
) -> U8Array:
    """Store weights in a block format.

    Args:
        weights: f32[rows, columns], finite; columns a multiple of the format's ``block_size``.
        qtype: a name out of ``QUANTIZABLE``.
        importance: f32[columns], not negative: the weight of each column's squared error, as an importance matrix holds it.
        effort: how long to search for scales; never changes the format.
        threads: rows are split over this many threads. The bytes do not depend on it.

    Returns:
        uint8[rows, row_bytes].

    Raises:
        ValueError: an unknown or not quantizable ``qtype``, a wrong shape, or an unknown effort.
    """
    row = _row_of(qtype)
    if qtype not in QUANTIZABLE:
        raise ValueError(f"{qtype} can be read but not written; written are {', '.join(sorted(QUANTIZABLE))}")
    if effort not in _EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(_EFFORTS)}. Got {effort!r} instead.")
    if weights.ndim != 2:
        raise ValueError(
            f"weights must have 2 dimensions (rows, columns). Got shape {weights.shape} instead."
        )
    rows, columns = weights.shape
    out = np.empty((rows, row.row_bytes(columns)), dtype=np.uint8)
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != (columns,):
            raise ValueError(
                f"importance must have shape ({columns},), one per column. Got {importance.shape} instead."
            )

    def part(start: int, stop: int) -> None:
        from bitladder.kernels import plain  # noqa: PLC0415

        chunk = np.ascontiguousarray(weights[start:stop], dtype=np.float32)
        out[start:stop] = plain.quantize_rows(chunk, qtype, importance, effort)

    _over_rows(part, rows, threads)
    return out


def dequantize(data: U8Array, qtype: str, *, threads: int = 1) -> F32Array:
    """Restore weights, bit for bit as the ``gguf`` package does.

    Args:
        data: uint8[rows, row_bytes].
        qtype: any name of ``formats.blocks.QTYPES`` that the ``gguf`` package decodes.
        threads: rows are split over this many threads.

    Returns:
        f32[rows, columns].

    Raises:
        ValueError: an unknown ``qtype``, or rows that are no whole number of blocks.
    """
    row = _row_of(qtype)
    if data.ndim != 2:
        raise ValueError(f"data must have 2 dimensions (rows, row_bytes). Got shape {data.shape} instead.")
    rows, row_bytes = data.shape
    blocks, rest = divmod(row_bytes, row.type_size)
    if rest:
        raise ValueError(
            f"a row of {row_bytes} bytes is not a multiple of {qtype}'s type size of {row.type_size}"
        )
    out = np.empty((rows, blocks * row.block_size), dtype=np.float32)

    def part(start: int, stop: int) -> None:
        import gguf  # noqa: PLC0415

        kind = gguf.GGMLQuantizationType[qtype]
        chunk = np.ascontiguousarray(data[start:stop])
        out[start:stop] = gguf.quants.dequantize(chunk, kind).reshape(stop - start, -1)

    if out.size:
        _over_rows(part, rows, threads)
    return out


def first_nonfinite(weights: F32Array) -> tuple[int, int] | None:
    """Row and column of the first NaN or infinity, or None when all are finite."""
    if np.isfinite(weights).all():
        return None
    row, column = np.argwhere(~np.isfinite(weights))[0]
    return int(row), int(column)


def _row_of(qtype: str) -> QType:
    row = QTYPES.get(qtype)
    if row is None:
        raise ValueError(f"unknown qtype {qtype!r}; known are {', '.join(QTYPES)}")
    return row


def _over_rows(part: Callable[[int, int], None], rows: int, threads: int) -> None:
    """Call ``part(start, stop)`` over all rows, in chunks of rows on several threads."""
    step = 64
    spans = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    if threads <= 1 or len(spans) <= 1:
        for span in spans:
            part(*span)
        return
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for done in [pool.submit(part, *span) for span in spans]:
            done.result()
