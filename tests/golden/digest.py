"""What is held of a file or a record: exact hashes, and sketches for what other processors round otherwise."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

N_SKETCH = 24
_OF_A_VERSION = (
    "imatrix.datasets",
    "bitladder.version",
    "bitladder.method",
    "bitladder.source",
    "bitladder.expected_kl",
)
"""Keys of a header that tell how and of what a file was made; its weights are held by their own hashes."""
_UNSTEADY = frozenset({
    "created", "when", "seconds", "by_formula_s", "predicted_s", "low_s", "high_s", "took_s", "timings", "jobs",
    "commands", "versions", "bitladder", "machine", "disk_free", "ram_available", "ram_total", "budget_bytes",
    "predicted", "measured", "decode_tokens_per_s", "prefill_tokens_per_s", "load_seconds", "others_share", "speed",
    "decode_rounds", "rounds", "turns", "certainty",
    "reason", "summary", "warnings", "cpu", "pair", "front", "question", "needs", "usable", "prediction",
})  # fmt: skip
"""Fields of records that a clock, the machine or its other programs decide."""
_BY_A_CLOCK = {"speed tier": "meets the bar", "both tiers": "quality tier"}
"""Which of the levels that meet the bar is the fastest."""


def sha(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _sketch(parts: list[np.ndarray]) -> list[float]:
    """Projections onto fixed random signs, each part scaled to one root mean square."""
    found = np.zeros(N_SKETCH)
    rng = np.random.default_rng(7)
    total = 0
    for part in parts:
        flat = part.reshape(-1).astype(np.float64)
        flat = flat - flat.mean()
        flat /= math.sqrt(float(np.square(flat).mean())) or 1.0
        total += flat.size
        found += (rng.integers(0, 2, (N_SKETCH, flat.size), np.int8) * 2 - 1) @ flat
    return [float(f"{value:.4g}") for value in found / math.sqrt(max(1, total))]


def far(one: list[float], other: list[float]) -> float:
    """Distance of two sketches over their size: about the root of twice the share of values that are unlike."""
    first, second = np.array(one), np.array(other)
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


def of_gguf(path: Path, *, sketched: bool) -> dict[str, Any]:
    """A GGUF file: its header without words of a version, each tensor, and a sketch of the decoded weights."""
    reader = gguf.GGUFReader(path)
    header = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "split.")) and not name.startswith(_OF_A_VERSION)
    }
    tensors = {
        t.name: f"{t.tensor_type.name} {[int(n) for n in t.shape]} {sha(t.data.tobytes())}" for t in reader.tensors
    }
    shapes = {t.name: [int(n) for n in t.shape] for t in reader.tensors}
    found = {
        "header": sha(json.dumps(header, sort_keys=True, default=str).encode()),
        "shapes": sha(json.dumps(shapes, sort_keys=True).encode()),
        "tensors": tensors,
    }
    if sketched:
        found["sketch"] = _sketch([gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors])
    return found


def of_checkpoint(path: Path) -> dict[str, Any]:
    """A safetensors file: each tensor, and a sketch of values and of the half-bytes of packed codes."""
    tensors, parts = {}, []
    with safe_open(path, "pt") as file:
        shapes = {}
        for name in sorted(file.keys()):
            value = file.get_tensor(name)
            raw = value.contiguous().view(-1).view(torch.uint8).numpy()
            shapes[name] = [str(value.dtype), *value.shape]
            tensors[name] = f"{value.dtype} {list(value.shape)} {sha(raw.tobytes())}"
            if value.is_floating_point():
                parts.append(value.float().numpy())
            elif raw.size > 64:
                parts.append(np.stack([raw & 15, raw >> 4]))
    return {"shapes": sha(json.dumps(shapes).encode()), "tensors": tensors, "sketch": _sketch(parts)}


def of_config(path: Path) -> dict[str, Any]:
    return {"header": sha(json.dumps(json.loads(path.read_text()), sort_keys=True).encode())}


def of_old_imatrix(path: Path) -> dict[str, Any]:
    return {"tensors": {"": sha(path.read_bytes())}}


def of_folder(folder: Path, *, sketched: bool) -> dict[str, Any]:
    """Every model file beneath a folder, by its path there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".gguf":
            found[name] = of_gguf(path, sketched=sketched)
        elif path.suffix == ".safetensors":
            found[name] = of_checkpoint(path)
        elif path.suffix == ".dat":
            found[name] = of_old_imatrix(path)
        elif path.name == "config.json":
            found[name] = of_config(path)
    return found


def steady(record: Any, folders: dict[str, str]) -> Any:
    """A record without what a clock or the machine decides, and without names of temporary folders."""
    if isinstance(record, dict):
        kept = {key: steady(value, folders) for key, value in record.items() if key not in _UNSTEADY}
        if isinstance(kept.get("tokens"), list):  # of an answer: kept for the two tiers, which a clock chooses
            del kept["tokens"]
        if not str(kept.get("path", ".gguf")).endswith(".gguf"):  # of a checkpoint's folder: its log holds seconds
            kept.pop("bytes", None)
        return kept
    if isinstance(record, list):
        return [steady(value, folders) for value in record]
    if record in _BY_A_CLOCK:
        return _BY_A_CLOCK[record]
    if isinstance(record, str):
        for path, name in folders.items():
            record = record.replace(path, name)
    return record
