"""What the servers of this world answer, and how: read alike by the client that measures and the gateway that serves.

Shapes are those that each sends, cut to what matters; the text is "Hello there" in all of them.
"""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from bitladder.engines.base import Chat
from bitladder.engines.endpoint import Endpoint, EndpointSettings, endpoint_at
from bitladder.errors import EngineReply
from bitladder.serve.settings import TierSpec
from upstreams import CHAT, DONE, FakeReply, Upstream, chat, fails, gateway


@dataclass(frozen=True)
class Server:
    """One server's model, its stream, and an error that is the request's fault."""

    model: str
    stream: tuple[Any, ...]
    """Documents, or bytes as they are."""
    error: Any = None
    status: int = 400
    said: str = "too long"
    done: bytes = DONE
    begins: bytes = b"data: "
    about: dict[str, Any] = field(default_factory=dict)
    """What every chunk holds."""

    def bytes(self) -> bytes:
        """The whole stream."""
        pieces = [
            one if isinstance(one, bytes) else self.begins + json.dumps({**self.about, **one}).encode() + b"\n\n"
            for one in self.stream
        ]
        return b"".join([*pieces, self.done])


def said(content, finish=None, **more):
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish, **more}]}


def chunks(model, *documents, **about):
    return [
        {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": model, **about, **one}
        for one in documents
    ]


ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}}

