"""The doors of the kernels: check the arguments, split the rows over threads, call the format's kernel."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitladder.formats.blocks import QTYPES, QType
from bitladder.kernels import codebook_search, mxfp4
from bitladder.kernels.codebook_rows import CODEBOOK
from bitladder.kernels.compiled import Compiled
from bitladder.kernels.rows import AFFINE, EFFORTS, SCALE, BlockRow, Effort, Ladder, searches

CHUNK_WEIGHTS = 1 << 17
"""Weights handed to a kernel at once where threads share the rows: half a megabyte of float32."""
CHUNK_ALONE = 1 << 20
"""Weights handed to a kernel by a thread alone: kernels go through them once, and a call takes as long as 10,000."""

F32Array = NDArray[np.float32]
U8Array = NDArray[np.uint8]

Scalar = TypeVar("Scalar", np.float32, np.uint8)

Encode = Callable[[F32Array, U8Array], Any]

_QUANTIZE_AFFINE = Compiled("bitladder.kernels.affine", "quantize_affine")
_QUANTIZE_SCALE = Compiled("bitladder.kernels.scale", "quantize_scale")
_QUANTIZE_PLAIN = Compiled("bitladder.kernels.plain", "quantize_plain")
_DECODE = {name: Compiled("bitladder.kernels.decode", f"decode_{name.lower()}") for name in (*AFFINE, *SCALE)}
_ENCODE_BF16, _DECODE_F16, _DECODE_BF16, _LARGEST_BITS = (
    Compiled("bitladder.kernels.floats", name) for name in ("encode_bf16", "decode_f16", "decode_bf16", "largest_bits")
)
_HALF = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
"""Every float16."""

QUANTIZABLE: frozenset[str] = frozenset({"F32", "F16", "BF16", "MXFP4", *AFFINE, *SCALE, *CODEBOOK})


def quantize(
    weights: F32Array,
    qtype: str,
    *,
    importance: F32Array | None = None,
    effort: Effort = "good",
    threads: int = 1,
    device: str = "cpu",
    out: U8Array | None = None,
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
        out: where to write, C-contiguous, of the shape and type below; a new array by default. The pages of a new one
            cost the plain formats as much time as the arithmetic.

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
    out = _room(out, (rows, row.row_bytes(columns)), np.uint8)
    importance = _checked_importance(importance, columns)
    if device != "cpu" and qtype in (*AFFINE, *SCALE):
        from bitladder.kernels import gpu  # torch is heavy, and most runs never need it here

        return gpu.quantize_array(weights, qtype, importance, effort, device, out)
    encode = _encoder(row, columns, importance, effort)

    def part(start: int, stop: int) -> None:
        chunk = np.require(weights[start:stop], np.float32, ["C", "W"])
        encode(chunk.reshape(-1), out[start:stop].reshape(-1))

    _over_rows(part, rows, columns, threads)
    return out


def dequantize(data: U8Array, qtype: str, *, threads: int = 1, out: F32Array | None = None) -> F32Array:
    """Restore weights, bit for bit as the ``gguf`` package does.

    Args:
        data: uint8[rows, row_bytes].
        qtype: any name of ``formats.blocks.QTYPES`` that the ``gguf`` package decodes.
        threads: rows are split over this many threads.
        out: where to write, C-contiguous, of the shape and type below; a new array by default.

    Returns:
        f32[rows, columns].

    Raises:
        ValueError: an unknown ``qtype``, rows that are no whole number of blocks, or an ``out`` of another shape.
    """
    row = _row_of(qtype)
    if data.ndim != 2:
        raise ValueError(f"data must have 2 dimensions (rows, row_bytes). Got shape {data.shape} instead.")
    rows, row_bytes = data.shape
    blocks, rest = divmod(row_bytes, row.type_size)
    if rest:
        raise ValueError(f"a row of {row_bytes} bytes is not a multiple of {qtype}'s type size of {row.type_size}")
    out = _room(out, (rows, blocks * row.block_size), np.float32)
    decode = _decoder(qtype)

    def part(start: int, stop: int) -> None:
        decode(np.require(data[start:stop], np.uint8, ["C", "W"]).reshape(-1), out[start:stop].reshape(-1))

    _over_rows(part, rows, out.shape[1], threads)
    return out


def largest_magnitude(weights: F32Array) -> float:
    """The largest magnitude of any weight, 0 of none; infinity or NaN where one is that."""
    bits = _LARGEST_BITS(np.require(weights, np.float32, ["C", "W"]).reshape(-1).view(np.uint32))
    return float(np.uint32(bits).view(np.float32))


def first_nonfinite(weights: F32Array) -> tuple[int, int] | None:
    """Row and column of the first NaN or infinity, or None when all are finite."""
    if np.isfinite(largest_magnitude(weights)):
        return None
    row, column = np.argwhere(~np.isfinite(weights))[0]
    return int(row), int(column)


def _room(out: NDArray[Scalar] | None, shape: tuple[int, int], kind: type[Scalar]) -> NDArray[Scalar]:
    """The array to write into: the caller's, checked, or a new one."""
    if out is None:
        return np.empty(shape, kind)
    if out.shape != shape or out.dtype != kind or not out.flags.c_contiguous:
        raise ValueError(
            f"out must be {kind.__name__}{list(shape)}, contiguous. Got {out.dtype}{list(out.shape)} instead."
        )
    return out


