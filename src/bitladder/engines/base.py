"""What every engine under test promises: a chat in, a completion out, errors in our words.

An engine is whatever runs a model behind a chat API: llama.cpp in a child process (``engines.llama``) or any
OpenAI-compatible endpoint (``engines.endpoint``). Stages see only this contract, so a fake is a class with
two methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, Any]
"""One chat message: ``{"role": "system" | "user" | "assistant", "content": "..."}``."""


@dataclass(frozen=True)
class TokenChoice:
    """One generated token with the engine's probabilities at that place (before any sampling filter)."""

    text: str
    logprob: float
    """Natural logarithm."""
    token_id: int | None = None
    """None where the engine does not tell."""
    top: tuple[TokenChoice, ...] = ()
    """The most likely tokens there, most likely first, when they were asked for."""


@dataclass(frozen=True)
class Timings:
    """The engine's own clock for one request. Rates are tokens per second, NaN where there was nothing to time."""

    prompt_tokens: int
    """Prompt tokens really computed; tokens taken from a cache are not among them."""
    prefill_tokens_per_s: float
    decode_tokens: int
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str
    finish_reason: str
    """``stop`` (the model ended), ``length`` (max_tokens reached) or what else the engine says."""
    prompt_tokens: int
    completion_tokens: int
    model: str
    """The model the engine says it used."""
    first_token_s: float
    """Seconds from sending the request to the first piece of text."""
    total_s: float
    tokens: tuple[TokenChoice, ...] = ()
    """Filled when log-probabilities were asked for."""
    timings: Timings | None = None
    """None where the engine does not report any."""


class Engine(Protocol):
    """A model one can talk to. Calls may come from several threads at once, up to ``parallel``."""

    name: str
    """What tables call it."""
    parallel: int
    """Requests worth having in flight at once."""

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        logprobs: int = 0,
        stop: Sequence[str] = (),
    ) -> Completion:
        """Answer a chat. Temperature 0 is greedy; ``logprobs`` asks for that many most likely tokens at each place.

        Raises:
            EngineError: the engine died, stalled, or answered something that is not a completion.
        """
        ...

    def close(self) -> None:
        """Let the engine go. Calling it twice does no harm."""
        ...
