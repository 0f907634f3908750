"""What `machine --measure` found, kept in the data folder: one file per machine, read by every plan.

Apart from measuring itself, so that planning imports no engine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bitladder.describe.machine import Machine
from bitladder.describe.rates import MeasuredMachine
from bitladder.errors import BadFile
from bitladder.files.atomic import write_whole
from bitladder.files.folders import data_folder
from bitladder.records import to_json
from bitladder.records.reading import read_json


def machine_key(machine: Machine) -> str:
    """A name for this machine in stored files: from processor, cores and memory, not from its host name."""
    parts = (machine.cpu, machine.cores, round(machine.ram_total / (1 << 30)), [gpu.name for gpu in machine.gpus])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def save_measured(found: MeasuredMachine) -> Path:
    """Keep a measurement in the user's data folder.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = data_folder("machines", f"{found.machine}.json")
    return write_whole(path, json.dumps(to_json(found), indent=1), do="Choose another folder with BITLADDER_DATA.")


def load_measured(machine: Machine) -> MeasuredMachine | None:
    """What was measured on this machine before, or None.

    Raises:
        BadFile: the stored file is damaged.
    """
    path = data_folder("machines", f"{machine_key(machine)}.json")
    if not path.is_file():
        return None
    try:
        return read_json(MeasuredMachine, path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadFile(
            f"{path} is no stored measurement: {error}", do="Delete it and run `bitladder machine --measure` again."
        ) from error
