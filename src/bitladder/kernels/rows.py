"""One row per format: what the two searches need to know about it, and how long they look at each effort.

Formats without a minimum store ``d * code``, searched by ``scale.py``; formats with one ``d * code - m``, searched
by ``affine.py``. In a super-block of 256, ``d`` and ``m`` of each sub-block are small whole numbers times a float16 of
the super-block; in a block of 32 they are float16 themselves, which the searches see as whole numbers fixed to one.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Effort = Literal["fast", "good", "best"]
EFFORTS: tuple[Effort, ...] = ("fast", "good", "best")
REVISION = "0003"
"""Raised whenever the kernels' bytes change: files name it, and one made by another revision is made again."""
STATE_ROWS = 14
"""Room for the values that a search keeps per sub-block."""


class PackLayout(IntEnum):
    """How a format lays its bytes out (``pack.py``)."""

    Q4_1 = 0
    Q5_1 = 1
    Q2_K = 2
    Q4_K = 3
    Q5_K = 4
    Q8_0 = 5
    Q4_0 = 6
    Q5_0 = 7
    Q3_K = 8
    Q6_K = 9
    IQ4_NL = 10
    IQ4_XS = 11


class BlockRow(NamedTuple):
    """A format as the searches see it; kernels take it as it is.

    ``size`` weights share a scale, ``parts`` such sub-blocks make a block. Codes run from ``low`` to ``high``, or, with
    ``table`` set, to the sixteen values of IQ4. The whole-number scales run from ``scale_low`` to ``scale_high``;
    both 0 when the sub-block's scale is the float16 itself.
    """

    packing: PackLayout
    parts: int
    size: int
    low: int
    high: int
    scale_low: int = 0
    scale_high: int = 0
    table: bool = False

    @property
    def name(self) -> str:
        """The format's."""
        return self.packing.name

    @property
    def scratch(self) -> int:
        """How many float32 a search of sixteen blocks works in: weights, importance, codes, and a state per part."""
        return 16 * self.parts * (3 * self.size + STATE_ROWS)


class ScaleSearch(NamedTuple):
    """How long to look; kernels take it as it is.

    Attributes:
        starts: f32[n, 2], the first guesses per sub-block. With a minimum: (how many codes more than the format has
            are laid over the sub-block's range, shift of the codes). Without: (the value its largest weight gets, 0).
            A single one is the plain encoding, from the range of the weights alone, and nothing is searched.
        rounds: improvements of the best guess of each sub-block: codes from scales, then scales from codes.
        trials: values of the block's float16 scale that are tried on the sub-blocks' best scales.
        passes: improvements of the whole block, with the scales as they will be stored.
        reach: in each pass, also try whole-number scales up to this far away.
        guard: keep the plain encoding of a block where it is better.
    """

    starts: NDArray[np.float32]
    rounds: int
    trials: int
    passes: int
    reach: int = 0
    guard: bool = True

    @property
    def plain(self) -> bool:
        """Whether there is nothing to search."""
        return len(self.starts) == 1


class Ladder(NamedTuple):
    """Searches of one block, of which the best result is stored; kernels take it as it is.

    Attributes:
        first: the effort's own.
        second, third: those of the efforts below, which find more in some blocks of heavy tails or of lopsided
            importance. So no effort is worse than one below it.
        rungs: how many of the three there are.
    """

    first: ScaleSearch
    second: ScaleSearch
    third: ScaleSearch
    rungs: int


AFFINE = {
    row.name: row
    for row in (
        BlockRow(PackLayout.Q4_1, 1, 32, 0, 15),
        BlockRow(PackLayout.Q5_1, 1, 32, 0, 31),
        BlockRow(PackLayout.Q2_K, 16, 16, 0, 3, 0, 15),
        BlockRow(PackLayout.Q4_K, 8, 32, 0, 15, 0, 63),
        BlockRow(PackLayout.Q5_K, 8, 32, 0, 31, 0, 63),
    )
}

SCALE = {
    row.name: row
    for row in (
        BlockRow(PackLayout.Q8_0, 1, 32, -127, 127),
        BlockRow(PackLayout.Q4_0, 1, 32, -8, 7),
        BlockRow(PackLayout.Q5_0, 1, 32, -16, 15),
        BlockRow(PackLayout.Q3_K, 16, 16, -4, 3, -32, 31),
        BlockRow(PackLayout.Q6_K, 16, 16, -32, 31, -128, 127),
        BlockRow(PackLayout.IQ4_NL, 1, 32, -127, 113, table=True),
        BlockRow(PackLayout.IQ4_XS, 8, 32, -127, 113, -32, 31, table=True),
    )
}


