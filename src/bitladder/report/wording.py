"""What changed in a level's answers: counts for tables, and a sentence with the names of inputs, items and words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitladder.records.evaluation import WorkloadResult
from bitladder.records.run import RunRecord
from bitladder.records.wording import Parting, WordingChanges
from bitladder.report.rows import UNKNOWN, interval, percent

MOST_NAMED = 5
"""Inputs, items or substitutions that are named; of more the rest is counted."""
_OFTEN = 2
"""Times from which a substitution is a habit and worth a word."""


@dataclass(frozen=True)
class AnswersRow:
    """What changed in one level's answers."""

    level: str
    changes: WordingChanges
    result: WorkloadResult | None
    reference: str
    """Name of what the answers are compared with."""

    @property
    def ties(self) -> list[Parting]:
        """First differences where both levels were as good as undecided."""
        return [place for place in self.changes.partings.values() if place.is_tie]

    @property
    def clear(self) -> dict[str, Parting]:
        """Input to its first difference, where at least one level was sure of its token."""
        return {name: place for name, place in self.changes.partings.items() if not place.is_tie}

    @property
    def parted(self) -> bool:
        """Whether it is known where answers part, if any do."""
        return bool(self.changes.partings) or not self.changes.changed_answers

    @property
    def recall(self) -> str:
        """Items caught of those that the reference catches."""
        changes = self.changes
        found = changes.reference_items - len(changes.missing_items)
        return f"{found}/{changes.reference_items}" if changes.reference_items else UNKNOWN

    @property
    def recall_interval(self) -> str:
        """95% interval of the share, in percent."""
        one = self.result
        return interval(one.recall_low, one.recall_high, lambda share: percent(share, 0)) if one and one.items else ""

    @property
    def notes(self) -> str:
        """The sentence."""
        return "; ".join(wording_notes(self.changes, self.result, self.reference))


@dataclass(frozen=True)
class AnswersColumn:
    """A count over a level's answers, and what it means."""

    title: str
    means: str
    read: Callable[[AnswersRow], str]
    counts: Callable[[WordingChanges], int]
    """0 for every level: the column is not worth showing."""


ANSWERS_COLUMNS = (
    AnswersColumn(
        "same words",
        "answers that are the reference's, word for word",
        lambda row: f"{row.changes.answers - row.changes.changed_answers}/{row.changes.answers}",
        lambda changes: changes.answers,
    ),
    AnswersColumn(
        "near ties",
        "answers that first differ where both held both tokens nearly equally likely: rounding alone can turn that",
        lambda row: str(len(row.ties)) if row.parted else UNKNOWN,
        lambda changes: changes.changed_answers,
    ),
    AnswersColumn(
        "clear changes",
        "answers that first differ where at least one of both was sure of its token",
        lambda row: str(len(row.clear)) if row.parted else UNKNOWN,
        lambda changes: changes.changed_answers,
    ),
    AnswersColumn(
        "recall",
        "items that the reference catches and the level, too",
        lambda row: row.recall,
        lambda changes: changes.reference_items,
    ),
    AnswersColumn(
        "recall 95%",
        "interval of the share of these items, where items of one input are no independent evidence",
        lambda row: row.recall_interval,
        lambda changes: changes.reference_items,
    ),
    AnswersColumn(
        "numbers",
        "answers whose numbers are not the reference's",
        lambda row: str(len(row.changes.changed_numbers)),
        lambda changes: len(changes.changed_numbers),
    ),
    AnswersColumn(
        "JSON broken",
        "answers that are JSON at the reference and not here",
        lambda row: str(len(row.changes.broken_format)),
        lambda changes: len(changes.broken_format),
    ),
    AnswersColumn(
        "loops",
        "answers that end in a loop where the reference's do not",
        lambda row: str(len(row.changes.looping)),
        lambda changes: len(changes.looping),
    ),
)


def answers_rows(record: RunRecord) -> list[AnswersRow]:
    """A row for each level whose answers were compared, in the order of the plan; none in older records."""
    results = {result.level: result for result in record.results}
    order = [*(row.level for row in record.plan.levels), *record.wording]
    levels = [level for level in dict.fromkeys(order) if level in record.wording]
    return [AnswersRow(level, record.wording[level], results.get(level), record.compared_with) for level in levels]


