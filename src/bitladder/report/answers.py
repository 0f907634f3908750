"""The workload's answers side by side: the reference's beside the chosen tiers', differences marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitladder.records.evaluation import Answer
from bitladder.records.run import InputFacts, RunRecord
from bitladder.report.words import Segment, word_diff


@dataclass(frozen=True)
class Told:
    """One level's answer to one input, as segments against the reference's."""

    level: str
    role: str
    """``reference``, ``quality``, ``speed`` or ``both``."""
    answer: Answer
    segments: tuple[Segment, ...]

    @property
    def same(self) -> bool:
        """The very same text."""
        return all(segment.kind == "same" for segment in self.segments)


@dataclass(frozen=True)
class Compared:
    """One input with every shown level's answer, the reference first."""

    input: InputFacts
    told: tuple[Told, ...]

    @property
    def kind(self) -> str:
        """``flipped`` (passes here, fails there), ``differs`` (in words only) or ``same``."""
        if len({one.answer.passed for one in self.told}) > 1:
            return "flipped"
        return "same" if all(one.same for one in self.told) else "differs"


def compared_answers(record: RunRecord) -> list[Compared]:
    """Inputs with flips first, then those that differ, then the same; in the workload's order within each."""
    shown = _shown_levels(record)
    # The first of several answers to an input is the one shown.
    answers = {one.level: {answer.input_id: answer for answer in reversed(one.answers)} for one in record.answers}
    compared = []
    for item in record.inputs:
        present = [(level, role, answers[level][item.id]) for level, role in shown if item.id in answers[level]]
        if present:
            compared.append(Compared(item, _told(present)))
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


def _told(present: Sequence[tuple[str, str, Answer]]) -> tuple[Told, ...]:
    """The first is what the others are compared with."""
    base = _shown_text(present[0][2])
    return tuple(
        Told(
            level,
            role,
            answer,
            tuple(word_diff(base, _shown_text(answer)) if number else [Segment("same", base)]),
        )
        for number, (level, role, answer) in enumerate(present)
    )


def _shown_text(answer: Answer) -> str:
    """What it says, and its calls of tools."""
    calls = (f"{call.name}({call.arguments})" for call in answer.calls)
    return "\n".join(part for part in (answer.text, *calls) if part)
