"""Names of levels to levels, in any case; the one place where a level's spelling is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from bitladder.errors import UnknownLevel
from bitladder.formats.recipes import LEVELS, RECIPES
from bitladder.levels.checkpoint import GRAMMAR, parse_checkpoint
from bitladder.levels.kinds import FeedbackLevel, FoldedLevel, Level, RecipeLevel

LADDER: tuple[Level, ...] = tuple(RecipeLevel(name) for name in LEVELS)
"""The levels that are offered when nobody asks for particular ones, largest first."""

_BPW = re.compile(r"bpw([0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)
_QUANTIZED = tuple(name for name, recipe in RECIPES.items() if recipe.qtype.startswith(("Q", "IQ")))
_K_QUANTS = tuple(name for name, recipe in RECIPES.items() if recipe.qtype.endswith("_K"))
_KINDS = (
    f"GGUF files: {', '.join(RECIPES)}; with error feedback GPTQ-Q4_K_M, or the best types for so many bits per weight "
    f"bpw4.25; after AWQ's scaling AWQ-Q4_K_M. Checkpoints: {GRAMMAR}."
)


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
    method, _, rest = name.partition("-")
    match method.upper():
        case "GPTQ" if rest and not rest[0].isdigit():
            return FeedbackLevel(_recipe(text, rest, "GPTQ-", _QUANTIZED))
        case "AWQ" if rest and not rest[0].isdigit():
            return FoldedLevel(_recipe(text, rest, "AWQ-", _K_QUANTS))
        case "GPTQ" | "AWQ" | "INT8" if rest:
            return parse_checkpoint(name)
        case "GPTQ" | "AWQ" | "INT8":
            files = "" if method.upper() == "INT8" else f"; a GGUF file {method.upper()}-Q4_K_M"
            raise UnknownLevel(
                f"'{text}' is a method; a level says in which format, too.", do=f"Checkpoints are {GRAMMAR}{files}."
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
        do=f"Levels are {_KINDS}" if not prefix else f"{prefix} works before {', '.join(offered)}.",
    )


def _nearest(name: str, offered: tuple[str, ...]) -> str:
    """What was most likely meant: ``Q4`` the middle one of its bits, else the nearest by letters."""
    if re.fullmatch(r"I?Q[0-9]", name):
        usual = (f"{name}_K_M", f"{name}_K", f"{name}_0", f"{name}_XS")
        return next((one for one in usual if one in offered), "")
    return next(iter(difflib.get_close_matches(name, offered, n=1, cutoff=0.5)), "")
