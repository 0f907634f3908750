"""What the shell offers for names of levels and models. Where no name begins so, it offers files, as it always does."""

from __future__ import annotations

_ROWS = (4096, 4096 + 64)
"""Rows of like models: what divides by 128, and what divides by 64 only, are offered other groups."""


def level_names(incomplete: str) -> list[str]:
    """Levels that begin so, in small letters where they are typed so; of a list like ``Q8_0,q4`` the last one is
    completed."""
    from bitladder.formats.recipes import RECIPES
    from bitladder.levels.checkpoints import offered_names
    from bitladder.levels.names import LADDER

    before, comma, begun = incomplete.rpartition(",")
    taken = before.upper().split(",")
    offered = (name for row in _ROWS for name in offered_names((row,)))
    names = dict.fromkeys([*(level.name for level in LADDER), *RECIPES, *offered])
    spelled = [name.lower() if begun and begun == begun.lower() else name for name in names]
    return [f"{before}{comma}{name}" for name in spelled if name.startswith(begun) and name.upper() not in taken]


def model_names(incomplete: str) -> list[str]:
    """Models that every verb knows by name."""
    from bitladder.files.sources import DEMOS

    return [name for name in DEMOS if name.startswith(incomplete)]


def planned_names(incomplete: str) -> list[str]:
    """Models that ``plan`` knows by name: the catalogue's, too."""
    from bitladder.errors import BitladderError
    from bitladder.files.catalogue import load_catalogue

    try:
        rows = load_catalogue()
    except BitladderError:  # a row that the user added is at fault; `plan` says so
        rows = ()
    names = [name for row in rows for name in (row.name, row.name.lower())[: 1 + bool(incomplete)]]
    return [*model_names(incomplete), *(name for name in dict.fromkeys(names) if name.startswith(incomplete))]
