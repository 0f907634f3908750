"""What this machine has: cores, memory, GPUs, disk. Respects the limits of a container; asks, never
measures.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Self

from bitladder import system
from bitladder.describe.machine import Gpu, Machine
from bitladder.files import probe_commands
from bitladder.files.control_groups import ROOT, cpu_quota, group_memory, read
from bitladder.files.folders import cache_folder

_FEATURES = (
    "sse3", "ssse3", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni",
    "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
"""Vector features that decide which of an engine's kernels run, in the kernel's (Linux) spelling."""


def probe_machine(folder: Path | None = None, root: Path = ROOT) -> Machine:
    """Describe this machine as this process may use it; ``disk_free`` is of the drive that holds ``folder`` (default:
    the user's cache). ``root``: where ``proc`` and ``sys`` lie.
    """
    from bitladder.files.nvidia import as_gpus, visible_gpus  # what commands that only need cores do without

    name, features = _cpu()
    total, available = memory(root)
    gpus, shared = as_gpus(visible_gpus(), total, available)
    return Machine(
        cpu=name,
        cores=available_cores(root),
        features=features,
        ram_total=total,
        ram_available=available,
        disk_free=disk_free(folder or cache_folder()),
        gpus=(*gpus, *_other_gpus(total, available)),
        unified=shared or (system.MACOS and platform.machine() == "arm64"),
    )


def memory(root: Path = ROOT) -> tuple[int, int]:
    """Bytes of memory that this process may have, in all and without what programs hold: by Linux's own word, elsewhere
    by psutil's, within the limits of its control groups.
    """
    lines = dict(line.split(":", 1) for line in read(root / "proc/meminfo").splitlines() if ":" in line)
    try:
        total, available = (1024 * int(lines[key].removesuffix("kB")) for key in ("MemTotal", "MemAvailable"))
    except (KeyError, ValueError):
        import psutil  # takes as long to import as all else here

        found = psutil.virtual_memory()
        total, available = found.total, found.available
    bound = group_memory(root)
    if bound.limit:
        total, available = min(total, bound.limit), min(available, max(0, bound.limit - bound.used))
    return total, available


class OtherLoad:
    """``with OtherLoad() as others: ...``: what other programs took of the processor meanwhile.

    Ours are this process and its children, an engine among them. ``share`` is of all cores, 0 to 1; NaN
    where the system does not tell.
    """

    share: float = math.nan

    def __enter__(self) -> Self:
        self._total, self._busy, self._own = _processor_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        total, busy, own = _processor_seconds()
        if total > self._total:
            others = (busy - self._busy) - (own - self._own)
            self.share = min(1.0, max(0.0, others / (total - self._total)))


def unused_cores(watched_s: float = 0.1) -> float:
    """Cores of the machine that other programs leave, as far as a moment tells; infinite where the system does not."""
    import psutil

    with OtherLoad() as others:
        time.sleep(watched_s)
    return math.inf if math.isnan(others.share) else (psutil.cpu_count() or 1) * (1 - others.share)


def _processor_seconds() -> tuple[float, float, float]:
    """Seconds of all cores since the start: in all, not idle, and of this process with its children."""
    import psutil

    times = psutil.cpu_times()._asdict()
    times = {name: value for name, value in times.items() if not name.startswith("guest")}  # part of user already
    idle = times["idle"] + times.get("iowait", 0.0)
    own = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            spent = process.cpu_times()
            own += spent.user + spent.system
    return sum(times.values()), sum(times.values()) - idle, own


def available_cores(root: Path = ROOT) -> int:
    """Cores this process may use: its affinity mask, cut by the CPU quota of each group it is in; at least 1.

    ``root``: where ``proc`` and ``sys`` lie.
    """
    return max(1, min(bound_cores(), round(min(cpu_quota(root), 1 << 20))))


def bound_cores() -> int:
    """Cores that this process's affinity mask leaves it, whatever share of their time it may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def disk_free(folder: Path) -> int:
    """Free bytes on the drive that holds ``folder``, which may not exist yet."""
    at = folder.absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    return shutil.disk_usage(at).free


def _other_gpus(total: int, available: int) -> tuple[Gpu, ...]:
    """GPUs that macOS and Windows know of, but for NVIDIA's. Arguments: bytes of RAM, in all and available."""
    found: tuple[Gpu, ...] = ()
    if system.MACOS:
        found = probe_commands.mac_gpus(total, available)
    elif system.WINDOWS:
        found = probe_commands.windows_gpus()
    return tuple(gpu for gpu in found if "nvidia" not in gpu.name.lower())


def cpu_name() -> str:
    """The processor's name, as it calls itself."""
    return _cpu()[0]


def _cpu() -> tuple[str, tuple[str, ...]]:
    """The processor's name and those of its vector features that matter here."""
    if system.MACOS and (found := probe_commands.mac_processor())[0]:
        return found
    if system.WINDOWS and (windows := probe_commands.windows_processor()):
        return windows, ()
    fields: dict[str, str] = {}
    for line in read(ROOT / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, tuple(feature for feature in _FEATURES if feature in flags)
