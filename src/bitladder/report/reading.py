"""A finished run, read back from its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bitladder.errors import BadInput
from bitladder.files.atomic import write_whole
from bitladder.files.outputs import check_output, holding
from bitladder.records import to_json
from bitladder.records.reading import read_json
from bitladder.records.run import RunRecord

RUN_JSON = "run.json"
"""What a run leaves in its folder."""


def read_run(path: Path) -> RunRecord:
    """The record that ``bitladder run --json`` printed or left beside its report.

    Raises:
        BadInput: no such file, or not a run.
    """
    try:
        return read_json(RunRecord, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(
            f"No such file: {path}.", do="Name the .json that `bitladder run` left beside its report."
        ) from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.", do="Check the path and its permissions.") from error
    except ValueError as error:
        raise BadInput(
            f"{path} is not a run: {error}.",
            means="It is another kind of JSON, or was written by another version.",
            do="Run `bitladder run` again; what was measured is reused.",
        ) from error


def check_run(path: Path, *, source_sha256: Callable[[], str]) -> None:
    """Raises UsageError where a run's record would take the place of anything but a record of the same source."""

    def is_ours(there: Path) -> bool:
        return holding('"bitladder": "', '"decision": ', source_sha256())(there)

    check_output(path, "a run's record", ours=is_ours)


def write_run(record: RunRecord, path: Path) -> Path:
    """Write a run's JSON, whole or not at all; returns the path. Raises OutputError."""
    return write_whole(path, json.dumps(to_json(record), ensure_ascii=False, indent=1) + "\n")
