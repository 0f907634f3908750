"""A tensor as a file's header describes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitladder.formats.blocks import QTYPES


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and type of a stored tensor.

    ``shape`` is in numpy order: ``(rows, columns)`` for a matrix, ``(experts, rows, columns)`` for stacked experts;
    a row's weights lie side by side. (GGUF headers write the same numbers reversed.)
    """

    name: str
    shape: tuple[int, ...]
    qtype: str

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        return QTYPES[self.qtype].nbytes(self.shape)
