"""Names of levels to levels, in any case; the one place where a level's spelling is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from bitladder.errors import UnknownLevel
from bitladder.formats.recipes import LEVELS, RECIPES
from bitladder.levels import checkpoints
from bitladder.levels.kinds import FeedbackLevel, FoldedLevel, Level, RecipeLevel

LADDER: tuple[Level, ...] = tuple(RecipeLevel(name) for name in LEVELS)
"""The levels that are offered when nobody asks for particular ones, largest first."""

_BPW = re.compile(r"bpw([0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)
_QUANTIZED = tuple(name for name, recipe in RECIPES.items() if recipe.qtype.startswith(("Q", "IQ")))
_K_QUANTS = tuple(name for name, recipe in RECIPES.items() if recipe.qtype.endswith("_K"))
_WITH_RECIPES: dict[str, tuple[type[FeedbackLevel | FoldedLevel], tuple[str, ...]]] = {
    "GPTQ": (FeedbackLevel, _QUANTIZED),
    "AWQ": (FoldedLevel, _K_QUANTS),
}
"""Methods that make GGUF files, too: the kind of level, and the recipes that the name goes on with."""


def parse_level(text: str) -> Level:
    """The level that a name like ``q4_k_m``, ``GPTQ-Q4_K_M``, ``bpw4.25``, ``AWQ-Q3_K_M``, ``AWQ-4bit-g64`` means.

    Raises:
        UnknownLevel: no level has this name, the nearest is suggested; or one that no engine can run.
    """
    name = text.strip()
    if name.upper() in RECIPES:
        return RecipeLevel(name.upper())
    if (match := _BPW.fullmatch(name)) is not None:
        return _for_bits(text, float(match[1]))
    first, _, rest = name.partition("-")
    prefix = first.upper()
    if rest and not rest[0].isdigit() and prefix in _WITH_RECIPES:
        kind, recipes = _WITH_RECIPES[prefix]
        return kind(_recipe(text, rest, f"{prefix}-", recipes))
    if prefix in checkpoints.prefixes():
        if rest or checkpoints.named(name) is not None:
            return checkpoints.parse_checkpoint(name)
        files = f"; a GGUF file {prefix}-Q4_K_M" if prefix in _WITH_RECIPES else ""
        raise UnknownLevel(
            f"'{text}' is a method; a level says in which format, too.",
            do=f"Checkpoints are {checkpoints.grammar()}{files}.",
        )
    return RecipeLevel(_recipe(text, name, "", tuple(RECIPES)))


def parse_levels(texts: Iterable[str]) -> tuple[Level, ...]:
    """Several, each once, in the order given.

    Raises:
        UnknownLevel: as ``parse_level``.
    """
    return tuple(dict.fromkeys(parse_level(text) for text in texts))


def _for_bits(text: str, bpw: float) -> FeedbackLevel:
    if not 1 < bpw < 17:
        raise UnknownLevel(f"There is no level '{text}'.", do="Bits per weight lie between 1 and 17, as in bpw4.25.")
    return FeedbackLevel(bpw=bpw)


def _recipe(text: str, name: str, prefix: str, offered: tuple[str, ...]) -> str:
    """The recipe in a level's name; raises UnknownLevel with the nearest that is offered."""
    if name.upper() in offered:
        return name.upper()
    near = _nearest(name.upper(), offered)
    raise UnknownLevel(
        f"There is no level '{text}'.",
        means=f"Did you mean {prefix}{near}?" if near else "",
        do=f"Levels are {_kinds()}" if not prefix else f"{prefix} works before {', '.join(offered)}.",
    )


def _kinds() -> str:
    return (
        f"GGUF files: {', '.join(RECIPES)}; with error feedback GPTQ-Q4_K_M, or the best types for so many bits per "
        f"weight bpw4.25; after AWQ's scaling AWQ-Q4_K_M. Checkpoints: {checkpoints.grammar()}."
    )


def _nearest(name: str, offered: tuple[str, ...]) -> str:
    """What was most likely meant: ``Q4`` the middle one of its bits, else the nearest by letters."""
    if re.fullmatch(r"I?Q[0-9]", name):
        usual = (f"{name}_K_M", f"{name}_K", f"{name}_0", f"{name}_XS")
        return next((one for one in usual if one in offered), "")
    return next(iter(difflib.get_close_matches(name, offered, n=1, cutoff=0.5)), "")
