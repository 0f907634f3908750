"""OpenAI's Responses API in words of chat completions, and the answers back (platform.openai.com, "Responses").

What chat completions cannot carry is refused by name: conversations that a server keeps, tools that it runs, files that
it holds. Members that mean the same in both APIs, or that we do not know, go on as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitladder.serve.chat_answer import AnswerEvents, ChatAnswer, Part, PartKind, Piece, whole_answer
from bitladder.serve.translation import (
    as_list,
    as_object,
    as_text,
    chat_messages,
    json_event,
    refuse,
)

_KEPT_ELSEWHERE = {
    "previous_response_id": "answers are not kept here: send the whole conversation in 'input'",
    "conversation": "conversations are not kept here: send the whole conversation in 'input'",
    "prompt": "prompts are not kept here: send the text",
    "background": "answers are not kept here, so none is computed in the background",
}
_OURS = frozenset(
    {*_KEPT_ELSEWHERE, "input", "instructions", "max_output_tokens", "tools", "tool_choice", "text", "reasoning"}
    | {"include", "store", "truncation", "metadata", "stream_options", "top_logprobs", "parallel_tool_calls"}
    | {"context_management"}
)
_ECHOED: Mapping[str, Any] = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "temperature": 1.0,
    "tool_choice": "auto", "tools": [], "top_p": 1.0, "truncation": "disabled", "user": None,
}  # fmt: skip
"""What a response repeats of its request, and what is repeated where the request says nothing."""
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


def chat_request(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the same request to ``/v1/chat/completions``.

    Raises:
        Refused: 400, something in it cannot be said there.
    """
    for name, why in _KEPT_ELSEWHERE.items():
        if asked.get(name):
            raise refuse(f"'{name}' cannot be used: {why}.")
    body = {name: value for name, value in asked.items() if name not in _OURS}
    body["messages"] = _messages(asked)
    if asked.get("max_output_tokens") is not None:
        body["max_tokens"] = asked["max_output_tokens"]
    body |= _tools(asked) | _text(as_object(asked.get("text"), "text"))
    if (effort := as_object(asked.get("reasoning"), "reasoning").get("effort")) is not None:
        body["reasoning_effort"] = effort
    if asked.get("top_logprobs") is not None or "message.output_text.logprobs" in as_list(
        asked.get("include"), "include"
    ):
        body |= {"logprobs": True, "top_logprobs": asked.get("top_logprobs") or 0}
    if asked.get("stream") is True:
        body["stream_options"] = {"include_usage": True}
    return body