def _steps(start: float, stop: float, count: int) -> list[float]:
    return [float(value) for value in np.linspace(start, stop, count)]


def _grid(first: list[float], second: list[float]) -> NDArray[np.float32]:
    """All pairs, as f32[n, 2]."""
    return np.array([(a, b) for b in second for a in first], dtype=np.float32)


# found on four tensors of a 768-wide Llama by trading error against time (docs/kernels.md); the middle of a range is
# not critical, its ends are: fewer codes than the format has pay for weights near zero, more cut off an outlier
_AFFINE_SEARCH: dict[Effort, ScaleSearch] = {
    "fast": ScaleSearch(_grid(_steps(-1, 1, 8), [0.0]), rounds=1, trials=4, passes=1, guard=False),
    "good": ScaleSearch(_grid(_steps(-1, 2, 8), _steps(-0.45, 0.45, 4)), rounds=2, trials=8, passes=2),
    "best": ScaleSearch(_grid(_steps(-1.2, 2, 12), _steps(-0.5, 0.5, 5)), rounds=2, trials=32, passes=2, reach=1),
}


_PLAIN_AFFINE = ScaleSearch(_grid([0.0], [0.0]), rounds=0, trials=0, passes=0, guard=False)


def affine_search(row: BlockRow, effort: Effort, *, weighted: bool) -> ScaleSearch:
    """How long to look for scales and minima of a format; ``weighted`` when there is an importance."""
    if effort == "fast" and not row.scale_high and not weighted:
        return _PLAIN_AFFINE
    return _AFFINE_SEARCH[effort]


def scale_search(row: BlockRow, effort: Effort, *, weighted: bool) -> ScaleSearch:
    """How long to look for scales of a format; ``weighted`` when there is an importance.

    Starts are given as the value that the sub-block's largest weight gets, near the lowest and the highest code; with
    few codes and an importance also far beyond, because cutting off a large weight that matters little can pay.
    """
    low, high, unit = float(row.low), float(row.high), (row.high - row.low) / 15

    def ends(below: float, above: float, count: int, at_high: int) -> NDArray[np.float32]:
        first = _steps(low - below * unit, low + above * unit, count)
        return _grid(first + _steps(high - above * unit, high + below * unit, at_high), [0.0])

    cuts = weighted and (row.table or row.high - row.low <= 15)
    if effort == "best":
        return ScaleSearch(ends(5.0 if cuts else 1.0, 2.0, 20, 20), rounds=4, trials=64, passes=5, reach=3)
    if row.name == "Q8_0" or (effort == "fast" and not weighted and row.name in ("Q4_0", "Q5_0")):
        return ScaleSearch(ends(0.0, 0.0, 1, 0), rounds=0, trials=0, passes=0, guard=False)
    if effort == "good" and row.name == "Q3_K" and not weighted:
        return ScaleSearch(ends(0.5, 1.5, 7, 0), rounds=1, trials=16, passes=1)
    if effort == "good":
        return ScaleSearch(ends(4.0 if cuts else 0.5, 2.0, 16, 12), rounds=1, trials=32, passes=1, reach=2)
    if cuts:
        return ScaleSearch(ends(3.0, 1.0, 7, 4), rounds=1, trials=16, passes=1, guard=False)
    return ScaleSearch(ends(0.5, 1.2, 6, 0), rounds=1, trials=16, passes=1, guard=False)


def searches(row: BlockRow, effort: Effort, *, weighted: bool) -> Ladder:
    """All searches of a format at an effort; ``weighted`` when there is an importance.

    Those below that can find nothing more are left out: the plain encoding, where the effort's own search compares
    with it already.
    """
    search = affine_search if row.name in AFFINE else scale_search
    at = EFFORTS.index(effort)
    first, *below = (search(row, EFFORTS[k], weighted=weighted) for k in range(at, -1, -1))
    below = [] if first.plain else [look for look in below if not (look.plain and first.guard)]
    second, third, *_ = [*below, first, first]
    return Ladder(first, second, third, 1 + len(below))
