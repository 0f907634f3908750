"""How levels behave beside the reference, in a sentence each: loops, thoughts, tool calls made in a wrong way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bitladder.records.evaluation import FaultCount, Thinking, WorkloadResult
from bitladder.records.run import RunRecord
from bitladder.report.wording import named

_MORE_REPETITION = 0.2
"""Share of repeated 4-grams above the reference's from which it is worth a word."""
_WINDOW = 50
"""Words of a stretch, as ``describe.repetition`` has it."""


def behaviour_notes(result: WorkloadResult, tags: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What is worth knowing of a level; ``tags``: input to its tags."""
    notes = [_of_fault(fault, tags) for fault in result.faults if fault.appeared]
    if result.thinking is not None:
        notes.append(_of_thoughts(result.thinking))
    return notes + _of_repetition(result.repetition, result.reference_repetition)


def behaviour_lines(record: RunRecord) -> dict[str, str]:
    """A sentence for each level of which there is something to say."""
    tags = {one.id: one.tags for one in record.inputs}
    notes = {result.level: behaviour_notes(result, tags) for result in record.results}
    return {level: "; ".join(said) for level, said in notes.items() if said}


def _of_fault(fault: FaultCount, tags: Mapping[str, tuple[str, ...]]) -> str:
    """With the inputs, or with the kinds of work that they belong to where there are many."""
    after = f" after about {fault.begins} words" if fault.begins is not None else ""
    note = f"{fault.fault}{after} in {fault.level} of {fault.answers} answers (reference {fault.reference})"
    by_tag: dict[str, int] = {}
    for name in fault.appeared:
        for tag in tags.get(name, ()):
            by_tag[tag] = by_tag.get(tag, 0) + 1
    kinds = [f"{tag} {count}" for tag, count in sorted(by_tag.items(), key=lambda one: (-one[1], one[0]))]
    return f"{note}: {named(fault.appeared)}" + (f" ({named(kinds)})" if kinds else "")


def _of_thoughts(found: Thinking) -> str:
    parts = [f"{found.thoughts} thoughts of {_tokens(found.tokens)} (reference {_tokens(found.reference_tokens)})"]
    parts += [f"{found.unfinished} without an end"] * bool(found.unfinished)
    parts += [f"{found.looping} in a loop"] * bool(found.looping)
    return ", ".join(parts)


def _tokens(mean: float) -> str:
    return "no tokens" if math.isnan(mean) else f"{mean:.0f} tokens"


def _of_repetition(own: Sequence[float], reference: Sequence[float]) -> list[str]:
    """From which word on an answer repeats itself clearly more than the reference's do there."""
    pairs = list(zip(own, reference, strict=False))
    for place, (here, there) in enumerate(pairs):
        if here > there + _MORE_REPETITION:
            return [
                f"from word {place * _WINDOW} on {here:.0%} of its 4-grams stood in the answer before "
                f"(reference {there:.0%})"
            ]
    return []
