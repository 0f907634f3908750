"""Where a level's weights come from: the source itself, another file, or a recipe applied on the fly.

Each is called with a tensor's name and gives f32, and each tells the *identity* of a tensor's weights:
levels whose tensors have had equal identities so far have had equal hidden states so far, and share them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitladder.errors import BadFile, BadWeights
from bitladder.files.gguf import GgufFile, read_weights, row_pieces
from bitladder.formats.roles import factor_name
from bitladder.kernels import Effort, dequantize, first_nonfinite, quantize
from bitladder.levels.held import require_held
from bitladder.walk.rounding import InputType

F32 = NDArray[np.float32]
Rows = slice | NDArray[np.int64] | None
_HASHED_AT_ONCE = 1 << 22
"""Weights."""


class LevelWeights(Protocol):
    """The weights of one level, and what tells them from another level's."""

    def __call__(self, name: str, rows: Rows = None) -> F32:
        """A tensor in its numpy shape, or f32[rows, columns] of some of its (flattened) rows."""

    def identity(self, name: str) -> Hashable:
        """Equal for tensors with equal weights of equal type."""

    def qtype(self, name: str) -> InputType:
        """The type in which the tensor is stored at this level; of a checkpoint, what its inputs meet."""

    def forget(self, name: str) -> None:
        """The tensor will not be read again in whole: what was kept of it can go."""