SERVERS = {
    "OpenAI": Server(
        "gpt-5.2",
        tuple(
            chunks(
                "gpt-5.2-2025-12-11",
                ROLE,
                said("Hello", logprobs=None),
                said(" there"),
                END,
                USAGE,
                usage=None,
                obfuscation="aX3",
                service_tier="default",
                system_fingerprint=None,
            )
        ),
        {
            "error": {
                "message": "too long",
                "type": "invalid_request_error",
                "param": "messages",
                "code": "context_length_exceeded",
            }
        },
    ),
    "Azure": Server(
        "gpt-5.2",
        (
            {
                "choices": [],
                "created": 0,
                "id": "",
                "model": "",
                "object": "",
                "prompt_filter_results": [{"prompt_index": 0}],
            },
            *chunks("gpt-5.2-2025-12-11", ROLE, said("Hello", content_filter_results={}), said(" there"), END, USAGE),
        ),
        {
            "error": {
                "message": "too long",
                "type": None,
                "param": "prompt",
                "code": "content_filter",
                "status": 400,
                "innererror": {},
            }
        },
    ),
    "Anthropic, compatible": Server(
        "claude-sonnet-4-5",
        tuple(chunks("claude-sonnet-4-5-20250929", said("Hello"), said(" there"), END, USAGE)),
        {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}, "request_id": "req_1"},
    ),
    "Google, compatible": Server(
        "gemini-2.5-flash",
        tuple(chunks("gemini-2.5-flash", said("Hello"), {**said(" there", "stop"), "usage": USAGE["usage"]})),
        [{"error": {"code": 400, "message": "too long", "status": "INVALID_ARGUMENT"}}],
    ),
    "vLLM": Server(
        "org/model",
        tuple(
            chunks(
                "org/model",
                ROLE,
                said("Hello", logprobs=None, token_ids=None),
                said(" there", "stop", stop_reason=None),
                USAGE,
            )
        ),
        {"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}},
    ),
    "vLLM before 0.10": Server(
        "org/model",
        tuple(chunks("org/model", ROLE, said("Hello"), said(" there", "stop"))),
        {"object": "error", "message": "too long", "type": "BadRequestError", "param": None, "code": 400},
    ),
    "SGLang": Server(
        "org/model",
        tuple(
            chunks(
                "org/model",
                ROLE,
                said("Hello", logprobs=None, matched_stop=None),
                said(" there"),
                {
                    "choices": [
                        {
                            "index": 0,
                            "delta": {"role": None, "content": None, "reasoning_content": None, "tool_calls": None},
                            "finish_reason": "stop",
                            "matched_stop": 2,
                        }
                    ]
                },
                USAGE,
                usage=None,
            )
        ),
        {"object": "error", "message": "too long", "type": "BadRequest", "param": None, "code": 400},
    ),
    "TGI": Server(
        "org/model",
        tuple(
            chunks(
                "org/model", said("Hello", logprobs=None), said(" there"), {**said("", "stop"), "usage": USAGE["usage"]}
            )
        ),
        {"error": "too long", "error_type": "validation"},
        status=422,
        begins=b"data:",
        done=b"data:[DONE]\n\n",
    ),
    "Ollama": Server(
        "llama3.2",
        tuple(
            chunks(
                "llama3.2:latest",
                said("Hello"),
                said(" there"),
                said("", "stop"),
                USAGE,
                system_fingerprint="fp_ollama",
            )
        ),
        {"error": {"message": "too long", "type": "invalid_request_error", "param": None, "code": None}},
    ),
    "LM Studio": Server(
        "qwen3-4b",
        tuple(chunks("qwen3-4b", said("Hello"), said(" there"), END, system_fingerprint="qwen3-4b")),
        {"error": "too long"},
    ),
    "llama-server": Server(
        "model.gguf",
        tuple(
            chunks(
                "model.gguf",
                ROLE,
                said("Hello"),
                said(" there"),
                {**END, "timings": {"prompt_n": 9, "prompt_ms": 5.0, "predicted_n": 2, "predicted_ms": 5.0}},
                USAGE,
            )
        ),
        {
            "error": {
                "code": 400,
                "message": "too long",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": 9,
                "n_ctx": 4,
            }
        },
    ),
    "LiteLLM": Server(
        "big",
        tuple(
            chunks(
                "big",
                {"citations": None, **said("Hello")},
                said(" there"),
                END,
                {**END, **USAGE, "provider_specific_fields": None},
            )
        ),
        {"error": {"message": "litellm.BadRequestError: too long", "type": None, "param": None, "code": "400"}},
        said="litellm.BadRequestError: too long",
    ),
    "OpenRouter": Server(
        "qwen/qwen3-32b",
        (
            b": OPENROUTER PROCESSING\n\n",
            *chunks("qwen/qwen3-32b", said("Hello", native_finish_reason=None), provider="x"),
            b": OPENROUTER PROCESSING\n\n",
            *chunks(
                "qwen/qwen3-32b",
                said(" there"),
                {**END, **{"native_finish_reason": "stop"}},
                {**ROLE, **{"usage": USAGE["usage"]}},
                provider="x",
            ),
        ),
        {"error": {"message": "too long", "code": 400, "metadata": {"provider_name": "x"}}, "user_id": "u"},
    ),
}
EACH = pytest.mark.parametrize("name", SERVERS)


def measuring(server: Server, reply: httpx.Response) -> Endpoint:
    settings = EndpointSettings("http://x.invalid/v1", model=server.model, retries=0)
    return Endpoint(settings, transport=httpx.MockTransport(lambda _: reply), sleep=lambda _: None)


def serving(server: Server, reply: FakeReply, path: str, body: dict) -> httpx.Response:
    def answer(request):
        return reply if request.path == CHAT else FakeReply(404, {}, [b"{}"])

    async def run():
        spec = TierSpec("Q8_0", url="http://x.invalid", model=server.model, n_ctx=0)
        async with gateway(Upstream(answer), fails(), quality=spec) as (client, _):
            return await client.post(path, json=body)

    return asyncio.run(run())


@EACH
def test_its_stream_is_measured(name):
    server = SERVERS[name]
    reply = httpx.Response(200, content=server.bytes(), headers={"content-type": "text/event-stream"})
    done = measuring(server, reply).chat(Chat.of("x", 5))
    assert (done.text, done.finish_reason) == ("Hello there", "stop")
    assert done.completion_tokens in (0, 2)


