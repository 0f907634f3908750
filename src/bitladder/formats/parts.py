"""What a model's tensors are for, as far as memory and speed ask."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bitladder.formats.tensors import TensorInfo

PARTS = ("embedding", "output", "layers", "experts")
"""embedding: one row per token is read, always in RAM. output: the logits' matrix (and what stands outside
layers).
layers: everything in layers but experts. experts: of which a token uses a few."""


def parts_of(tensors: Sequence[TensorInfo]) -> dict[str, dict[str, int]]:
    """Bytes of tensors by part and qtype."""
    parts: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        held = parts.setdefault(part_of(tensor.name), {})
        held[tensor.qtype] = held.get(tensor.qtype, 0) + tensor.nbytes
    return parts


def part_of(name: str) -> str:
    """One of ``PARTS``."""
    if name.startswith(("token_embd.", "per_layer_token_embd.")):
        return "embedding"
    if "_exps." in name:
        return "experts"
    return "layers" if name.startswith("blk.") else "output"


_NEXTN = re.compile(r"blk\.(\d+)\.nextn\.")


def nextn_blocks(names: Iterable[str]) -> frozenset[int]:
    """Blocks that predict the token after the next one (MTP, NextN), by the names of their tensors."""
    return frozenset(int(match[1]) for name in names if (match := _NEXTN.match(name)))
