"""What changed in the words of a level's answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from bitladder.records import Real

TIE_RATIO = 0.5
"""A tie: each level gave the other's token at least this share of its own one's probability."""


@dataclass(frozen=True)
class Parting:
    """A token where two levels, after the same words, differ. Probabilities 0 to 1; NaN: not among the likeliest that
    the engine lists.

    ``a_of_a`` is what level A gave its own token there, ``a_of_b`` what it gave B's, and so on.
    """

    index: int
    token_a: str
    token_b: str
    a_of_a: Real
    a_of_b: Real
    b_of_a: Real
    b_of_b: Real

    @property
    def is_tie(self) -> bool:
        """Whether both levels were as good as undecided."""
        return self.a_of_b >= TIE_RATIO * self.a_of_a and self.b_of_a >= TIE_RATIO * self.b_of_b


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
    looping: tuple[str, ...] = ()
    """Inputs whose answer, unlike the reference's, ends in a loop: the same span at least three times in a row."""
    partings: dict[str, Parting] = field(default_factory=dict)
    """Input to the first place where its answer differs from the reference's (A), token by token; inputs whose tokens
    are not known, and workloads that sample, have none."""
