"""What changed in the answers: where they part, items, numbers, substitutions, broken format, loops at the end.

Words are compared as sequences (difflib's longest matching blocks), so that "shall pay" beside "will pay" is
one substitution of "shall" by "will". Everything here is a function of texts.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence

from bitladder.describe.criteria import extract_json, found_items
from bitladder.describe.numbers import numbers
from bitladder.describe.repetition import loop_start
from bitladder.describe.workload import Input, Workload
from bitladder.records.evaluation import Answer, AnswerToken
from bitladder.records.wording import Parting, Substitution, WordingChanges
from bitladder.stats.intervals import Rate, weighted_wilson
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
    inputs = {one.id: one for one in workload.inputs}
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    changed_numbers, broken_format, missing_items, looping = [], [], [], []
    partings: dict[str, Parting] = {}
    compared = changed = total_words = reference_items = 0
    for answer, other in _pairs(reference, level):
        text = other.text
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
        place = first_parting(answer.tokens, other.tokens) if workload.temperature == 0 else None
        if place is not None:
            partings.setdefault(answer.input_id, place)
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
        partings=partings,
    )


def item_recall(workload: Workload, reference: Sequence[Answer], level: Sequence[Answer]) -> tuple[int, int, Rate]:
    """How many items the reference names, how many of them the level names, too, and the share with its 95% interval.

    Items of one input are no independent evidence: the interval is Wilson's at the effective number of items
    (``stats.intervals``). Without items the share is NaN.
    """
    inputs = {one.id: one for one in workload.inputs}
    named: collections.Counter[str] = collections.Counter()
    kept: collections.Counter[str] = collections.Counter()
    for answer, other in _pairs(reference, level):
        items, missing = _items(inputs[answer.input_id], answer.text, other.text)
        if items:
            named[answer.input_id] += items
            kept[answer.input_id] += items - len(missing)
    rate = weighted_wilson([kept[name] / named[name] for name in named], [float(named[name]) for name in named])
    return named.total(), kept.total(), rate


def first_parting(before: Sequence[AnswerToken], after: Sequence[AnswerToken]) -> Parting | None:
    """Where two greedy answers first differ, token by token; None where they do not, where one is cut short before, or
    where the ids are of two vocabularies."""
    texts: dict[int, str] = {}
    whole = (
        token for token in (*before, *after) if token.text and "\ufffd" not in token.text
    )  # no part of a character
    if any(texts.setdefault(token.token_id, token.text) != token.text for token in whole):
        return None
    for index, (a, b) in enumerate(zip(before, after, strict=False)):
        if a.token_id != b.token_id:
            chances = (_chance(side, token.token_id) for side in (a, b) for token in (a, b))
            return Parting(index, a.text, b.text, *chances)
    return None


def _chance(chosen: AnswerToken, token_id: int) -> float:
    """The probability that a level gave to a token at this place; NaN where it is not among the likeliest."""
    logprobs = dict(chosen.top) | {chosen.token_id: chosen.logprob}
    return math.exp(logprobs[token_id]) if token_id in logprobs else math.nan


def _pairs(reference: Sequence[Answer], level: Sequence[Answer]) -> Iterator[tuple[Answer, Answer]]:
    """Answers of both to the same input and sample."""
    ours: Mapping[tuple[str, int], Answer] = {(answer.input_id, answer.sample): answer for answer in level}
    return ((one, ours[one.input_id, one.sample]) for one in reference if (one.input_id, one.sample) in ours)


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
