"""llama.cpp's importance matrix files: per tensor the mean of each input channel's squared activation.

Two kinds are met. Files since mid-2025 are GGUF: for each tensor ``<name>.in_sum2`` f32[matrices, columns]
holds sums of squares and ``<name>.counts`` f32[matrices, 1] how many activations were summed; stacked experts
have one matrix each. Before that (``.dat``):

    entries i32
    per entry: name (i32 length, bytes) | calls i32 | values i32 | f32[values]: mean squares x calls
    chunks i32 | dataset (i32 length, bytes)          (these two may be missing)

Both are written too, so that llama-quantize can use ours.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitladder.errors import BadFile, BadInput
from bitladder.files.atomic import write_whole
from bitladder.files.gguf_header import Header, read_file_header
from bitladder.files.gguf_writer import encoded, layout
from bitladder.files.regular import open_regular, read_regular
from bitladder.formats import gguf
from bitladder.formats.tensors import TensorInfo

F32Array = NDArray[np.float32]

_KEY_SOURCE = gguf.PROVENANCE + "source_sha256"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MEANS = "The importance matrix was cut short while copying, or is something else."
_DO = "Get it again, or compute one for this model."


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squared activations per tensor and how they were gathered.

    ``mean_squares`` f32[matrices, columns]; an old file knows no matrices: there it is f32[1, matrices x
    columns]. ``counts`` f32[matrices]: activations behind each row; 0 where calibration never came by (its
    means are 1, which is neutral).
    """

    mean_squares: dict[str, F32Array]
    counts: dict[str, F32Array]
    chunks: int = 0
    chunk_size: int = 0
    datasets: tuple[str, ...] = field(default=())

    def vectors(self) -> dict[str, F32Array]:
        """What quantizers take: f32[columns] for a matrix, f32[matrices, columns] for a stack."""
        return {name: means[0] if len(means) == 1 else means for name, means in self.mean_squares.items()}


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read either kind.

    Raises:
        BadInput: there is no such file, or it cannot be read.
        BadFile: it is truncated, lies, or holds values that no mean of squares can have.
    """
    try:
        with open_regular(path) as file:
            is_gguf = file.read(4) == gguf.MAGIC
        matrix = _from_gguf(read_file_header(path)) if is_gguf else _from_dat(path, read_regular(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.", do="Check the path and its permissions.") from error
    for name, means in matrix.mean_squares.items():
        if not np.isfinite(means).all() or (means < 0).any():
            raise BadFile(
                f"{path}: the importance of {name} holds NaN, infinity or a negative number.",
                means="Calibration overflowed, or the file is damaged.",
                do=_DO,
            )
    return matrix


def _means(sums: F32Array, counts: F32Array) -> F32Array:
    """Sums of squares (f32[matrices, columns]) divided by their counts; 1 for what was never counted."""
    used = counts > 0
    means = np.ones_like(sums)
    with np.errstate(over="ignore"):  # what is infinite is refused by its name
        means[used] = sums[used] / counts[used, None]
    return means


def _from_gguf(header: Header) -> ImportanceMatrix:
    stored = {tensor.info.name: tensor for tensor in header.tensors}
    arrays: dict[str, F32Array] = {}
    for name, tensor in stored.items():
        if tensor.info.qtype != "F32":
            raise BadFile(f"{header.path}: {name} is {tensor.info.qtype}, not F32.", means=_MEANS, do=_DO)
        flat = np.fromfile(header.path, "<f4", tensor.info.elements, offset=tensor.offset)
        arrays[name] = flat.reshape(-1, tensor.info.shape[-1] if tensor.info.shape else 1)
    means, all_counts = {}, {}
    for key in stored:
        if not key.endswith(_SUMS):
            continue
        name = key.removesuffix(_SUMS)
        counts = arrays.get(name + _COUNTS)
        if counts is None or counts.size != len(arrays[key]):
            found = "no counts" if counts is None else f"{counts.size} counts for {len(arrays[key])} matrices"
            raise BadFile(f"{header.path}: {name} has {found}.", means=_MEANS, do=_DO)
        all_counts[name] = counts.reshape(-1)
        means[name] = _means(arrays[key], all_counts[name])
    if not means:
        raise BadFile(
            f"{header.path} holds no sums of squares among its {len(stored)} tensors.",
            means="It is a model or another GGUF file, no importance matrix.",
            do="Give the file that llama-imatrix or bitladder wrote.",
        )
    datasets = header.metadata.get("imatrix.datasets", [])
    return ImportanceMatrix(
        means,
        all_counts,
        chunks=_whole(header.metadata.get("imatrix.chunk_count")),
        chunk_size=_whole(header.metadata.get("imatrix.chunk_size")),
        datasets=tuple(str(one) for one in datasets) if isinstance(datasets, list) else (),
    )


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


class _Bytes:
    """A position in an old file."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at = path, data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> bytes:
        if not 0 <= count <= self.left:
            raise BadFile(
                f"{self.path}: {what} needs {count} bytes at offset {self.at}, the file has {self.left} left.",
                means=_MEANS,
                do=_DO,
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def i32(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])


