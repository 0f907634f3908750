"""What changed in the words: substitutions, numbers, missing items, broken format, answers that end in a loop.

Words are compared as sequences (difflib's longest matching blocks), so that "shall pay" beside "will pay" is
one substitution of "shall" by "will". Everything here is a function of texts.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from bitladder.describe.criteria import extract_json, found_items
from bitladder.describe.numbers import numbers
from bitladder.describe.repetition import loop_start
from bitladder.describe.workload import Input, Workload
from bitladder.records.evaluation import Answer
from bitladder.records.wording import Substitution, WordingChanges
from bitladder.unicode import changes, words

_MAX_SPAN = 4
"""Words of the longest substitution that counts as one; longer ones are rewriting."""
MOST_SUBSTITUTIONS = 50
"""The most frequent ones are kept: an answer that shares nothing with the reference's has as many as words."""


def substitutions(before: str, after: str) -> list[tuple[str, str]]:
    """What replaced what, in order, in lower case; ("", x) was added, (x, "") left out."""
    old, new = [word.lower() for word in words(before)], [word.lower() for word in words(after)]
    return [
        (" ".join(old[a]), " ".join(new[b]))
        for kind, a, b in changes(old, new)
        if kind != "equal" and max(a.stop - a.start, b.stop - b.start) <= _MAX_SPAN
    ]


def wording_changes(workload: Workload, reference: Sequence[Answer], level: Sequence[Answer]) -> WordingChanges:
    """Differences summed over a workload; answers that only one side has are left out."""
    ours = {(answer.input_id, answer.sample): answer.text for answer in level}
    inputs = {one.id: one for one in workload.inputs}
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    changed_numbers, broken_format, missing_items, looping = [], [], [], []
    compared = changed = total_words = reference_items = 0
    for answer in reference:
        text = ours.get((answer.input_id, answer.sample))
        if text is None:
            continue
        compared += 1
        changed += text != answer.text
        total_words += len(words(answer.text))
        counts.update(substitutions(answer.text, text))
        if sorted(numbers(answer.text)) != sorted(numbers(text)):
            changed_numbers.append(answer.input_id)
        if _is_json(answer.text) and not _is_json(text):
            broken_format.append(answer.input_id)
        if loop_start(text) is not None and loop_start(answer.text) is None:
            looping.append(answer.input_id)
        items, missing = _items(inputs[answer.input_id], answer.text, text)
        reference_items += items
        missing_items += [(answer.input_id, item) for item in missing]
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return WordingChanges(
        answers=compared,
        changed_answers=changed,
        words=total_words,
        substitutions=tuple(
            Substitution(before, after, count) for (before, after), count in ordered[:MOST_SUBSTITUTIONS]
        ),
        changed_numbers=tuple(dict.fromkeys(changed_numbers)),
        missing_items=tuple(missing_items),
        reference_items=reference_items,
        broken_format=tuple(dict.fromkeys(broken_format)),
        looping=tuple(dict.fromkeys(looping)),
    )


def _is_json(text: str) -> bool:
    try:
        return isinstance(extract_json(text), dict | list)
    except ValueError:
        return False


def _items(one: Input, before: str, after: str) -> tuple[int, list[str]]:
    """How many items of the input's set_recall criteria the reference named, and which of these the level lacks."""
    named: list[str] = []
    kept: set[str] = set()
    for criterion in one.criteria:
        if criterion.kind == "set_recall":
            named += found_items(criterion, before)
            kept |= set(found_items(criterion, after))
    return len(named), [item for item in named if item not in kept]
