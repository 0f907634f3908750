"""``tool_choice`` is honoured or refused, never passed over: a client that asked for a call waits for one.

llama.cpp takes "required" for a wish, and the name of a tool for "auto". So a call that must be made is asked of our
own engines as an answer in JSON: the schema holds the functions that may be called and their parameters, the template
tells the model of the tools as ever, and what comes back is worded as the call that it is. Other upstreams get
``tool_choice`` as it came, and an answer that ends without the call is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bitladder.serve.backends import UpstreamFailed
from bitladder.serve.events import DONE, read_events
from bitladder.serve.protocol import CHAT, ModelRequest, Refused, name_of_tool, named_tool
from bitladder.serve.relay import Relayed
from bitladder.serve.tiers import Tier
from bitladder.serve.translation import json_bytes

_NO_CALL = "The model answered without the tool call that 'tool_choice' asks for."
_BEGINNING = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')
_ENDING = re.compile(r"[\s}]*\Z")


def is_forced(request: ModelRequest) -> bool:
    """Whether a chat request asks for a call, whatever the model would do."""
    return request.path == CHAT and request.value("tool_choice") not in (None, "none", "auto")


def as_schema(request: ModelRequest, tier: Tier) -> bool:
    """Whether a forced call is asked of this tier as an answer in JSON."""
    return tier.engine is not None and is_forced(request)


def tool_values(request: ModelRequest, tier: Tier) -> dict[str, Any]:
    """What must differ in a chat request, so that this tier's engine honours its ``tool_choice``.

    Raises:
        Refused: 400, the model cannot be told of tools, or the parameters of one are no schema.
    """
    tools, choice = request.value("tools"), request.value("tool_choice")
    if not tools or choice == "none" or tier.engine is None:
        return {}
    if tier.engine.takes_tools is False:
        raise Refused(
            400,
            f"{tier.spec.level} does not support tools: the model's chat template has no place for them.",
            code="tools_not_supported",
        )
    if not as_schema(request, tier):
        return {}
    name = named_tool(choice)
    called = [tool for tool in tools if name in (None, name_of_tool(tool))]
    try:
        schema = _schema(called)
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise Refused(400, "'tools' must be functions with a name and a schema.", code="bad_request") from None
    shape = {"type": "json_schema", "json_schema": {"name": "call", "strict": True, "schema": schema}}
    return {"tool_choice": "none", "response_format": shape, "parallel_tool_calls": False}


def _schema(tools: list[Any]) -> dict[str, Any]:
    """The schema of one call. Each function's parameters stand whole under ``$defs``, so that references within them
    can be set right.
    """
    calls, definitions = [], {}
    for place, tool in enumerate(tools):
        function = tool["function"]
        definitions[f"tool{place}"] = _moved(function.get("parameters") or {"type": "object"}, f"#/$defs/tool{place}")
        parts = {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/tool{place}"}}
        about = {"required": ["name", "arguments"], "additionalProperties": False}
        calls.append({"type": "object", "properties": parts, **about})
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": definitions}


def _moved(schema: Any, to: str) -> Any:
    """A schema whose references from its root begin at ``to``."""
    if isinstance(schema, list):
        return [_moved(one, to) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: to + value[1:]
        if name == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, to)
        for name, value in schema.items()
    }


def with_calls(answer: Relayed, request: ModelRequest, tier: Tier) -> Relayed:
    """The same answer with the call that the request asks for; a stream's end is held against it, too.

    Raises:
        Refused: 400, a document ends without a call.
        UpstreamFailed: phase ``garbage``, a document that should be a call is none.
    """
    if not is_forced(request) or answer.status >= 300:
        return answer
    worded = as_schema(request, tier)
    if answer.stream is not None:
        return replace(answer, stream=_called(answer.stream) if worded else _with_calls(answer.stream))
    document = json.loads(answer.head)
    if worded:
        return replace(answer, head=_called_document(document))
    seen = _Calls()
    seen.look(document)
    if seen.missing:
        raise Refused(400, f"{_NO_CALL} It does not support that.", code="tools_not_supported")
    return answer


async def _with_calls(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    seen = _Calls()
    async for whole in chunks:
        for _, chunk in read_events(whole):
            if chunk is None and seen.missing:
                raise UpstreamFailed("no tool call", _NO_CALL)
            seen.look(chunk or {})
        yield whole


class _Calls:
    """Whether an answer made a call, or ended of itself without one."""

    def __init__(self) -> None:
        self._called = self._ended = False

    @property
    def missing(self) -> bool:
        """It ended, and not because it had to be cut, without a call."""
        return self._ended and not self._called

    def look(self, document: Mapping[str, Any]) -> None:
        """See a document, or the next chunk of a stream."""
        for choice in document.get("choices") or ():
            part = choice.get("message") or choice.get("delta")
            self._called |= isinstance(part, dict) and bool(part.get("tool_calls") or part.get("function_call"))
            self._ended |= choice.get("finish_reason") == "stop"


@dataclass
class _CallWriter:
    """The JSON of one choice, piece by piece, as the call that it is."""

    held: str = ""
    """What came and is not told yet: the beginning, or what may be the end."""
    name: str = ""
    begun: bool = False
    """Whether any of the arguments was told."""

    def take(self, text: str) -> tuple[bool, str]:
        """Whether the call begins here, and what can be told of its arguments."""
        self.held += text
        begins = False
        if not self.name:
            found = _BEGINNING.match(self.held)
            if found is None:
                return False, ""
            self.name, self.held, begins = json.loads(found[1]), self.held[found.end() :], True
        if not self.begun:
            self.held = self.held.lstrip()  # of "arguments": {} the space may come by itself
        ending = _ENDING.search(self.held)
        told, self.held = self.held[: ending.start()], self.held[ending.start() :]  # type: ignore[union-attr]
        self.begun = self.begun or bool(told)
        return begins, told

    def rest(self, *, cut: bool) -> str:
        """What is left of the arguments: all of it where the answer was cut, else without the brace of the call."""
        return self.held if cut else self.held.rstrip().removesuffix("}").rstrip()


@dataclass
class _CalledStream:
    """The chunks of a stream of JSON as those of a call."""

    writers: dict[Any, _CallWriter] = field(default_factory=dict)

    def take(self, chunk: dict[str, Any]) -> bytes:
        """The chunk in other words."""
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta")
            if not isinstance(delta, dict):
                continue
            writer = self.writers.setdefault(choice.get("index", 0), _CallWriter())
            text = delta.pop("content", None)
            begins, told = writer.take(text) if isinstance(text, str) and text else (False, "")
            finish = choice.get("finish_reason")
            if finish:
                told += writer.rest(cut=finish != "stop") if writer.name else ""
                choice["finish_reason"] = "tool_calls" if finish == "stop" else finish
                if finish == "stop" and not writer.name:
                    raise UpstreamFailed("garbage", _NO_CALL)
            if begins or told:
                about = {"id": _call_id(chunk, choice), "type": "function"} if begins else {}
                function = {**({"name": writer.name} if begins else {}), "arguments": told}
                delta["tool_calls"] = [{"index": 0, **about, "function": function}]
        return b"data: " + json_bytes(chunk) + b"\n\n"


async def _called(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    stream = _CalledStream()
    async for whole in chunks:
        try:
            yield b"".join([DONE if chunk is None else stream.take(chunk) for _, chunk in read_events(whole)])
        except (AttributeError, TypeError, ValueError) as error:
            raise UpstreamFailed("garbage", f"{_NO_CALL} ({error})") from None


def _called_document(document: dict[str, Any]) -> bytes:
    for choice in document.get("choices") or ():
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str):
            raise UpstreamFailed("garbage", _NO_CALL)
        writer = _CallWriter()
        _, told = writer.take(text)
        cut = choice.get("finish_reason") != "stop"
        if not writer.name and not cut:
            raise UpstreamFailed("garbage", _NO_CALL)
        message["content"] = None
        if writer.name:
            function = {"name": writer.name, "arguments": told + writer.rest(cut=cut)}
            message["tool_calls"] = [{"id": _call_id(document, choice), "type": "function", "function": function}]
        if not cut:
            choice["finish_reason"] = "tool_calls"
    return json_bytes(document)


def _call_id(document: Mapping[str, Any], choice: Mapping[str, Any]) -> str:
    return f"call_{str(document.get('id', '')).removeprefix('chatcmpl-')[:40]}{choice.get('index', 0)}"
