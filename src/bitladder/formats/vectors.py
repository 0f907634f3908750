"""What a calibrating walk gathers beside checkpoints: vectors per tensor that GGUF levels are made with.

``AWQ-Q3_K_M`` is llama.cpp's Q3_K_M after folding: input channels that matter are multiplied by scales, and the
norm or linear layer before takes up their inverse (``kernels/awq.py``). The file is an ordinary GGUF.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from bitladder.errors import UnknownLevel
from bitladder.formats.checkpoint import CheckpointLevel
from bitladder.formats.recipes import RECIPES

_PREFIX = "AWQ-"
_RECIPES = tuple(name for name, recipe in RECIPES.items() if recipe.qtype.endswith("_K"))

COLUMNS, ROWS, SQUARES, COUNT = "columns", "rows", "squares", "count"
"""Kinds of vectors, after a tensor's name: a fold's multipliers and divisors, sums of squares and how many."""


@dataclass(frozen=True)
class FoldedLevel:
    """A K-quant level after AWQ's folding. ``recipe`` is llama.cpp's name for the mix of types."""

    recipe: str
    method: Literal["AWQ"] = "AWQ"
    smooth: bool = False

    @property
    def name(self) -> str:
        """What users call it."""
        return _PREFIX + self.recipe


@dataclass(frozen=True)
class ImportanceVectors:
    """The importance matrix: mean squared inputs of every tensor."""

    name: str = "importance"
    method: Literal["importance"] = "importance"
    smooth: bool = False


Product = CheckpointLevel | FoldedLevel | ImportanceVectors
"""What a calibrating walk can make."""


def is_folded_level(name: str) -> bool:
    """Whether a level's name asks for folding and K-quants: ``AWQ-`` and anything but a number of bits."""
    rest = name.strip().upper().removeprefix(_PREFIX)
    return rest != name.strip().upper() and not rest[:1].isdigit()


def parse_folded(name: str) -> FoldedLevel:
    """The level that a name like ``AWQ-Q3_K_M`` asks for, in any case.

    Raises:
        UnknownLevel: what follows ``AWQ-`` is no K-quant level.
    """
    recipe = name.strip().upper().removeprefix(_PREFIX)
    if recipe in _RECIPES:
        return FoldedLevel(recipe)
    near = difflib.get_close_matches(recipe, _RECIPES, n=1, cutoff=0.3)
    raise UnknownLevel(
        f"There is no level '{name}'.",
        means=f"Did you mean {_PREFIX}{near[0]}?" if near else "",
        do=f"AWQ works before these: {', '.join(_PREFIX + one for one in _RECIPES)}; checkpoints are AWQ-4bit-g64.",
    )
