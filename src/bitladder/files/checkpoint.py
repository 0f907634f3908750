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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from bitladder.errors import BadFile, BadInput
from bitladder.files.regular import open_regular, read_regular

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element of each dtype that whole bytes can hold."""
MAX_HEADER = 100_000_000
"""Upper bound of a header in bytes, the format's own."""
MAX_DEPTH = 100
"""How deep JSON of a checkpoint may be nested; real files stay under 20."""
_LFS_POINTER = b"version https://git-lfs"


PICKLES = "Its weights are pickles, which can run any code when they are read, so they are never opened here."


@dataclass(frozen=True)
class CheckpointTensor:
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
    tensors: tuple[CheckpointTensor, ...]
    shard_of: Mapping[str, str] = field(default_factory=dict)
    """The file name of the shard that holds a tensor."""

    def placed(self) -> Iterator[tuple[str, CheckpointTensor]]:
        """Every tensor with the file name of its shard."""
        return ((self.shard_of[tensor.name], tensor) for tensor in self.tensors)

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
        BadInput: no config.json, no safetensors, a shard that the index names is missing, or it is an adapter.
        BadFile: a file is truncated or contradicts itself.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
        raise BadInput(
            f"{folder} is an adapter (PEFT): differences to a model, no model.",
            means="Its effect depends on the model that it is added to.",
            do="Merge it into that model (peft: merge_and_unload, then save_pretrained) and give the merged folder.",
        )
    config = read_json(folder / "config.json")
    shards = list_shards(folder)
    tensors: dict[str, CheckpointTensor] = {}
    shard_of: dict[str, str] = {}
    for shard in shards:
        for tensor in read_safetensors_header(shard):
            if tensor.name in tensors:
                raise BadFile(
                    f"{folder}: tensor '{tensor.name}' is in {shard_of[tensor.name]} and in {shard.name}.",
                    means="The folder holds two copies of the weights, and no index says which one counts.",
                    do="Move the file that does not belong out of the folder.",
                )
            tensors[tensor.name] = tensor
            shard_of[tensor.name] = shard.name
    return Checkpoint(folder, config, shards, tuple(tensors.values()), shard_of)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BadInput: no such file.
        BadFile: no regular file, not a JSON object, too large or too deep.
    """
    try:
        raw = read_regular(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise dangling(path) from None
        raise BadInput(
            f"{path.parent} has no {path.name}.",
            means="It is no Hugging Face checkpoint folder, or only part of one was copied.",
            do="Give the folder that holds config.json, the tokenizer and the safetensors files.",
        ) from None
    value = read_json_text(raw, str(path))
    if not isinstance(value, dict):
        raise BadFile(f"{path} holds a {type(value).__name__}, not an object.", do="Copy the file again.")
    return value


def read_json_text(raw: bytes, where: str) -> Any:
    """JSON in UTF-8, nested at most ``MAX_DEPTH`` deep; of a key that comes twice the last value.

    Raises:
        BadFile: it is something else; ``where`` is in the message.
    """
    if raw.startswith(_LFS_POINTER):
        raise lfs_pointer(where)
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        found = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise BadFile(f"{where} cannot be read as JSON: {found}", do="Copy the file again.") from error
    if _deeper_than(value, MAX_DEPTH):
        raise BadFile(f"{where} is nested more than {MAX_DEPTH} deep.", means="No file of a checkpoint is.")
    return value


def _constant(name: str) -> float:
    """Python's writer leaves infinities in real configurations (time steps without a bound); NaN is nothing's value."""
    if name == "NaN":
        raise ValueError("it holds NaN, which is no number")
    return float(name)


def _deeper_than(value: Any, depth: int) -> bool:
    """Level by level, so that no depth can exhaust the stack."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(depth):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, (dict, list))]
    return bool(level)


def dangling(path: Path) -> BadFile:
    """The error for a link whose target is gone."""
    return BadFile(
        f"{path} is a link to {os.readlink(path)}, which is not there.",  # noqa: PTH115  (the link's text, unresolved)
        means="The cache that it leads into was cleaned or moved.",
        do="Fetch the model again.",
    )


