"""What a level answered, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from bitladder.records import Real


class Alternative(NamedTuple):
    """A token that an engine held likely at some place, with its log-probability (natural)."""

    token_id: int
    logprob: Real


@dataclass(frozen=True)
class AnswerToken:
    """One token of an answer, as the engine chose it. The token that ended the answer is among them."""

    token_id: int
    logprob: Real
    text: str
    top: tuple[Alternative, ...]
    """The most likely tokens there, this one among them, most likely first."""


@dataclass(frozen=True)
class Answer:
    """A level's answer to one input of a workload."""

    input_id: str
    text: str
    passed: bool
    detail: str
    """Why the criterion passed or failed, in a phrase."""
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    sample: int = 0
    """Which of several answers to the same input; also the seed."""
    question: str = ""
    """SHA-256 of what was asked (``describe.workload.question_hash``): what an answer can be found again by."""
    tokens: tuple[AnswerToken, ...] = ()
    """Empty where the engine does not tell token ids and probabilities."""


MOST_OTHERS_SHARE = 0.15
"""Share of the processor that other programs may take while a speed is measured."""


@dataclass(frozen=True)
class Speed:
    """Measured through the engine with one request at a time; medians of repeats, tokens per second."""

    prefill_tokens_per_s: Real
    decode_tokens_per_s: Real
    load_seconds: Real
    others_share: Real = float("nan")
    """Share of this machine's processor time that other programs took meanwhile; NaN where it says nothing."""
    rounds: tuple[Real, ...] = ()
    """Decode rates one by one, where levels were timed in turns."""
    turns: str = ""
    """Which turns: the same rounds of levels that bear the same one saw the same machine."""

    @property
    def disturbed(self) -> bool:
        """Whether this says more about other programs than about the level."""
        return self.others_share > MOST_OTHERS_SHARE


@dataclass(frozen=True)
class LevelAnswers:
    """A whole workload through one level."""

    level: str
    answers: tuple[Answer, ...]
    speed: Speed


@dataclass(frozen=True)
class TagResult:
    """One kind of work at one level, compared with the reference pair by pair."""

    tag: str
    inputs: int
    passes: int
    pass_low: Real
    pass_high: Real
    lost: int
    gained: int
    p_value: Real
    """McNemar's exact test, corrected for the number of tags (Holm)."""


@dataclass(frozen=True)
class WorkloadResult:
    """Passes of a level, compared pair by pair with the reference's on the same inputs.

    An input asked several times passes when at least half of its answers do; ``pass_rate`` counts every
    answer.
    """

    level: str
    passes: int
    inputs: int
    pass_low: Real
    pass_high: Real
    """95% Wilson interval of the pass rate; with weights or several answers, at the effective number of inputs."""
    lost: tuple[str, ...]
    """Inputs the reference passed and this level did not."""
    gained: tuple[str, ...]
    same_answers: int
    """Inputs with the very same text as the reference's."""
    p_value: Real
    """McNemar's exact test on lost against gained; with several answers per input or unequal weights, the
    paired permutation test of the weighted pass shares.
    """
    decode_tokens_per_s: Real
    prefill_tokens_per_s: Real
    pass_rate: Real = float("nan")
    """Share of passes, each input with its weight."""
    smallest_visible_loss: Real = float("nan")
    """A true loss smaller than this (as a share) goes unseen by a workload of this size more than one time in five."""
    tags: tuple[TagResult, ...] = ()
    decode_rounds: tuple[Real, ...] = ()
    """Decode rates round by round, tokens per second, where levels were timed in turns."""
    items: int = 0
    """Items of ``set_recall`` criteria that the reference's answers name."""
    items_kept: int = 0
    """Those of them that this level's answers name, too."""
    recall_low: Real = float("nan")
    recall_high: Real = float("nan")
    """95% interval of ``items_kept / items``: Wilson's, at the effective number of items: those of one input
    are no independent evidence."""

    @property
    def recall(self) -> float:
        """Share of what the reference catches that this level catches; NaN where there are no items."""
        return self.items_kept / self.items if self.items else float("nan")
