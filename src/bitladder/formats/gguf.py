"""The GGUF container's numbers: magic, value types, limits, keys, and how split files are named.

Source: the GGUF specification in the ggml repository (docs/gguf.md), and what llama.cpp's own reader accepts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Layouts that are alike. Version 1 counted with 32 bits and is long gone."""
VERSION_WRITTEN = 3
DEFAULT_ALIGNMENT = 32
QUANTIZATION_VERSION = 2
"""ggml's version of the block formats, the value of general.quantization_version."""

MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 63
"""ggml keeps a tensor's name in 64 bytes with a closing zero."""
MAX_KEY_BYTES = 65535
MAX_ALIGNMENT = 1 << 20
MAX_SPLITS = 65535
"""split.count is an unsigned 16-bit number."""

STRING, ARRAY, BOOL = 8, 9, 7
UINT8, UINT16, UINT32, INT32, FLOAT32, UINT64 = 0, 2, 4, 5, 6, 10
SCALARS: dict[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Value type -> its ``struct`` code, little-endian. Strings (8) and arrays (9) have a length in front."""

KEY_ALIGNMENT = "general.alignment"
KEY_FILE_TYPE = "general.file_type"
KEY_QUANTIZATION_VERSION = "general.quantization_version"
KEY_SPLIT_NO, KEY_SPLIT_COUNT, KEY_SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
PROVENANCE = "bitladder."
"""Keys with this prefix say how Bitladder made a file."""

_SPLIT_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class SplitName:
    """``<prefix>-00001-of-00003.gguf``; ``number`` counts from 1."""

    prefix: str
    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.prefix}-{self.number:05d}-of-{self.count:05d}.gguf"


def parse_split_name(filename: str) -> SplitName | None:
    """The parts of a split file's name, or None for any other name."""
    match = _SPLIT_NAME.fullmatch(filename)
    return SplitName(match["prefix"], int(match["number"]), int(match["count"])) if match else None


def padded(size: int, alignment: int) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment
