"""Where and how a level's answers part from the reference's."""

from __future__ import annotations

from dataclasses import dataclass

from bitladder.records import Real


@dataclass(frozen=True)
class Departure:
    """One place where a level, given the reference's words up to there, would go on with another token.

    Log-probabilities are natural; NaN where an engine did not report the token among its most likely.
    """

    position: int
    """Tokens of the answer before it."""
    reference_token: str
    level_token: str
    """Both as text; ``<end>`` where an answer ends."""
    reference_logprob: float
    """What the reference gave its own token."""
    reference_logprob_of_level: float
    """What the reference gave the level's token."""
    level_logprob: float
    """What the level gave its own token."""
    level_logprob_of_reference: float
    """What the level gave the reference's token."""
    tie: bool
    """Both models held the two tokens nearly equally likely (odds of at most two to one)."""


@dataclass(frozen=True)
class Divergence:
    """One answer beside the reference's."""

    input_id: str
    kind: str
    """``identical``: no departure; ``tie-break``: every departure is a tie, which rounding alone can turn;
    ``diverged``: at least one is not."""
    departures: tuple[Departure, ...]
    """In order; the first is where the free-running answers part. Each later one is found after putting the
    level back on the reference's words.
    """
    compared_tokens: int
    """Tokens of the reference's answer that were compared."""
    complete: bool
    """False when the search stopped at its limit of departures."""


@dataclass(frozen=True)
class Substitution:
    """Words of the reference that a level replaced; either side may be empty (left out, added)."""

    before: str
    after: str
    count: int


@dataclass(frozen=True)
class WordingChanges:
    """Differences in words, summed over a workload."""

    answers: int
    changed_answers: int
    words: int
    """Words in the reference's answers."""
    substitutions: tuple[Substitution, ...]
    """Most frequent first."""
    changed_numbers: tuple[str, ...]
    """Inputs whose numbers are not the reference's, order aside."""
    missing_items: tuple[tuple[str, str], ...]
    """(input, item) that the reference named and the level did not, from ``set_recall`` criteria."""
    reference_items: int
    """Items that the reference named."""
    broken_format: tuple[str, ...]
    """Inputs where the reference's answer was JSON and the level's is not."""


@dataclass(frozen=True)
class Degeneration:
    """What long answers show when few bits are left. Means over answers of at least the stated length."""

    answers: int
    distinct_1: Real
    distinct_2: Real
    distinct_4: Real
    """Different n-grams as a share of all n-grams of words; NaN without answers that long."""
    repeated_share: Real
    """Share of words inside a span that repeats what directly precedes it."""
    looping: tuple[str, ...]
    """Inputs whose answer ends in a loop: the same span at least three times in a row up to the end."""
