"""Machines that are not here: a table of known GPUs and memories, and machines described in words.

RTX 4090 + 64 GiB        2x RTX 3090 + 128 GiB DDR4-3200 dual        Apple M4 Max 128 GiB        32 GiB
16 GB laptop        MacBook Pro M4 32GB        two 3090s        64 GB of RAM and 24 GB of VRAM
GPU 24 GiB 936 GB/s 71 TFLOP/s + 64 GiB 80 GB/s        (a GPU or memory that no table knows: its figures by hand)

GB of memory are taken as they are sold, as GiB.
"""

from __future__ import annotations

import difflib
import re
import statistics
from dataclasses import dataclass, field
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
    shareable: int
    """Bytes of RAM that a model may take at most: all, or the part of a shared memory that a GPU may have."""


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
    """A machine from words: GPUs (``2x RTX 3090``) and RAM (``64 GiB``, with its kind if known), joined by ``+``, a
    comma, ``and`` or ``with``. Words that say nothing of memory (``laptop``) may stand beside them.

    Raises:
        UsageError: a part names nothing known (the nearest names are given), or there is no RAM.
    """
    words = _Words(text)
    for piece in _pieces(text):
        words.take(piece)
    ram = words.ram or words.assume_ram()
    if ram <= 0:
        raise UsageError(f"'{text}' has no RAM.", do="Add its size, like '+ 64 GiB'.")
    if ram > MOST_RAM:
        raise UsageError(f"'{text}' has {human_bytes(ram)} of RAM.", do=f"Give {human_bytes(MOST_RAM)} or less.")
    gpus, assumed = words.all_gpus(), words.assumed
    memory = words.memory or DEFAULT_MEMORY
    if not words.memory and not words.ram_rate:
        assumed.append(f"memory is {memory}")
    row = known_memories()[memory]
    assumed.append("rates from data sheets")
    bandwidth = words.ram_rate or row["bandwidth"] * 1e9
    unified = "gpu_share" in row
    shareable = int(ram * row.get("gpu_share", 1.0))
    machine = Machine(
        cpu=memory if unified else "a described machine",
        cores=8,
        features=(),
        ram_total=ram,
        ram_available=max(0, min(ram - _SYSTEM, shareable)),
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
        shareable,
    )


_COUNTS = {
    "one": 1, "single": 1, "two": 2, "dual": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
}  # fmt: skip
_SAYS_NOTHING = re.compile(
    r"\b(macbook( pro| air)?|mac( mini| studio| pro)?|imac|laptop|notebook|desktop|pc|computer|workstation|server|"
    r"machine|gaming|my|an?|the|of|unified|memory|chip|total|ram)\b",
    re.IGNORECASE,
)
"""Words of everyday descriptions that decide nothing."""
_VIDEO = re.compile(r"\b(vram|video|graphics( card)?|gpu( memory)?)\b", re.IGNORECASE)


def _pieces(text: str) -> list[str]:
    """What is joined by ``+``, a comma, ``and`` or ``with``; plurals and spoken units written out."""
    text = re.sub(r"(?<=\d)\s*(gigs?|gigabytes?|g)\b", " GB", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\d)((?:\s?ti|\s?super|\s?xtx?)*)s\b", r"\1", text, flags=re.IGNORECASE)
    return [
        piece.strip() for piece in re.split(r"\s*(?:\+|,|&|\band\b|\bwith\b|\bplus\b)\s*", text, flags=re.IGNORECASE)
    ]


