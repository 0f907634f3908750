"""What a level answered, and how fast."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True)
class Speed:
    """Measured through the engine; medians over the workload's requests, tokens per second."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    load_seconds: float


@dataclass(frozen=True)
class LevelAnswers:
    """A whole workload through one level."""

    level: str
    answers: tuple[Answer, ...]
    speed: Speed


@dataclass(frozen=True)
class WorkloadResult:
    """Passes of a level, compared pair by pair with the reference's on the same inputs."""

    level: str
    passes: int
    inputs: int
    pass_low: float
    pass_high: float
    """95% Wilson interval of the pass rate."""
    lost: tuple[str, ...]
    """Inputs the reference passed and this level did not."""
    gained: tuple[str, ...]
    same_answers: int
    """Inputs with the very same text as the reference's."""
    p_value: float
    """McNemar's exact test on lost against gained."""
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
