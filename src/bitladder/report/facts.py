"""What a run says about itself, as lines for people: settings, machine, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitladder.records.run import RunRecord
from bitladder.units import human_bytes

_BYTES = ("ram_total", "ram_available", "disk_free", "vram_total", "vram_free")
NAMES = {
    "cpu": "Processor", "cores": "Cores", "features": "Instruction sets", "ram_total": "Memory",
    "ram_available": "Memory free", "disk_free": "Disk space free", "gpus": "GPUs",
    "unified": "GPU shares the memory", "text": "Text measured on", "protocol": "Measured how", "workload": "Workload",
    "engine": "Engine", "temperature": "Temperature", "effort": "Search for scales", "importance": "Importance matrix",
    "device": "Computed on", "endpoints": "Addresses", "seed": "Seed",
}  # fmt: skip
"""Fields of a machine and of settings, in words. The page's ``facts.js`` has the same."""
SENTENCES = {
    "text": "{documents}; SHA-256 {sha256}",
    "workload": "{name}, {inputs} inputs, SHA-256 {sha256}",
    "engine": "{engine} {version}, {n_ctx} tokens for each request, requests at once: {n_parallel}, threads: {threads}",
    "gpus": "{name}, {vram_total}, of which {vram_free} free",
}
"""Fields that hold several values, as one text each."""


def facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each value that says something; nested ones in one line."""
    named = ((name_of(name), _text(name, value)) for name, value in values.items())
    return [(name, text) for name, text in named if text]


def name_of(field: str) -> str:
    """A field's name as people read it."""
    return NAMES.get(field) or field[:1].upper() + field[1:].replace("_", " ")


def _text(name: str, value: Any) -> str:
    """A value in words; empty for nothing."""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, int) and name in _BYTES:
        return human_bytes(value)
    if isinstance(value, Mapping):
        texts = {key: _text(key, one) for key, one in value.items()}
        try:
            return SENTENCES[name].format_map(texts)
        except KeyError:  # other fields than today's
            return ", ".join(f"{name_of(key).lower()} {text}" for key, text in texts.items() if text)
    if isinstance(value, list | tuple):
        return "; ".join(filter(None, (_text(name, one) for one in value)))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def warnings(record: RunRecord) -> list[str]:
    """The run's warnings; that the source is itself quantized is always among them when it is."""
    own = "The source is itself quantized: every loss below is relative to that file, not to the original model."
    known = any("itself quantized" in warning for warning in record.warnings)
    return [*([own] if record.source.quantized and not known else []), *record.warnings]