def answers_columns(rows: Sequence[AnswersRow]) -> list[AnswersColumn]:
    """Those that say something of any level."""
    return [column for column in ANSWERS_COLUMNS if any(column.counts(row.changes) for row in rows)]


def answers_view(record: RunRecord) -> dict[str, Any]:
    """The table as plain data: ``columns`` with title and meaning, ``rows`` with level, cells and the sentence."""
    rows = answers_rows(record)
    columns = answers_columns(rows)
    return {
        "reference": record.compared_with,
        "columns": [{"title": column.title, "means": column.means} for column in columns],
        "rows": [
            {"level": row.level, "cells": [column.read(row) for column in columns], "notes": row.notes} for row in rows
        ],
    }


def wording_notes(
    changes: WordingChanges, result: WorkloadResult | None = None, reference: str = "the reference"
) -> list[str]:
    """What is worth knowing, the gravest first; empty where every answer is the reference's.

    Args:
        changes: of one level.
        result: of the same level, for the interval of the share of items.
        reference: what to call what the answers are compared with.
    """
    notes = []
    if changes.reference_items:
        notes.append(_recall_note(changes, result, reference))
    if changes.changed_numbers:
        notes.append(f"numbers changed in: {named(changes.changed_numbers)}")
    if changes.broken_format:
        notes.append(f"JSON broken in: {named(changes.broken_format)}")
    if changes.looping:
        notes.append(f"ends in a loop: {named(changes.looping)}")
    often = [each for each in changes.substitutions if each.count >= _OFTEN and each.before and each.after]
    if often:
        notes.append(named([f"'{each.before}' became '{each.after}' {each.count} times" for each in often]))
    if changes.changed_answers:
        notes.append(_parting_note(changes))
    return notes


def wording_lines(record: RunRecord) -> dict[str, str]:
    """A sentence for each chosen tier of which there is something to say, the quality tier first."""
    looping = {result.level for result in record.results if any(fault.fault == "loop" for fault in result.faults)}
    rows = {
        # `behaviour_lines` says more of loops
        row.level: replace(row, changes=replace(row.changes, looping=())) if row.level in looping else row
        for row in answers_rows(record)
    }
    tiers = dict.fromkeys(level for level in (record.decision.quality, record.decision.speed) if level in rows)
    return {level: rows[level].notes for level in tiers if level and rows[level].notes}


def _recall_note(changes: WordingChanges, result: WorkloadResult | None, reference: str) -> str:
    found = changes.reference_items - len(changes.missing_items)
    known = f"{found} of {changes.reference_items} items"
    if result is not None and result.items and result.recall_low == result.recall_low:  # not NaN
        known += f", 95% interval {percent(result.recall_low, 1)} to {percent(result.recall_high, 1)}"
    note = f"catches {percent(found / changes.reference_items, 1)} of what {reference} catches ({known})"
    missing = [f"{item} ({input_id})" for input_id, item in changes.missing_items]
    return f"{note}, not {named(missing)}" if missing else note


def _parting_note(changes: WordingChanges) -> str:
    """How many answers differ, and where most clearly."""
    note = f"{changes.changed_answers} of {changes.answers} answers differ"
    if not changes.partings:
        return note
    clear = {name: place for name, place in changes.partings.items() if not place.is_tie}
    note += f": {len(changes.partings) - len(clear)} at near ties, {len(clear)} by a clear change"
    if not clear:
        return note
    name, place = max(clear.items(), key=lambda item: _sureness(item[1]))
    return (
        f"{note}, most clearly at token {place.index + 1} of {name}: "
        f"{place.token_a!r} ({place.a_of_a:.0%} likely) became {place.token_b!r} ({place.b_of_b:.0%})"
    )


def _sureness(place: Parting) -> float:
    """Probability that the less sure side gave to its own token."""
    return min(place.a_of_a, place.b_of_b)


def named(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
