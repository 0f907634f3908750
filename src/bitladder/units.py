"""Bytes, how people write them, and what a figure rests on."""

from __future__ import annotations

import math
import re
from enum import StrEnum

from bitladder.errors import UsageError


class Basis(StrEnum):
    """What a figure rests on; a reader trusts the first most."""

    MEASURED = "measured"
    """It was measured on this machine, or earlier jobs here corrected it."""
    DERIVED = "derived"
    """From measured rates, or from a data sheet's peak figures."""
    ASSUMED = "assumed"


KiB = 1024
MiB = 1024**2
GiB = 1024**3

_FACTORS = {
    "": 1, "b": 1,
    "k": 1000, "kb": 1000, "kib": KiB,
    "m": 1000**2, "mb": 1000**2, "mib": MiB,
    "g": 1000**3, "gb": 1000**3, "gib": GiB,
    "t": 1000**4, "tb": 1000**4, "tib": 1024**4,
}  # fmt: skip


def human_bytes(count: float) -> str:
    """Binary units with three significant digits: ``4.58 GiB``, ``98.5 MiB``, ``512 B``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.{max(0, 3 - len(str(int(abs(value)))))}f} {unit}"


def human_rate(value: float) -> str:
    """Tokens per second to three digits, never as a power of ten: ``0.546``, ``35.3``, ``1620``."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def parse_bytes(text: str) -> int:
    """``"4.2GiB"`` as a whole number of bytes; decimal (GB) and binary (GiB) units are told apart.

    Raises:
        UsageError: the text is no size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _FACTORS:
        raise UsageError(f"'{text}' is not a size.", do="Write a number and a unit, like 4.2GiB or 800MB.")
    size = float(match[1]) * _FACTORS[match[2].lower()]
    if not math.isfinite(size):
        raise UsageError(f"A size of {len(match[1])} digits is none.", do="Write a number and a unit, like 4.2GiB.")
    return int(size)


def check_above_zero(option: str, value: float | None) -> None:
    """Raises UsageError for a limit that nothing can keep, or everything does: 0, less, infinity, NaN."""
    if value is not None and not 0 < value < math.inf:
        raise UsageError(f"{option} is {value:g}; it must be a finite number above 0.", do="Give one, or leave it out.")


_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}


def parse_duration(text: str) -> float:
    """``"90s"``, ``"10m"``, ``"1.5h"`` or ``"1h30m"`` in seconds.

    Raises:
        UsageError: the text is no duration above zero.
    """
    parts = re.findall(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(s|min|m|h)", text.replace(" ", "").lower())
    whole = "".join(f"{number}{unit}" for number, unit in parts)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if whole != text.replace(" ", "").lower() or not seconds:
        raise UsageError(f"'{text}' is not a duration.", do="Write a number and a unit, like 30s, 10m or 2h.")
    return seconds


def human_duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 119.5 * 60 else f"{seconds / 3600:.1f} h"