def _messages(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    task = asked["input"]
    items = [{"role": "user", "content": task}] if isinstance(task, str) else task
    said: list[dict[str, Any]] = []
    if asked.get("instructions"):
        said.append({"role": "system", "content": as_text(asked["instructions"], "instructions")})
    for place, item in enumerate(items):
        said += _item(item, f"input[{place}]")
    return chat_messages(said)


def _item(item: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages of one item; those of one turn are joined afterwards."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise refuse(f"'{where}.role' must be user, assistant, system or developer.")
        content = item.get("content")
        parts = (
            content if isinstance(content, str) else [_part(one, where) for one in as_list(content, f"{where}.content")]
        )
        return [{"role": "system" if role == "developer" else role, "content": parts}]
    if kind == "function_call":
        call = {"name": as_text(item.get("name"), f"{where}.name"), "arguments": as_text(item.get("arguments"), where)}
        calls = [{"id": item.get("call_id") or item.get("id"), "type": "function", "function": call}]
        return [{"role": "assistant", "tool_calls": calls}]
    if kind == "function_call_output":
        output = item.get("output")
        content = (
            output if isinstance(output, str) else [_part(one, where) for one in as_list(output, f"{where}.output")]
        )
        return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": content}]
    if kind == "reasoning":
        texts = [
            part.get("text") for part in as_list(item.get("content"), f"{where}.content") if isinstance(part, dict)
        ]
        thought = "".join(text for text in texts if isinstance(text, str))
        return [{"role": "assistant", "reasoning_content": thought}] if thought else []
    raise refuse(f"Items of the type '{str(kind)[:40]}' ({where}) cannot be used with this model.")


def _content_of(content: Any, where: str) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [_part(part, where) for part in as_list(content, where)]


def _part(part: Any, where: str) -> dict[str, Any]:
    part = as_object(part, where)
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": as_text(part.get("text"), f"{where}.text")}
    if kind == "refusal":
        return {"type": "text", "text": as_text(part.get("refusal"), f"{where}.refusal")}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        detail = {"detail": part["detail"]} if part.get("detail") else {}
        return {"type": "image_url", "image_url": {"url": part["image_url"], **detail}}
    if kind == "input_audio":
        return {"type": "input_audio", "input_audio": part.get("input_audio")}
    raise refuse(f"Parts of the type '{str(kind)[:40]}' ({where}), or of kept files, cannot be used with this model.")


def _tools(asked: Mapping[str, Any]) -> dict[str, Any]:
    tools = [_tool(tool) for tool in as_list(asked.get("tools"), "tools")]
    choice = asked.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        names = {
            tool.get("name") for tool in as_list(choice.get("tools"), "tool_choice.tools") if isinstance(tool, dict)
        }
        tools = [tool for tool in tools if tool["function"].get("name") in names]
        choice = choice.get("mode", "auto")
    elif isinstance(choice, dict):
        if choice.get("type") != "function":
            raise refuse(f"A tool_choice of the type '{str(choice.get('type'))[:40]}' cannot be used with this model.")
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    found: dict[str, Any] = {"tools": tools} if tools else {}
    if choice is not None and (tools or choice not in ("auto", "none")):
        found["tool_choice"] = choice
    if tools and asked.get("parallel_tool_calls") is not None:
        found["parallel_tool_calls"] = asked["parallel_tool_calls"]
    return found


def _tool(tool: Any) -> dict[str, Any]:
    tool = as_object(tool, "tools")
    if tool.get("type") != "function":
        kind = str(tool.get("type"))[:40]
        raise refuse(f"Tools of the type '{kind}' cannot be used with this model: it calls functions alone.")
    known = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in known if tool.get(name) is not None}}


def _text(text: Mapping[str, Any]) -> dict[str, Any]:
    shape = as_object(text.get("format"), "text.format")
    found = {"verbosity": text["verbosity"]} if text.get("verbosity") else {}
    if shape.get("type") == "json_schema":
        known = ("name", "description", "schema", "strict")
        about = {name: shape[name] for name in known if shape.get(name) is not None}
        return {**found, "response_format": {"type": "json_schema", "json_schema": about}}
    if shape.get("type", "text") != "text":
        return {**found, "response_format": shape}
    return found


