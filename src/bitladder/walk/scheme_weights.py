"""A checkpoint level made on the fly: each matrix rounded to nearest in the scheme that a recipe gives it, to measure
whole recipes without writing them."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping

import numpy as np
from numpy.typing import NDArray

from bitladder.levels.checkpoints import CheckpointFormat
from bitladder.walk.rounding import InputType
from bitladder.walk.weights import FileWeights, Rows

F32 = NDArray[np.float32]


class SchemeWeights:
    """``LevelWeights`` of a source whose matrices ``forms`` names are stored so; all others are the source's own."""

    def __init__(
        self, source: FileWeights, forms: Mapping[str, CheckpointFormat], importance: Mapping[str, F32] | None = None
    ) -> None:
        """``importance``: as ``Quantizer`` takes it, what scales are searched by."""
        self._source, self._forms, self._importance = source, forms, importance or {}

    def __call__(self, name: str, rows: Rows = None) -> F32:
        """As ``LevelWeights``."""
        form = self._forms.get(name)
        if form is None or rows is not None:  # tables that are read row by row stay float
            return self._source(name, rows)
        whole = self._source(name)
        matrices = whole.reshape(-1, *whole.shape[-2:])
        own = self._importance.get(name)
        each = [own] * len(matrices) if own is None or own.ndim == 1 else list(own)
        made = [rounded(form, matrix, seen) for matrix, seen in zip(matrices, each, strict=True)]
        return np.stack(made).reshape(whole.shape)

    def identity(self, name: str) -> Hashable:
        """What the weights depend on."""
        form, own = self._forms.get(name), self._importance.get(name)
        if form is None:
            return self._source.identity(name)
        seen = b"" if own is None else hashlib.blake2b(own.tobytes(), digest_size=16).digest()
        return self._source.identity(name), form, seen

    def qtype(self, name: str) -> InputType:
        """What the inputs meet at run time."""
        form = self._forms.get(name)
        return (form.rounds_inputs if form is not None else None) or "F32"

    def forget(self, name: str) -> None:
        """Nothing is kept here."""
        self._source.forget(name)


def rounded(form: CheckpointFormat, matrix: F32, importance: F32 | None, *, quick: bool = True) -> F32:
    """Weights f32[rows, columns] as a reader of the format computes them, codes to nearest."""
    found = form.search(np.ascontiguousarray(matrix), importance, quick=quick)
    return found.decode(found.grid().nearest(matrix))
