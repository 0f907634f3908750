"""A model in a GGUF file, or in the parts of a split one: its header as a ``Model``, its tensors read when they are
asked for.

They are read, not mapped into memory: a file that shrinks meanwhile, or a disk that fails, would otherwise end the
process with a signal (SIGBUS), where a read ends with an error.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder import system
from bitladder.describe.dims import dims_from_metadata
from bitladder.describe.gguf_kinds import refuse_other_kinds
from bitladder.describe.model import Model
from bitladder.errors import BadFile, BitladderError, UnknownArchitecture
from bitladder.files.engine_package import ENGINE, engine_knows, engine_version
from bitladder.files.following import AHEAD, FollowingHash
from bitladder.files.gguf_header import Header, StoredTensor, read_file_header, row_bytes
from bitladder.files.hashing import file_sha256
from bitladder.files.regular import open_regular
from bitladder.formats import gguf
from bitladder.formats.families import FAMILIES
from bitladder.formats.tensors import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = slice | NDArray[np.int64] | None

_READ_AT_ONCE = 1 << 24
"""Weights: what is stored of a large tensor need not lie in memory beside all that it decodes to."""
_TYPE_SUFFIX = re.compile(r"[-._](?:f32|f16|fp16|bf16|i?q\d\w*|tq\d_\d|mxfp4\w*)$", re.IGNORECASE)


def base_name(path: Path) -> str:
    """A model's name from its file's: without folder, part number, extension and level
    (``SmolLM2.Q4_1.gguf``: ``SmolLM2``).
    """
    split = gguf.parse_split_name(path.name)
    stem = split.prefix if split else path.name.removesuffix(".gguf")
    return _TYPE_SUFFIX.sub("", stem) or stem


def _parts(path: Path) -> list[Header]:
    """The headers of all parts of the model that ``path`` belongs to, in order."""
    header = read_file_header(path)
    count = header.metadata.get(gguf.KEY_SPLIT_COUNT, 0)
    if not isinstance(count, int) or count <= 1:
        return [header]
    name = gguf.parse_split_name(path.name)
    if name is None or name.count != count:
        raise BadFile(
            f"{path}: its header says it is part of {count} files, its name does not.",
            means="A part of a split model was renamed, so the other parts cannot be found.",
            do=f"Give the parts their names back: <name>-00001-of-{count:05d}.gguf and so on.",
        )
    headers = []
    for number in range(1, count + 1):
        part = path.with_name(str(gguf.SplitName(name.prefix, number, count)))
        if not part.exists():
            raise BadFile(
                f"{part} is missing; the model has {count} parts.",
                means="Not all parts were downloaded.",
                do="Download the missing part.",
            )
        headers.append(header if part == path else read_file_header(part))
        number_inside = headers[-1].metadata.get(gguf.KEY_SPLIT_NO)
        if number_inside != number - 1:
            raise BadFile(
                f"{part}: its header says part {number_inside!r} (counting from 0), its name says {number - 1}.",
                means="Parts were renamed or mixed up.",
                do="Download the parts again.",
            )
    return headers


def _merged(headers: list[Header]) -> dict[str, StoredTensor]:
    """All parts' tensors by name, checked against the count that the first part promises."""
    stored: dict[str, StoredTensor] = {}
    for shard, header in enumerate(headers):
        for tensor in header.tensors:
            if tensor.info.name in stored:
                raise BadFile(
                    f"{header.path}: the tensor '{tensor.info.name}' is in two parts.",
                    means="Parts were mixed up.",
                    do="Download the parts again.",
                )
            stored[tensor.info.name] = StoredTensor(tensor.info, tensor.offset, shard)
    promised = headers[0].metadata.get(gguf.KEY_SPLIT_TENSORS, len(stored))
    if len(headers) > 1 and promised != len(stored):
        raise BadFile(
            f"{headers[0].path}: {promised} tensors are promised, the {len(headers)} parts hold {len(stored)}.",
            means="Parts of different models were mixed.",
            do="Download the parts again.",
        )
    return stored


def _model(headers: list[Header], stored: dict[str, StoredTensor]) -> Model:
    first = headers[0]
    tensors = tuple(tensor.info for tensor in stored.values())
    try:
        refuse_other_kinds(first.metadata, tensors)
        _require_known(first.metadata.get("general.architecture"))
        dims = dims_from_metadata(first.metadata, tensors)
    except BitladderError as error:
        raise type(error)(f"{first.path}: {error.found}", means=error.means, do=error.do) from error
    return Model(
        name=base_name(first.path),
        dims=dims,
        tensors=tensors,
        metadata=first.metadata,
        header_bytes=sum(header.data_start for header in headers),
        file_name=first.path.name,
        raw_metadata=first.raw,
        alignment=first.alignment,
    )


def _require_known(architecture: Any) -> None:
    """What the engine knows is the rule; where there is none, any name is as good as another."""
    if isinstance(architecture, str) and architecture not in FAMILIES and engine_knows(architecture) is False:
        raise UnknownArchitecture(
            f"The architecture '{architecture}' is not known to the engine here ({ENGINE} {engine_version()}).",
            means="The model is newer than the engine, or the file holds something else than a language model.",
            do=f"Update the engine if the model is new (pip install -U {ENGINE}), or choose another model.",
        )


