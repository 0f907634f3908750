"""Anthropic's Messages API in words of chat completions, and the answers back (docs.anthropic.com, "Messages").

What chat completions cannot carry is refused by name: tools that the service runs, files that it holds, PDFs. Marks for
caches and signatures of thoughts mean nothing to other services and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bitladder.serve.chat_answer import AnswerEvents, ChatAnswer, Part, PartKind, Piece, whole_answer
from bitladder.serve.protocol import Refused
from bitladder.serve.translation import as_list, as_object, as_text, chat_messages, json_event, refuse

_OURS = frozenset(
    {"messages", "system", "tools", "tool_choice", "stop_sequences", "thinking", "metadata", "container"}
    | {"mcp_servers", "output_config", "output_format", "context_management", "service_tier", "cache_control"}
    | {"inference_geo", "betas"}
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_STOPS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_LEFT_OUT = ("redacted_thinking",)


def chat_request(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the same request to ``/v1/chat/completions``.

    Raises:
        Refused: 400, something in it cannot be said there.
    """
    for name in ("container", "mcp_servers"):
        if asked.get(name):
            raise refuse(f"'{name}' cannot be used with this model: it needs a service that runs tools.")
    body = {name: value for name, value in asked.items() if name not in _OURS}
    body["messages"] = _messages(asked)
    if asked.get("stop_sequences"):
        body["stop"] = asked["stop_sequences"]
    if user := as_object(asked.get("metadata"), "metadata").get("user_id"):
        body["user"] = user
    body |= _tools(asked) | _output(asked)
    if asked.get("stream") is True:
        body["stream_options"] = {"include_usage": True}
    return body


