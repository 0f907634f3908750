"""The workload's answers side by side: the reference's, the chosen tiers' and all other levels', differences marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitladder.records.evaluation import Answer
from bitladder.records.run import InputFacts, RunRecord
from bitladder.report.words import Segment, word_diff


@dataclass(frozen=True)
class Shown:
    """One level's answer to one input, as segments against the reference's."""

    level: str
    role: str
    """``reference``, ``quality``, ``speed``, ``both``, or empty for a level in no tier."""
    answer: Answer
    segments: tuple[Segment, ...]

    @property
    def same(self) -> bool:
        """The very same text."""
        return all(segment.kind == "same" for segment in self.segments)


@dataclass(frozen=True)
class Compared:
    """One input with every level's answer."""

    input: InputFacts
    shown: tuple[Shown, ...]
    """The reference first, then the tiers."""
    others: tuple[Shown, ...] = ()
    """All other levels that answered, in the plan's order."""

    @property
    def kind(self) -> str:
        """Of the answers shown first: ``flipped`` (passes here, fails there), ``differs`` (only in words), ``same``."""
        if len({one.answer.passed for one in self.shown}) > 1:
            return "flipped"
        return "same" if all(one.same for one in self.shown) else "differs"


def compared_answers(record: RunRecord) -> list[Compared]:
    """Inputs with flips first, then those that differ, then the same; in the workload's order within each."""
    shown = _shown_levels(record)
    first = {level for level, _ in shown}
    levels = [*shown, *((one.level, "") for one in record.answers if one.level not in first)]
    # The first of several answers to an input is the one shown.
    answers = {one.level: {answer.input_id: answer for answer in reversed(one.answers)} for one in record.answers}
    compared = []
    for item in record.inputs:
        present = [(level, role, answers[level][item.id]) for level, role in levels if item.id in answers[level]]
        if any(level in first for level, _, _ in present):
            sides = _sides(present)
            compared.append(
                Compared(
                    item,
                    tuple(one for one in sides if one.level in first),
                    tuple(one for one in sides if one.level not in first),
                )
            )
    order = {"flipped": 0, "differs": 1, "same": 2}
    return sorted(compared, key=lambda one: order[one.kind])


def _shown_levels(record: RunRecord) -> list[tuple[str, str]]:
    """Reference, quality tier and speed tier, as far as they answered; without tiers the closest levels that
    answered."""
    answered = [one.level for one in record.answers]
    quality, speed = record.decision.quality, record.decision.speed
    shown = [(record.compared_with, "reference")]
    if quality is not None and quality == speed:
        shown.append((quality, "both"))
    else:
        shown += [(level, role) for level, role in ((quality, "quality"), (speed, "speed")) if level is not None]
    if len(shown) == 1:
        shown += [(level, "") for level in answered if level != record.compared_with][:2]
    return [(level, role) for level, role in shown if level in answered]


def _sides(present: Sequence[tuple[str, str, Answer]]) -> list[Shown]:
    """The first is what the others are compared with."""
    base = _shown_text(present[0][2])
    return [
        Shown(
            level,
            role,
            answer,
            tuple(word_diff(base, _shown_text(answer)) if number else [Segment("same", base)]),
        )
        for number, (level, role, answer) in enumerate(present)
    ]


def _shown_text(answer: Answer) -> str:
    """What it says, and its calls of tools."""
    calls = (f"{call.name}({call.arguments})" for call in answer.calls)
    return "\n".join(part for part in (answer.text, *calls) if part)
