"""What changed in the words of a level's answers, in a sentence: missing items, numbers, JSON, loops, substitutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bitladder.records.run import RunRecord
from bitladder.records.wording import WordingChanges

MOST_NAMED = 5
"""Inputs, items or substitutions that are named; of more the rest is counted."""
_OFTEN = 2
"""Times from which a substitution is a habit and worth a word."""


def wording_notes(changes: WordingChanges) -> list[str]:
    """What is worth knowing, the gravest first; empty where no item, number, format or repeated word changed."""
    notes = []
    if changes.reference_items:
        found = changes.reference_items - len(changes.missing_items)
        note = f"found {found} of the {changes.reference_items} items that the reference found"
        missing = [f"{item} ({input_id})" for input_id, item in changes.missing_items]
        notes.append(f"{note}, not {named(missing)}" if missing else note)
    if changes.changed_numbers:
        notes.append(f"numbers changed in: {named(changes.changed_numbers)}")
    if changes.broken_format:
        notes.append(f"JSON broken in: {named(changes.broken_format)}")
    if changes.looping:
        notes.append(f"ends in a loop: {named(changes.looping)}")
    often = [each for each in changes.substitutions if each.count >= _OFTEN and each.before and each.after]
    if often:
        notes.append(named([f"'{each.before}' became '{each.after}' {each.count} times" for each in often]))
    return notes


def wording_lines(record: RunRecord) -> dict[str, str]:
    """A sentence for each chosen tier of which there is something to say, the quality tier first."""
    tiers = dict.fromkeys(level for level in (record.decision.quality, record.decision.speed) if level)
    looping = {result.level for result in record.results if any(fault.fault == "loop" for fault in result.faults)}
    changes = {level: record.wording[level] for level in tiers if level in record.wording}
    # `behaviour_lines` says more of loops.
    changes |= {level: replace(one, looping=()) for level, one in changes.items() if level in looping}
    notes = {level: wording_notes(one) for level, one in changes.items()}
    return {level: "; ".join(said) for level, said in notes.items() if said}


def named(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