def read_header(path: Path) -> Model:
    """Describe a model from its header alone: no tensor data is touched, so a file whose data is a hole will
    do.

    Raises:
        BadInput, BadFile, UnknownArchitecture: as ``GgufFile``.
    """
    headers = _parts(path)
    return _model(headers, _merged(headers))


def row_pieces(info: TensorInfo, weights: int) -> Iterator[slice]:
    """A tensor's flattened rows, at most so many weights at a time, but at least a row."""
    count, _ = row_bytes(info)
    step = max(1, weights // max(1, info.shape[-1] if info.shape else 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def part_paths(path: Path) -> list[Path]:
    """Every file of the model that ``path`` belongs to, in order. Raises as ``read_header`` does."""
    return [header.path for header in _parts(path)]


class GgufFile:
    """An open model. Use as a context manager, or call ``close``.

    Raises:
        BadInput: there is no such file, or it cannot be read.
        BadFile: a file is truncated, contradicts itself or is hostile; parts do not belong together.
        UnknownArchitecture: nobody knows this model family.
    """

    def __init__(self, path: Path) -> None:
        self.headers = _parts(path)
        self.path = self.headers[0].path
        self._stored = _merged(self.headers)
        self.model = _model(self.headers, self._stored)
        self._hash: FollowingHash | None = None
        with ExitStack() as opened:
            self._files = [opened.enter_context(open_regular(header.path)) for header in self.headers]
            self._open = opened.pop_all()

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Open a model for reading. Any part of a split model will do."""
        return cls(path)

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; what was read stays."""
        self._open.close()
        if self._hash is not None:
            self._hash.abandon()

    @property
    def metadata(self) -> dict[str, Any]:
        """Every key of the (first) header with its decoded value."""
        return self.headers[0].metadata

    def info(self, name: str) -> TensorInfo:
        """A tensor's shape and type. Raises KeyError for a name that is not there."""
        return self._stored[name].info

    def raw(self, name: str, rows: Rows = None) -> NDArray[np.uint8]:
        """A tensor's stored bytes, or those of some of its rows: uint8[rows, row_bytes], leading dimensions flattened
        into rows.

        Raises:
            BadFile: the file has become shorter since it was opened, or cannot be read.
        """
        import numpy as np  # loaded by the first who needs it: hashing need not wait for it

        tensor = self._stored[name]
        count, width = row_bytes(tensor.info)
        if rows is None or (isinstance(rows, slice) and rows.step in (None, 1)):
            first, last, _ = (rows or slice(None)).indices(count)
            data = np.empty((max(0, last - first), width), np.uint8)
            self._fill(tensor.shard, tensor.offset + first * width, data)
            return data
        wanted = np.arange(count)[rows]
        data = np.empty((len(wanted), width), np.uint8)
        for at, row in enumerate(wanted.tolist()):
            self._fill(tensor.shard, tensor.offset + row * width, data[at])
        return data

    def _fill(self, shard: int, offset: int, data: NDArray[np.uint8]) -> None:
        """Read as many bytes as ``data`` has room for."""
        left = data.data.cast("B") if data.size else memoryview(b"")
        path = self.headers[shard].path
        while left:
            try:
                count = system.read_into(self._files[shard].fileno(), left, offset)
            except OSError as error:
                raise BadFile(f"{path} cannot be read: {error.strerror}.", do="Check the disk it lies on.") from error
            if not count:
                raise BadFile(
                    f"{path} has become shorter while it was read: nothing is left at byte {offset}.",
                    means="Another program writes to it, or it is still being copied.",
                    do="Wait until it is complete and try again.",
                )
            left, offset = left[count:], offset + count

    def read(self, name: str, rows: Rows = None, *, threads: int = 1) -> NDArray[np.float32]:
        """A tensor's weights as f32 in its own shape, or f32[rows, columns] of the flattened rows in ``rows``. Raises
        as ``raw`` does.
        """
        return read_weights(self, name, rows, threads=threads)

    def place(self, name: str) -> StoredTensor:
        """Where a tensor lies: its part (from 0) and the offset of its first byte there."""
        return self._stored[name]

    def hash_ahead(self) -> FollowingHash:
        """Begin to hash the files, a little ahead of who reads them; the same hash at every call."""
        if self._hash is None:
            self._hash = FollowingHash([header.path for header in self.headers])
            self._hash.advance(0, AHEAD)
        return self._hash

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, remembered as long as it does not change; see ``joined_sha256`` for a split
        model.
        """
        if self._hash is not None:
            return joined_sha256(self._hash.result())
        return joined_sha256([file_sha256(header.path) for header in self.headers])


def read_weights(file: GgufFile, name: str, rows: Rows, *, threads: int) -> NDArray[np.float32]:
    """As ``GgufFile.read``, of anything that has ``info`` and ``raw``."""
    import numpy as np

    from bitladder.kernels import dequantize

    info = file.info(name)
    if rows is not None:
        return dequantize(file.raw(name, rows), info.qtype, threads=threads)
    count, _ = row_bytes(info)
    values = np.empty((count, info.shape[-1] if info.shape else 1), np.float32)
    for part in row_pieces(info, _READ_AT_ONCE):
        dequantize(file.raw(name, part), info.qtype, threads=threads, out=values[part])
    return values.reshape(info.shape)


def joined_sha256(digests: list[str]) -> str:
    """One hash for a model: its file's, or the SHA-256 of the parts' hashes (as text, in order)."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
