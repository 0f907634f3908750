"""What a chat completion says, taken apart: the parts of an answer, from a document or from the chunks of a stream.

The other APIs that the gateway speaks (`responses_api`, `messages_api`) are worded from these parts, so that a document
and a stream of one answer cannot differ.
"""

from __future__ import annotations

import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from bitladder.engines.chat_api import count_of, text_of
from bitladder.units import MiB

_MAX_CHARACTERS = 64 * MiB
_NOT_OF_AN_ID = re.compile(r"[^A-Za-z0-9]+")
_MOST_CALLS = 1024


class PartKind(StrEnum):
    """What a part of an answer is."""

    THOUGHT = "thought"
    TEXT = "text"
    REFUSAL = "refusal"
    CALL = "call"
    """Of a function: its text is the arguments, JSON."""


@dataclass
class Part:
    """One part of an answer, as far as it has come."""

    kind: PartKind
    number: int
    """Its place among the parts."""
    pieces: list[str] = field(default_factory=list)
    call_id: str = ""
    name: str = ""
    """Of the function."""
    logprobs: list[Any] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


class Piece(NamedTuple):
    """What one chunk adds to a part."""

    part: Part
    text: str
    begins: bool
    """Whether the part is a new one."""
    logprobs: list[Any]


class ChatAnswer:
    """The first choice of a chat completion, taken apart."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.model = ""
        self.created = int(time.time())
        self.finish = ""
        """``stop``, ``length``, ``tool_calls``, ``content_filter``; empty before the end is told."""
        self.stopped_by = ""
        """The stop sequence, where the upstream tells it."""
        self.usage: Mapping[str, Any] = {}
        self._id = ""
        self._calls: dict[int, Part] = {}
        self._characters = 0

    @property
    def id(self) -> str:
        """The upstream's id for the answer in letters and digits, or a new one."""
        if not self._id:
            self._id = secrets.token_hex(16)
        return self._id

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 where they are not told."""
        return count_of(self.usage.get("prompt_tokens"), 0)

    @property
    def completion_tokens(self) -> int:
        """Tokens of the answer; 0 where they are not told."""
        return count_of(self.usage.get("completion_tokens"), 0)

    def detail(self, of: str, name: str) -> int:
        """``usage.prompt_tokens_details.cached_tokens`` and the like; 0 where it is not told."""
        details = self.usage.get(f"{of}_tokens_details")
        return count_of(details.get(name), 0) if isinstance(details, dict) else 0

    def take(self, document: Mapping[str, Any]) -> Iterator[Piece]:
        """A whole document, or the next chunk of a stream; gives what it adds.

        Raises:
            ValueError, TypeError, AttributeError, KeyError: it has another shape than OpenAI's.
        """
        if isinstance(document.get("id"), str) and not self._id:
            self._id = _NOT_OF_AN_ID.sub("", document["id"].removeprefix("chatcmpl"))[:64]
        self.model = document.get("model") or self.model
        self.created = count_of(document.get("created"), self.created)
        usage = document.get("usage")
        self.usage = usage if isinstance(usage, dict) else self.usage
        for choice in document.get("choices") or ():
            if choice.get("index", 0) in (0, None):
                yield from self._choice(choice)

    def _choice(self, choice: Mapping[str, Any]) -> Iterator[Piece]:
        delta = choice.get("delta") or choice.get("message") or {}
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(thought, str) and thought:
            yield self._add(PartKind.THOUGHT, thought)
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        if text := text_of(delta.get("content")):
            yield self._add(PartKind.TEXT, text, logprobs)
        if refusal := text_of(delta.get("refusal")):
            yield self._add(PartKind.REFUSAL, refusal)
        for place, call in enumerate(delta.get("tool_calls") or ()):
            yield self._call(count_of(call.get("index"), place), call)
        self.finish = choice.get("finish_reason") or self.finish
        if isinstance(choice.get("stop_reason"), str):
            self.stopped_by = choice["stop_reason"]

    def _add(self, kind: PartKind, text: str, logprobs: list[Any] | None = None) -> Piece:
        begins = not self.parts or self.parts[-1].kind is not kind
        part = self._new(kind) if begins else self.parts[-1]
        return self._grown(part, text, begins, logprobs)

    def _call(self, index: int, call: Mapping[str, Any]) -> Piece:
        function = call.get("function") or {}
        begins = index not in self._calls
        if begins:
            part = self._calls[index] = self._new(PartKind.CALL)
            part.call_id = str(call.get("id") or f"call_{self.id}{index}")
            part.name = str(function["name"])
        return self._grown(self._calls[index], text_of(function.get("arguments")), begins)

    def _new(self, kind: PartKind) -> Part:
        if len(self.parts) >= _MOST_CALLS:
            raise ValueError(f"an answer of more than {_MOST_CALLS} parts")
        self.parts.append(Part(kind, len(self.parts)))
        return self.parts[-1]

    def _grown(self, part: Part, text: str, begins: bool, logprobs: list[Any] | None = None) -> Piece:
        self._characters += len(text)
        if self._characters > _MAX_CHARACTERS:
            raise ValueError(f"an answer of more than {_MAX_CHARACTERS} characters")
        part.pieces.append(text)
        part.logprobs += logprobs or ()
        return Piece(part, text, begins, logprobs or [])


def whole_answer(document: Mapping[str, Any]) -> ChatAnswer:
    """The answer in a document.

    Raises:
        ValueError, TypeError, AttributeError, KeyError: it has another shape than OpenAI's.
    """
    answer = ChatAnswer()
    for _ in answer.take(document):
        pass
    return answer


class AnswerEvents(ABC):
    """The chunks of a chat completion as the events of another API."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self._asked = asked
        self._answer = ChatAnswer()
        self._open: Part | None = None

    def take(self, chunk: Mapping[str, Any]) -> bytes:
        """The events that a chunk makes.

        Raises:
            ValueError, TypeError, AttributeError, KeyError: it has another shape than OpenAI's.
        """
        pieces = list(self._answer.take(chunk))
        return self._begin() + b"".join([self._piece(piece) for piece in pieces])

    @abstractmethod
    def finish(self) -> bytes:
        """The events that end it."""

    @abstractmethod
    def _begin(self) -> bytes:
        """What goes before all others; empty when it went."""

    @abstractmethod
    def _piece(self, piece: Piece) -> bytes:
        """The events of what a chunk adds to a part, the beginning of a new one among them."""
