"""Calibration text that a model writes itself: how it is sampled, which of it is fit for use, and when there is too
little.

A damaged, tiny or unwilling model writes one word over and over, or in another script than it was asked in. Statistics
of such text describe a state that good use never reaches, so it is dropped; of a text that ends in a loop the part
before it is kept, and of one that goes round in circles what it said first. Only tokens and letters are looked at:
whether a text is true or sensible is of no account here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bitladder.describe.seed import Seed
from bitladder.describe.text import scripts_of

TEMPERATURE, TOP_P, MIN_P = 0.8, 0.95, 0.05
"""Near what chats are sampled with: greedy text is all of one kind, and from 1.0 on small models stray."""
MOST_TOKENS = 384
"""Of one answer: with the question about a window."""
LEAST_TOKENS = 24
"""Written by the model, below which a text says nothing of how it writes."""
LEAST_SHARE = 0.5
"""Of the texts, below which the rest is not taken either: a model that fails so often writes nothing to fit to."""
_LONGEST_SPAN = 64
"""Tokens of the longest span whose repetition counts as a loop."""
_LEAST_LOOP = 24
"""Tokens from which three times the same span is a loop and no list."""
_STRETCH, _GRAM, _MOST_SEEN = 64, 4, 0.7
"""Tokens of a stretch, of a piece of it, and the share of pieces that stood in the text before from which a text goes
round in circles without saying the very same each time: what goes on saying something has less than half, code and
tables included."""
_LEAST_LETTERS = 20
_MOST_BROKEN = 0.02
"""Of the characters: tokens of bytes that make none, as random or damaged weights write them."""
_JAPANESE = frozenset({"Hiragana", "Katakana", "Cjk", "Katakana-hiragana"})


@dataclass(frozen=True)
class Sound:
    """What may be used of a text: its first ``tokens``; none of it where there is a reason against."""

    tokens: int
    reason: str = ""


def sound_part(ids: Sequence[int], text: str, seed: Seed, *, least: int = LEAST_TOKENS) -> Sound:
    """How much of what a model wrote can be used.

    Args:
        ids: tokens that it wrote.
        text: the same in letters.
        seed: what it was asked.
        least: tokens that it must have: fewer of an answer in the middle of a chat.
    """
    if not text.strip():
        return Sound(0, "empty")
    end = min(loop_start(ids), circling_start(ids))
    if end < least:
        return Sound(0, "a loop" if end < len(ids) else "too short")
    if _most_frequent(ids[:end]) > 0.5:
        return Sound(0, "one token over and over")
    if text.count("\ufffd") > max(2, _MOST_BROKEN * len(text)):
        return Sound(0, "broken characters")
    if not _in_script(text, seed.script):
        return Sound(0, f"not in {seed.script} script")
    return Sound(end)


def loop_start(ids: Sequence[int]) -> int:
    """Tokens before the repetitions that a text ends in, the repeated span once among them; all where there are none.

    A loop is a span of at most 64 tokens that stands there three times or more, the last one possibly cut short, over
    at least 24 tokens.
    """
    best = len(ids)
    for size in range(1, min(_LONGEST_SPAN, len(ids) // 2) + 1):
        place = len(ids) - 1
        while place >= size and ids[place] == ids[place - size]:
            place -= 1
        start = place + 1  # of what repeats: the span itself lies before it
        if len(ids) - (start - size) >= max(3 * size, _LEAST_LOOP):
            best = min(best, start)
    return best


def circling_start(ids: Sequence[int]) -> int:
    """Tokens before the first stretch of 64 that hardly says anything new; all where there is none."""
    seen: set[tuple[int, ...]] = set()
    for start in range(0, len(ids), _STRETCH):
        grams = [tuple(ids[at : at + _GRAM]) for at in range(start, min(start + _STRETCH, len(ids) - _GRAM + 1))]
        known = 0
        for gram in grams:
            known += gram in seen
            seen.add(gram)
        if len(grams) >= _STRETCH // 2 and known > _MOST_SEEN * len(grams):
            return start
    return len(ids)


def refusal(kept: int, asked: int) -> str:
    """Why nothing of it is used: too many texts were dropped; empty where enough are left."""
    if asked and kept >= LEAST_SHARE * asked:
        return ""
    return f"only {kept} of {asked} texts that it wrote are fit for use"


def _most_frequent(ids: Sequence[int]) -> float:
    return Counter(ids).most_common(1)[0][1] / len(ids)


def _in_script(text: str, script: str) -> bool:
    """Whether at least half of the letters are, where there are enough to tell."""
    counts = scripts_of(text)
    letters = sum(counts.values())
    if letters < _LEAST_LETTERS:
        return True
    wanted = _JAPANESE if script == "Japanese" else {script}
    return sum(count for name, count in counts.items() if name in wanted) >= letters / 2