def _from_dat(path: Path, data: bytes) -> ImportanceMatrix:
    source = _Bytes(path, data)
    entries = source.i32("the number of entries")
    if not 0 < entries <= source.left // 17:
        raise BadFile(
            f"{path}: it says {entries} entries; its {len(data)} bytes can hold 1 to {source.left // 17}.",
            means=_MEANS,
            do=_DO,
        )
    means: dict[str, F32Array] = {}
    counts: dict[str, F32Array] = {}
    for number in range(entries):
        name = source.take(source.i32(f"the length of name {number}"), f"name {number}").decode(errors="replace")
        if not name or name in means:
            raise BadFile(
                f"{path}: the name of entry {number}, '{name}', is empty or appears twice.",
                means=_MEANS,
                do=_DO,
            )
        calls = source.i32(f"the calls of {name}")
        values = source.take(4 * source.i32(f"the number of values of {name}"), f"the values of {name}")
        sums = np.frombuffer(values, "<f4").reshape(1, -1)
        counts[name] = np.array([max(calls, 0)], np.float32)
        means[name] = _means(sums, counts[name])
    chunks = 0
    datasets: tuple[str, ...] = ()
    if source.left >= 8:
        chunks = source.i32("the number of chunks")
        text = source.take(source.i32("the length of the dataset's name"), "the dataset's name")
        datasets = (text.decode(errors="replace"),)
    return ImportanceMatrix(means, counts, chunks=chunks, datasets=datasets)


def write_imatrix(
    path: Path, matrix: ImportanceMatrix, kind: Literal["gguf", "dat"] = "gguf", *, source_sha256: str = ""
) -> None:
    """Write a file that llama-quantize reads; whole under its name or not at all. A GGUF keeps ``source_sha256``, the
    model's hash.

    Raises:
        OutputError: the file cannot be written.
    """
    data = _gguf_bytes(matrix, source_sha256) if kind == "gguf" else _dat_bytes(matrix)
    write_whole(path, data)


def made_from(path: Path, source_sha256: str) -> bool:
    """Whether a file is an importance matrix that Bitladder made of the model with this hash."""
    try:
        keys = read_file_header(path).metadata
    except BadInput:  # whatever it is, it is not ours
        return False
    return keys.get("general.type") == "imatrix" and keys.get(_KEY_SOURCE) == source_sha256


def _gguf_bytes(matrix: ImportanceMatrix, source_sha256: str) -> bytes:
    arrays: dict[str, F32Array] = {}
    for name in sorted(matrix.mean_squares):
        counts = matrix.counts[name].reshape(-1, 1)
        arrays[name + _SUMS] = (matrix.mean_squares[name] * counts).astype("<f4")
        arrays[name + _COUNTS] = counts.astype("<f4")
    texts = [text.encode() for text in matrix.datasets]
    listed = struct.pack("<IIQ", gguf.ARRAY, gguf.STRING, len(texts))
    metadata = {
        "general.type": encoded(gguf.STRING, "imatrix"),
        "imatrix.datasets": listed + b"".join(struct.pack("<Q", len(text)) + text for text in texts),
        "imatrix.chunk_count": encoded(gguf.UINT32, matrix.chunks),
        "imatrix.chunk_size": encoded(gguf.UINT32, matrix.chunk_size),
    }
    if source_sha256:
        metadata[_KEY_SOURCE] = encoded(gguf.STRING, source_sha256)
    plan = layout(metadata, [TensorInfo(name, array.shape, "F32") for name, array in arrays.items()], 32)
    out = bytearray(plan.size)
    out[: len(plan.header)] = plan.header
    for offset, array in zip(plan.offsets, arrays.values(), strict=True):
        out[offset : offset + array.nbytes] = array.tobytes()
    return bytes(out)


def _dat_bytes(matrix: ImportanceMatrix) -> bytes:
    parts = [struct.pack("<i", len(matrix.mean_squares))]
    for name in sorted(matrix.mean_squares):
        text = name.encode()
        means = matrix.mean_squares[name]
        calls = max(1, int(matrix.counts[name].max()))
        parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", calls, means.size)]
        parts.append((means * np.float32(calls)).astype("<f4").tobytes())
    text = ", ".join(matrix.datasets).encode()
    parts += [struct.pack("<ii", matrix.chunks, len(text)), text]
    return b"".join(parts)
