"""``tool_choice`` is honoured or refused, never passed over: a client that asked for a call waits for one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from bitladder.serve.backends import UpstreamFailed
from bitladder.serve.events import read_events
from bitladder.serve.protocol import CHAT, ModelRequest, Refused, name_of_tool, named_tool
from bitladder.serve.relay import Relayed
from bitladder.serve.tiers import Tier

_NO_CALL = "The model answered without the tool call that 'tool_choice' asks for."


def tool_values(request: ModelRequest, tier: Tier) -> dict[str, Any]:
    """What must differ in a chat request, so that this tier's engine honours its ``tool_choice``.

    llama.cpp takes the name of a tool there for "auto"; with that tool alone, and a call required, it must call it.

    Raises:
        Refused: 400, the model cannot be told of tools.
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
    name = named_tool(choice)
    if name is None:
        return {}
    return {"tools": [tool for tool in tools if name_of_tool(tool) == name], "tool_choice": "required"}


def with_calls(answer: Relayed, request: ModelRequest) -> Relayed:
    """The same answer, if it makes the call that the request asks for; a stream's end is held against it, too.

    Raises:
        Refused: 400, a document ends without a call.
    """
    forced = request.path == CHAT and request.value("tool_choice") not in (None, "none", "auto")
    if not forced or answer.status >= 300:
        return answer
    if answer.stream is not None:
        return replace(answer, stream=_with_calls(answer.stream))
    seen = _Calls()
    seen.look(json.loads(answer.head))
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
