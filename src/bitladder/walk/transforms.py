"""What llama.cpp's converter did to tensors, undone: the transforms that ``formats/roles.py`` names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bitladder.formats.roles import Rearrangement

F32 = NDArray[np.float32]


def unpermute(weight: F32, heads: int) -> F32:
    """Rows of a query or key projection (or its bias) from interleaved pairs to two halves per head.

    llama.cpp's "normal" rotary embedding turns neighbours (0, 1), (2, 3), ...; transformers turns (0, d/2),
    (1, d/2 + 1), ... The converter wrote ``weight`` as [heads, d/2, 2, columns]; transformers wants [heads,
    2, d/2, columns].
    """
    shape = weight.shape
    pairs = shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def permute(weight: F32, heads: int) -> F32:
    """The inverse of ``unpermute``: transformers' row order to llama.cpp's."""
    shape = weight.shape
    pairs = shape[0] // heads // 2
    return weight.reshape(heads, 2, pairs, *shape[1:]).swapaxes(1, 2).reshape(shape)


_PLAIN: dict[str, Callable[[Sequence[F32]], F32]] = {
    "same": lambda parts: parts[0],
    "minus_one": lambda parts: parts[0] - np.float32(1),
    "row": lambda parts: parts[0].reshape(1, -1),
    "stack": lambda parts: np.concatenate(parts, axis=-2),
}


def offset_of(transform: str | Rearrangement) -> float:
    """What a file stores more than the parameter, in every value."""
    if isinstance(transform, str):
        return 1.0 if transform == "minus_one" else 0.0
    return transform.offset


def stored(transform: str | Rearrangement, part: int, value: F32, heads: int) -> F32:
    """A file's tensor from a parameter, what ``apply`` undoes; of stacked ones the share of one ``part`` is given."""
    if not isinstance(transform, str):
        own: F32 = transform.tensor(part, value)
        return own
    if transform == "unpermute":
        return permute(value, heads)
    return value + np.float32(1) if transform == "minus_one" else value


def apply(transform: str | Rearrangement, parts: Sequence[F32], heads: int) -> F32:
    """Make a parameter from a file's tensors. ``heads`` is how many heads the rows hold (used by
    ``unpermute``)."""
    if not isinstance(transform, str):
        made: F32 = transform.parameter(parts)
        return made
    if transform == "unpermute":
        return unpermute(parts[0], heads)
    return _PLAIN[transform](parts)
