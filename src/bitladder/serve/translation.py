"""What every translation of an API into chat completions needs: readers that refuse, turns that are joined, events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.serve.protocol import Refused

Json = Mapping[str, Any]


def refuse(message: str) -> Refused:
    """The refusal of what cannot be said in chat completions."""
    return Refused(400, message, code="unsupported")


def as_object(value: Any, where: str) -> dict[str, Any]:
    """A member that is an object; empty where it is missing.

    Raises:
        Refused: 400, it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refused(400, f"'{where}' must be an object.", code="bad_request")
    return value


def as_list(value: Any, where: str) -> list[Any]:
    """A member that is a list; empty where it is missing.

    Raises:
        Refused: 400, it is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise Refused(400, f"'{where}' must be a list.", code="bad_request")
    return value


def as_text(value: Any, where: str) -> str:
    """A member that is a text.

    Raises:
        Refused: 400, it is something else.
    """
    if not isinstance(value, str):
        raise Refused(400, f"'{where}' must be a text.", code="bad_request")
    return value


def chat_messages(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: one system message, at the start, where those that begin a conversation
    are several; and what an assistant thought, said and called in one turn as one message.
    """
    joined: list[dict[str, Any]] = []
    for turn in turns:
        last = joined[-1] if joined else {}
        if turn["role"] == "system" and last.get("role") == "system":
            last["content"] = _both(last["content"], turn["content"])
        elif turn["role"] == "assistant" and last.get("role") == "assistant" and _goes_on(last, turn):
            joined[-1] = {**last, **turn, "tool_calls": [*last.get("tool_calls", ()), *turn.get("tool_calls", ())]}
            if not joined[-1]["tool_calls"]:
                del joined[-1]["tool_calls"]
        else:
            joined.append(dict(turn))
    for message in joined:
        if message["role"] == "assistant":
            message.setdefault("content", None if message.get("tool_calls") else "")
        message["content"] = _plainly(message["content"])
    return joined


def _goes_on(last: Json, turn: Json) -> bool:
    """Whether a message goes on with the one before: no member but the calls would be written over."""
    return not any(name in last for name in turn if name not in ("role", "tool_calls")) and not (
        "tool_calls" in last and "tool_calls" not in turn
    )


def _both(first: Any, second: Any) -> Any:
    first, second = _plainly(first), _plainly(second)
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [*_parts(first), *_parts(second)]


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _plainly(content: Any) -> Any:
    """Content as a text where all of it is: many chat templates know no parts."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "\n".join(part["text"] for part in content)
    return content


def json_bytes(document: Json) -> bytes:
    """JSON in UTF-8; escaped where it holds half a surrogate pair, which UTF-8 cannot."""
    try:
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(document, separators=(",", ":")).encode()


def json_event(document: Json) -> bytes:
    """An event of a stream that is named as its document's type."""
    return b"event: %b\ndata: %b\n\n" % (document["type"].encode(), json_bytes(document))
