"""The doors of the kernels: check the arguments, split the rows over threads, call the format's kernel."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from bitladder.formats.blocks import QTYPES, QType
from bitladder.kernels import floats
from bitladder.kernels.affine import quantize_affine
from bitladder.kernels.decode import DECODERS, HALF
from bitladder.kernels.rows import AFFINE, EFFORTS, SCALE, Effort, affine_search, scale_search
from bitladder.kernels.scale import quantize_scale

CHUNK_WEIGHTS = 1 << 17
"""Weights handed to a kernel at once: half a megabyte of float32."""

F32Array = NDArray[np.float32]
U8Array = NDArray[np.uint8]

QUANTIZABLE: frozenset[str] = frozenset({"F32", "F16", "BF16", *AFFINE, *SCALE})


def quantize(
    weights: F32Array,
    qtype: str,
    *,
    importance: F32Array | None = None,
    effort: Effort = "good",
    threads: int = 1,
    device: str = "cpu",
) -> U8Array:
    """Store weights in a block format.

    Args:
        weights: f32[rows, columns], finite; columns a multiple of the format's ``block_size``.
        qtype: a name out of ``QUANTIZABLE``.
        importance: f32[columns], not negative: the weight of each column's squared error, as in an importance matrix.
            Without one every weight's squared error counts the same.
        effort: how long to search for scales; never changes the format.
        threads: rows are split over this many threads. The bytes do not depend on it.
        device: "cpu" for the compiled kernels; another device of torch for their twins there (block formats only).
            The bytes do not depend on it either.

    Returns:
        uint8[rows, row_bytes].

    Raises:
        ValueError: an unknown or not quantizable ``qtype``, a wrong shape, an unknown effort, a negative importance.
    """
    row = _row_of(qtype)
    if qtype not in QUANTIZABLE:
        raise ValueError(f"{qtype} can be read but not written; written are {', '.join(sorted(QUANTIZABLE))}")
    if effort not in EFFORTS:
        raise ValueError(f"The effort parameter must be one of {', '.join(EFFORTS)}. Got {effort!r} instead.")
    if weights.ndim != 2:
        raise ValueError(f"weights must have 2 dimensions (rows, columns). Got shape {weights.shape} instead.")
    rows, columns = weights.shape
    out = np.empty((rows, row.row_bytes(columns)), dtype=np.uint8)
    importance = _checked_importance(importance, columns)
    if device != "cpu" and row.is_quantized:
        from bitladder.kernels import gpu  # torch is heavy, and most runs never need it here

        return gpu.quantize_array(weights, qtype, importance, effort, device)
    encode = _encoder(row, columns, importance, effort)

    def part(start: int, stop: int) -> None:
        chunk = np.require(weights[start:stop], np.float32, ["C", "W"])
        encode(chunk.reshape(-1), out[start:stop].reshape(-1))

    _over_rows(part, rows, columns, threads)
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
        raise ValueError(f"a row of {row_bytes} bytes is not a multiple of {qtype}'s type size of {row.type_size}")
    out = np.empty((rows, blocks * row.block_size), dtype=np.float32)

    decode = _decoder(qtype)

    def part(start: int, stop: int) -> None:
        decode(np.require(data[start:stop], np.uint8, ["C", "W"]).reshape(-1), out[start:stop].reshape(-1))

    _over_rows(part, rows, out.shape[1], threads)
    return out


def first_nonfinite(weights: F32Array) -> tuple[int, int] | None:
    """Row and column of the first NaN or infinity, or None when all are finite."""
    if not floats.any_nonfinite(np.require(weights, np.float32, ["C", "W"]).reshape(-1)):
        return None
    row, column = np.argwhere(~np.isfinite(weights))[0]
    return int(row), int(column)


def _row_of(qtype: str) -> QType:
    row = QTYPES.get(qtype)
    if row is None:
        raise ValueError(f"unknown qtype {qtype!r}; known are {', '.join(QTYPES)}")
    return row


def _encoder(
    row: QType, columns: int, importance: F32Array | None, effort: Effort
) -> Callable[[F32Array, U8Array], None]:
    """A function that encodes whole rows, given flat, into flat bytes."""
    weights = np.empty(0, np.float32) if importance is None else importance
    if (affine := AFFINE.get(row.name)) is not None:
        look = affine_search(affine, effort, weighted=importance is not None)

        def encode(x: F32Array, out: U8Array) -> None:
            quantize_affine(
                x, columns, weights, affine.pack, affine.parts, affine.size, affine.high, affine.scale_high,
                row.type_size, look.starts, look.rounds, look.trials, look.passes, look.reach, look.guard, out,
            )  # fmt: skip

    elif (scale := SCALE.get(row.name)) is not None:
        look = scale_search(scale, effort, weighted=importance is not None)

        def encode(x: F32Array, out: U8Array) -> None:
            quantize_scale(
                x, columns, weights, scale.pack, scale.parts, scale.size, scale.low, scale.high, scale.table,
                scale.scale_low, scale.scale_high, row.type_size,
                look.starts, look.rounds, look.trials, look.passes, look.reach, look.guard, out,
            )  # fmt: skip

    elif row.name == "F16":
        return floats.encode_f16

    elif row.name == "BF16":

        def encode(x: F32Array, out: U8Array) -> None:
            floats.encode_bf16(x, out.view(np.uint16))

    else:

        def encode(x: F32Array, out: U8Array) -> None:
            out[:] = x.view(np.uint8)

    return encode


def _decoder(qtype: str) -> Callable[[U8Array, F32Array], None]:
    """A function that decodes flat bytes into flat weights."""
    if (decode := DECODERS.get(qtype)) is not None:
        return lambda data, out: decode(data, out, HALF)
    if qtype == "F16":
        return lambda data, out: floats.decode_f16(data.view(np.uint16), out)
    if qtype == "BF16":
        return lambda data, out: floats.decode_bf16(data.view(np.uint16), out)
    if qtype == "F32":
        return lambda data, out: np.copyto(out, data.view(np.float32))
    import gguf  # only formats that are read, never written, need it

    type_size = QTYPES[qtype].type_size

    def decode_with_gguf(data: U8Array, out: F32Array) -> None:
        try:
            kind = gguf.GGMLQuantizationType[qtype]
            out[:] = gguf.quants.dequantize(data.reshape(-1, type_size), kind).reshape(-1)
        except (KeyError, NotImplementedError) as error:
            reader = f"gguf {version('gguf')}"
            raise ValueError(f"{qtype} cannot be decoded: neither Bitladder nor {reader} knows how") from error

    return decode_with_gguf


def _checked_importance(importance: F32Array | None, columns: int) -> F32Array | None:
    """Importance with its largest entry 1 and none below 1e-9, or None when it says nothing.

    Only ratios matter. The floor keeps columns that calibration never reached from decoding to anything at all.
    """
    if importance is None:
        return None
    importance = np.ascontiguousarray(importance, dtype=np.float32)
    if importance.shape != (columns,):
        raise ValueError(f"importance must have shape ({columns},), one per column. Got {importance.shape} instead.")
    bad = np.flatnonzero(~(np.isfinite(importance) & (importance >= 0)))
    if bad.size:
        raise ValueError(
            f"importance must be finite and not negative. Got {importance[bad[0]]} at column {bad[0]} instead."
        )
    largest = importance.max(initial=np.float32(0))
    if largest == 0:
        return None
    ratios: F32Array = importance / largest
    return np.maximum(ratios, np.float32(1e-9))


def _over_rows(part: Callable[[int, int], None], rows: int, columns: int, threads: int) -> None:
    """Call ``part(start, stop)`` over all rows, in chunks that fit a cache, on several threads."""
    if rows == 0 or columns == 0:
        return
    step = max(1, CHUNK_WEIGHTS // columns)
    spans = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    if threads <= 1 or len(spans) <= 1:
        for span in spans:
            part(*span)
        return
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for done in [pool.submit(part, *span) for span in spans]:
            done.result()
