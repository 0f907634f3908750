"""What macOS and Windows say of a machine, each by a command of its own; asked once in a process.

    macOS      sysctl NAME...                            "NAME: VALUE" lines; names it does not know are left out
               system_profiler SPDisplaysDataType -json  a list of adapters
    Windows    powershell, Get-CimInstance               adapters and processors; CIM's AdapterRAM has 32 bits, so the
                                                         driver's own 64-bit figure is taken from the registry

A command that is not there, fails or answers something else says nothing. NVIDIA's GPUs are ``nvidia-smi``'s to tell.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from bitladder.describe.machine import Gpu, unified_share
from bitladder.units import GiB, MiB

_TIMEOUT_S = 20
_LEAST_VRAM = 2 * GiB
"""An adapter with less of its own computes in the RAM: its memory is not worth planning with."""
_SYSCTL = ("machdep.cpu.brand_string", "hw.optional.arm.FEAT_DotProd", "hw.optional.arm.FEAT_I8MM",
           "machdep.cpu.features", "machdep.cpu.leaf7_features")  # fmt: skip
_POWERSHELL = (
    "$a=@(Get-CimInstance Win32_VideoController|Select-Object Name,AdapterRAM);"
    "$s=@(Get-ItemProperty 'HKLM:\\SYSTEM\\CurrentControlSet\\Control\\Class\\"
    "{4d36e968-e325-11ce-bfc1-08002be10318}\\0*' -ErrorAction SilentlyContinue|"
    "Select-Object DriverDesc,@{n='Bytes';e={$_.'HardwareInformation.qwMemorySize'}});"
    "$c=@(Get-CimInstance Win32_Processor|Select-Object Name);"
    "@{adapters=$a;sizes=$s;processors=$c}|ConvertTo-Json -Depth 4 -Compress"
)


def answer_of(*command: str) -> str:
    """What a command prints; nothing where it is not there or does not end. Some print what they know and fail."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


@cache
def _mac_processor() -> tuple[str, tuple[str, ...]]:
    return parse_sysctl(answer_of("sysctl", *_SYSCTL))


@cache
def _mac_displays() -> str:
    return answer_of("system_profiler", "SPDisplaysDataType", "-json")


@cache
def _windows() -> str:
    return answer_of("powershell", "-NoProfile", "-NonInteractive", "-Command", _POWERSHELL)


def mac_processor() -> tuple[str, tuple[str, ...]]:
    """The name and vector features of a Mac's processor, features in Linux's spelling."""
    return _mac_processor()


def mac_gpus(ram_total: int, ram_available: int) -> tuple[Gpu, ...]:
    """A Mac's GPUs: Apple's own as a view of the RAM, in bytes, others with the memory that they state."""
    return parse_displays(_mac_displays(), ram_total, ram_available)


def windows_processor() -> str:
    """The processor's name; empty where Windows does not tell."""
    return next((name for row in _rows(_document(_windows()), "processors") if (name := _text(row.get("Name")))), "")


def windows_gpus() -> tuple[Gpu, ...]:
    """Adapters with memory of their own."""
    return parse_adapters(_windows())


def parse_sysctl(text: str) -> tuple[str, tuple[str, ...]]:
    """The processor's name and its vector features from ``sysctl``'s lines."""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = f"{fields.get('machdep.cpu.features', '')} {fields.get('machdep.cpu.leaf7_features', '')}".lower()
    found = [flag for flag in flags.replace("avx1.0", "avx").split() if flag in ("sse3", "ssse3", "avx", "fma", "f16c")]
    found += ["avx2"] if "avx2" in flags.split() else []
    name = fields.get("machdep.cpu.brand_string", "")
    if name.startswith("Apple"):
        found += ["asimd"]
        found += ["asimddp"] if fields.get("hw.optional.arm.FEAT_DotProd") == "1" else []
        found += ["i8mm"] if fields.get("hw.optional.arm.FEAT_I8MM") == "1" else []
    return name, tuple(found)


def parse_displays(text: str, ram_total: int, ram_available: int) -> tuple[Gpu, ...]:
    """GPUs from ``system_profiler``'s JSON; see ``mac_gpus``."""
    found = []
    for row in _rows(_document(text), "SPDisplaysDataType"):
        name, memory = _text(row.get("sppci_model")), _text(row.get("spdisplays_vram"))
        size = re.fullmatch(r"([\d.]{1,8}) ?([MG])B", memory)
        if name.startswith("Apple"):
            cores = _text(row.get("sppci_cores"))
            total = int(ram_total * unified_share(ram_total))
            label = f"{name} GPU, {cores} cores" if cores.isdecimal() else f"{name} GPU"
            found.append(Gpu(label, total, min(total, ram_available)))
        elif name and size and re.fullmatch(r"\d+(\.\d+)?", size[1]):
            found.append(_whole(name, int(float(size[1]) * {"M": MiB, "G": GiB}[size[2]])))
    return tuple(gpu for gpu in found if gpu.vram_total >= _LEAST_VRAM)


def parse_adapters(text: str) -> tuple[Gpu, ...]:
    """GPUs from what PowerShell printed; the driver's figure goes before CIM's, which ends at 4 GiB."""
    document = _document(text)
    sizes: dict[str, int] = {}
    for row in _rows(document, "sizes"):
        name = _text(row.get("DriverDesc"))
        sizes[name] = max(sizes.get(name, 0), _bytes(row.get("Bytes")))
    found = [
        _whole(name, sizes.get(name) or _bytes(row.get("AdapterRAM")))
        for row in _rows(document, "adapters")
        if (name := _text(row.get("Name")))
    ]
    return tuple(gpu for gpu in found if gpu.vram_total >= _LEAST_VRAM)


def _whole(name: str, size: int) -> Gpu:
    """A GPU of whose memory nobody says what is free."""
    return Gpu(name, size, size)


def _document(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(document: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    """A list of objects. PowerShell writes a list of one as that one alone."""
    found = document.get(name)
    rows = found if isinstance(found, list) else [found]
    return [row for row in rows if isinstance(row, dict)]


def _text(value: Any) -> str:
    return " ".join(value.split())[:120] if isinstance(value, str) else ""


def _bytes(value: Any) -> int:
    """A size in bytes. Some drivers register it as eight bytes, the lowest first."""
    if isinstance(value, list) and len(value) == 8 and all(isinstance(one, int) and 0 <= one < 256 for one in value):
        value = int.from_bytes(bytes(value), "little")
    is_size = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 50
    return int(value) if is_size else 0
