"""What this machine has: cores, memory, GPUs, disk. Respects the limits of a container; asks, never
measures.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Self

from bitladder import system
from bitladder.describe.machine import Gpu, Machine
from bitladder.files import probe_commands
from bitladder.files.folders import cache_folder
from bitladder.units import MiB

_CGROUP = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_FEATURES = (
    "sse3", "ssse3", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni",
    "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
"""Vector features that decide which of an engine's kernels run, in the kernel's (Linux) spelling."""


def probe_machine(folder: Path | None = None) -> Machine:
    """Describe this machine; ``disk_free`` is of the drive that holds ``folder`` (default: the user's
    cache).
    """
    name, features = _cpu()
    total, available = _memory()
    limit, used = cgroup_memory()
    if limit:
        total, available = min(total, limit), min(available, max(0, limit - used))
    unified = system.MACOS and platform.machine() == "arm64"
    return Machine(
        cpu=name,
        cores=available_cores(),
        features=features,
        ram_total=total,
        ram_available=available,
        disk_free=disk_free(folder or cache_folder()),
        gpus=(*probe_gpus(), *_other_gpus(total, available)),
        unified=unified,
    )


def _memory() -> tuple[int, int]:
    """Bytes of memory, in all and without what programs hold: by Linux's own word, elsewhere by psutil's."""
    told = dict(line.split(":", 1) for line in _read(_MEMINFO).splitlines())
    try:
        total, available = (1024 * int(told[key].removesuffix("kB")) for key in ("MemTotal", "MemAvailable"))
    except (KeyError, ValueError):
        import psutil  # takes as long to import as all else here

        memory = psutil.virtual_memory()
        total, available = memory.total, memory.available
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


def available_cores(cgroup: Path = _CGROUP, own: Path = _OWN_GROUPS) -> int:
    """Cores this process may use: its affinity mask, cut by the CPU quota of each group it is in; at least 1.

    ``cgroup``: where the control groups are mounted; ``own``: what tells this process's own.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups("cpu", cgroup, own):
        if text := _read(folder / "cpu.max"):  # version 2: "200000 100000" or "max 100000"
            quota, period = (_whole(part) for part in f"{text} 100000".split()[:2])
        else:  # version 1: -1 when there is none
            quota, period = (_whole(_read(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota and period:
            cores = min(cores, max(1, round(quota / period)))
    return max(1, cores)


def cgroup_memory(cgroup: Path = _CGROUP, own: Path = _OWN_GROUPS) -> tuple[int, int]:
    """``(limit, used)`` in bytes: the least limit on memory of the groups this process is in, and what of it is not to
    be had, because it is used or a group above has less left; ``(0, 0)`` without a limit. Arguments as
    ``available_cores``.

    Page cache does not count as used: the kernel gives it back before it refuses memory.
    """
    limits, left = [], []
    for folder in _groups("memory", cgroup, own):
        for limit_name, used_name, cache in (
            ("memory.max", "memory.current", ("inactive_file", "active_file")),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
        ):
            limit = _whole(_read(folder / limit_name))
            if not 0 < limit < 1 << 60:
                continue
            stats = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
            used = _whole(_read(folder / used_name)) - sum(_whole(stats.get(key, "")) for key in cache)
            limits.append(limit)
            left.append(limit - max(0, used))
    return (min(limits), max(0, min(limits) - min(left))) if limits else (0, 0)


def _groups(controller: str, cgroup: Path, own: Path) -> list[Path]:
    """Folders of the control groups that bound this process, its own first and the mounted root last: limits of all of
    them hold. Within a container the path of its own may be the host's, of which only the root is there.
    """
    found = []
    for line in [*_read(own).splitlines(), "0::/", f"1:{controller}:/"]:
        number, _, rest = line.partition(":")
        names, _, place = rest.partition(":")
        if number == "0" and not names:
            root = cgroup  # version 2: one tree for all controllers
        elif controller in names.split(","):
            root = cgroup / (names if (cgroup / names).is_dir() else controller)
        else:
            continue
        parts = [] if ".." in place.split("/") else [part for part in place.split("/") if part]
        found += [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return list(dict.fromkeys(found))


def _whole(text: str) -> int:
    """A kernel file's count; 0 where it says "max", -1 or nothing."""
    return int(text) if text.isdecimal() else 0


def disk_free(folder: Path) -> int:
    """Free bytes on the drive that holds ``folder``, which may not exist yet."""
    at = folder.absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    return shutil.disk_usage(at).free


def probe_gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs as ``nvidia-smi`` reports them; empty when there is no such program or it finds no
    driver.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_nvidia_smi(done.stdout) if done.returncode == 0 else ()


def _other_gpus(total: int, available: int) -> tuple[Gpu, ...]:
    """GPUs that macOS and Windows know of, but for NVIDIA's. Arguments: bytes of RAM, in all and available."""
    found: tuple[Gpu, ...] = ()
    if system.MACOS:
        found = probe_commands.mac_gpus(total, available)
    elif system.WINDOWS:
        found = probe_commands.windows_gpus()
    return tuple(gpu for gpu in found if "nvidia" not in gpu.name.lower())


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """Rows of ``name, total MiB, free MiB``. Rows without numbers ("[N/A]": memory shared with the CPU) are
    left out.
    """
    gpus = []
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(row) == 3 and row[1].strip().isdigit() and row[2].strip().isdigit():
            gpus.append(Gpu(row[0].strip(), int(row[1]) * MiB, int(row[2]) * MiB))
    return tuple(gpus)


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
    for line in _read(_CPUINFO).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, tuple(feature for feature in _FEATURES if feature in flags)


def _read(path: Path) -> str:
    """A small kernel file's text, or nothing where this system has no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
