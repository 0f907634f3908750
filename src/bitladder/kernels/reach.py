"""How far a type reaches: the largest weights that it can hold, whatever scale is chosen for them.

scale only         d * s * code        d at most 65504 of either sign, s the largest whole number of a sub-block
scale and minimum  d * s * code - m    m = dmin * s of a sub-block with whole numbers, else a float16; beside other
                                       weights that are 0
"""

from __future__ import annotations

from typing import NamedTuple

from bitladder.kernels.codebook_rows import CODEBOOK, CodebookRow
from bitladder.kernels.rows import AFFINE, SCALE, BlockRow

LARGEST_F16 = 65504.0
_LARGEST_BF16 = float((2 - 2**-7) * 2.0**127)
_LARGEST_MXFP4 = 6 * 2.0**125
"""Its largest value on the largest power of two whose products are float32."""


class Reach(NamedTuple):
    """The lowest and the highest weight."""

    lowest: float
    highest: float

    @property
    def magnitude(self) -> float:
        """What is no larger fits with either sign."""
        return min(-self.lowest, self.highest)


def _of_affine(row: BlockRow) -> Reach:
    scale = row.scale_high or 1
    return Reach(-LARGEST_F16 * scale, LARGEST_F16 * scale * row.high)


def _of_scale(row: BlockRow) -> Reach:
    most = LARGEST_F16 * max(-row.low, row.high) * max(-row.scale_low, row.scale_high, 1)
    return Reach(-most, most)


def _of_codebook(row: CodebookRow) -> Reach:
    most = LARGEST_F16 * (2 * row.scales - 1) * row.unit / 8 * row.top
    return Reach(-most, most)


_REACH = {
    "F16": Reach(-LARGEST_F16, LARGEST_F16),
    "BF16": Reach(-_LARGEST_BF16, _LARGEST_BF16),
    "MXFP4": Reach(-_LARGEST_MXFP4, _LARGEST_MXFP4),
    **{name: _of_affine(row) for name, row in AFFINE.items()},
    **{name: _of_scale(row) for name, row in SCALE.items()},
    **{name: _of_codebook(row) for name, row in CODEBOOK.items()},
}


def reach_of(qtype: str) -> Reach:
    """How far a type reaches that ``quantize`` writes; without end where float32 does not reach further."""
    return _REACH.get(qtype, Reach(-float("inf"), float("inf")))
