"""Small integers in int32 words: the storage of GPTQ, AWQ and compressed-tensors checkpoints.

Codes of ``bits`` bits fill a stream, low bits first: code i takes bits ``i*bits`` to ``(i+1)*bits`` of the
stream, and word w holds bits ``32*w`` to ``32*w + 32``. Where ``bits`` divides 32 no code straddles two
words:

    4 bits    word 0 = c0 | c1<<4 | c2<<8 | ... | c7<<28
    3 bits    word 0 = c0 | c1<<3 | ... | c9<<27 | (c10 & 3)<<30,   word 1 = c10>>2 | c11<<1 | ...

Thirty-two codes fill ``bits`` whole words, whatever ``bits`` is, so one loop over 32 slots serves all widths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_PERIOD = 32


def words_for(count: int, bits: int) -> int:
    """How many int32 words ``count`` codes fill; the last one may be part empty."""
    return -(-count * bits // 32)


def pack(codes: npt.NDArray[np.integer], bits: int, order: tuple[int, ...] | None = None) -> npt.NDArray[np.int32]:
    """Codes ``[..., n]`` as words ``int32[..., ceil(n*bits/32)]``, packed along the last axis.

    Args:
        codes: Integers in ``0 .. 2**bits - 1``.
        bits: Width of a code, 1 to 16.
        order: When given, slot ``i`` of each run of ``len(order)`` slots holds code ``order[i]`` of that run;
            ``n`` must be a multiple of its length.

    Raises:
        ValueError: a code does not fit ``bits``, or ``n`` is not a multiple of the order's length.
    """
    if codes.size and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise ValueError(f"codes run from {codes.min()} to {codes.max()}, and {bits} bits hold 0 to {(1 << bits) - 1}")
    count = codes.shape[-1]
    if order is not None:
        codes = _reorder(codes, order)
    padded = -(-count // _PERIOD) * _PERIOD
    stream = np.zeros((*codes.shape[:-1], padded), np.uint32)
    stream[..., :count] = codes
    stream = stream.reshape(*codes.shape[:-1], padded // _PERIOD, _PERIOD)
    words = np.zeros((*stream.shape[:-1], bits), np.uint32)
    for slot in range(_PERIOD):
        word, shift = divmod(slot * bits, 32)
        words[..., word] |= stream[..., slot] << np.uint32(shift)
        if shift + bits > 32:
            words[..., word + 1] |= stream[..., slot] >> np.uint32(32 - shift)
    flat = words.reshape(*codes.shape[:-1], -1)[..., : words_for(count, bits)]
    return np.ascontiguousarray(flat).view(np.int32)


def unpack(
    words: npt.NDArray[np.int32], bits: int, count: int, order: tuple[int, ...] | None = None
) -> npt.NDArray[np.uint16]:
    """The ``count`` codes along the last axis of ``words``: the inverse of ``pack``.

    Raises:
        ValueError: the words are too few or too many for ``count`` codes.
    """
    if words.shape[-1] != words_for(count, bits):
        raise ValueError(
            f"{words.shape[-1]} words cannot hold {count} codes of {bits} bits: that takes {words_for(count, bits)}"
        )
    periods = -(-count // _PERIOD)
    stream = np.zeros((*words.shape[:-1], periods * bits), np.uint32)
    stream[..., : words.shape[-1]] = words.astype(np.int32, copy=False).view(np.uint32)
    stream = stream.reshape(*words.shape[:-1], periods, bits)
    codes = np.empty((*stream.shape[:-1], _PERIOD), np.uint32)
    for slot in range(_PERIOD):
        word, shift = divmod(slot * bits, 32)
        codes[..., slot] = stream[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            codes[..., slot] |= stream[..., word + 1] << np.uint32(32 - shift)
    codes &= np.uint32((1 << bits) - 1)
    flat = codes.reshape(*words.shape[:-1], periods * _PERIOD)[..., :count]
    if order is not None:
        flat = _reorder(flat, tuple(int(i) for i in np.argsort(order)))
    return flat.astype(np.uint16)


def _reorder(codes: npt.NDArray[Any], order: tuple[int, ...]) -> npt.NDArray[Any]:
    count, run = codes.shape[-1], len(order)
    if count % run:
        raise ValueError(f"{count} codes are not a multiple of the order's {run}")
    return codes.reshape(*codes.shape[:-1], count // run, run)[..., order].reshape(codes.shape)
