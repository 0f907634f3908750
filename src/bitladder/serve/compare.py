"""One prompt through two levels: where the answers part, with both probabilities, and how fast each was.

Greedy answers of two levels of one model are equal up to the first token where they choose differently;
from there on they are two texts. So the one telling place is that token. Where both levels held both tokens
within odds of two to one it was a tie, which any rounding can break; otherwise at least one was sure, and they
really disagree.

Two engines of our own with one tokenizer tell more: B is put back on A's words after each place, and goes on alone
until it parts again. What remains is a list of places where both levels, given the *same* words, prefer different
tokens. Each costs one request, whose prompt the engine has in its cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bitladder.engines.base import Chat, Completion, Continuing, Engine, Message, TokenChoice
from bitladder.records.wording import Parting
from bitladder.unicode import changes, pieces

TOP = 10
MOST_LATER = 8
"""Places after the first that are looked for."""


@dataclass(frozen=True)
class Side:
    """One level's answer. Rates in tokens per second, NaN where the engine does not tell."""

    level: str
    text: str
    finish_reason: str
    tokens: int
    first_token_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Span:
    """A run of text: ``both`` answers hold it, or only ``a`` or ``b``."""

    where: str
    text: str


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt."""

    prompt: str
    a: Side
    b: Side
    parting: Parting | None
    """The first place. None: token by token the same, or no probabilities were told."""
    spans: tuple[Span, ...]
    later: tuple[Parting, ...] | None = None
    """Where else B, put back on A's words, would go on otherwise. None where it cannot be: an engine is not of ours, or
    the tokenizers differ."""

    @property
    def same(self) -> bool:
        """Whether both texts are equal."""
        return self.a.text == self.b.text


def compare(a: Engine, b: Engine, messages: Sequence[Message], *, max_tokens: int = 256) -> Comparison:
    """Ask both levels, one after the other so that neither slows the other down, greedily.

    Raises:
        EngineError: an engine failed.
    """
    first, second = (engine.chat(Chat(messages, max_tokens, logprobs=TOP)) for engine in (a, b))
    found = compared(str(messages[-1]["content"]), (a.name, first), (b.name, second))
    if found.parting is None or not (isinstance(a, Continuing) and isinstance(b, Continuing)):
        return found
    begin, same = (engine.tokenize(engine.render(messages), add_special=True) for engine in (a, b))
    return replace(found, later=later_partings(first.tokens, found.parting, b, begin)) if begin == same else found


def later_partings(
    a: Sequence[TokenChoice], first: Parting, b: Continuing, prompt: Sequence[int]
) -> tuple[Parting, ...] | None:
    """The next ``MOST_LATER`` places where B, put back on A's words after each, would go on otherwise.

    Args:
        a: A's answer; None is returned where an id is not known.
        first: where the free answers part.
        b: is asked.
        prompt: token ids before the answer.

    Raises:
        EngineError: the engine failed.
    """
    ids = [choice.token_id for choice in a if choice.token_id is not None]
    if len(ids) < len(a):
        return None
    found: list[Parting] = []
    start = first.index + 1
    while start < len(ids) and len(found) < MOST_LATER:
        choices = b.continue_tokens([*prompt, *ids[:start]], max_tokens=len(ids) - start, top=TOP)
        place = first_difference(a[start:], choices)
        if place is None:
            break
        found.append(replace(place, index=start + place.index))
        start = found[-1].index + 1
    return tuple(found)


def compared(prompt: str, a: tuple[str, Completion], b: tuple[str, Completion]) -> Comparison:
    """Put two answers side by side."""
    spans = differences(a[1].text, b[1].text)
    return Comparison(prompt, _side(*a), _side(*b), first_difference(a[1].tokens, b[1].tokens), spans)


def _side(level: str, answer: Completion) -> Side:
    rate = answer.timings.decode_tokens_per_s if answer.timings else math.nan
    return Side(level, answer.text, answer.finish_reason, answer.completion_tokens, answer.first_token_s, rate)


def first_difference(a: Sequence[TokenChoice], b: Sequence[TokenChoice]) -> Parting | None:
    """Where two greedy answers first chose differently; None when one is the beginning of the other."""
    for index, (of_a, of_b) in enumerate(zip(a, b, strict=False)):
        if of_a.text != of_b.text:
            chances = _chance(of_a, of_a.text), _chance(of_a, of_b.text), _chance(of_b, of_a.text)
            return Parting(index, of_a.text, of_b.text, *chances, _chance(of_b, of_b.text))
    return None


def _chance(choice: TokenChoice, text: str) -> float:
    """The probability that a level gave to a token at this place; NaN when it was not told."""
    found = next((token for token in (choice, *choice.top) if token.text == text), None)
    return math.nan if found is None else math.exp(found.logprob)


def differences(a: str, b: str) -> tuple[Span, ...]:
    """Both texts as runs of words that are in both, or in one only. Joining the runs of one side gives its
    text.
    """
    words_a, words_b = pieces(a), pieces(b)
    spans: list[Span] = []
    for _, of_a, of_b in changes(words_a, words_b):
        one, other = "".join(words_a[of_a]), "".join(words_b[of_b])
        if one == other:
            spans.append(Span("both", one))
        else:
            spans += [Span(side, text) for side, text in (("a", one), ("b", other)) if text]
    return tuple(spans)
