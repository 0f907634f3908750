"""Read a GGUF header and trust nothing in it.

    magic "GGUF" | version u32 | tensor count u64 | key count u64
    per key:     key (u64 length, bytes) | value type u32 | value
    per tensor:  name (u64 length, bytes) | dimensions u32 | sizes u64 each, columns first
                 | ggml type u32 | offset u64
    padding to the alignment, then tensor data; offsets count from there

Every count is compared with the bytes that are left before anything is allocated for it, sizes are multiplied
as Python integers (which do not wrap), and every tensor must lie inside the file without touching another.
Only the header's own pages are read, so a file whose data is a hole costs nothing.

The bytes of each key are kept beside its decoded value: what is carried over to another file is copied, not
rewritten.
"""

from __future__ import annotations

import functools
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitladder.errors import BadFile, BadInput
from bitladder.files.regular import open_regular
from bitladder.formats import gguf
from bitladder.formats.blocks import QTYPE_BY_NUMBER, QTYPES
from bitladder.formats.tensors import TensorInfo

_SMALLEST_KEY = 8 + 1 + 4 + 1
_SMALLEST_TENSOR = 8 + 1 + 4 + 4 + 8
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_DAMAGED = "The file is damaged, was cut short while copying, or is no GGUF file."
_AGAIN = "Download or convert it again."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where it lies: ``offset`` in bytes from the start of its file."""

    info: TensorInfo
    offset: int
    shard: int = 0


@dataclass(frozen=True)
class Header:
    """What stands before the tensor data of one file."""

    path: Path
    version: int
    alignment: int
    metadata: dict[str, Any] = field(repr=False)
    """Values as Python numbers, strings, bools and lists; text that is no UTF-8 has its bad bytes replaced.
    """
    raw: dict[str, bytes] = field(repr=False)
    """Per key the value's own bytes, its type in front."""
    tensors: tuple[StoredTensor, ...]
    data_start: int
    file_bytes: int


