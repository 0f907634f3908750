"""What changed in the words: substitutions, numbers, missing items, broken format, and degeneration of long answers.

Words are compared as sequences (difflib's longest matching blocks), so that "shall pay" beside "will pay" is
one substitution of "shall" by "will". Everything here is a function of texts.
"""

from __future__ import annotations

import collections
import difflib
import math
import re
import statistics
from collections.abc import Sequence

from bitladder.describe.criteria import extract_json, found_items, numbers
from bitladder.describe.workload import Input, Workload
from bitladder.records.divergence import Degeneration, Substitution, WordingChanges
from bitladder.records.evaluation import Answer

_MAX_SPAN = 4
"""Words of the longest substitution that counts as one; longer ones are rewriting."""
MOST_SUBSTITUTIONS = 50
"""The most frequent ones are kept: an answer that shares nothing with the reference's has as many as words."""
LONG_WORDS = 30
"""Words from which an answer is long enough to speak of degeneration."""
_LONGEST_LOOP = 60


def words(text: str) -> list[str]:
    """Words with apostrophes and hyphens, numbers with their points and commas, and single marks."""
    return re.findall(r"\d+(?:[.,]\d+)*|\w+(?:['’-]\w+)*|[^\w\s]", text)


def substitutions(before: str, after: str) -> list[tuple[str, str]]:
    """What replaced what, in order, in lower case; ("", x) was added, (x, "") left out."""
    old, new = [word.lower() for word in words(before)], [word.lower() for word in words(after)]
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return [
        (" ".join(old[a:b]), " ".join(new[c:d]))
        for kind, a, b, c, d in matcher.get_opcodes()
        if kind != "equal" and max(b - a, d - c) <= _MAX_SPAN
    ]


def wording_changes(workload: Workload, reference: Sequence[Answer], level: Sequence[Answer]) -> WordingChanges:
    """Differences summed over a workload; answers that only one side has are left out."""
    ours = {(answer.input_id, answer.sample): answer.text for answer in level}
    inputs = {one.id: one for one in workload.inputs}
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    changed_numbers, broken_format, missing_items = [], [], []
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
    )


def degeneration(answers: Sequence[Answer]) -> Degeneration:
    """Repetition in the long answers (``LONG_WORDS`` words or more); NaN when there are none."""
    long = [(answer, words(answer.text.lower())) for answer in answers]
    long = [(answer, said) for answer, said in long if len(said) >= LONG_WORDS]
    distinct = {n: [_distinct(said, n) for _, said in long] for n in (1, 2, 4)}
    mean = {n: statistics.fmean(shares) if shares else math.nan for n, shares in distinct.items()}
    repeated = [_repeated_words(said) / len(said) for _, said in long]
    return Degeneration(
        answers=len(long),
        distinct_1=mean[1],
        distinct_2=mean[2],
        distinct_4=mean[4],
        repeated_share=statistics.fmean(repeated) if repeated else math.nan,
        looping=tuple(dict.fromkeys(answer.input_id for answer, said in long if _ends_in_loop(said))),
    )


def _distinct(said: Sequence[str], n: int) -> float:
    grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    return len(set(grams)) / len(grams)


def _repeated_words(said: Sequence[str]) -> int:
    """Words that belong to a span which repeats the span right before it; from left to right, shortest span first."""
    repeated, place = 0, 1
    while place < len(said):
        longest = min(_LONGEST_LOOP, place, len(said) - place)
        for size in range(1, longest + 1):
            if said[place : place + size] == said[place - size : place]:
                repeated, place = repeated + size, place + size
                break
        else:
            place += 1
    return repeated


def _ends_in_loop(said: Sequence[str]) -> bool:
    """Whether the end is one span three times over, a last one possibly cut short."""
    for size in range(1, min(_LONGEST_LOOP, len(said) // 3) + 1):
        tail = said[-3 * size :]
        if all(tail[i] == tail[i - size] for i in range(size, len(tail))):
            return True
    return False


def _is_json(text: str) -> bool:
    try:
        return isinstance(extract_json(text), dict | list)
    except (ValueError, RecursionError):
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
