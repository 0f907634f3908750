"""The contract of engines. Stages, steps and the gateway see only this.

An `Engine` is whatever runs a model behind a chat API: an OpenAI-compatible endpoint of somebody else
(``engines.endpoint``), or an engine of our own. One of our own is started from a `Launch` (a file or folder, and how to
run it) and is `Running` then: an address that a gateway can pass requests to, and beside the chat its tokenizer, its
clock, who it is, and how it ends. An `EngineKind` makes one of the other; ``engines.registry`` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from bitladder.errors import BadInput, EngineError
from bitladder.records.evaluation import ToolCall
from bitladder.records.plan import DEFAULT_CTX

Message = Mapping[str, Any]
"""One chat message: ``{"role": "system" | "user" | "assistant" | "tool", "content": "..."}``, and what belongs to calls
of tools."""


@dataclass(frozen=True)
class Chat:
    """What an engine is asked."""

    messages: Sequence[Message]
    max_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    logprobs: int = 0
    """Most likely tokens wanted at each place."""
    stop: Sequence[str] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    """What the model may call, in OpenAI's form."""
    response_format: Mapping[str, Any] | None = None
    """In OpenAI's form: what the engine holds the answer to with a grammar."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Further settings of the sampler: ``top_p``, ``top_k``, ``min_p``, ``repeat_penalty``, ..."""
    max_thought_tokens: int | None = None
    """Tokens that a thought may have; they are among ``max_tokens``. None: as many as there are."""

    @classmethod
    def of(cls, prompt: str, max_tokens: int) -> Self:
        """One message of a user, answered greedily."""
        return cls([{"role": "user", "content": prompt}], max_tokens)


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
    drafted: int = 0
    """Tokens guessed by speculative decoding, and those of them that were right."""
    accepted: int = 0


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
    thought: bool = False
    """Whether the model thought before it answered; what it thought is no part of the text."""
    reasoning: str = ""
    """What it thought, where the engine tells."""
    thought_tokens: int = 0
    """Length of the thought, among ``completion_tokens``; by its share of the characters where nobody counted."""
    calls: tuple[ToolCall, ...] = ()
    """Calls of tools, as the engine's own parser found them."""

    @property
    def unfinished_thought(self) -> bool:
        """Whether it was cut before an answer began."""
        return self.thought and not self.text and not self.calls and self.finish_reason == "length"


class Engine(Protocol):
    """A model one can talk to. Calls may come from several threads at once, up to ``parallel``."""

    name: str
    """What tables call it."""
    parallel: int
    """Requests worth having in flight at once."""

    def chat(self, chat: Chat) -> Completion:
        """Answer a chat.

        Raises:
            EngineError: the engine died, stalled, or answered something that is not a completion.
        """
        ...

    def close(self) -> None:
        """Let the engine go. Calling it twice does no harm."""
        ...


class Unsupported(EngineError):
    """This engine has no such service: no tokenizer that can be asked, or no clock of its own."""


class EngineTask(StrEnum):
    """What an engine is started for; it does nothing else then."""

    TEXT = "text"
    EMBEDDINGS = "embeddings"
    RERANK = "rerank"


@dataclass(frozen=True)
class Launch:
    """What an engine of our own is given: a model, and how to run it."""

    path: str | Path
    """A GGUF file, or a checkpoint folder."""
    n_ctx: int = DEFAULT_CTX
    """Tokens of context *of one request*."""
    n_parallel: int = 1
    """Requests computed together."""
    threads: int = 2
    n_gpu_layers: int = -1
    """Layers kept on the GPU: -1 as many as fit, 0 none. Without a GPU it has no effect."""
    alias: str = ""
    """The name it answers to; empty: the file's name without ``.gguf``."""
    api_key: str = field(default="", repr=False)
    """What requests must carry; without one the engine answers any web page in a browser on this machine."""
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one."""
    projector: str | Path = ""
    """A GGUF file that takes in pictures and sounds for the model; empty: none."""
    task: EngineTask = EngineTask.TEXT
    chats: bool = True
    """False: nothing is asked that needs the model's chat template, so that one which the engine cannot read does not
    matter."""

    def __post_init__(self) -> None:
        for name, least in (("n_ctx", 16), ("n_parallel", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise BadInput(f"The {name} of an engine must be at least {least}. Got {getattr(self, name)} instead.")

    @property
    def model_name(self) -> str:
        """The name the engine answers to."""
        return self.alias or Path(self.path).name.removesuffix(".gguf")


@runtime_checkable
class TakesProjectors(Protocol):
    """An engine of which it is known whether it loads a projector beside a model."""

    @property
    def takes_projectors(self) -> bool:
        """Whether it does."""
        ...


@runtime_checkable
class TellsOfTools(Protocol):
    """A running engine that knows whether its model can be told of tools."""

    def takes_tools(self) -> bool | None:
        """Whether the model's chat template has a place for tools; None where the engine does not say."""
        ...