def _messages(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    system = _blocks(asked.get("system"), "system")
    if system:
        turns.append({"role": "system", "content": [_part(block, "system") for block in system]})
    for place, message in enumerate(asked["messages"]):
        where = f"messages[{place}]"
        blocks = _blocks(message.get("content"), f"{where}.content")
        match message.get("role"):
            case "user":
                turns += _from_user(blocks, where)
            case "assistant":
                turns.append(_from_assistant(blocks, where))
            case "system":
                turns.append({"role": "system", "content": [_part(block, where) for block in blocks]})
            case _:
                raise Refused(400, f"'{where}.role' must be user or assistant.", code="bad_request")
    return chat_messages(turns)


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [as_object(block, where) for block in as_list(content, where)]


def _from_user(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """What tools answered comes first, as messages of their own: it belongs to the calls right before."""
    results = [block for block in blocks if block.get("type") == "tool_result"]
    others = [_part(block, where) for block in blocks if block.get("type") != "tool_result"]
    turns: list[dict[str, Any]] = [
        {
            "role": "tool",
            "tool_call_id": block.get("tool_use_id"),
            "content": [_part(one, where) for one in _blocks(block.get("content"), f"{where}.content")],
        }
        for block in results
    ]
    return [*turns, {"role": "user", "content": others}] if others or not results else turns


def _from_assistant(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant"}
    texts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for block in blocks:
        kind = block.get("type")
        if kind == "tool_use":
            arguments = json.dumps(as_object(block.get("input"), f"{where}.input"), ensure_ascii=False)
            function = {"name": as_text(block.get("name"), f"{where}.name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(as_text(block.get("thinking"), f"{where}.thinking"))
        elif kind not in _LEFT_OUT:
            texts.append(_part(block, where))
    if thoughts:
        turn["reasoning_content"] = "\n".join(thoughts)
    if texts:
        turn["content"] = texts
    if calls:
        turn["tool_calls"] = calls
    return turn


def _part(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = block.get("type")
    source = block.get("source")
    if kind == "text":
        return {"type": "text", "text": as_text(block.get("text"), f"{where}.text")}
    if kind == "image" and isinstance(source, dict):
        if source.get("type") == "base64":
            media, data = (as_text(source.get(name), f"{where}.source.{name}") for name in ("media_type", "data"))
            return {"type": "image_url", "image_url": {"url": f"data:{media};base64,{data}"}}
        if source.get("type") == "url":
            return {"type": "image_url", "image_url": {"url": as_text(source.get("url"), f"{where}.source.url")}}
    if kind == "document" and isinstance(source, dict) and source.get("type") == "text":
        title = f"{block['title']}\n\n" if isinstance(block.get("title"), str) else ""
        return {"type": "text", "text": title + as_text(source.get("data"), f"{where}.source.data")}
    of = f" from '{str(source.get('type'))[:40]}'" if isinstance(source, dict) else ""
    raise refuse(f"Blocks of the type '{str(kind)[:40]}'{of} ({where}) cannot be used with this model.")


def _tools(asked: Mapping[str, Any]) -> dict[str, Any]:
    tools = [_tool(tool) for tool in as_list(asked.get("tools"), "tools")]
    choice = as_object(asked.get("tool_choice"), "tool_choice")
    found: dict[str, Any] = {"tools": tools} if tools else {}
    if choice.get("type") == "tool":
        found["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif choice:
        chosen = _CHOICES.get(str(choice.get("type")))
        if chosen is None:
            raise Refused(400, "'tool_choice.type' must be auto, any, tool or none.", code="bad_request")
        found["tool_choice"] = chosen
    if tools and choice.get("disable_parallel_tool_use") is True:
        found["parallel_tool_calls"] = False
    return found


def _tool(tool: Any) -> dict[str, Any]:
    tool = as_object(tool, "tools")
    if tool.get("type", "custom") not in ("custom", None):
        raise refuse(
            f"Tools of the type '{str(tool['type'])[:40]}' cannot be used with this model: it calls functions alone."
        )
    function = {name: tool[name] for name in ("name", "description", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": {**function, "parameters": as_object(tool.get("input_schema"), "tools")}}


def _output(asked: Mapping[str, Any]) -> dict[str, Any]:
    config = as_object(asked.get("output_config"), "output_config")
    shape = as_object(config.get("format") or asked.get("output_format"), "output_config.format")
    found: dict[str, Any] = {"reasoning_effort": config["effort"]} if config.get("effort") else {}
    if shape:
        if shape.get("type") != "json_schema":
            raise refuse("'output_config.format.type' must be json_schema.")
        about = {"name": "answer", "schema": shape.get("schema"), "strict": True}
        found["response_format"] = {"type": "json_schema", "json_schema": about}
    return found


def document(chat: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001 - as of its like
    """A chat completion as a message.

    Raises:
        ValueError, TypeError, AttributeError, KeyError: it has another shape than OpenAI's.
    """
    answer = whole_answer(chat)
    content = [_block(part, answer) for part in answer.parts]
    return {**_message(answer), "content": content, **_stopped(answer), "usage": _usage(answer)}


def _message(answer: ChatAnswer) -> dict[str, Any]:
    return {
        "id": f"msg_{answer.id}",
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _stopped(answer: ChatAnswer) -> dict[str, Any]:
    called = any(part.kind is PartKind.CALL for part in answer.parts)
    reason = _STOPS.get(answer.finish) or ("tool_use" if called else "end_turn")
    if reason == "end_turn" and answer.stopped_by:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": answer.stopped_by or None}


def _usage(answer: ChatAnswer) -> dict[str, int]:
    """Anthropic's API counts what came out of a cache apart."""
    cached = min(answer.detail("prompt", "cached_tokens"), answer.prompt_tokens)
    return {
        "input_tokens": answer.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": answer.completion_tokens,
    }


def _block(part: Part, answer: ChatAnswer) -> dict[str, Any]:
    if part.kind is not PartKind.CALL:
        return _begun(part) | {_MEMBERS[part.kind]: part.text}
    return _begun(part) | {"input": _arguments(part, answer)}


def _arguments(part: Part, answer: ChatAnswer) -> dict[str, Any]:
    """A call's arguments; none where they were cut."""
    try:
        found = json.loads(part.text or "{}")
    except ValueError:
        if answer.finish != "length":
            raise
        found = {}
    if not isinstance(found, dict):
        raise TypeError("a call's arguments are no object")
    return found


_MEMBERS = {PartKind.TEXT: "text", PartKind.REFUSAL: "text", PartKind.THOUGHT: "thinking"}


def _begun(part: Part) -> dict[str, Any]:
    """A part as a block that holds nothing yet."""
    if part.kind is PartKind.CALL:
        return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": {}}
    if part.kind is PartKind.THOUGHT:
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _delta(part: Part, text: str) -> dict[str, str]:
    if part.kind is PartKind.CALL:
        return {"type": "input_json_delta", "partial_json": text}
    if part.kind is PartKind.THOUGHT:
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


class EventWriter(AnswerEvents):
    """The chunks of a chat completion as the events of a message."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        super().__init__(asked)
        self._begun = False

    def finish(self) -> bytes:
        """As ``AnswerEvents``."""
        ending = {"type": "message_delta", "delta": _stopped(self._answer), "usage": _usage(self._answer)}
        return self._begin() + self._done() + json_event(ending) + json_event({"type": "message_stop"})

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        message = {**_message(self._answer), "usage": _usage(self._answer)}
        return json_event({"type": "message_start", "message": message})

    def _piece(self, piece: Piece) -> bytes:
        part, before = piece.part, b""
        if piece.begins:
            before = self._done()
            self._open = part
            before += json_event({"type": "content_block_start", "index": part.number, "content_block": _begun(part)})
        elif part is not self._open:
            raise ValueError("two parts of an answer at once")
        if not piece.text:
            return before
        delta = _delta(part, piece.text)
        return before + json_event({"type": "content_block_delta", "index": part.number, "delta": delta})

    def _done(self) -> bytes:
        part, self._open = self._open, None
        return b"" if part is None else json_event({"type": "content_block_stop", "index": part.number})
