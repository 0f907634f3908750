"""A long text with one sentence to be found in it: retrieval at depth, for a workload's own inputs."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from typing import Any

from bitladder.describe.criterion_values import MOST, a_count, a_share, a_string, fields, words

CHARACTERS_PER_TOKEN = 4.2
"""Of English prose, about: a workload is read before any tokenizer is known."""
MOST_TOKENS = MOST // 20
_WHO = ("The baker", "A sailor", "Her aunt", "The clerk", "An old teacher", "The gardener", "My neighbour", "A nurse")
_DOES = ("sold", "mended", "carried", "painted", "forgot", "counted", "borrowed", "wrapped", "described", "found")
_WHAT = ("a lamp", "two chairs", "the ladder", "some letters", "a kettle", "the map", "three baskets", "an umbrella")
_WHERE = ("by the river", "near the mill", "in the square", "behind the school", "at the harbour", "on the hill")
_WHEN = ("on Monday", "before lunch", "in the rain", "last spring", "at dusk", "after the fair", "in silence")


def haystack_fields(value: Any) -> dict[str, Any]:
    """``{needle: "...", tokens: 4000, depth: 0.5, text: essays.txt}``; without a text plain sentences are made up.

    Raises:
        ValueError: the rest of a sentence.
    """
    found = fields(value, {"needle": words, "tokens": a_count}, {"depth": (0.5, a_share), "text": ("", a_string)})
    if found["tokens"] > MOST_TOKENS:
        raise ValueError(f"asks for {found['tokens']} tokens; at most {MOST_TOKENS} are made")
    return found


def haystack(needle: str, tokens: int, depth: float, text: str = "") -> str:
    """About so many tokens of prose with the needle between two of its sentences, at this share of its length.

    Args:
        needle: the sentence to be found.
        tokens: length of all.
        depth: 0 is the beginning, 1 the end.
        text: where the prose is from, over again where it is too short; empty for made-up sentences, always the same.
    """
    room = max(0, int(tokens * CHARACTERS_PER_TOKEN) - len(needle))
    sentences, length = [], 0
    for sentence in _sentences(text):
        if length >= room:
            break
        sentences.append(sentence)
        length += len(sentence) + 1
    ends = list(itertools.accumulate(len(sentence) + 1 for sentence in sentences))
    place = sum(end <= depth * length for end in ends)
    return " ".join([*sentences[:place], needle, *sentences[place:]])


def _sentences(text: str) -> Iterator[str]:
    own = [one for one in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if one]
    if own:
        yield from itertools.cycle(own)
    drawn = random.Random(20261129)
    while True:
        parts = [drawn.choice(part) for part in (_WHO, _DOES, _WHAT, _WHERE, _WHEN)]
        yield f"{' '.join(parts)}, for the {drawn.randrange(2, 400)}th time."
