"""Whether a type can hold weights at all: none is a number that is none, and none lies beyond the type's reach."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from bitladder.errors import BadWeights
from bitladder.kernels import QUANTIZABLE, dequantize, first_nonfinite, largest_magnitude
from bitladder.kernels.reach import reach_of

F32 = NDArray[np.float32]
_SMALL = 1e-3
"""Weights of a float16 scale that are all smaller than this may vanish; larger ones never do."""


def require_held(weights: F32, qtypes: Iterable[str], name: str, first_row: int = 0) -> float:
    """Refuse weights that a type cannot hold.

    Args:
        weights: f32[rows, columns].
        qtypes: what they are to be stored in; their own type is none of these.
        name: the tensor's.
        first_row: the number of the first row in its tensor.

    Returns:
        The largest magnitude of them.

    Raises:
        BadWeights: one is NaN or infinite, or a type ends before it.
    """
    largest = largest_magnitude(weights)
    if not math.isfinite(largest):
        row, column = first_nonfinite(weights) or (0, 0)
        raise BadWeights(
            f"{name} holds {weights[row, column]} in row {first_row + row}, column {column}.",
            means="The model was damaged while training, converting or copying; no level of it can work.",
            do="Get the original weights again.",
        )
    for qtype in qtypes:
        if largest > reach_of(qtype).magnitude:
            _require_reach(weights, qtype, name)
    return largest


def _require_reach(weights: F32, qtype: str, name: str) -> None:
    reach, lowest, highest = reach_of(qtype), float(weights.min()), float(weights.max())
    if reach.lowest <= lowest and highest <= reach.highest:
        return
    beyond, end = (highest, reach.highest) if highest > reach.highest else (lowest, reach.lowest)
    enough = [
        other for other in sorted(QUANTIZABLE) if reach_of(other).lowest <= lowest <= highest <= reach_of(other).highest
    ]
    raise BadWeights(
        f"{name} holds a weight of {beyond:.6g}; {qtype} ends at {end:.6g}.",
        means="The model was made for a type with a wider range, or was damaged while training or converting.",
        do=f"Ask for a level in which this tensor has one of: {', '.join(enough)}.",
    )


def vanishes(data: NDArray[np.uint8], qtype: str, largest: float) -> bool:
    """Whether weights of this largest magnitude, not 0, have all become zeros.

    Args:
        data: uint8[rows, row_bytes], what they are stored as.
        qtype: the type.
        largest: as ``require_held`` gives it.
    """
    return 0 < largest < _SMALL and not dequantize(data, qtype).any()
