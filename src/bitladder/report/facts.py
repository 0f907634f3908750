"""What a run says about itself, as lines for people: settings, machine, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitladder.records.run import RunRecord
from bitladder.units import human_bytes

_BYTES = ("ram_total", "ram_available", "disk_free", "vram_total", "vram_free")


def facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each value that says something; nested ones in one line."""
    named = ((name.replace("_", " "), _said(name, value)) for name, value in values.items())
    return [(name, text) for name, text in named if text]


def _said(name: str, value: Any) -> str:
    """A value in words; empty for nothing."""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, int) and name in _BYTES:
        return human_bytes(value)
    if isinstance(value, Mapping):
        inner = ((key, _said(key, one)) for key, one in value.items())
        return ", ".join(f"{key.replace('_', ' ')} {text}" for key, text in inner if text)
    if isinstance(value, list | tuple):
        return "; ".join(filter(None, (_said(name, one) for one in value)))
    return "" if value is None else str(value)


def warnings(record: RunRecord) -> list[str]:
    """The run's warnings; that the source is itself quantized is always among them when it is."""
    own = "The source is itself quantized: every loss below is relative to that file, not to the original model."
    said = any("itself quantized" in warning for warning in record.warnings)
    return [*([own] if record.source.quantized and not said else []), *record.warnings]
