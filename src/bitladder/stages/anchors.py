"""The user's own measured runs of a model on this machine, which correct predicted speeds."""

from __future__ import annotations

import statistics
from pathlib import Path

from bitladder.describe.machine import Machine
from bitladder.files.hashing import recall
from bitladder.store.evidence import Evidence
from bitladder.store.location import store_url


def stored_runs(model: str, machine: Machine, *, store: str | None = None) -> dict[str, float]:
    """Level -> decoded tokens per second in earlier runs of a local model file on this processor; empty without any.

    Nothing is computed for it: a file that was never hashed has no runs, and no store is made where there is none.

    Raises:
        BadInput: the store cannot be read.
    """
    path = Path(model).expanduser()
    source = recall(path) if path.is_file() else None
    url = store_url(store)
    if source is None or (url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file()):
        return {}
    found: dict[str, list[float]] = {}
    with Evidence.open(store) as evidence:
        for row in evidence.find("speed", source=source):
            engine = row.key.get("engine", {})
            here = engine.get("cpu") == machine.cpu and engine.get("threads") == machine.cores
            if here and "level" in row.key:
                found.setdefault(row.key["level"], []).append(float(row.value["decode_tokens_per_s"]))
    return {level: statistics.median(speeds) for level, speeds in found.items()}
