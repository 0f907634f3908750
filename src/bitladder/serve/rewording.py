"""A request in the words of chat completions, for upstreams that speak nothing else, and its answer worded back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from bitladder.serve import messages_api, responses_api
from bitladder.serve.backends import UpstreamFailed
from bitladder.serve.events import read_events
from bitladder.serve.protocol import CHAT, MESSAGES, RESPONSES, ModelRequest, parse_request
from bitladder.serve.relay import Relayed
from bitladder.serve.translation import json_bytes


class _Writer(Protocol):
    """Makes the events of another API from the chunks of a chat completion."""

    def take(self, chunk: Mapping[str, Any]) -> bytes: ...

    def finish(self) -> bytes: ...


_APIS = {RESPONSES: responses_api, MESSAGES: messages_api}
TRANSLATED = frozenset(_APIS)
"""The paths whose requests can be worded as chat completions."""


def as_chat(request: ModelRequest) -> ModelRequest:
    """The same request to ``/v1/chat/completions``.

    Raises:
        Refused: 400, it cannot be said there.
    """
    asked = {name: member.value for name, member in request.members.items()}
    return parse_request(CHAT, json_bytes(_APIS[request.path].chat_request(asked)))


def worded_for(request: ModelRequest, answer: Relayed) -> Relayed:
    """A chat completion as the answer to a request; errors stay as they are.

    Raises:
        UpstreamFailed: phase ``garbage``, it is none after all.
    """
    if answer.status >= 300:
        return answer
    api = _APIS[request.path]
    asked = {name: member.value for name, member in request.members.items()}
    if answer.stream is not None:
        return replace(answer, stream=_events(answer.stream, api.EventWriter(asked)))
    try:
        document = api.document(json.loads(answer.head), asked)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _garbage(error) from None
    return replace(answer, content_type="application/json", head=json_bytes(document))


async def _events(chunks: AsyncIterator[bytes], writer: _Writer) -> AsyncIterator[bytes]:
    async for whole in chunks:
        try:
            worded = [writer.finish() if chunk is None else writer.take(chunk) for _, chunk in read_events(whole)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _garbage(error) from None
        if events := b"".join(worded):
            yield events


def _garbage(error: Exception) -> UpstreamFailed:
    return UpstreamFailed("garbage", f"The upstream's answer is no chat completion ({type(error).__name__}: {error}).")
