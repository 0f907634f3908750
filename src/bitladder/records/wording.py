"""What changed in the words of a level's answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Substitution:
    """Words of the reference that a level replaced; either side may be empty (left out, added)."""

    before: str
    after: str
    count: int


@dataclass(frozen=True)
class WordingChanges:
    """Differences in words, summed over a workload."""

    answers: int
    changed_answers: int
    words: int
    """Words in the reference's answers."""
    substitutions: tuple[Substitution, ...]
    """Most frequent first."""
    changed_numbers: tuple[str, ...]
    """Inputs whose numbers are not the reference's, order aside."""
    missing_items: tuple[tuple[str, str], ...]
    """(input, item) that the reference named and the level did not, from ``set_recall`` criteria."""
    reference_items: int
    """Items that the reference named."""
    broken_format: tuple[str, ...]
    """Inputs where the reference's answer was JSON and the level's is not."""
    looping: tuple[str, ...] = ()
    """Inputs whose answer, unlike the reference's, ends in a loop: the same span at least three times in a row."""
