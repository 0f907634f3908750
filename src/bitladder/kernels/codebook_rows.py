"""A row for each codebook type: its table, how signs and steps are stored, and bytes for what a search found.

    IQ2_XXS   qs 64: for 32 weights four entries of a byte, then four signs of seven bits and a step of four bits
    IQ2_XS    qs 64: for 8 weights an entry of nine bits and signs of seven; scales 8: a nibble for 16 weights
    IQ2_S     qs 64: low bytes of 32 entries, then 32 bytes of signs; qh 8: two bits each; scales 8
    IQ3_XXS   qs 96: 64 entries of a byte; for 32 weights four signs of seven bits and a step of four bits
    IQ3_S     qs 64: low bytes of 64 entries; qh 8: a bit each; signs 32; scales 4: a nibble for 32 weights
    IQ1_S     qs 32: low bytes of 32 entries; qh 16: for 32 weights four times three bits, a step of three, the shift
    IQ1_M     qs 32; qh 16: three bits and the shift for each; scales 8: sixteen steps of three bits, and d's nibbles

Signs of seven bits stand for eight: there is an even number of them. Tables are those of the ``gguf`` package (ggml's
own grids); entries of IQ1 are -1, 0 and 1, shifted up or down by an eighth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitladder.kernels.rows import Effort

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]

BLOCK = 256
_SHIFT = np.float32(0.125)


class CodebookRow(NamedTuple):
    """A format as the search sees it; kernels take it as it is.

    ``entries`` of ``width`` weights each, in ``variants`` tables of which a sub-block of ``size`` weights uses one. A
    step is ``(2 s + 1) unit / 8`` times the block's float16, s below ``scales``. ``top`` is the largest magnitude of an
    entry. ``signed``: entries bear their signs; else signs are stored, ``even`` in number or freely.
    """

    width: int
    entries: int
    size: int
    scales: int
    unit: int
    top: int
    even: int = 0
    signed: int = 0
    variants: int = 1

    @property
    def parts(self) -> int:
        """Sub-blocks of a block."""
        return BLOCK // self.size

    @property
    def groups(self) -> int:
        """Entries of a block."""
        return BLOCK // self.width

    @property
    def scratch(self) -> int:
        """How many float32 the search of a block works in."""
        return 2 * self.entries * self.groups * self.variants


class CodebookSearch(NamedTuple):
    """How long to look; kernels take it as it is.

    ``starts`` first guesses of a sub-block's step, from ``low`` to ``high`` hundredths of what lays its largest weight
    on the largest entry, the best improved ``rounds`` times; ``trials`` values of the float16; whole numbers up to
    ``reach`` away; and the block fitted again up to ``passes`` times.
    """

    starts: int
    low: int
    high: int
    rounds: int
    trials: int
    reach: int
    passes: int


SEARCH: dict[Effort, CodebookSearch] = {
    "fast": CodebookSearch(5, 45, 105, 0, 16, 0, 0),
    "good": CodebookSearch(7, 40, 110, 1, 24, 1, 1),
    "best": CodebookSearch(16, 25, 120, 3, 48, 2, 3),
}

CODEBOOK = {
    "IQ2_XXS": CodebookRow(8, 256, 32, 16, 1, 43, even=1),
    "IQ2_XS": CodebookRow(8, 512, 16, 16, 1, 43, even=1),
    "IQ2_S": CodebookRow(8, 1024, 16, 16, 1, 43),
    "IQ3_XXS": CodebookRow(4, 256, 32, 16, 2, 62, even=1),
    "IQ3_S": CodebookRow(4, 512, 32, 16, 8, 15),
    "IQ1_S": CodebookRow(8, 2048, 32, 8, 8, 1, signed=1, variants=2),
    "IQ1_M": CodebookRow(8, 4096, 16, 8, 8, 1, signed=1),
}


@dataclass(frozen=True)
class Found:
    """What a search decided for blocks: ``scale`` f32[blocks], ``whole`` and ``variants`` i64[blocks, parts],
    ``entries`` i64[blocks, groups], ``signs`` u8[blocks, 32], a set bit for a negative weight."""

    scale: F32
    whole: I64
    variants: I64
    entries: I64
    signs: U8


def joined(parts: Sequence[Found]) -> Found:
    """Blocks of several, one after another."""
    each = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Found)}
    return Found(**{name: np.concatenate(own) for name, own in each.items()})


def part_of(found: Found, rows: slice) -> Found:
    """Some of its blocks; the same memory."""
    return Found(**{field.name: getattr(found, field.name)[rows] for field in fields(Found)})


@functools.cache
def table_of(qtype: str) -> F32:
    """f32[variants, width, entries] of a key of ``CODEBOOK``."""
    from gguf import quants  # not needed by those who write no codebooks

    kind = getattr(quants, qtype)
    kind.init_grid()
    grid = np.asarray(kind.grid, np.float32).reshape(kind.grid_shape).T
    if qtype == "IQ1_S":
        return np.ascontiguousarray(np.stack([grid + _SHIFT, grid - _SHIFT]))
    if qtype == "IQ1_M":  # the shift is the entry's own: twice as many entries
        return np.ascontiguousarray(np.concatenate([grid + _SHIFT, grid - _SHIFT], axis=1)[None])
    return np.ascontiguousarray(grid[None])


def values_of(qtype: str, found: Found) -> F32:
    """The weights f32[blocks, 256] that it stands for, as ``pack`` stores it."""
    row, table = CODEBOOK[qtype], table_of(qtype)
    variant = np.repeat(found.variants, row.size // row.width, axis=1)
    entries = table.transpose(0, 2, 1)[variant, found.entries].reshape(-1, BLOCK)
    unit = np.float32(row.unit / 8)
    step = found.scale[:, None] * (2 * found.whole + 1).astype(np.float32) * unit
    values = np.repeat(step, row.size, axis=1) * entries
    negative = np.unpackbits(found.signs, axis=1, bitorder="little").astype(bool)
    return np.where(negative, -values, values).astype(np.float32)


def pack(qtype: str, found: Found) -> U8:
    """u8[blocks, type_size]."""
    scale = found.scale.astype(np.float16)
    body = _PACK[qtype](found)
    if qtype == "IQ1_M":
        return _with_nibbles(body, scale)
    return np.concatenate([scale[:, None].view(np.uint8), body], axis=1)


def _low(found: Found) -> U8:
    return (found.entries & 255).astype(np.uint8)


def _nibbles(whole: I64) -> U8:
    return (whole[:, ::2] | whole[:, 1::2] << 4).astype(np.uint8)


def _signs_and_steps(found: Found) -> U8:
    """For 32 weights four times seven signs, and the step above them: u8[blocks, 8, 4]."""
    seven = (found.signs & 127).astype(np.uint32).reshape(len(found.signs), 8, 4)
    words = (seven << np.array([0, 7, 14, 21], np.uint32)).sum(axis=2, dtype=np.uint32)
    words |= found.whole.astype(np.uint32) << np.uint32(28)
    return np.ascontiguousarray(words[..., None]).view(np.uint8)


def _iq2_xxs(found: Found) -> U8:
    both = np.concatenate([_low(found).reshape(-1, 8, 4), _signs_and_steps(found)], axis=2)
    return both.reshape(len(both), -1)


def _iq2_xs(found: Found) -> U8:
    words = found.entries.astype(np.uint16) | (found.signs & 127).astype(np.uint16) << np.uint16(9)
    return np.concatenate([np.ascontiguousarray(words).view(np.uint8), _nibbles(found.whole)], axis=1)


def _iq2_s(found: Found) -> U8:
    high = (found.entries >> 8).reshape(-1, 8, 4) << np.array([0, 2, 4, 6])
    return np.concatenate([_low(found), found.signs, high.sum(axis=2).astype(np.uint8), _nibbles(found.whole)], axis=1)


def _iq3_xxs(found: Found) -> U8:
    return np.concatenate([_low(found), _signs_and_steps(found).reshape(len(found.signs), -1)], axis=1)


def _iq3_s(found: Found) -> U8:
    high = np.packbits((found.entries >> 8).astype(np.uint8), axis=1, bitorder="little")
    return np.concatenate([_low(found), high, found.signs, _nibbles(found.whole)], axis=1)


def _iq1_s(found: Found) -> U8:
    words = ((found.entries >> 8).reshape(-1, 8, 4) << np.array([0, 3, 6, 9])).sum(axis=2)
    words |= found.whole << 12 | found.variants << 15
    return np.concatenate([_low(found), np.ascontiguousarray(words.astype(np.uint16)).view(np.uint8)], axis=1)


def _iq1_m(found: Found) -> U8:
    high = found.entries >> 8  # three bits, and above them the shift's sign
    steps = (found.whole.reshape(-1, 4, 4) << np.array([0, 3, 6, 9])).sum(axis=2).astype(np.uint16)
    return np.concatenate([_low(found), _nibbles(high), np.ascontiguousarray(steps).view(np.uint8)], axis=1)


def _with_nibbles(body: U8, scale: NDArray[np.float16]) -> U8:
    """IQ1_M's float16, four bits in each of the four words of steps."""
    words = body[:, -8:].copy().view(np.uint16)
    bits = scale.view(np.uint16)[:, None]
    words |= (bits >> np.array([0, 4, 8, 12], np.uint16) & np.uint16(15)) << np.uint16(12)
    return np.concatenate([body[:, :-8], words.view(np.uint8)], axis=1)


_PACK: dict[str, Callable[[Found], U8]] = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}
