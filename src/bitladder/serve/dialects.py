"""The APIs that the gateway speaks, a row each: what ends a stream, where the model is named, what counts as an answer.

The words of requests are in ``protocol``, those of the APIs that are translated in `responses_api` and `messages_api`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitladder.serve.events import has_error
from bitladder.serve.protocol import (
    CHAT,
    COMPLETIONS,
    COUNT_TOKENS,
    EMBEDDINGS,
    MESSAGES,
    RERANK,
    RESPONSES,
)

MAX_TOKENS = 1 << 40
"""More completion tokens than any answer has: an upstream's count beyond it is not believed."""


@dataclass(frozen=True)
class Dialect:
    """How one API words its answers."""

    answers: tuple[str, ...]
    """Members of which a document holds at least one, a list or a count."""
    ends: frozenset[str] = frozenset()
    """Types of the events that end a stream; empty: ``[DONE]`` ends it."""
    within: str = ""
    """The member that the events of a stream keep the answer in."""
    failed: frozenset[str] = frozenset({"error"})
    """Types of the events that tell of an error."""
    counted: str = "completion_tokens"
    """What the usage calls the tokens of an answer."""
    marks: bytes = b"data:"
    """Stands once in each event that brings a token."""

    def is_answer(self, document: Mapping[str, Any]) -> bool:
        """Whether a document holds an answer at all."""
        found = [document.get(name) for name in self.answers]
        return any(isinstance(one, list) or type(one) is int for one in found)

    def is_error(self, document: Mapping[str, Any]) -> bool:
        """Whether a document or an event tells of an error."""
        if not self.ends:
            return has_error(document)
        return bool(document.get("error")) or document.get("type") in self.failed or document.get("status") == "failed"

    def model(self, document: Mapping[str, Any]) -> Any:
        """The model that a document or an event names; None where it names none."""
        inner = document.get(self.within) if self.within else None
        return (inner if isinstance(inner, dict) else document).get("model")

    def tokens(self, document: Mapping[str, Any]) -> int:
        """Completion tokens of a document as the upstream counted them; 0 where it did not, or cannot have."""
        usage = document.get("usage")
        tokens = usage.get(self.counted) if isinstance(usage, dict) else None
        return tokens if type(tokens) is int and 0 < tokens <= MAX_TOKENS else 0


DIALECTS: Mapping[str, Dialect] = {
    CHAT: Dialect(("choices",)),
    COMPLETIONS: Dialect(("choices",)),
    EMBEDDINGS: Dialect(("data",)),
    RERANK: Dialect(("results", "data")),
    COUNT_TOKENS: Dialect(("input_tokens",)),
    RESPONSES: Dialect(
        ("output",),
        ends=frozenset({"response.completed", "response.incomplete"}),
        within="response",
        failed=frozenset({"error", "response.failed"}),
        counted="output_tokens",
        marks=b".delta\n",
    ),
    MESSAGES: Dialect(
        ("content",),
        ends=frozenset({"message_stop"}),
        within="message",
        counted="output_tokens",
        marks=b"event: content_block_delta",
    ),
}