def _read(file: GgufFile, name: str, rows: Rows, threads: int) -> F32:
    """Weights without the factor that the file may have beside them."""
    info, values = file.info(name), read_weights(file, name, rows, threads=threads)
    columns = info.shape[-1] if info.shape else 1
    flat = values.reshape(values.size // columns if columns else 0, columns)
    wrong = first_nonfinite(flat)
    if wrong is not None:
        raise BadWeights(
            f"{file.path}: the tensor '{name}' holds {flat[wrong]} at row {wrong[0]}, column {wrong[1]}"
            + (" of the rows read." if rows is not None else "."),
            means="The model was damaged in training, conversion or transfer; every prediction would be NaN.",
            do="Download or convert the model again.",
        )
    return values


class FileWeights:
    """The weights of a GGUF file as they are stored: the reference, or a level that another tool wrote."""

    def __init__(self, file: GgufFile, *, threads: int = 1) -> None:
        self.file, self._threads = file, threads
        self._names = {tensor.name for tensor in file.model.tensors}
        self._digests: dict[str, bytes] = {}

    def __call__(self, name: str, rows: Rows = None) -> F32:
        """As ``LevelWeights``; raises BadWeights for NaN or infinity."""
        return self.times_factor(name, self.stored(name, rows), rows)

    def stored(self, name: str, rows: Rows = None) -> F32:
        """The same without the factor beside a matrix: what is quantized when its type changes, for the factor stays.
        Raises as ``__call__``."""
        return _read(self.file, name, rows, self._threads)

    def times_factor(self, name: str, values: F32, rows: Rows = None) -> F32:
        """What the engine makes of a matrix: times its factor (NVFP4 has one beside each), or each expert's own.

        Raises:
            BadFile: the factor has another shape than one number, or one for each matrix.
        """
        own = factor_name(name)
        if own not in self._names:
            return values
        factors = _read(self.file, own, None, self._threads).reshape(-1)
        shape = self.file.info(name).shape
        matrices = math.prod(shape[:-2])
        if len(factors) not in (1, matrices):
            raise BadFile(
                f"{self.file.path}: {own} has {len(factors)} numbers for {matrices} matrices.",
                means="The file is damaged, or a variant that is not known here.",
                do="Convert the model again from its original checkpoint.",
            )
        if len(factors) == 1:
            return np.asarray(values * factors[0])
        each = np.repeat(factors, shape[-2])[:, None]
        return np.asarray(values * (each.reshape(*shape[:-1], 1) if rows is None else each[rows]))

    def identity(self, name: str) -> Hashable:
        """Type and hash of the stored bytes, so that equal tensors in different files are known to be
        equal."""
        if name not in self._digests:
            digest = hashlib.blake2b(digest_size=16)
            for part in (one for one in (name, factor_name(name)) if one in self._names):
                for rows in row_pieces(self.file.info(part), _HASHED_AT_ONCE):
                    digest.update(self.file.raw(part, rows).data)
            self._digests[name] = digest.digest()
        return self.file.info(name).qtype, self._digests[name]

    def qtype(self, name: str) -> str:
        """As the file's header says."""
        return self.file.info(name).qtype

    def forget(self, name: str) -> None:
        """Nothing of it is kept."""


class Quantizer:
    """Quantizes tensors of a source once per (tensor, qtype) and keeps the bytes while levels still need
    them.

    One per walk, shared by its levels. Bytes are kept instead of f32 because they are an eighth as large.
    """

    def __init__(
        self,
        source: FileWeights,
        *,
        importance: Mapping[str, F32] | None = None,
        effort: Effort = "good",
        threads: int = 1,
        device: str = "cpu",
    ) -> None:
        """``importance``: f32[columns] per tensor, or f32[experts, columns] for stacked experts. ``device``: where
        scales are searched for; the bytes do not depend on it."""
        self.source, self._importance = source, importance or {}
        self._effort: Effort = effort
        self._threads, self._device = threads, device
        self._packed: dict[tuple[str, str], NDArray[np.uint8]] = {}
        self._settings = {
            name: hashlib.blake2b(values.tobytes(), digest_size=16).digest()
            for name, values in self._importance.items()
        }

    def identity(self, name: str, qtype: str) -> Hashable:
        """Equal when the quantized bytes are: same weights, type, effort and importance."""
        return self.source.identity(name), qtype, self._effort, self._settings.get(name)

    def read(self, name: str, qtype: str, rows: Rows = None) -> F32:
        """Weights of a tensor (or of some rows) as they come out of quantizing and dequantizing.

        Raises:
            BadWeights: the type does not hold them.
        """
        if rows is not None:
            packed = self._pack(name, self.source.stored(name, rows), qtype, rows)
            return self.source.times_factor(name, dequantize(packed, qtype, threads=self._threads), rows)
        key = (name, qtype)
        if key not in self._packed:
            self._packed[key] = self._pack(name, self.source.stored(name), qtype, None)
        shape = self.source.file.info(name).shape
        made = dequantize(self._packed[key], qtype, threads=self._threads).reshape(shape)
        return self.source.times_factor(name, made)

    def _pack(self, name: str, weights: F32, qtype: str, rows: Rows) -> NDArray[np.uint8]:
        importance = self._importance.get(name)
        if qtype != self.source.qtype(name):
            require_held(weights.reshape(-1, weights.shape[-1]), [qtype], name)

        def packed(matrix: F32, own: F32 | None) -> NDArray[np.uint8]:
            return quantize(
                matrix, qtype, importance=own, effort=self._effort, threads=self._threads, device=self._device
            )

        if importance is None or importance.ndim == 1:
            return packed(weights.reshape(-1, weights.shape[-1]), importance)
        if rows is not None:
            raise ValueError(f"{name}: rows of stacked experts with an importance each cannot be quantized apart")
        return np.concatenate([packed(expert, own) for expert, own in zip(weights, importance, strict=True)])

    def forget(self, name: str) -> None:
        """Drop the bytes of a tensor."""
        for key in [key for key in self._packed if key[0] == name]:
            del self._packed[key]
        self.source.forget(name)


class MadeWeights:
    """A level made on the fly: each tensor of the source in the ``qtype`` that a recipe gives it."""

    def __init__(self, quantizer: Quantizer, qtypes: Mapping[str, str]) -> None:
        """``qtypes``: tensor name to qtype; a tensor that is missing, or keeps its type, is the source's
        own."""
        self._quantizer, self._source = quantizer, quantizer.source
        stored = {tensor.name: tensor.qtype for tensor in self._source.file.model.tensors}
        unknown = set(qtypes) - set(stored)
        if unknown:
            raise BadFile(f"The recipe names a tensor that the source lacks: '{min(unknown)}'.")
        self._qtypes = {name: qtype for name, qtype in qtypes.items() if qtype not in (stored[name], "F32")}

    def __call__(self, name: str, rows: Rows = None) -> F32:
        """As ``LevelWeights``; raises BadWeights for NaN or infinity in the source."""
        qtype = self._qtypes.get(name)
        return self._source(name, rows) if qtype is None else self._quantizer.read(name, qtype, rows)

    def identity(self, name: str) -> Hashable:
        """What the bytes depend on, or the source's own identity."""
        qtype = self._qtypes.get(name)
        return self._source.identity(name) if qtype is None else self._quantizer.identity(name, qtype)

    def qtype(self, name: str) -> str:
        """What the recipe says, or the source's own."""
        return self._qtypes.get(name) or self._source.qtype(name)

    def forget(self, name: str) -> None:
        """Drop what the quantizer keeps of a tensor."""
        self._quantizer.forget(name)