@dataclass
class _Words:
    """What the parts of a description add up to."""

    text: str
    gpus: list[Gpu] = field(default_factory=list)
    ram: int = 0
    ram_rate: float = 0.0
    """Bytes per second, where they were given by hand."""
    memory: str = ""
    """A row of the table of memories."""
    vram: int = 0
    """Of a GPU that has a size and no name."""
    assumed: list[str] = field(default_factory=list)

    def take(self, part: str) -> None:
        """One more part; raises UsageError when it says nothing."""
        rest, size, bandwidth, flops = _figures(part)
        count, name = _counted(rest)
        gpu = _known_gpu(_counted(part)[1]) or _known_gpu(name)
        if gpu is None and name.upper() == "GPU" and size and bandwidth:
            flops = flops or _FLOPS_PER_BYTE * bandwidth
            gpu = {"name": "GPU", "memory": size / GiB, "bandwidth": bandwidth / 1e9, "fp16": flops / 1e12}
        plain = _SAYS_NOTHING.sub(" ", name).strip()
        kind = _VIDEO.sub(" ", plain).strip()
        if gpu:
            self._add_gpus(gpu, count)
        elif plain != kind and not kind:
            self.vram += size * count
        elif size:
            self.ram += size
            self.ram_rate = bandwidth or self.ram_rate
            self.memory = _memory(plain) if plain else self.memory
        elif chip := _chip(plain):
            self.memory = chip
        elif plain or not name:
            raise _unknown(part)

    def _add_gpus(self, row: dict[str, Any], count: int) -> None:
        if not 1 <= count <= 64:
            raise UsageError(f"'{self.text}' has {count} GPUs.", do="Give 1 to 64.")
        self.gpus += [_gpu(row)] * count

    def all_gpus(self) -> list[Gpu]:
        """Those with a name; else one that has as much memory as was said, at the usual pace of such a GPU."""
        if self.gpus or not self.vram:
            return self.gpus
        nearest = min(known_gpus().values(), key=lambda row: abs(row["memory"] - self.vram / GiB))["memory"]
        alike = [row for row in known_gpus().values() if row["memory"] == nearest]
        bandwidth, flops = (statistics.median(row[key] for row in alike) for key in ("bandwidth", "fp16"))
        self.assumed.append(f"the GPU reads {bandwidth:g} GB/s, as those of {nearest} GiB usually do")
        return [Gpu("GPU", self.vram, self.vram, bandwidth * 1e9, flops * 1e12)]

    def assume_ram(self) -> int:
        """RAM of a machine of which only GPUs were named: as much as they have."""
        total = sum(gpu.vram_total for gpu in self.gpus)
        if total:
            self.assumed.append(f"RAM is {human_bytes(total)}, as much as the GPUs have")
        return total


def _counted(part: str) -> tuple[int, str]:
    """``2x RTX 3090``, ``two 3090`` as a count and the rest."""
    words = "|".join(_COUNTS)
    match = re.match(rf"(?:(\d+)\s*[x×]\s*|(\d)\s+(?=[a-z]*\s?\d{{4}})|({words})\s+)(.+)", part, re.IGNORECASE)
    if match is None:
        return 1, part
    digits = match[1] or match[2]
    return int(digits) if digits else _COUNTS[match[3].lower()], match[4].strip()


def _known_gpu(name: str) -> dict[str, Any] | None:
    """The row of a GPU, with or without the name of its series (``3090``)."""
    found = _find(name, known_gpus())
    wanted = _plain(name)
    if found is None and re.match(r"\d{4}", wanted):
        return next((row for known, row in known_gpus().items() if _plain(known).endswith(wanted)), None)
    return found


def _chip(name: str) -> str:
    """A machine of the table whose size was said elsewhere (``Apple M4``), or nothing."""
    row = _find(re.sub(r"^(?=m\d)", "Apple ", name, flags=re.IGNORECASE), known_memories()) if name else None
    return str(row["name"]) if row else ""


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
    return _Part(rest, parse_bytes(size[1] + size[2][0] + "iB") if size else 0, *found)


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


def known_gpu(name: str) -> str | None:
    """The table's name of a GPU that a driver calls ``name``; None where it is not known."""
    row = _find(name, known_gpus())
    return None if row is None else str(row["name"])


def _plain(name: str) -> str:
    text = re.sub(r"[\s_-]|gib|gb", "", name.lower())
    return re.sub(r"^(nvidia|geforce|radeon|tesla)+", "", text)


def _gpu(row: dict[str, Any]) -> Gpu:
    size = int(row["memory"] * GiB)
    return Gpu(row["name"], size, size, row["bandwidth"] * 1e9, row["fp16"] * 1e12)


def _memory(name: str) -> str:
    """The row of a memory or a machine by its name; of a kind without its speed (``DDR4``) the first one."""
    kind = _plain(name)
    found = _chip(name) or next(
        (known for known in known_memories() if len(kind) > 3 and _plain(known).startswith(kind)), ""
    )
    if not found:
        raise _unknown(name)
    return found


def _unknown(part: str) -> UsageError:
    names = [*known_gpus(), *known_memories()]
    plain = {_plain(name): name for name in names}
    close = difflib.get_close_matches(_plain(part), plain, n=3, cutoff=0.4)
    return UsageError(
        f"'{part}' is no known GPU, memory or size.",
        means="Nearest known: " + ", ".join(plain[name] for name in close) if close else "",
        do="Write for example 'RTX 4090 + 64 GiB', or figures by hand: 'GPU 24 GiB 936 GB/s + 64 GiB 80 GB/s'.",
    )
