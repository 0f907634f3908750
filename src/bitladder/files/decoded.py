"""A checkpoint whose matrices are quantized in a way that the converter does not read, written anew with floats.

The converter reads the formats of large releases (FP8 in blocks, MXFP4, NVFP4, plain GPTQ, one group of
compressed-tensors), tensor by tensor and without a copy on the disk, so it keeps them. For all else a twin of the
checkpoint is made first, of float tensors alone, by the decoders of ``levels/checkpoints/stored.py``. Headers alone
decide which of both it is, and what neither can read is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder.describe.quantized import quantization_of
from bitladder.errors import BadFile, BadInput
from bitladder.files.checkpoint import DTYPE_BYTES, Checkpoint, CheckpointTensor
from bitladder.files.safetensors_writer import PiecewiseTensor, stored_tensors, write_safetensors
from bitladder.files.staging import without_quantization
from bitladder.levels.checkpoints.converter_formats import ReadAs, converter_reads
from bitladder.levels.checkpoints.stored import PackedMatrix, belongs_to, packed_matrices, unscaled
from bitladder.progress import Progress, silent

if TYPE_CHECKING:
    import numpy.typing as npt

    from bitladder.kernels.grid import F32

FLOATS = ("F32", "F16", "BF16")
_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "F8_E8M0": "u1",
}  # fmt: skip
_LARGEST = {"F16": 65504.0}


@dataclass(frozen=True)
class Decoding:
    """What is quantized in a checkpoint."""

    matrices: Mapping[str, PackedMatrix]
    """By the name of the float matrix."""
    dtype: str
    """What they are written as: what most other weights of the checkpoint are, ``F32``, ``F16`` or ``BF16``."""
    by_converter: ReadAs
    """Whether the converter reads the checkpoint as it is."""


def decoding_of(checkpoint: Checkpoint) -> Decoding | None:
    """How a checkpoint's quantized matrices become floats; None where none of a known kind is there.

    Raises:
        BadFile: arrays contradict one another.
        BadInput: FP8 without scales.
    """
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    configuration = quantization_of(checkpoint.config)
    reader = _Reader(checkpoint)
    try:
        matrices = {one.name: one for one in packed_matrices(configuration, tensors, reader.read)}
    except ValueError as error:
        raise BadFile(
            f"{checkpoint.folder}: {error}.",
            means="The checkpoint is damaged, or stored in a variant of its format that is not read here.",
            do="Fetch it again, or give the checkpoint that it was quantized from.",
        ) from error
    bare = unscaled(tensors)
    if bare is not None:
        raise BadInput(
            f"{checkpoint.folder}: {bare} is stored as FP8 without a scale.",
            means="Its scales were lost, or it was cast without any; without them its weights have no size.",
            do="Fetch the checkpoint again with all its files, or give the one that it was made from.",
        )
    if not matrices:
        return None
    apart = (checkpoint.folder / "hf_quant_config.json").is_file()
    method = str(configuration.get("quant_method") or ("modelopt" if apart else "")).lower()
    native = converter_reads(method, configuration, matrices, tensors)
    return Decoding(matrices, _float_type(tensors, matrices), native)


def decoded_bytes(checkpoint: Checkpoint, decoding: Decoding) -> int:
    """Bytes of the tensors once all are floats."""
    return sum(tensor.nbytes for tensor in _twin(checkpoint, decoding))


def write_decoded(checkpoint: Checkpoint, decoding: Decoding, folder: Path, progress: Progress = silent) -> Checkpoint:
    """The twin of a checkpoint with float weights, in ``folder``, shard by shard; its configuration says nothing of a
    quantization.

    Raises:
        BadFile: arrays contradict one another.
        OSError: no room.
    """
    folder.mkdir(parents=True)
    reader = _Reader(checkpoint)
    done, count = [0], len(decoding.matrices)

    def decoded(matrix: PackedMatrix) -> Iterator[memoryview]:
        yield _floats(reader, checkpoint.folder, matrix, decoding.dtype).reshape(-1).data
        done[0] += 1
        progress("decoding quantized weights", done[0], count)

    twin = _twin(checkpoint, decoding)
    places = {tensor.name: _shard(tensor.name, checkpoint, decoding) for tensor in twin}
    shards = []
    for shard in checkpoint.shards:
        kept = {tensor.name: tensor for tensor in stored_tensors(shard)}
        pieces = []
        for tensor in twin:
            if places[tensor.name] != shard.name:
                continue
            matrix = decoding.matrices.get(tensor.name)
            pieces.append(
                kept[tensor.name]
                if matrix is None
                else PiecewiseTensor(tensor.name, tensor.dtype, tensor.shape, partial(decoded, matrix))
            )
        if pieces:
            shards.append(folder / shard.name)
            write_safetensors(shards[-1], pieces)
    return replace(
        checkpoint, config=without_quantization(checkpoint.config), shards=tuple(shards), tensors=tuple(twin),
        shard_of=places,
    )  # fmt: skip


def _twin(checkpoint: Checkpoint, decoding: Decoding) -> list[CheckpointTensor]:
    """The tensors of the twin, in the order of the checkpoint's."""
    found: dict[str, CheckpointTensor] = {}
    owner = {name: matrix for matrix in decoding.matrices.values() for name in matrix.arrays.values()}
    for tensor in checkpoint.tensors:
        matrix = owner.get(tensor.name)
        if matrix is not None:
            size = DTYPE_BYTES[decoding.dtype] * math.prod(matrix.shape)
            found.setdefault(matrix.name, CheckpointTensor(matrix.name, decoding.dtype, matrix.shape, size))
        elif not belongs_to(tensor.name, decoding.matrices):
            found[tensor.name] = tensor
    return list(found.values())


