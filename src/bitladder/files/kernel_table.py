"""The table of engines, schemes and devices that ships, with the source and date of every row."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import yaml

from bitladder.records.kernels import EngineNote, Kernel, KernelTable


@cache
def kernel_table() -> KernelTable:
    """As it ships."""
    text = resources.files("bitladder").joinpath("data/kernels.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    rows = tuple(
        Kernel(**{**row, "others": tuple(row.get("others", ())), "date": str(row["date"])[:7]})
        for row in loaded["rows"]
    )
    engines = {name: EngineNote(**one) for name, one in loaded["engines"].items()}
    return KernelTable(rows, engines, loaded["sources"])