def lfs_pointer(where: str | os.PathLike[str]) -> BadFile:
    """The error for a file that git fetched without its content."""
    return BadFile(
        f"{where} is a Git LFS pointer, not the file itself.",
        means="The repository was cloned without its large files.",
        do="Run `git lfs pull` in that folder, or download the model again.",
    )


def list_shards(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint: those of its index, else ``model.safetensors``, else all
    that may be weights.

    Raises:
        BadInput: there are none, or some are missing.
        BadFile: the index is damaged, or a shard is no regular file.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists() or index.is_symlink():
        weight_map = read_json(index).get("weight_map")
        values = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not values or not all(isinstance(name, str) and _is_shard_name(name) for name in values):
            raise BadFile(f"{index} has no usable weight_map.", do="Copy the file again.")
        names = sorted(set(values))
        missing = [name for name in names if not (folder / name).exists() and not (folder / name).is_symlink()]
        if missing:
            raise BadInput(
                f"{folder} lacks {len(missing)} of {len(names)} weight files, first {missing[0]}.",
                means="A download or copy did not finish.",
                do="Fetch the missing files.",
            )
        return tuple(_regular(folder / name) for name in names)
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    whole = [path for path in found if path.name == "model.safetensors"]
    twins = [path for path in found if path.name.startswith("consolidated")]
    if whole:  # what transformers loads; others beside it are variants or a trainer's
        found = whole
    elif len(twins) < len(found):  # the same weights a second time, under the maker's own names
        found = [path for path in found if path not in twins]
    if found:
        return tuple(_regular(path) for path in found)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    raise BadInput(
        f"{folder} has no safetensors files" + (f", but {pickles[0]}." if pickles else "."),
        means=PICKLES if pickles else "The weights are missing.",
        do="Fetch the safetensors twin, or convert where you trust them (transformers: save_pretrained)."
        if pickles
        else "Give the folder that holds the safetensors files.",
    )


WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".safetensors.index.json")
"""How files that may be weights end, whether they are read here or not."""


def has_weights(folder: Path) -> bool:
    """Whether a folder holds anything that may be weights; a link to nothing counts."""
    return any(path.name.endswith(WEIGHTS) for path in folder.iterdir())


def _is_shard_name(name: str) -> bool:
    """A file name and nothing but one, of a safetensors file."""
    return Path(name).name == name and name.endswith(".safetensors") and "\0" not in name


def _regular(path: Path) -> Path:
    """The path itself, when a regular file is there."""
    if path.is_file():
        return path
    if path.is_symlink() and not path.exists():
        raise dangling(path)
    raise BadFile(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}.", do="Fetch the file again.")


def read_safetensors_header(path: Path) -> list[CheckpointTensor]:
    """The tensors of one safetensors file, in the order of their data.

    Raises:
        BadFile: truncated, or a header that contradicts itself or the file's size.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if head == _LFS_POINTER[:8]:
            raise lfs_pointer(path)
        if len(head) < 8 or length > min(size - 8, MAX_HEADER):
            raise _broken(path, f"a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    if len(raw) < length:
        raise _broken(path, f"{len(raw)} of {length} header bytes")
    return parse_safetensors_header(raw, str(path), size - 8 - length)


def parse_safetensors_header(raw: bytes, where: str, data_bytes: int) -> list[CheckpointTensor]:
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


def _entry(where: str | Path, name: str, entry: Any) -> tuple[int, CheckpointTensor]:
    """One checked row of the header: where its data starts, and the tensor."""
    if not isinstance(entry, dict):
        raise _broken(where, f"no description of tensor '{name}'")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _broken(where, f"tensor '{name}' of unknown dtype {dtype!r}")
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise _broken(where, f"tensor '{name}' with shape {shape!r} at {offsets!r}")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise _broken(where, f"tensor '{name}' of {nbytes} bytes in a space of {offsets[1] - offsets[0]}")
    return offsets[0], CheckpointTensor(name, dtype, tuple(shape), nbytes)


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
