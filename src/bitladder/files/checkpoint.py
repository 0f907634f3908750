"""A Hugging Face checkpoint folder, read without loading it: config.json and the headers of its safetensors
files.

Layout of a safetensors file: u64 length of the header, the header as JSON (name -> dtype, shape,
data_offsets), the data.
Everything is checked before it is believed: lengths against the file, offsets against the header, shapes
against bytes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from bitladder.errors import BadFile, BadInput

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element of each dtype that whole bytes can hold."""
MAX_HEADER = 100_000_000
"""Upper bound of a header in bytes, the format's own."""


PICKLES = "Its weights are pickles, which can run any code when they are read, so they are never opened here."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors header names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint described from its headers."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    tensors: tuple[StoredTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def main_dtype(self) -> str:
        """The dtype that holds the most bytes."""
        held: dict[str, int] = {}
        for tensor in self.tensors:
            held[tensor.dtype] = held.get(tensor.dtype, 0) + tensor.nbytes
        return max(held, key=lambda dtype: held[dtype])


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and every shard's header.

    Raises:
        BadInput: no config.json, no safetensors, or a shard that the index names is missing.
        BadFile: a file is truncated or contradicts itself.
    """
    config = read_json(folder / "config.json")
    shards = list_shards(folder)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in read_safetensors_header(shard):
            if tensor.name in tensors:
                raise BadFile(
                    f"{folder}: tensor '{tensor.name}' is in two shards.",
                    do="Remove the files that do not belong.",
                )
            tensors[tensor.name] = tensor
    return Checkpoint(folder, config, shards, tuple(tensors.values()))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BadInput: no such file.
        BadFile: not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(
            f"{path.parent} has no {path.name}.",
            means="It is no Hugging Face checkpoint folder, or only part of one was copied.",
            do="Give the folder that holds config.json, the tokenizer and the safetensors files.",
        ) from None
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read as JSON: {error}", do="Copy the file again.") from error
    if not isinstance(value, dict):
        raise BadFile(f"{path} holds a {type(value).__name__}, not an object.", do="Copy the file again.")
    return value


def list_shards(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, as its index says when it has one.

    Raises:
        BadInput: there are none, or some are missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise BadFile(f"{index} has no usable weight_map.", do="Copy the file again.")
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise BadInput(
                f"{folder} lacks {len(missing)} of {len(names)} weight files, first {missing[0]}.",
                means="A download or copy did not finish.",
                do="Fetch the missing files.",
            )
        return tuple(folder / name for name in names)
    found = tuple(sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")))
    if found:
        return found
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    raise BadInput(
        f"{folder} has no safetensors files" + (f", but {pickles[0]}." if pickles else "."),
        means=PICKLES if pickles else "The weights are missing.",
        do="Fetch the safetensors twin, or convert where you trust them (transformers: save_pretrained)."
        if pickles
        else "Give the folder that holds the safetensors files.",
    )


def read_safetensors_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their data.

    Raises:
        BadFile: truncated, or a header that contradicts itself or the file's size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, MAX_HEADER):
            raise _broken(path, f"a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    if len(raw) < length:
        raise _broken(path, f"{len(raw)} of {length} header bytes")
    return parse_safetensors_header(raw, str(path), size - 8 - length)


def parse_safetensors_header(raw: bytes, where: str, data_bytes: int) -> list[StoredTensor]:
    """Check and read the JSON of a safetensors header; ``data_bytes`` follow it.

    Raises:
        BadFile: it contradicts itself or ``data_bytes``.
    """
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _broken(where, f"a header that is no JSON ({error})") from error
    if not isinstance(table, dict):
        raise _broken(where, "a header that is no JSON object")
    placed = sorted(
        (_entry(where, name, entry) for name, entry in table.items() if name != "__metadata__"),
        key=lambda item: item[0],
    )
    end = 0
    for start, tensor in placed:
        if start != end:
            raise _broken(where, f"tensor '{tensor.name}' at byte {start} where {end} is expected")
        end = start + tensor.nbytes
    if end != data_bytes:
        raise _broken(where, f"{data_bytes} bytes of data where the header promises {end}")
    return [tensor for _, tensor in placed]


def _entry(where: str | Path, name: str, entry: Any) -> tuple[int, StoredTensor]:
    """One checked row of the header: where its data starts, and the tensor."""
    if not isinstance(entry, dict):
        raise _broken(where, f"no description of tensor '{name}'")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPE_BYTES:
        raise _broken(where, f"tensor '{name}' of unknown dtype {dtype!r}")
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise _broken(where, f"tensor '{name}' with shape {shape!r} at {offsets!r}")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise _broken(where, f"tensor '{name}' of {nbytes} bytes in a space of {offsets[1] - offsets[0]}")
    return offsets[0], StoredTensor(name, dtype, tuple(shape), nbytes)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )


def _broken(where: str | os.PathLike[str], found: str) -> BadFile:
    return BadFile(
        f"{where} is no sound safetensors file: {found}.",
        means="The file was cut short on its way or is not what its name says.",
        do="Fetch it again and compare its size.",
    )
