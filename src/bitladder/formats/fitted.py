"""Names of levels whose codes are fitted with error feedback: ``GPTQ-Q4_K_M``, or a recipe of our own, ``bpw4.25``."""

from __future__ import annotations

import re

from bitladder.errors import UnknownLevel
from bitladder.formats.recipes import level_named

_FITTED = re.compile(r"GPTQ-(?P<level>I?Q[0-9]\w*)$|bpw(?P<bpw>[0-9]+(\.[0-9]+)?)$", re.IGNORECASE)


def is_fitted_level(name: str) -> bool:
    """Whether a level's name asks for codes fitted with error feedback."""
    return bool(_FITTED.match(name.strip()))


def parse_fitted(name: str) -> tuple[str | None, float | None]:
    """The named recipe, or the bits per weight, that a fitted level's name asks for.

    Raises:
        UnknownLevel: there is no such recipe, or no such number of bits.
    """
    found = _FITTED.match(name.strip())
    if found is None or not (found["level"] or 1 < float(found["bpw"]) < 17):
        raise UnknownLevel(f"There is no level '{name}'.", do="Fitted levels are named like GPTQ-Q4_K_M and bpw4.25.")
    return (level_named(found["level"]), None) if found["level"] else (None, float(found["bpw"]))


def fitted_name(name: str) -> str:
    """The one spelling of a fitted level's name: ``GPTQ-Q4_K_M``, ``bpw4.50``; more digits only if there are more.

    Raises:
        UnknownLevel: as ``parse_fitted``.
    """
    level, bpw = parse_fitted(name)
    if bpw is None:
        return f"GPTQ-{level}"
    return f"bpw{bpw:.2f}" if bpw == round(bpw, 2) else f"bpw{bpw:g}"