def document(chat: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion as the response to a request.

    Raises:
        ValueError, TypeError, AttributeError, KeyError: it has another shape than OpenAI's.
    """
    answer = whole_answer(chat)
    return _response(answer, asked, _ending(answer))


def _ending(answer: ChatAnswer) -> str:
    return "incomplete" if answer.finish in _INCOMPLETE else "completed"


def _response(answer: ChatAnswer, asked: Mapping[str, Any], status: str) -> dict[str, Any]:
    running = status == "in_progress"
    reason = _INCOMPLETE.get(answer.finish) if status == "incomplete" else None
    echoed = {name: asked[name] if asked.get(name) is not None else other for name, other in _ECHOED.items()}
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "model": answer.model,
        "output": [] if running else [_output(part, answer, status) for part in answer.parts],
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None, **as_object(asked.get("reasoning"), "reasoning")},
        "store": False,
        "text": asked.get("text") or {"format": {"type": "text"}},
        **echoed,
        "usage": None if running else _usage(answer),
    }


def _usage(answer: ChatAnswer) -> dict[str, Any]:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.detail("prompt", "cached_tokens")},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.detail("completion", "reasoning_tokens")},
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def _item_id(part: Part, answer: ChatAnswer) -> str:
    start = {PartKind.THOUGHT: "rs", PartKind.CALL: "fc"}.get(part.kind, "msg")
    return f"{start}_{answer.id}{part.number}"


def _output(part: Part, answer: ChatAnswer, status: str) -> dict[str, Any]:
    """A part as an item; while it is in progress it holds nothing yet."""
    about = {"id": _item_id(part, answer), "status": status}
    begun = status == "in_progress"
    if part.kind is PartKind.CALL:
        arguments = "" if begun else part.text
        return {"type": "function_call", **about, "call_id": part.call_id, "name": part.name, "arguments": arguments}
    content = [] if begun else [_content(part)]
    if part.kind is PartKind.THOUGHT:
        return {"type": "reasoning", **about, "summary": [], "content": content}
    return {"type": "message", **about, "role": "assistant", "content": content}


def _content(part: Part, *, empty: bool = False) -> dict[str, Any]:
    text = "" if empty else part.text
    if part.kind is PartKind.THOUGHT:
        return {"type": "reasoning_text", "text": text}
    if part.kind is PartKind.REFUSAL:
        return {"type": "refusal", "refusal": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [] if empty else part.logprobs}


_FIELDS = {
    PartKind.TEXT: ("output_text", "text"),
    PartKind.THOUGHT: ("reasoning_text", "text"),
    PartKind.REFUSAL: ("refusal", "refusal"),
    PartKind.CALL: ("function_call_arguments", "arguments"),
}
"""What the events of a part are called, and the member that has its text when it is done."""


class EventWriter(AnswerEvents):
    """The chunks of a chat completion as the events of a response."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        super().__init__(asked)
        self._number = 0

    def finish(self) -> bytes:
        """As ``AnswerEvents``."""
        status = _ending(self._answer)
        last = self._begin() + self._done()
        return last + self._event(status, response=_response(self._answer, self._asked, status))

    def _begin(self) -> bytes:
        if self._number:
            return b""
        begun = _response(self._answer, self._asked, "in_progress")
        return self._event("created", response=begun) + self._event("in_progress", response=begun)

    def _piece(self, piece: Piece) -> bytes:
        part = piece.part
        before = b""
        if piece.begins:
            before = self._done()
            self._open = part
            item = _output(part, self._answer, "in_progress")
            before += self._event("output_item.added", output_index=part.number, item=item)
            if part.kind is not PartKind.CALL:
                before += self._of_part("content_part.added", part, part=_content(part, empty=True))
        elif part is not self._open:
            raise ValueError("two parts of an answer at once")
        if not piece.text:
            return before
        about = {"delta": piece.text} | ({"logprobs": piece.logprobs} if part.kind is PartKind.TEXT else {})
        return before + self._of_part(f"{_FIELDS[part.kind][0]}.delta", part, **about)

    def _done(self) -> bytes:
        """The events that end the part that is open, if one is."""
        part, self._open = self._open, None
        if part is None:
            return b""
        name, member = _FIELDS[part.kind]
        about: dict[str, Any] = {member: part.text}
        if part.kind is PartKind.TEXT:
            about["logprobs"] = part.logprobs
        if part.kind is PartKind.CALL:
            about["name"] = part.name
        out = self._of_part(f"{name}.done", part, **about)
        if part.kind is not PartKind.CALL:
            out += self._of_part("content_part.done", part, part=_content(part))
        status = _ending(self._answer)
        return out + self._event("output_item.done", output_index=part.number, item=_output(part, self._answer, status))

    def _of_part(self, kind: str, of: Part, /, **about: Any) -> bytes:
        place: dict[str, Any] = {"item_id": _item_id(of, self._answer), "output_index": of.number}
        if of.kind is not PartKind.CALL:
            place["content_index"] = 0
        return self._event(kind, **place, **about)

    def _event(self, kind: str, /, **about: Any) -> bytes:
        event = {"type": f"response.{kind}", "sequence_number": self._number, **about}
        self._number += 1
        return json_event(event)
