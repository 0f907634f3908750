"""Machines that are not here: a table of known GPUs and memories, and machines described in words.

RTX 4090 + 64 GiB        2x RTX 3090 + 128 GiB DDR4-3200 dual        Apple M4 Max 128 GiB        32 GiB
GPU 24 GiB 936 GB/s 71 TFLOP/s + 64 GiB 80 GB/s        (a GPU or memory that no table knows: its figures by hand)
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import yaml

from bitladder.describe.machine import Gpu, Machine
from bitladder.describe.rates import PoolRates, from_data_sheet
from bitladder.errors import UsageError
from bitladder.units import GiB, human_bytes, parse_bytes

DEFAULT_MEMORY = "DDR5-4800 dual"
"""What a described machine's RAM is taken for when nobody says: a common desktop's."""
_CPU_FLOPS = 4e11
"""Arithmetic assumed of a described machine's CPU: eight cores with 256-bit vectors."""
_FLOPS_PER_BYTE = 70
"""Operations per byte of bandwidth of a GPU whose arithmetic nobody gave: the low end of the table."""
MOST_RAM = 1 << 50
_SYSTEM = 2 * GiB
"""What the system of a described machine is taken to use of its RAM."""


@dataclass(frozen=True)
class DescribedMachine:
    """A machine in words, with the rates its data sheets promise."""

    machine: Machine
    cpu: PoolRates
    gpu: PoolRates | None
    assumed: tuple[str, ...]
    """What had to be assumed, for people to see."""


@cache
def known_gpus() -> dict[str, dict[str, Any]]:
    """Name -> memory (GiB), bandwidth (GB/s), fp16 (TFLOP/s), source."""
    return {row["name"]: row for row in _table("gpus")["gpus"]}


@cache
def known_memories() -> dict[str, dict[str, Any]]:
    """Name -> bandwidth (GB/s), source; machines with unified memory have a ``gpu_share`` too."""
    table = _table("memory")
    return {row["name"]: row for row in [*table["kinds"], *table["unified"]]}


def _table(name: str) -> dict[str, Any]:
    text = resources.files("bitladder").joinpath(f"data/devices/{name}.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return loaded


def parse_machine(text: str) -> DescribedMachine:
    """A machine from words: GPUs (``2x RTX 3090``) and RAM (``64 GiB``, with its kind if known), joined by
    ``+``.

    Raises:
        UsageError: a part names nothing known (the nearest names are given), or there is no RAM.
    """
    gpus: list[Gpu] = []
    ram, memory, assumed = 0, "", []
    by_hand = 0.0
    for part in (piece.strip() for piece in text.split("+")):
        rest, size, bandwidth, flops = _figures(part)
        count_match = re.match(r"(\d+)\s*[x×]\s*(.+)", rest)
        count, name = (int(count_match[1]), count_match[2].strip()) if count_match else (1, rest)
        gpu = _find(part.split("x", 1)[-1].strip() if count_match else part, known_gpus()) or _find(name, known_gpus())
        if gpu is None and name.upper() == "GPU" and size and bandwidth:
            flops = flops or _FLOPS_PER_BYTE * bandwidth
            gpu = {"name": "GPU", "memory": size / GiB, "bandwidth": bandwidth / 1e9, "fp16": flops / 1e12}
        if gpu and not 1 <= count <= 64:
            raise UsageError(f"'{text}' has {count} GPUs.", do="Give 1 to 64.")
        if gpu:
            gpus += [_gpu(gpu)] * count
        elif size:
            ram += size
            by_hand = bandwidth or by_hand
            memory = _memory(name) if name and name.lower() not in ("ram", "of ram") else memory
        else:
            raise _unknown(part)
    if ram <= 0:
        raise UsageError(f"'{text}' has no RAM.", do="Add its size, like '+ 64 GiB'.")
    if ram > MOST_RAM:
        raise UsageError(f"'{text}' has {human_bytes(ram)} of RAM.", do=f"Give {human_bytes(MOST_RAM)} or less.")
    if not memory:
        memory = DEFAULT_MEMORY
        assumed += [] if by_hand else [f"memory is {memory}"]
    row = known_memories()[memory]
    assumed.append("rates from data sheets")
    bandwidth = by_hand or row["bandwidth"] * 1e9
    unified = "gpu_share" in row
    machine = Machine(
        cpu=memory if unified else "a described machine",
        cores=8,
        features=(),
        ram_total=ram,
        ram_available=max(0, min(ram - _SYSTEM, int(ram * row.get("gpu_share", 1.0)))),
        disk_free=1 << 40,
        gpus=tuple(gpus),
        unified=unified,
    )
    slowest = min(gpus, key=lambda gpu: gpu.bandwidth) if gpus else None
    return DescribedMachine(
        machine,
        from_data_sheet(bandwidth, _CPU_FLOPS * (8 if unified else 1), gpu=unified),
        from_data_sheet(slowest.bandwidth, slowest.flops, gpu=True) if slowest else None,
        tuple(assumed),
    )


class _Part(NamedTuple):
    """A part of a machine as it was written."""

    rest: str
    """What is left when its figures are taken out."""
    bytes: int
    bytes_per_s: float
    flops: float
    """Operations per second. Figures that are not there are 0."""


def _figures(part: str) -> _Part:
    found = []
    for pattern in (r"(?<![\w.-])([\d.]+)\s*([GT])B/s\b", r"(?<![\w.-])([\d.]+)\s*([GT])FLOP(?:/?s)\b"):
        match = re.search(pattern, part, re.IGNORECASE)
        found.append(_number(match[1]) * {"G": 1e9, "T": 1e12}[match[2].upper()] if match else 0.0)
        part = (part[: match.start()] + part[match.end() :]).strip() if match else part
    size = re.search(r"(?<![\w.-])([\d.]+)\s*([GT]i?B)\b", part, re.IGNORECASE)
    rest = (part[: size.start()] + part[size.end() :]).strip() if size else part
    return _Part(rest, parse_bytes(size[1] + size[2]) if size else 0, *found)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"'{text}' is no number.", do="Write figures like 24 GiB or 936 GB/s.") from error


