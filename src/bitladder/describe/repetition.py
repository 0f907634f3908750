"""Repetition along a text: where it begins to loop, and how much of each stretch stood there before.

A damaged model often begins well and ends in one span over and over. Words are those of ``unicode.words`` in lower
case.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from bitladder.unicode import words

LEAST_WORDS = 30
"""Words from which a text is long enough to speak of a loop."""
LONGEST_SPAN = 60
"""Words of the longest span whose repetition counts as a loop."""
LEAST_TIMES = 3
WINDOW = 50
"""Words of a stretch."""
GRAM = 4
LONGEST = 50_000
"""Characters that are looked at, from the end."""


def loop_start(text: str) -> int | None:
    """Words before the loop that a text ends in; None where it ends in none.

    A loop is one span of at most 60 words three times over, the last one possibly cut short. The word counted to is
    the first that the span repeats, so a text that says something once and then loops on it begins to loop there.
    """
    found = _words(text)
    if len(found) < LEAST_WORDS:
        return None
    for size in range(1, min(LONGEST_SPAN, len(found) // LEAST_TIMES) + 1):
        tail = found[-LEAST_TIMES * size :]
        if all(tail[place] == tail[place - size] for place in range(size, len(tail))):
            return _first_repeated(found, size)
    return None


@functools.lru_cache(maxsize=128)
def _words(text: str) -> tuple[str, ...]:
    """In lower case; of the reference's answers they are wanted once for each level."""
    return tuple(word.lower() for word in words(text[-LONGEST:]))


def _first_repeated(found: Sequence[str], size: int) -> int:
    """Where the periodic end of these words begins, its first span not counted."""
    place = len(found) - 1
    while place >= size and found[place] == found[place - size]:
        place -= 1
    return place + 1


def repeated_shares(text: str) -> list[float]:
    """For each whole stretch of 50 words, the share of its 4-grams that stood in the text before."""
    found = _words(text)
    grams = [found[place : place + GRAM] for place in range(len(found) - GRAM + 1)]
    seen: set[tuple[str, ...]] = set()
    shares = []
    for start in range(0, len(found) - WINDOW + 1, WINDOW):
        repeated = 0
        own = grams[start : start + WINDOW]
        for gram in own:
            repeated += gram in seen
            seen.add(gram)
        shares.append(repeated / len(own))
    return shares