@EACH
@pytest.mark.parametrize("cut", [13, 1_000_000])
def test_its_stream_is_served_in_every_api(name, cut):
    server, whole = SERVERS[name], SERVERS[name].bytes()
    pieces = [whole[at : at + cut] for at in range(0, len(whole), cut)]

    def stream(path, body):
        reply = FakeReply(200, {"content-type": "text/event-stream"}, pieces)
        found = serving(server, reply, path, {**body, "stream": True})
        assert found.headers["x-bitladder-tier"] == "quality" and b"not complete" not in found.content
        return found.content

    plain = stream(CHAT, chat("quality"))
    assert plain.replace(b"data:[DONE]", b"data: [DONE]") == whole.replace(b"data:[DONE]", b"data: [DONE]")
    responded = stream("/v1/responses", {"model": "quality", "input": "x"})
    last = json.loads(responded.rstrip().rsplit(b"\ndata: ", 1)[1])
    assert last["type"] == "response.completed"
    assert last["response"]["output"][0]["content"][0]["text"] == "Hello there"
    told = stream("/v1/messages", {"model": "quality", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]})
    documents = [json.loads(line[6:]) for line in told.split(b"\n") if line.startswith(b"data: ")]
    assert "".join(one["delta"]["text"] for one in documents if one["type"] == "content_block_delta") == "Hello there"


@EACH
def test_its_errors_are_told_in_one_shape(name):
    server = SERVERS[name]
    body = json.dumps(server.error).encode()
    reply = serving(
        server, FakeReply(server.status, {"content-type": "application/json"}, [body]), CHAT, chat("quality")
    )
    error = reply.json()["error"]
    assert (reply.status_code, error["message"], error["type"]) == (server.status, server.said, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"} and isinstance(error["code"], str)
    with pytest.raises(EngineReply, match="too long"):
        measuring(server, httpx.Response(server.status, content=body)).chat(Chat.of("x", 5))


MIDDLE = {
    "OpenAI": b'data: {"error": {"message": "out of memory", "type": "server_error", "code": null}}\n\n',
    "TGI": b'data:{"error":"out of memory","error_type":"generation"}\n\n',
    "TGI, an event": b'event: error\ndata: {"error":"out of memory","error_type":"generation"}\n\n',
    "OpenRouter": b'data: {"id":"1","error":{"code":502,"message":"out of memory"},'
    b'"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}\n\n',
    "vLLM": b'data: {"error": {"object": "error", "message": "out of memory", "code": 400}}\n\n',
    "SGLang": b'data: {"error": {"object": "error", "message": "out of memory", "type": "x", "param": null}}\n\n',
}


@pytest.mark.parametrize("name", MIDDLE)
@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages"])
def test_an_error_in_the_middle_is_never_an_answer(name, path):
    server = SERVERS["OpenAI"]
    start = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in server.stream[:2])
    body = {CHAT: chat("quality")}.get(path, {"model": "quality", "input": "x", "max_tokens": 9})
    body = {**body, "messages": [{"role": "user", "content": "x"}], "stream": True}
    reply = serving(
        server, FakeReply(200, {"content-type": "text/event-stream"}, [start, MIDDLE[name], DONE]), path, body
    )
    assert b"out of memory" in reply.content and b"not complete" in reply.content and DONE not in reply.content
    response = httpx.Response(200, content=start + MIDDLE[name] + DONE, headers={"content-type": "text/event-stream"})
    with pytest.raises(EngineReply, match="out of memory"):
        measuring(server, response).chat(Chat.of("x", 5))


def test_keys_of_clouds_are_known_by_their_hosts():
    assert endpoint_at("https://mine.openai.azure.com/openai/v1#gpt").key_env == "AZURE_OPENAI_API_KEY"
    assert endpoint_at("https://openai.azure.com.example/v1#gpt").key_env == ""
    assert endpoint_at("https://openrouter.ai/api/v1#x").key_env == "OPENROUTER_API_KEY"
