"""What the table of kernels (``data/kernels.yaml``) says of a device, and of levels on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bitladder.describe.machine import Machine
from bitladder.files.devices import capability_of
from bitladder.levels import CheckpointLevel, Level
from bitladder.records.kernels import Kernel, KernelTable, Runs

SERVERS = ("vllm", "sglang", "tgi")
"""Engines that serve checkpoints; transformers decodes all of them, and serves none."""
GENERATIONS = (
    ("Turing", 7.5), ("Ampere", 8.0), ("Ada", 8.9), ("Hopper", 9.0), ("Blackwell", 10.0),
)  # fmt: skip
"""NVIDIA's, by the capability that kernels ask about."""


_AMD = re.compile(r"\b(AMD|Radeon|Instinct|RX \d|MI\d)", re.IGNORECASE)


_INTEL = re.compile(r"\b(Intel|Arc [AB]\d)", re.IGNORECASE)


def is_nvidia(name: str) -> bool:
    """Whether a GPU is NVIDIA's, by its name: what no other maker's name says is taken for theirs."""
    return _AMD.search(name) is None and _INTEL.search(name) is None


@dataclass(frozen=True)
class Device:
    """What an engine would run on. ``capability`` is NVIDIA's compute capability, 0 of others."""

    name: str
    capability: float = 0.0
    kind: str = "nvidia"
    """Or ``cpu``, ``amd``, ``apple``."""
    features: tuple[str, ...] = ()
    """A processor's instruction sets, as Linux spells them; none: not known."""


def usual_devices() -> tuple[Device, ...]:
    """NVIDIA's generations, a CPU, others."""
    others = (Device("CPU", kind="cpu"), Device("AMD", kind="amd"), Device("Apple", kind="apple"))
    return (*(Device(name, capability) for name, capability in GENERATIONS), *others)


def devices_of(machine: Machine) -> tuple[Device, ...]:
    """What of a machine the table knows: its GPUs, each once, and its CPU."""
    if machine.unified and not machine.gpus:
        return (Device(machine.cpu, kind="apple"),)
    names = dict.fromkeys(gpu.name for gpu in machine.gpus)
    known = [Device(name, capability) for name in names if (capability := capability_of(name))]
    amd = [Device(name, kind="amd") for name in names if _AMD.search(name)]
    return (*known, *amd, Device("CPU", kind="cpu", features=machine.features))


def weakest(machine: Machine) -> Device | None:
    """The device that decides which kernels there are: the oldest GPU of those that the table knows; the processor
    where there is no GPU; None where nothing is known of the GPUs.
    """
    known = devices_of(machine)
    if not machine.gpus:
        return known[0]
    return min((device for device in known if device.capability), key=lambda device: device.capability, default=None)


def how(row: Kernel | None, device: Device) -> Runs:
    """How an engine runs a scheme on a device."""
    if row is None:
        return Runs.NO
    if device.kind not in ("nvidia", *row.others) or _lacks(row, device):
        return Runs.NO
    if device.kind != "nvidia":
        return Runs.SLOWER if row.native is None and row.slower else Runs.FULL
    if row.native is not None and device.capability >= row.native:
        return Runs.FULL
    return Runs.SLOWER if row.runs is not None and device.capability >= row.runs else Runs.NO


def _lacks(row: Kernel, device: Device) -> str:
    """What a row needs that a processor lacks; "" where it lacks nothing, or where nothing is known of it."""
    return row.cpu_needs if device.features and row.cpu_needs not in ("", *device.features) else ""


def no_kernel(table: KernelTable, level: Level, device: Device, engine: str) -> str:
    """The scheme of a level that ``engine`` has no kernel for on a device, and where; "" where it runs, or where the
    table says nothing of it."""
    if not isinstance(level, CheckpointLevel) or engine not in SERVERS or engine not in level.engines:
        return ""
    for scheme in level.format.kernels:
        if scheme in table.schemes and how(row := table.of(engine, scheme), device) is Runs.NO:
            return f"{table.engines[engine].name} has no kernel for {scheme} on {_where(device, row)}"
    return ""


def _where(device: Device, *rows: Kernel | None) -> str:
    """A device, and what it lacks of what these rows need."""
    if device.kind == "nvidia":
        return f"{device.name} (compute capability {device.capability:g})"
    lacking = dict.fromkeys(lacks for row in rows if row and (lacks := _lacks(row, device)))
    return f"this {device.name}, which has no {' and no '.join(lacking)}" if lacking else f"a {device.name}"


def kernel_warnings(table: KernelTable, levels: Sequence[Level], device: Device, engine: str = "") -> list[str]:
    """What is to be said of checkpoint levels on a device: schemes that no server of the table runs there, or that
    ``engine`` does not; without an engine nothing is said of what one server runs at full speed."""
    said: list[str] = []
    for level in levels:
        if not isinstance(level, CheckpointLevel):
            continue
        for scheme in level.format.kernels:
            if scheme not in table.schemes:
                continue  # a scheme that the table does not know
            engines = [engine] if engine in SERVERS else list(SERVERS)
            rows = {one: table.of(one, scheme) for one in engines}
            found = {one: how(row, device) for one, row in rows.items()}
            where = _where(device, *rows.values())
            names = " or ".join(table.engines[one].name for one in engines)
            if Runs.FULL in found.values():
                continue
            slower = next((row for one, row in rows.items() if row is not None and found[one] is Runs.SLOWER), None)
            if slower is None:
                said.append(f"{level}: {scheme} has no kernel in {names} on {where}: see bitladder formats")
            else:
                who = table.engines[slower.engine].name
                said.append(f"{level}: {who} runs {scheme} on {where} slowly, as {slower.slower}")
    return list(dict.fromkeys(said))
