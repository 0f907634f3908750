"""NVIDIA GPUs as ``nvidia-smi`` reports them, cut to those that CUDA shows this process (``CUDA_VISIBLE_DEVICES``)."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bitladder.describe.machine import Gpu
from bitladder.units import GiB, MiB

_QUERIES = ("name,memory.total,memory.free,uuid,mig.mode.current", "name,memory.total,memory.free,uuid")
"""The second for drivers that know nothing of instances."""
_SHARED = re.compile(r"\[?(N/A|Not Supported)\]?", re.IGNORECASE)
"""What stands for the memory of a GPU that has none of its own: Jetson, GB10."""
_SECONDS = 20


@dataclass(frozen=True)
class Reported:
    """A GPU, or an instance of one (MIG), in the driver's order. Bytes."""

    name: str
    uuid: str
    total: int
    """0 where the driver gives no figure."""
    free: int
    remark: str = ""
    """What stood in the place of a figure."""
    divided: bool = False
    """Cut into instances: nothing runs on the whole."""
    instances: tuple[Reported, ...] = ()

    @property
    def shares_memory(self) -> bool:
        """It has no memory of its own but the processor's."""
        return not self.total and bool(_SHARED.fullmatch(self.remark))

    @property
    def silent(self) -> bool:
        """It reports an error in the place of its memory, so nothing can be planned on it."""
        return not self.total and not self.shares_memory


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[Reported, ...]:
    """GPUs that this process may use, in CUDA's order; none without the program or its driver."""
    wish = environ.get("CUDA_VISIBLE_DEVICES")
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None or (wish is not None and not wish.strip()):
        return ()
    for fields in _QUERIES:
        if (text := _output([program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"])) is not None:
            break
    else:
        return ()
    found = parse_query(text)
    if any(gpu.divided for gpu in found):
        found = with_instances(found, _output([program, "-L"]) or "")
    return shown(found, wish, by_bus=environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID")


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def parse_query(text: str) -> tuple[Reported, ...]:
    """Rows of ``name, total MiB, free MiB, uuid[, mode of instances]``; others are passed over."""
    found = []
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(row) < 4:
            continue
        name, total, free, uuid, *mode = (cell.strip() for cell in row)
        counted = _count(total)
        found.append(
            Reported(
                name, uuid, counted * MiB, min(counted, _count(free)) * MiB,
                remark="" if counted else total, divided=mode == ["Enabled"],
            )
        )  # fmt: skip
    return tuple(found)


def _count(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def with_instances(gpus: Sequence[Reported], listing: str) -> tuple[Reported, ...]:
    """The instances of divided GPUs, from ``nvidia-smi -L``; their size is in their profile's name (``3g.40gb``)."""
    own: dict[str, list[Reported]] = {}
    at = ""
    for line in listing.splitlines():
        if (gpu := re.match(r"GPU \d+: .*\(UUID: (\S+)\)", line)) is not None:
            at = gpu[1]
        elif (part := re.match(r"\s+MIG (\S+)\s.*\(UUID: (\S+)\)", line)) is not None:
            size = re.search(r"\.(\d{1,4})gb", part[1])
            total = int(size[1]) * GiB if size else 0
            own.setdefault(at, []).append(Reported(f"MIG {part[1]}", part[2], total, total))
    return tuple(
        replace(gpu, instances=tuple(replace(part, name=f"{gpu.name} {part.name}") for part in own.get(gpu.uuid, ())))
        for gpu in gpus
    )


def shown(gpus: Sequence[Reported], wish: str | None, *, by_bus: bool = True) -> tuple[Reported, ...]:
    """What CUDA shows of them.

    Source: the CUDA programming guide on ``CUDA_VISIBLE_DEVICES``: numbers or beginnings of identifiers; the first one
    that names nothing ends the list, and one named twice empties it; a process sees one instance at most.

    Args:
        wish: the variable's value; None where it is not set.
        by_bus: numbers follow the bus, as ``nvidia-smi``'s do; else the fastest comes first.
    """
    order = list(gpus) if by_bus else _fastest_first(gpus)
    instances = [part for gpu in order for part in gpu.instances]
    if wish is None:
        whole = tuple(gpu for gpu in order if not gpu.divided)
        return whole or tuple(instances[:1])
    found: list[Reported] = []
    for word in wish.split(","):
        gpu = _named(word.strip(), order, instances)
        if gpu is None:
            break
        if gpu in found:
            return ()
        found.append(gpu)
    one = next((gpu for gpu in found if gpu in instances), None)
    return (one,) if one is not None else tuple(gpu for gpu in found if not gpu.divided)


def _named(word: str, gpus: Sequence[Reported], instances: Sequence[Reported]) -> Reported | None:
    if re.fullmatch(r"[0-9]{1,4}", word):
        gpu = gpus[int(word)] if int(word) < len(gpus) else None
        return gpu.instances[0] if gpu is not None and gpu.divided and gpu.instances else gpu
    if not word.startswith(("GPU-", "MIG-")):
        return None
    alike = [gpu for gpu in (*gpus, *instances) if gpu.uuid.startswith(word)]
    return alike[0] if len(alike) == 1 else None


def _fastest_first(gpus: Sequence[Reported]) -> list[Reported]:
    """CUDA's own order, by the tables' figures; the bus's where a GPU is in none."""
    from bitladder.files.devices import gpu_figures

    if len({gpu.name for gpu in gpus}) < 2:
        return list(gpus)
    speeds = {gpu.name: float((gpu_figures(gpu.name) or {}).get("fp16", 0.0)) for gpu in gpus}
    return sorted(gpus, key=lambda gpu: -speeds[gpu.name]) if all(speeds.values()) else list(gpus)


def as_gpus(reported: Sequence[Reported], ram_total: int, ram_available: int) -> tuple[tuple[Gpu, ...], bool]:
    """Those that work can be planned on, and whether they share the processor's memory (bytes of it given)."""
    own = tuple(Gpu(gpu.name, gpu.total, gpu.free) for gpu in reported if gpu.total)
    if own:
        return own, False
    shared = tuple(Gpu(gpu.name, ram_total, ram_available) for gpu in reported if gpu.shares_memory)
    return shared, bool(shared)
