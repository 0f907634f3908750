"""What llama.cpp's converter did to tensors, undone: the transforms that ``formats/roles.py`` names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

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


def apply(transform: str, parts: Sequence[F32], heads: int) -> F32:
    """Make a parameter from a file's tensors. ``heads`` is how many heads the rows hold (used by
    ``unpermute``)."""
    if transform == "unpermute":
        return unpermute(parts[0], heads)
    return _PLAIN[transform](parts)
