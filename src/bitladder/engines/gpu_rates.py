"""What a GPU's memory, its matrix units and the way to it deliver, measured with torch where torch sees the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from bitladder.units import MiB

_REPEATS = 5


def measure_gpus() -> tuple[dict[str, float], ...]:
    """Per GPU that torch sees: ``read``, ``f16_matmul`` and ``from_host``, bytes or operations per second."""
    return tuple(measure_device(torch.device("cuda", number)) for number in range(torch.cuda.device_count()))


def measure_device(device: torch.device, *, size: int = 512 * MiB, edge: int = 4096) -> dict[str, float]:
    """The three rates of one device. ``size`` bytes are read and copied, matrices are ``edge`` square."""
    held = torch.ones(size // 4, dtype=torch.float32, device=device)
    host = torch.ones(size // 4, dtype=torch.float32, pin_memory=device.type == "cuda")
    a = torch.full((edge, edge), 0.5, dtype=torch.float16 if device.type == "cuda" else torch.float32, device=device)
    return {
        "read": size / _best(held.sum, device),
        "f16_matmul": 2 * edge**3 / _best(lambda: a @ a, device),
        "from_host": size / _best(lambda: held.copy_(host, non_blocking=True), device),
    }


def _best(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    times = []
    for _ in range(_REPEATS + 1):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - began)
    return max(1e-9, min(times[1:]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
