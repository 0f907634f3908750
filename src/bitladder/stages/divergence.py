"""Where a level's answer parts from the reference's, and whether rounding or damage parted them.

Two greedy answers usually part because at some place two tokens were nearly equally likely, and after that
they have different histories and cannot be compared word by word. So the level is put back on the reference's
words: given the prompt and the reference's answer up to and including the place where they parted, it goes on
alone until it parts again, and so on to the end. What remains is a list of places where the two models, given
the *same* words, prefer different tokens, each with both probabilities in both models:

    identical    no such place
    tie-break    at every such place both models held both tokens nearly equally likely (odds of two to one at most)
    diverged     at some place at least one model was sure

A place costs one request, whose prompt the engine has in its cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bitladder.describe.workload import Input
from bitladder.engines.base import Continuing, TokenChoice
from bitladder.errors import BadInput
from bitladder.records.divergence import Departure, Divergence
from bitladder.records.evaluation import Answer, AnswerToken

TIE_NATS = math.log(2)
"""Two tokens are tied when their log-probabilities differ by at most this: odds of two to one."""
MOST_DEPARTURES = 8
END = "<end>"
_TOP = 5


def diverge(engine: Continuing, one: Input, reference: Answer, *, most: int = MOST_DEPARTURES) -> Divergence:
    """Follow the reference's answer with the level that ``engine`` runs.

    Args:
        engine: runs the level's file; the tokenizer must be the reference's.
        one: the input.
        reference: the reference's answer, with its tokens and their likely alternatives.
        most: departures after which the search stops.

    Raises:
        BadInput: the reference's answer carries no tokens.
        EngineError: the engine failed.
    """
    if not reference.tokens:
        raise BadInput(
            f"The reference's answer to '{one.id}' carries no tokens.",
            means="It came from an engine that does not tell token ids and probabilities.",
            do="Use a reference that runs in llama.cpp.",
        )
    prompt = engine.tokenize(engine.render(one.messages), add_special=True)
    said = [token.token_id for token in reference.tokens]
    departures: list[Departure] = []
    start = 0
    while start < len(said) and len(departures) < most:
        choices = engine.continue_tokens(prompt + said[:start], max_tokens=len(said) - start, top=_TOP)
        parted = first_difference(said[start:], choices)
        if parted is None:
            return _result(one, departures, len(said), complete=True)
        departures.append(departure(start + parted, reference.tokens[start + parted], choices[parted : parted + 1]))
        start += parted + 1
    return _result(one, departures, min(start, len(said)), complete=start >= len(said))


def first_difference(said: Sequence[int], choices: Sequence[TokenChoice]) -> int | None:
    """The first place where the choices are not what was said; None when all of it is followed."""
    for place, token_id in enumerate(said):
        if place >= len(choices) or choices[place].token_id != token_id:
            return place
    return None


def departure(position: int, reference: AnswerToken, level: Sequence[TokenChoice]) -> Departure:
    """One place with both tokens and what both models gave them; ``level`` is empty when the engine gave no token."""
    ours = level[0] if level else TokenChoice("", math.nan)
    theirs = {other.token_id: other.logprob for other in reference.top} | {reference.token_id: reference.logprob}
    mine = {other.token_id: other.logprob for other in ours.top} | {ours.token_id: ours.logprob}
    reference_of_level = theirs.get(ours.token_id, math.nan) if ours.token_id is not None else math.nan
    level_of_reference = mine.get(reference.token_id, math.nan)
    gaps = (reference.logprob - reference_of_level, ours.logprob - level_of_reference)
    return Departure(
        position=position,
        reference_token=reference.text or END,
        level_token=ours.text or END,
        reference_logprob=reference.logprob,
        reference_logprob_of_level=reference_of_level,
        level_logprob=ours.logprob,
        level_logprob_of_reference=level_of_reference,
        # A token that is not even among the likely ones is no tie; comparisons with NaN are false, which says
        # just that.
        tie=all(gap <= TIE_NATS for gap in gaps),
    )


def _result(one: Input, departures: Sequence[Departure], compared: int, *, complete: bool) -> Divergence:
    if not departures:
        kind = "identical"
    elif all(each.tie for each in departures):
        kind = "tie-break"
    else:
        kind = "diverged"
    return Divergence(one.id, kind, tuple(departures), compared, complete)