def gpu_figures(name: str) -> dict[str, Any] | None:
    """The table's row for a GPU as its driver names it (``NVIDIA GeForce RTX 4090``), or None."""
    return _find(re.sub(r"^(NVIDIA|AMD|GeForce|Radeon|Tesla|\s)+", "", name), known_gpus())


def capability_of(name: str) -> float | None:
    """NVIDIA's compute capability of a GPU as its driver, or a table, names it; None where none is known."""
    found = (gpu_figures(name) or {}).get("capability")
    return float(found) if found is not None else None


def _find(name: str, table: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The row whose name says the same, whatever the case, spaces and maker's prefix; the most particular
    one first.
    """
    wanted = _plain(name)
    for known in sorted(table, key=len, reverse=True):
        if wanted in (_plain(known), _plain("NVIDIA " + known), _plain("AMD " + known)):
            return table[known]
    starts = [row for known, row in table.items() if wanted and _plain(known).startswith(wanted)]
    return min(starts, key=lambda row: row["memory"]) if starts and len(wanted) >= 4 and "memory" in starts[0] else None


def _plain(name: str) -> str:
    text = re.sub(r"[\s_-]|gib|gb", "", name.lower())
    return re.sub(r"^(nvidia|geforce|radeon|tesla)+", "", text)


def _gpu(row: dict[str, Any]) -> Gpu:
    size = int(row["memory"] * GiB)
    return Gpu(row["name"], size, size, row["bandwidth"] * 1e9, row["fp16"] * 1e12)


def _memory(name: str) -> str:
    row = _find(name, known_memories())
    if row is None:
        raise _unknown(name)
    return str(row["name"])


def _unknown(part: str) -> UsageError:
    names = [*known_gpus(), *known_memories()]
    plain = {_plain(name): name for name in names}
    close = difflib.get_close_matches(_plain(part), plain, n=3, cutoff=0.4)
    return UsageError(
        f"'{part}' is no known GPU, memory or size.",
        means="Nearest known: " + ", ".join(plain[name] for name in close) if close else "",
        do="Write for example 'RTX 4090 + 64 GiB', or figures by hand: 'GPU 24 GiB 936 GB/s + 64 GiB 80 GB/s'.",
    )
