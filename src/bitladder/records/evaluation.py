"""What a level answered, and how fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from bitladder.records import OPTIONAL, Real


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
class ToolCall:
    """A call of a tool as the engine's parser found it in what the model wrote."""

    name: str
    arguments: str
    """JSON, as far as the model kept to it."""


@dataclass(frozen=True)
class Reply:
    """An answer in a chat before its last one."""

    text: str
    finish_reason: str
    completion_tokens: int
    thought: str = field(default="", metadata=OPTIONAL)
    thought_tokens: int = field(default=0, metadata=OPTIONAL)
    calls: tuple[ToolCall, ...] = field(default=(), metadata=OPTIONAL)


@dataclass(frozen=True)
class Answer:
    """A level's answer to one input of a workload; of a chat of several turns the last one."""

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
    thought: str = field(default="", metadata=OPTIONAL)
    """What the model thought before it answered; no part of ``text``, and never judged."""
    thought_tokens: int = field(default=0, metadata=OPTIONAL)
    """Its length, one of ``completion_tokens``; where the engine does not count it, by its share of the characters."""
    calls: tuple[ToolCall, ...] = field(default=(), metadata=OPTIONAL)
    """Calls of tools, in their order."""
    earlier: tuple[Reply, ...] = field(default=(), metadata=OPTIONAL)
    """The model's own answers to the turns before; fewer than the chat has turns where it could not go on."""

    @property
    def replies(self) -> tuple[Reply, ...]:
        """Every answer of the chat, the last one among them."""
        last = Reply(
            self.text, self.finish_reason, self.completion_tokens, self.thought, self.thought_tokens, self.calls
        )
        return (*self.earlier, last)


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
class FaultCount:
    """How often a level's answers have a fault that needs no criterion, or make a tool call in one wrong way, beside
    the reference's to the same inputs."""

    fault: str
    """A name of ``stages.behaviour.FAULTS``."""
    answers: int
    """Answers of the level in which it could show itself."""
    level: int
    """Those that have it."""
    reference: int
    """Those of the reference that have it."""
    appeared: tuple[str, ...]
    """Inputs of whose answers more have it than of the reference's."""
    vanished: tuple[str, ...]
    """Inputs of whose answers fewer have it."""
    p_value: Real
    """One-sided sign test over these inputs: chance of so many that it appeared in if neither had it more often."""
    low: Real = float("nan")
    """95% interval of the share of the level's answers that have it, over inputs (Wilson, effective number)."""
    high: Real = float("nan")
    begins: int | None = field(default=None, metadata=OPTIONAL)
    """Of loops: words after which they begin, the median over answers; None for other faults."""


@dataclass(frozen=True)
class Thinking:
    """What a level thought before its answers, beside the reference's thoughts about the same inputs."""

    thoughts: int
    """Answers that a thought came before."""
    tokens: Real
    """Mean length of the level's thoughts."""
    reference_tokens: Real
    """Mean length of the reference's."""
    unfinished: int
    """Thoughts that were cut before an answer began."""
    looping: int
    """Thoughts that end in a loop."""


class Difference(NamedTuple):
    """An input with the level's pass share minus the reference's."""

    input_id: str
    share: Real


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
    items: int = field(default=0, metadata=OPTIONAL)
    """Items of ``set_recall`` criteria that the reference's answers name."""
    items_kept: int = field(default=0, metadata=OPTIONAL)
    """Those of them that this level's answers name, too."""
    recall_low: Real = float("nan")
    recall_high: Real = float("nan")
    """95% interval of ``items_kept / items``: Wilson's, at the effective number of items: those of one input
    are no independent evidence."""

    @property
    def recall(self) -> float:
        """Share of what the reference catches that this level catches; NaN where there are no items."""
        return self.items_kept / self.items if self.items else float("nan")

    faults: tuple[FaultCount, ...] = field(default=(), metadata=OPTIONAL)
    """Faults that the level's answers or the reference's have; one that neither has is left out."""
    thinking: Thinking | None = field(default=None, metadata=OPTIONAL)
    """None where neither thought."""
    repetition: tuple[Real, ...] = field(default=(), metadata=OPTIONAL)
    """Share of 4-grams that stood in the answer before, in its words 0 to 50, 50 to 100 and so on: the mean over
    answers that reach so far. Empty where none is long."""
    reference_repetition: tuple[Real, ...] = field(default=(), metadata=OPTIONAL)
    """The same of the reference."""
    differences: tuple[Difference, ...] | None = field(default=None, metadata=OPTIONAL)
    """Of inputs whose pass shares differ, where each was answered several times; None where each was answered once."""