class _Cursor:
    """A position in a header; every step checks that the bytes are there."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer = buffer
        self.size = len(buffer)
        self.path = path
        self.at = 0

    def fault(self, found: str, *, means: str = _DAMAGED, do: str = _AGAIN) -> BadFile:
        return BadFile(f"{self.path}: {found}", means=means, do=do)

    def take(self, count: int, what: str) -> int:
        """Step over ``count`` bytes; returns where they start."""
        start, end = self.at, self.at + count
        if end > self.size:
            raise self.fault(f"{what} needs {count} bytes at offset {start}, the file has {self.size - start} left.")
        self.at = end
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.buffer, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.buffer, self.take(8, what))[0])

    def count(self, what: str, smallest: int) -> int:
        """A count of things that take at least ``smallest`` bytes each."""
        number = self.u64(what)
        if number * smallest > self.size - self.at:
            raise self.fault(
                f"{what} is {number}, which needs at least {number * smallest} bytes; {self.size - self.at} are left."
            )
        return number

    def name(self, what: str, limit: int) -> str:
        length = self.u64(f"the length of {what}")
        if not 0 < length <= limit:
            raise self.fault(f"{what} has {length} bytes; between 1 and {limit} are allowed.")
        start = self.take(length, what)
        try:
            return self.buffer[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.fault(f"{what} at offset {start} is not UTF-8 text.") from error


def _strings(cursor: _Cursor, count: int, key: str) -> list[str]:
    """``count`` strings one after another: the tight loop of big vocabularies."""
    buffer, size, at, unpack = cursor.buffer, cursor.size, cursor.at, _U64.unpack_from
    texts = []
    for _ in range(count):
        start = at + 8
        if start > size:
            raise cursor.fault(f"the text of key '{key}' runs past the end of the file.")
        at = start + unpack(buffer, at)[0]
        if at > size:
            raise cursor.fault(f"a text of key '{key}' has {at - start} bytes, the file has {size - start} left.")
        texts.append(buffer[start:at])
    cursor.at = at
    return [text.decode("utf-8", "replace") for text in texts]


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == gguf.STRING:
        return _strings(cursor, 1, key)[0]
    if kind == gguf.ARRAY:
        inner = cursor.u32(f"the element type of key '{key}'")
        if inner == gguf.STRING:
            return _strings(cursor, cursor.count(f"the length of array '{key}'", 8), key)
        if inner not in gguf.SCALARS:
            what = "an array of arrays" if inner == gguf.ARRAY else f"an array of unknown type {inner}"
            raise cursor.fault(f"key '{key}' is {what}.", means=f"llama.cpp has no use for it. {_DAMAGED}")
        width = struct.calcsize("<" + gguf.SCALARS[inner])
        count = cursor.count(f"the length of array '{key}'", width)
        start = cursor.take(count * width, f"array '{key}'")
        return list(struct.unpack_from(f"<{count}{gguf.SCALARS[inner]}", cursor.buffer, start))
    if kind not in gguf.SCALARS:
        raise cursor.fault(f"key '{key}' has the unknown value type {kind}.")
    code = "<" + gguf.SCALARS[kind]
    return struct.unpack_from(code, cursor.buffer, cursor.take(struct.calcsize(code), f"key '{key}'"))[0]


def _metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    values: dict[str, Any] = {}
    raw: dict[str, bytes] = {}
    for number in range(count):
        key = cursor.name(f"key {number}", gguf.MAX_KEY_BYTES)
        if key in values:
            raise cursor.fault(f"the key '{key}' appears twice.")
        start = cursor.at
        values[key] = _value(cursor, cursor.u32(f"the type of key '{key}'"), key)
        raw[key] = cursor.buffer[start : cursor.at]
    return values, raw


def _tensor(cursor: _Cursor, number: int) -> tuple[TensorInfo, int]:
    """One row of the tensor list, with its offset into the data."""
    name = cursor.name(f"the name of tensor {number}", gguf.MAX_NAME_BYTES)
    dimensions = cursor.u32(f"the dimensions of tensor '{name}'")
    if dimensions > gguf.MAX_DIMENSIONS:
        raise cursor.fault(f"tensor '{name}' has {dimensions} dimensions; {gguf.MAX_DIMENSIONS} are allowed.")
    sizes = [cursor.u64(f"a size of tensor '{name}'") for _ in range(dimensions)]
    number_of_type = cursor.u32(f"the type of tensor '{name}'")
    offset = cursor.u64(f"the offset of tensor '{name}'")
    qtype = QTYPE_BY_NUMBER.get(number_of_type)
    if qtype is None:
        raise cursor.fault(
            f"tensor '{name}' has the unknown type number {number_of_type}.",
            means="The file comes from a newer or another program, or is damaged.",
            do="Convert the model again from its original checkpoint.",
        )
    info = TensorInfo(name, tuple(reversed(sizes)), qtype.name)
    if info.elements >= 1 << 63:
        raise cursor.fault(f"tensor '{name}' claims {info.elements} weights; sizes {sizes} do not fit 63 bits.")
    if sizes and sizes[0] % qtype.block_size:
        raise cursor.fault(
            f"tensor '{name}' has rows of {sizes[0]} weights; {qtype.name} needs multiples of {qtype.block_size}."
        )
    return info, offset


def _alignment(cursor: _Cursor, metadata: dict[str, Any], raw: dict[str, bytes]) -> int:
    value = metadata.get(gguf.KEY_ALIGNMENT, gguf.DEFAULT_ALIGNMENT)
    typed = gguf.KEY_ALIGNMENT not in raw or raw[gguf.KEY_ALIGNMENT][:4] == _U32.pack(gguf.UINT32)
    if not typed or not 0 < value <= gguf.MAX_ALIGNMENT or value & (value - 1):
        raise cursor.fault(f"{gguf.KEY_ALIGNMENT} is {value!r}; it must be a power of two up to {gguf.MAX_ALIGNMENT}.")
    return int(value)


def _placed(
    cursor: _Cursor, listed: list[tuple[TensorInfo, int]], data_start: int, alignment: int
) -> tuple[StoredTensor, ...]:
    """Tensors with their place in the file, after every check that needs more than one of them."""
    names: set[str] = set()
    stored = []
    for info, offset in listed:
        if info.name in names:
            raise cursor.fault(f"the tensor '{info.name}' appears twice.")
        names.add(info.name)
        if offset % alignment:
            raise cursor.fault(
                f"tensor '{info.name}' lies at offset {offset}, no multiple of the alignment {alignment}."
            )
        stored.append(StoredTensor(info, data_start + offset))
    end, owner = data_start, "the header"
    for tensor in sorted(stored, key=lambda tensor: (tensor.offset, tensor.info.nbytes)):
        if tensor.offset < end:
            raise cursor.fault(
                f"tensor '{tensor.info.name}' starts at byte {tensor.offset}, inside {owner}, which ends at {end}."
            )
        end, owner = tensor.offset + tensor.info.nbytes, f"tensor '{tensor.info.name}'"
    if end > cursor.size:
        raise cursor.fault(
            f"the file has {cursor.size} bytes, its header describes {end}: "
            f"{end - cursor.size} bytes are missing ({owner} is the last).",
            means="The download or copy stopped early.",
        )
    return tuple(stored)


def _preamble(cursor: _Cursor) -> int:
    """Check magic and version; returns the version."""
    magic = cursor.buffer[cursor.take(4, "the magic number") : cursor.at]
    if magic != gguf.MAGIC:
        raise cursor.fault(
            f"it starts with {magic!r}, not with {gguf.MAGIC!r}.",
            means="It is no GGUF file (perhaps a web page or a pointer file in its place), or is damaged.",
            do="Give a .gguf file, a checkpoint folder or hf:org/name.",
        )
    version = cursor.u32("the version")
    if version not in gguf.VERSIONS:
        if version & 0xFFFF == 0 and version:
            raise cursor.fault(
                "its numbers are big-endian.",
                means="It was made for another kind of machine.",
                do="Convert it with gguf-convert-endian.",
            )
        raise cursor.fault(
            f"it has GGUF version {version}; versions {gguf.VERSIONS[0]} and {gguf.VERSIONS[-1]} are known.",
            means="The file is older or newer than this program, or is damaged.",
        )
    return version


def read_file_header(path: Path) -> Header:
    """The header of one file, whether or not it is a part of a split model.

    Raises:
        BadInput: there is no such file, or it cannot be read.
        BadFile: the file is truncated, contradicts itself or is hostile.
    """
    try:
        stat = path.stat()
        return _header_of(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.", do="Check the path and its permissions.") from error


@functools.lru_cache(maxsize=4)
def _header_of(path: Path, _inode: int, size: int, _mtime_ns: int) -> Header:
    """Headers are kept: a command asks for its source's several times, and big vocabularies take a while."""
    if size < 24:
        raise BadFile(f"{path}: it has {size} bytes; a GGUF header alone has 24.", means=_DAMAGED, do=_AGAIN)
    with open_regular(path) as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with buffer:
        cursor = _Cursor(buffer, path)
        version = _preamble(cursor)
        n_tensors = cursor.u64("the tensor count")
        n_keys = cursor.count("the key count", _SMALLEST_KEY)
        if n_tensors * _SMALLEST_TENSOR > cursor.size:
            raise cursor.fault(
                f"the tensor count is {n_tensors}, more than a file of {cursor.size} bytes can describe."
            )
        metadata, raw = _metadata(cursor, n_keys)
        alignment = _alignment(cursor, metadata, raw)
        listed = [_tensor(cursor, number) for number in range(n_tensors)]
        data_start = gguf.padded(cursor.at, alignment)
        stored = _placed(cursor, listed, data_start, alignment)
        return Header(path, version, alignment, metadata, raw, stored, data_start, cursor.size)


def row_bytes(info: TensorInfo) -> tuple[int, int]:
    """Rows (over all leading dimensions) of a tensor, and the bytes of each."""
    columns = info.shape[-1] if info.shape else 1
    return (info.elements // columns if columns else 0), QTYPES[info.qtype].row_bytes(columns)