@dataclass(frozen=True)
class Identity:
    """Who answers: part of the key of all evidence that an engine gave."""

    engine: str
    version: str
    model: str = ""
    """The name it answers to; empty before a model is named."""

    def __str__(self) -> str:
        return f"{self.engine} {self.version}"


@runtime_checkable
class Running(Engine, Protocol):
    """An engine of our own, and a context manager that starts it and ends it.

    Over HTTP it answers ``GET /health`` with 200 once it can be asked, and speaks OpenAI's API under ``/v1``.
    ``engines.served.ServedEngine`` does all of this for a server that is started by a command.
    """

    @property
    def launch(self) -> Launch:
        """What it was given."""
        ...

    @property
    def identity(self) -> Identity:
        """Who answers."""
        ...

    @property
    def base_url(self) -> str:
        """``http://host:port`` once started."""
        ...

    @property
    def load_seconds(self) -> float:
        """From starting to answering; NaN before."""
        ...

    def start(self) -> Self:
        """Start it and wait until it answers; blocks. `stop` from another thread breaks it off.

        Raises:
            BadInput: there is no such file or folder.
            EngineError: it did not start; the message carries its last words.
        """
        ...

    def poll(self) -> int | None:
        """None while it runs, otherwise its exit code (negative: the signal that ended it)."""
        ...

    def stop(self, grace_s: float = 5.0) -> None:
        """End it, by force after ``grace_s``; blocks. Calling it twice does no harm."""
        ...

    def last_log(self, lines: int = 8) -> str:
        """The engine's last words."""
        ...

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids. ``add_special`` adds BOS and EOS where the model wants them.

        Raises:
            Unsupported: the engine cannot be asked for them.
            EngineError: it died, stalled or answered nonsense.
        """
        ...

    def time_tokens(self, tokens: Sequence[int], *, max_tokens: int, again: bool = False) -> Mapping[str, float]:
        """Compute a prompt anew and decode exactly ``max_tokens`` after it, on the engine's own clock. ``again``: what
        the engine still holds of the prompt need not be computed once more.

        Returns ``prompt_n``, ``prompt_ms``, ``predicted_n``, ``predicted_ms``: tokens, and milliseconds.

        Raises:
            Unsupported: it has no clock of its own.
            EngineError: it died, stalled or answered nonsense.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Continuing(Protocol):
    """An engine that goes on from tokens, which comparing answers token by token needs."""

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """As of `Running`."""
        ...

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that the model's own chat template makes of a chat."""
        ...

    def continue_tokens(self, tokens: Sequence[int], *, max_tokens: int, top: int = 2) -> list[TokenChoice]:
        """Greedy continuation of a prompt given as token ids, with the ``top`` most likely tokens at each place."""
        ...


class EngineKind(Protocol):
    """A program that runs models, installed or not."""

    @property
    def name(self) -> str:
        """What users call it."""
        ...

    def missing(self) -> str:
        """Empty where it can run here, else what to do about it, as a sentence."""
        ...

    def identity(self) -> Identity:
        """Engine and version, without starting it: stored evidence is looked up by them."""
        ...

    def prepare(self, launch: Launch) -> Running:
        """The engine for a model, not yet started."""
        ...
