"""Steps of `bitladder formats`: the table of engines, schemes and devices, and one machine's column of it."""

from __future__ import annotations

from dataclasses import dataclass

from bitladder.files.kernel_table import kernel_table
from bitladder.plan.kernels import Device, devices_of, how, usual_devices
from bitladder.records.kernels import KernelTable, Runs
from bitladder.stages.plan import the_machine


@dataclass(frozen=True)
class FormatsResult:
    """The table, and how each row runs on some devices."""

    table: KernelTable
    devices: tuple[Device, ...]
    runs: tuple[tuple[Runs, ...], ...]
    """For each row of the table, on each of the devices."""


def formats(machine: str | None = None) -> FormatsResult:
    """The table; ``machine``: in words, whose devices take the place of the generations.

    Raises:
        UsageError: there is no such machine.
    """
    devices = usual_devices() if machine is None else devices_of(the_machine(machine)[0])
    table = kernel_table()
    return FormatsResult(table, devices, tuple(tuple(how(row, device) for device in devices) for row in table.rows))
