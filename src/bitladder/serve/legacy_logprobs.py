"""Log-probabilities of ``/v1/completions`` in the shape of that API, which llama.cpp words as those of chats.

OpenAI's client knows them as parallel lists: ``tokens``, ``token_logprobs``, ``top_logprobs`` (a mapping each) and
``text_offset``, in characters from where the choice's text begins.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from bitladder.serve.backends import UpstreamFailed
from bitladder.serve.events import DONE, read_events
from bitladder.serve.protocol import COMPLETIONS, ModelRequest
from bitladder.serve.relay import Relayed
from bitladder.serve.translation import json_bytes


def in_own_shape(answer: Relayed, request: ModelRequest) -> Relayed:
    """An answer to a text completion with its log-probabilities as that API has them; every other one as it is.

    Raises:
        UpstreamFailed: phase ``garbage``, they have no shape that is known.
    """
    if request.path != COMPLETIONS or not request.value("logprobs") or answer.status >= 300:
        return answer
    offsets: dict[Any, int] = {}
    if answer.stream is not None:
        return replace(answer, stream=_events(answer.stream, offsets))
    return replace(answer, head=_reworded(answer.head, json.loads(answer.head), offsets))


async def _events(chunks: AsyncIterator[bytes], offsets: dict[Any, int]) -> AsyncIterator[bytes]:
    async for whole in chunks:
        out = []
        for event, chunk in read_events(whole):
            as_it_came = whole[event.begins : event.ends]
            worded = as_it_came if chunk is None else _reworded(b"", chunk, offsets)
            out.append(DONE if chunk is None else b"data: " + worded + b"\n\n" if worded else as_it_came)
        yield b"".join(out)


def _reworded(body: bytes, document: Mapping[str, Any], offsets: dict[Any, int]) -> bytes:
    """The document with the parallel lists, ``body`` where none are needed; ``offsets`` are those of each choice."""
    changed = False
    try:
        for choice in document.get("choices") or ():
            told = choice.get("logprobs")
            if isinstance(told, dict) and isinstance(told.get("content"), list) and "tokens" not in told:
                choice["logprobs"] = _lists(told["content"], offsets, choice.get("index", 0))
                changed = True
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UpstreamFailed("garbage", f"The upstream's log-probabilities are none ({error}).") from None
    return json_bytes(document) if changed else body


def _lists(content: list[Any], offsets: dict[Any, int], choice: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    at = offsets.get(choice, 0)
    for token in content:
        text, logprob = str(token["token"]), float(token["logprob"])
        others = {str(other["token"]): float(other["logprob"]) for other in token.get("top_logprobs") or ()}
        found["tokens"].append(text)
        found["token_logprobs"].append(logprob)
        found["top_logprobs"].append(others or {text: logprob})
        found["text_offset"].append(at)
        at += len(text)
    offsets[choice] = at
    return found