def _row_of(qtype: str) -> QType:
    row = QTYPES.get(qtype)
    if row is None:
        raise ValueError(f"unknown qtype {qtype!r}; known are {', '.join(QTYPES)}")
    return row


def _encoder(row: QType, columns: int, importance: F32Array | None, effort: Effort) -> Encode:
    """A function that encodes whole rows, given flat, into flat bytes."""
    form = AFFINE.get(row.name) or SCALE.get(row.name)
    if form is not None:
        return _block_encoder(form, searches(form, effort, weighted=importance is not None), columns, importance)
    if row.name in CODEBOOK:
        return lambda x, out: codebook_search.encode(x, columns, row.name, importance, effort, out)
    if row.name == "MXFP4":
        return lambda x, out: mxfp4.encode(x.reshape(-1, columns), importance, out)
    if row.name == "F16":
        return _encode_f16
    if row.name == "BF16":
        return lambda x, out: _ENCODE_BF16(x.view(np.uint32), out.view(np.uint16))
    return lambda x, out: np.copyto(out, x.view(np.uint8))


def _block_encoder(form: BlockRow, look: Ladder, columns: int, importance: F32Array | None) -> Encode:
    """A function that encodes blocks; each thread that calls it works in arrays of its own."""
    weights = np.empty(0, np.float32) if importance is None else importance
    type_size = QTYPES[form.name].type_size

    def room() -> tuple[F32Array, U8Array, NDArray[np.int64]]:
        return np.empty(form.scratch, np.float32), np.empty(16 * type_size, np.uint8), np.empty(48, np.int64)

    def encode_plain(x: F32Array, out: U8Array) -> None:
        _QUANTIZE_PLAIN(x, form, *room(), out)

    kernel = _QUANTIZE_AFFINE if form.name in AFFINE else _QUANTIZE_SCALE

    def encode(x: F32Array, out: U8Array) -> None:
        kernel(x, columns, weights, form, look, *room(), out)

    return encode_plain if look.first.plain else encode


def _encode_f16(x: F32Array, out: U8Array) -> None:
    """Nearest float16, ties to even; beyond +-65504, that."""
    np.copyto(out.view(np.float16), np.clip(x, -65504, 65504), casting="same_kind")


def _decoder(qtype: str) -> Callable[[U8Array, F32Array], Any]:
    """A function that decodes flat bytes into flat weights."""
    if (decode := _DECODE.get(qtype)) is not None:
        return lambda data, out: decode(data, out, _HALF)
    if qtype == "F16":
        return lambda data, out: _DECODE_F16(data.view(np.uint16), out.view(np.uint32))
    if qtype == "BF16":
        return lambda data, out: _DECODE_BF16(data.view(np.uint16), out.view(np.uint32))
    if qtype == "F32":
        return lambda data, out: np.copyto(out, data.view(np.float32))
    import gguf  # only formats that are read, never written, need it

    type_size = QTYPES[qtype].type_size

    def decode_with_gguf(data: U8Array, out: F32Array) -> None:
        try:
            kind = gguf.GGMLQuantizationType[qtype]
            out[:] = gguf.quants.dequantize(data.reshape(-1, type_size), kind).reshape(-1)
        except (KeyError, NotImplementedError) as error:
            from importlib.metadata import version

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
    """Call ``part(start, stop)`` over all rows, in chunks, on several threads."""
    if rows == 0 or columns == 0:
        return
    step = max(1, (CHUNK_WEIGHTS if threads > 1 else CHUNK_ALONE) // columns)
    spans = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    if threads <= 1 or len(spans) <= 1:
        for span in spans:
            part(*span)
        return
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for done in [pool.submit(part, *span) for span in spans]:
            done.result()
