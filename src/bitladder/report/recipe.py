"""A recipe in lines: its size and expected loss, and the types of each role, layers together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from math import isfinite

from bitladder.records.fidelity import Fidelity
from bitladder.records.recipe import FittedLevel, Recipe, Tuning
from bitladder.report.rows import small
from bitladder.units import human_bytes

_NUMBERS = re.compile(r"\d[\d.e+-]*")
_OF_EXPECTED = "0.5 to 1.2"
"""Of the reference model's files, GGUF and mixed checkpoints (docs/recipe.md): what is checked against measurements
when tensors are weighed is codes to nearest, and what feedback gains differs by type and bits."""
_LAYER = re.compile(r"blk\.\d+\.(?P<role>.+?)(\.weight)?$")


def recipe_lines(recipe: Recipe) -> Iterator[str]:
    """What a person reads of a recipe."""
    expected = "" if recipe.expected_kl is None else f", mean KL expected {recipe.expected_kl:.3g}"
    yield f"{recipe.label}: {human_bytes(recipe.bytes)}, {recipe.bpw:.2f} bits per weight{expected}"
    if recipe.expected_kl is not None and recipe.feedback:
        yield f"  files of a 191M model lost {_OF_EXPECTED} times what was expected; a file that is written is measured"
    if recipe.limits:
        yield f"  limits: {'; '.join(recipe.limits)}"
    for role, types in _by_role(recipe).items():
        yield f"  {role:16} " + ", ".join(f"{count} x {qtype}" if count > 1 else qtype for qtype, count in types)


def note_lines(fitted: FittedLevel) -> Iterator[str]:
    """What was done differently than for other tensors, and why: a line for each kind, with its first tensor."""
    notes: dict[str, list[str]] = {}
    for one in fitted.losses:
        if one.note:
            notes.setdefault(_NUMBERS.sub("#", one.note), []).append(f"{one.name}: {one.note}")
    for own in notes.values():
        others = f" (and {len(own) - 1} other tensors alike)" if len(own) > 1 else ""
        yield f"{fitted.recipe.label}, {own[0]}{others}."


def tuning_line(tuning: Tuning) -> str:
    """What came of tuning."""
    note = f" ({tuning.note})" if tuning.note else ""
    if not tuning.steps:
        return f"Not tuned: {tuning.note}."
    on = f"mean KL {small(tuning.before)} -> {small(tuning.after)} on {tuning.held_out:,} tokens that no step saw"
    if tuning.kept:
        return f"Tuned in {tuning.steps} steps on {tuning.tokens:,} tokens{note}: {on}."
    return f"Tuning was not kept: {on}, no more than chance, in {tuning.steps} steps on {tuning.tokens:,} tokens{note}."


def lost_words(held: Fidelity) -> str:
    """What a file was measured to lose, with the interval where more than one text says it."""
    if not isfinite(held.kl_low):
        return f"mean KL {small(held.kl_mean)} (one {held.unit}: no interval)"
    return f"mean KL {small(held.kl_mean)} [{small(held.kl_low)}, {small(held.kl_high)}]"


def _by_role(recipe: Recipe) -> dict[str, list[tuple[str, int]]]:
    """Role -> (type, how many tensors), most first; tensors of 32-bit floats are not worth a line."""
    counts: dict[str, Counter[str]] = {}
    for name, qtype in recipe.qtypes.items():
        if qtype == "F32":
            continue
        found = _LAYER.match(name)
        counts.setdefault(found["role"] if found else name.removesuffix(".weight"), Counter())[qtype] += 1
    return {role: own.most_common() for role, own in counts.items()}