def _shard(name: str, checkpoint: Checkpoint, decoding: Decoding) -> str:
    """Where a tensor of the twin goes: to where the codes of a matrix are."""
    matrix = decoding.matrices.get(name)
    return checkpoint.shard_of[name if matrix is None else next(iter(matrix.arrays.values()))]


def _floats(reader: _Reader, folder: Path, matrix: PackedMatrix, dtype: str) -> npt.NDArray[Any]:
    """A matrix's weights as bytes of ``dtype``, rounded to nearest."""
    from bitladder.kernels import quantize

    weights = _weights(reader, folder, matrix, dtype)
    return quantize(weights.reshape(-1, weights.shape[-1]), dtype)


def _weights(reader: _Reader, folder: Path, matrix: PackedMatrix, dtype: str) -> F32:
    """A matrix's weights f32, all of which ``dtype`` can hold."""
    import numpy as np

    try:
        with np.errstate(all="ignore"):  # what comes of damaged scales is looked at below
            weights = matrix.decode({role: reader.read(name) for role, name in matrix.arrays.items()})
    except (ValueError, KeyError, TypeError) as error:
        raise BadFile(
            f"{folder}: {matrix.name} contradicts itself: {error}.",
            means="The checkpoint is damaged.",
            do="Fetch it again.",
        ) from error
    largest = float(np.abs(weights).max(initial=0))
    if not largest <= _LARGEST.get(dtype, float(np.finfo(np.float32).max)):
        raise BadFile(
            f"{folder}: {matrix.name} decodes to weights of {largest:g}.",
            means="Its scales are damaged, or were made for another layout.",
            do="Fetch the checkpoint again.",
        )
    return np.ascontiguousarray(weights)


def _float_type(tensors: Mapping[str, CheckpointTensor], matrices: Mapping[str, PackedMatrix]) -> str:
    held = dict.fromkeys(FLOATS, 0)
    for tensor in tensors.values():
        if tensor.dtype in held and not belongs_to(tensor.name, matrices):
            held[tensor.dtype] += tensor.nbytes
    return max(held, key=lambda dtype: held[dtype]) if any(held.values()) else "BF16"


class FloatView:
    """A checkpoint's tensors as its twin in floats has them, each decoded when it is read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises as ``decoding_of``."""
        self.checkpoint, self._decoding = checkpoint, decoding_of(checkpoint)
        self._reader = _Reader(checkpoint)
        self.tensors = checkpoint.tensors if self._decoding is None else tuple(_twin(checkpoint, self._decoding))
        """In the order of the checkpoint's."""

    @property
    def main_dtype(self) -> str:
        """The dtype that holds the most bytes."""
        return self.checkpoint.main_dtype if self._decoding is None else self._decoding.dtype

    def decoded(self, name: str) -> F32 | None:
        """A matrix that is stored quantized as f32; None where a tensor is what it is. Values are as the converter has
        them: rounded to the twin's type where it was given the twin.

        Raises:
            BadFile: its arrays contradict one another.
        """
        matrix = None if self._decoding is None else self._decoding.matrices.get(name)
        if matrix is None or self._decoding is None:
            return None
        weights = _weights(self._reader, self.checkpoint.folder, matrix, self._decoding.dtype)
        if self._decoding.by_converter is not ReadAs.FLOATS:
            return weights
        from bitladder.kernels import dequantize, quantize

        lines = weights.reshape(-1, weights.shape[-1])
        return dequantize(quantize(lines, self._decoding.dtype), self._decoding.dtype).reshape(weights.shape)


class _Reader:
    """Values of a checkpoint's tensors, by name."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._shards = {shard.name: shard for shard in checkpoint.shards}
        self._shard_of = checkpoint.shard_of
        self._open: dict[str, dict[str, PiecewiseTensor]] = {}

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor; codes of small floats as u8, BF16 as f32."""
        import numpy as np

        shard = self._shard_of[name]
        if shard not in self._open:
            self._open[shard] = {tensor.name: tensor for tensor in stored_tensors(self._shards[shard])}
        tensor = self._open[shard][name]
        values = np.frombuffer(b"".join(tensor.pieces()), _NUMPY[tensor.dtype]).reshape(tensor.shape)
        if tensor.dtype == "BF16":
            return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values
