"""Responses and Messages through the gateway: passed on where the upstream speaks them, else worded as chat completions
and back; the same routing, headers and endings as chat completions have. Shapes are those that clients send and read.
"""

import asyncio
import json
from types import SimpleNamespace

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitladder.serve import responses_api
from bitladder.serve.backends import UpstreamFailed
from bitladder.serve.limits import add_key
from bitladder.serve.protocol import MESSAGES, RESPONSES, Refused, parse_request
from bitladder.serve.relay import Relayed
from bitladder.serve.rewording import as_chat, worded_for
from bitladder.serve.tool_choice import tool_values, with_calls
from upstreams import CHAT, DONE, FakeReply, Upstream, chat, event, fails, gateway, replies, says

ASKED = {
    RESPONSES: {"model": "quality", "input": "Say hi.", "max_output_tokens": 8},
    MESSAGES: {"model": "quality", "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8},
}
COUNT = "/v1/messages/count_tokens"
FAST = says("the fast answer", "Q4_K_M")


def only_chat(text, model, **more):
    """An upstream that knows no other path than chat completions."""
    inner = says(text, model, **more)

    def answer(request):
        known = request.path == CHAT
        return (
            inner.answer(request) if known else FakeReply(404, {"content-type": "text/html"}, [b"<h1>Not Found</h1>"])
        )

    return Upstream(answer)


def ask(quality, speed, body, path, headers=None, times=1, **settings):
    async def run():
        async with gateway(quality, speed, **settings) as (client, _):
            return [await client.post(path, json=body, headers=headers) for _ in range(times)][-1]

    return asyncio.run(run())


def named_events(body: bytes) -> list[dict]:
    """The documents of a stream whose events are named; each name must be its document's type."""
    found = []
    for block in body.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        found.append(document)
    return found


def openai_reading(body: bytes, kind: str = "text/event-stream") -> openai.OpenAI:
    """OpenAI's client, which gets these bytes whatever it asks."""
    reply = httpx.Response(200, content=body, headers={"content-type": kind})
    transport = httpx.MockTransport(lambda _: reply)
    return openai.OpenAI(api_key="x", base_url="http://x.invalid/v1", http_client=httpx.Client(transport=transport))


# Worded as chat completions


def test_a_response_from_an_upstream_that_knows_chat_completions_only():
    quality = only_chat("Hi there", "Q8_0")
    reply = ask(quality, FAST, ASKED[RESPONSES], RESPONSES, times=2)
    assert (reply.status_code, reply.headers["x-bitladder-tier"]) == (200, "quality")
    assert [request.path for request in quality.asked] == [
        RESPONSES,
        CHAT,
        CHAT,
    ]  # asked once only
    sent = json.loads(quality.asked[1].body)
    assert sent == {"model": "Q8_0", "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8}
    found = openai_reading(reply.content, "application/json").responses.create(model="x", input="x")
    assert (found.output_text, found.status, found.model, found.usage.output_tokens) == (
        "Hi there",
        "completed",
        "Q8_0",
        2,
    )


def test_a_message_from_an_upstream_that_knows_chat_completions_only():
    reply = ask(only_chat("Hi there", "Q8_0"), FAST, ASKED[MESSAGES], MESSAGES)
    found = reply.json()
    assert found["content"] == [{"type": "text", "text": "Hi there"}]
    assert {name: found[name] for name in ("type", "role", "model", "stop_reason", "stop_sequence")} == {
        "type": "message", "role": "assistant", "model": "Q8_0", "stop_reason": "end_turn", "stop_sequence": None,
    }  # fmt: skip
    assert found["id"].startswith("msg_") and found["usage"]["output_tokens"] == 2


def test_openais_stream_helper_reads_a_streamed_response():
    reply = ask(only_chat("one two three", "Q8_0"), FAST, {**ASKED[RESPONSES], "stream": True}, RESPONSES)
    events = named_events(reply.content)
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    assert [one["type"] for one in events if not one["type"].endswith(".delta")] == [
        f"response.{name}"
        for name in ("created", "in_progress", "output_item.added", "content_part.added", "output_text.done",
                     "content_part.done", "output_item.done", "completed")
    ]  # fmt: skip
    with openai_reading(reply.content).responses.stream(model="x", input="x") as stream:
        text = "".join(one.delta for one in stream if one.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == "onetwothree"


def test_a_streamed_message():
    reply = ask(only_chat("one two", "Q8_0"), FAST, {**ASKED[MESSAGES], "stream": True}, MESSAGES)
    events = named_events(reply.content)
    assert [one["type"] for one in events] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert [one["delta"]["text"] for one in events if one["type"] == "content_block_delta"] == ["one", "two"]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Paris?"},
    {
        "role": "assistant",
        "reasoning_content": "I should look.",
        "content": "Let me see.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
            {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Lyon"}'}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "20 C"},
    {"role": "tool", "tool_call_id": "c2", "content": "18 C\nwindy"},
    {"role": "user", "content": [
        {"type": "text", "text": "And this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": WEATHER}}]


def test_a_whole_conversation_with_tools_in_all_three_apis():
    in_responses = {
        "model": "auto",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Weather in Paris?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
                {"type": "reasoning_text", "text": "I should look."},
            ]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Paris"}'},
            {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city": "Lyon"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "20 C"},
            {"type": "function_call_output", "call_id": "c2", "output": [
                {"type": "input_text", "text": "18 C"}, {"type": "input_text", "text": "windy"},
            ]},
            {"role": "user", "content": [
                {"type": "input_text", "text": "And this?"},
                {"type": "input_image", "image_url": "data:image/png;base64,AAAA"},
            ]},
        ],
        "tools": [{"type": "function", "name": "weather", "description": "d", "parameters": WEATHER}],
        "tool_choice": {"type": "function", "name": "weather"},
        "temperature": 0.5,
        "store": False,
        "text": {"format": {"type": "json_schema", "name": "w", "schema": WEATHER, "strict": True}},
    }  # fmt: skip
    in_messages = {
        "model": "auto",
        "max_tokens": 8,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "Weather in Paris?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "I should look.", "signature": "xyz"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "c2", "name": "weather", "input": {"city": "Lyon"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "20 C"},
                {"type": "tool_result", "tool_use_id": "c2", "content": [
                    {"type": "text", "text": "18 C"}, {"type": "text", "text": "windy"},
                ]},
                {"type": "text", "text": "And this?"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
            ]},
        ],
        "tools": [{"name": "weather", "description": "d", "input_schema": WEATHER}],
        "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        "stop_sequences": ["END"],
        "top_k": 5,
    }  # fmt: skip
    for path, body in ((RESPONSES, in_responses), (MESSAGES, in_messages)):
        request = parse_request(path, json.dumps(body).encode())
        assert request.asked == "And this?"
        said = {name: member.value for name, member in as_chat(request).members.items()}
        assert said["messages"] == SAID
        assert said["tools"] == TOOLS
        assert said["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
        assert not {"input", "system", "store", "text", "stop_sequences", "instructions"} & set(said)
    assert (said["stop"], said["top_k"], said["max_tokens"], said["parallel_tool_calls"]) == (["END"], 5, 8, False)
    worded = responses_api.chat_request(in_responses)
    assert worded["response_format"]["json_schema"] == {"name": "w", "schema": WEATHER, "strict": True}
    assert worded["temperature"] == 0.5


PDF = {"type": "document", "source": {"type": "base64"}}
REFUSED = [
    (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
    (RESPONSES, {"conversation": "conv_1"}, "conversation"),
    (RESPONSES, {"background": True}, "background"),
    (RESPONSES, {"tools": [{"type": "web_search"}]}, "web_search"),
    (RESPONSES, {"tools": "x"}, "tools"),
    (RESPONSES, {"tool_choice": {"type": "mcp"}}, "mcp"),
    (RESPONSES, {"tool_choice": "required"}, "tools"),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input_file"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input_image"),
    (RESPONSES, {"input": [{"role": "robot", "content": "x"}]}, "role"),
    (RESPONSES, {"text": 5}, "text"),
    (MESSAGES, {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
    (MESSAGES, {"tool_choice": {"type": "some"}}, "tool_choice"),
    (MESSAGES, {"tool_choice": {"type": "any"}}, "tools"),
    (MESSAGES, {"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
    (MESSAGES, {"messages": [{"role": "robot", "content": "x"}]}, "role"),
    (MESSAGES, {"messages": [{"role": "user", "content": [PDF]}]}, "base64"),
    (MESSAGES, {"messages": [{"role": "user", "content": 5}]}, "content"),
    (MESSAGES, {"messages": [{"role": "user", "content": ["x"]}]}, "content"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "more", "named"), REFUSED)
def test_what_chat_completions_cannot_carry_is_refused_by_its_name(path, more, named):
    reply = ask(only_chat("x", "Q8_0"), FAST, {**ASKED[path], **more}, path)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert named in error["message"] and error["type"] == "invalid_request_error"
    assert (reply.json().get("type") == "error") is (path == MESSAGES)


WORDS = ["user", "text", "system", "\ud83d"]
LEAVES = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3) | st.sampled_from(WORDS)
NAMES = st.sampled_from(["role", "content", "type", "text", "source", "name"]) | st.sampled_from(
    ["input", "output", "tools", "format", "data", "mode"]
)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)
MEMBERS = st.sampled_from(["messages", "input", "tools", "tool_choice", "system", "text", "include", "metadata"])


@settings(deadline=None)
@given(ANYTHING, st.sampled_from([MESSAGES, RESPONSES]), MEMBERS)
def test_any_body_is_worded_or_refused(value, path, member):
    try:
        request = parse_request(path, json.dumps({**ASKED[path], member: value}).encode())
        as_chat(request)
    except Refused as refused:
        assert refused.status == 400


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["a", " ", "é", "\u2028", '"}', "\n\n", "\U0001f600", "\ud83d"]), max_size=6),
    st.lists(st.sampled_from(["t", " h"]), max_size=3),
    st.booleans(),
    st.sampled_from(["stop", "length", "content_filter"]),
)
def test_a_stream_and_a_document_of_one_answer_hold_the_same(text, thought, called, finish):
    finish = "tool_calls" if called else finish
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}
    head = {"id": "chatcmpl-x1", "model": "m", "created": 5}
    message = {"role": "assistant", "content": "".join(text), "reasoning_content": "".join(thought)}
    message |= {"tool_calls": [CALL]} if called else {}
    whole = {**head, "choices": [{"message": message, "finish_reason": finish}], "usage": usage}
    deltas = [{"reasoning_content": piece} for piece in thought] + [{"content": piece} for piece in text]
    if called:
        arguments = CALL["function"]["arguments"]
        deltas.append(
            {"tool_calls": [{"index": 0, **CALL, "function": {"name": "weather", "arguments": arguments[:4]}}]}
        )
        deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": arguments[4:]}}]})
    choices = [[{"delta": delta, "finish_reason": None}] for delta in deltas]
    chunks = [{**head, "choices": one} for one in choices]
    chunks += [{**head, "choices": [{"delta": {}, "finish_reason": finish}]}, {**head, "choices": [], "usage": usage}]

    async def stream():
        for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n".encode()
        yield DONE

    async def read(path):
        request = parse_request(path, json.dumps(ASKED[path]).encode())
        answer = worded_for(request, Relayed(200, "text/event-stream", b"", stream()))
        events = named_events(b"".join([piece async for piece in answer.stream]))
        document = worded_for(request, Relayed(200, "application/json", json.dumps(whole).encode()))
        return events, json.loads(document.head)

    events, document = asyncio.run(read(RESPONSES))
    assert events[-1]["response"] == document
    assert document["status"] == ("incomplete" if finish in ("length", "content_filter") else "completed")
    events, document = asyncio.run(read(MESSAGES))
    blocks = [{**one["content_block"]} for one in events if one["type"] == "content_block_start"]
    partial = {}
    for one in events:
        if one["type"] == "content_block_delta":
            _, (name, piece) = one["delta"].items()
            if name == "partial_json":
                partial[one["index"]] = partial.get(one["index"], "") + piece
            else:
                blocks[one["index"]][name] += piece
    for index, arguments in partial.items():
        blocks[index]["input"] = json.loads(arguments)
    assert blocks == document["content"]
    assert events[-2]["usage"] == document["usage"] == {
        "input_tokens": 2, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 5, "output_tokens": 3,
    }  # fmt: skip
    assert events[-2]["delta"]["stop_reason"] == document["stop_reason"]


# Passed on to upstreams that speak them

RESPONSE = {"id": "resp_1", "object": "response", "status": "completed", "model": "Q8_0", "error": None}
RESPONSE |= {"output": [], "usage": {"input_tokens": 1, "output_tokens": 5, "total_tokens": 6}}
MESSAGE: dict = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "Q8_0",
    "content": [],
    "stop_reason": "end_turn",
}
MESSAGE |= {"usage": {"input_tokens": 1, "output_tokens": 5}}


def sse(*documents):
    return [f"event: {one['type']}\ndata: {json.dumps(one)}\n\n".encode() for one in documents]


STREAMS = {
    RESPONSES: sse(
        {"type": "response.created", "response": {**RESPONSE, "status": "in_progress"}},
        {"type": "response.output_text.delta", "delta": "Hi", "output_index": 0, "sequence_number": 1},
        {"type": "response.completed", "response": RESPONSE},
    ),
    MESSAGES: sse(
        {"type": "message_start", "message": MESSAGE},
        {"type": "ping"},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
        {"type": "message_stop"},
    ),
}
WHOLE = {RESPONSES: RESPONSE, MESSAGES: MESSAGE}


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_an_upstream_that_speaks_it_gets_the_request_as_it_came(path):
    body = {**ASKED[path], "tools": [{"type": "web_search"}], "unknown": {"a": 1}}
    quality = replies(json.dumps(WHOLE[path]).encode(), kind="application/json")
    reply = ask(quality, FAST, body, path)
    assert reply.json() == WHOLE[path]
    assert json.loads(quality.asked[0].body) == {**body, "model": "Q8_0"}
    streamed = ask(replies(*STREAMS[path]), FAST, {**body, "stream": True}, path)
    assert streamed.content == b"".join(STREAMS[path])


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
@pytest.mark.parametrize(
    "after",
    [
        [],
        [UpstreamFailed("broken", "It broke off.")],
        [b"data: [DONE]\n\n"],
        [b"data: {oops\n\n"],
        "error",
        "another model",
    ],
    ids=str,
)
def test_a_stream_that_does_not_end_as_it_should_is_told(path, after):
    if after == "error":
        after = sse({"type": "error", "error": {"type": "api_error", "message": "out of memory"}})
    elif after == "another model":
        within = "response" if path == RESPONSES else "message"
        after = sse({"type": "x", within: {"model": "other"}})
    first, *_, last = STREAMS[path]
    reply = ask(replies(first, *after, *([last] if after else [])), FAST, {**ASKED[path], "stream": True}, path)
    events = named_events(reply.content)
    assert events[-1]["type"] == "error" and "not complete" in events[-1]["error"]["message"]
    assert len(events) == 2
    if path == RESPONSES:
        assert events[-1]["sequence_number"] == 1
        with pytest.raises(openai.APIError, match="not complete"):
            list(openai_reading(reply.content).responses.create(model="x", input="x", stream=True))


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
@pytest.mark.parametrize("tail", [[], [UpstreamFailed("broken", "It broke off.")], [b"data: {oops\n\n", DONE]], ids=str)
def test_a_worded_stream_that_breaks_is_told_in_the_same_way(path, tail):
    def answer(request):
        if request.path != CHAT:
            return FakeReply(404, {}, [b"{}"])
        return FakeReply(200, {"content-type": "text/event-stream"}, [event("Hi", "Q8_0"), *tail])

    reply = ask(Upstream(answer), FAST, {**ASKED[path], "stream": True}, path)
    events = named_events(reply.content)
    assert events[-1]["type"] == "error" and "not complete" in events[-1]["error"]["message"]
    assert not any(one["type"] in ("response.completed", "message_stop") for one in events)
    if path == RESPONSES:
        assert events[-1]["sequence_number"] == len(events) - 1


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
@pytest.mark.parametrize("stream", [False, True])
def test_before_the_first_byte_the_other_tier_answers(path, stream):
    reply = ask(fails(), only_chat("fast", "Q4_K_M"), {**ASKED[path], "stream": stream}, path)
    assert (reply.status_code, reply.headers["x-bitladder-tier"]) == (200, "speed")
    assert "the quality tier cannot be reached" in reply.headers["x-bitladder-reason"]
    assert b"fast" in reply.content


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
def test_anthropics_clients_find_their_errors_and_send_their_key(path, tmp_path):
    body = {**ASKED[MESSAGES], "model": "nothing"}
    unknown = ask(FAST, FAST, body, path)
    assert unknown.status_code == 404
    assert unknown.json()["type"] == "error" and unknown.json()["error"]["type"] == "not_found_error"
    down = ask(fails(), fails(), ASKED[MESSAGES], path)
    assert (down.status_code, down.json()["error"]["type"]) == (503, "overloaded_error")
    secret = add_key(tmp_path / "keys", "alice")
    settings = {"api_key_file": tmp_path / "keys"}
    good = ask(
        replies(b'{"input_tokens": 5}', kind="application/json"),
        FAST,
        ASKED[MESSAGES],
        COUNT,
        {"x-api-key": secret},
        **settings,
    )
    assert good.json() == {"input_tokens": 5}
    for headers in ({}, {"x-api-key": "bl-wrong"}, {"authorization": "Basic x"}):
        refused = ask(FAST, FAST, ASKED[MESSAGES], path, headers, **settings)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert refused.json()["type"] == "error"


def test_tokens_are_counted_by_the_tier_itself_and_nobody_else():
    quality = replies(b'{"error": {"message": "no such path"}}', status=404, kind="application/json")
    speed = says("x", "Q4_K_M")
    reply = ask(quality, speed, ASKED[MESSAGES], COUNT)
    assert (reply.status_code, speed.asked) == (501, [])
    assert f"does not know {COUNT}" in reply.json()["error"]["message"]
    assert ask(FAST, FAST, {**ASKED[MESSAGES], "stream": True}, COUNT).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_that_is_not_made_is_an_error(stream):
    body = chat("quality", tools=TOOLS, tool_choice="required", stream=stream)

    def answer(request):
        if not request.stream:
            choice = {"message": {"content": "Sure!"}, "finish_reason": "stop"}
            return FakeReply(200, {"content-type": "application/json"}, [json.dumps({"choices": [choice]}).encode()])
        end = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
        return FakeReply(200, {"content-type": "text/event-stream"}, [event("Sure!", "Q8_0"), end, DONE])

    reply = ask(Upstream(answer), FAST, body, CHAT)
    assert reply.status_code == (200 if stream else 400)
    assert b"tool_choice" in reply.content and DONE not in reply.content


@pytest.mark.parametrize(
    ("tools", "choice", "status"),
    [
        (TOOLS, "auto", 200),
        (TOOLS, "none", 200),
        (None, "none", 200),
        (None, "auto", 200),
        (TOOLS, "sometimes", 400),
        (None, "required", 400),
        ([], "required", 400),
        (TOOLS, {"type": "function", "function": {"name": "other"}}, 400),
        ("weather", "auto", 400),
    ],
)
def test_a_tool_choice_that_cannot_be_met_is_refused(tools, choice, status):
    body = chat("quality", tool_choice=choice, **({} if tools is None else {"tools": tools}))
    assert ask(says("x", "Q8_0"), FAST, body, CHAT).status_code == status


CHOSEN = [
    {"token": " and", "logprob": -0.5, "top_logprobs": [
        {"token": " and", "logprob": -0.5}, {"token": " or", "logprob": -1},
    ]},
    {"token": " 4", "logprob": -0.25, "top_logprobs": []},
]  # fmt: skip
LISTS = {
    "tokens": [" and", " 4"],
    "token_logprobs": [-0.5, -0.25],
    "top_logprobs": [{" and": -0.5, " or": -1}, {" 4": -0.25}],
    "text_offset": [0, 4],
}


@pytest.mark.parametrize("told", [{"content": CHOSEN}, LISTS], ids=["llama.cpp's", "OpenAI's"])
def test_text_completions_tell_log_probabilities_as_that_api_does(told):
    asked = {"model": "quality", "prompt": "One, two,", "logprobs": 2}
    body = {"model": "Q8_0", "choices": [{"index": 0, "text": " and 4", "logprobs": told, "finish_reason": "stop"}]}
    reply = ask(replies(json.dumps(body).encode(), kind="application/json"), FAST, asked, "/v1/completions")
    choice = openai_reading(reply.content, "application/json").completions.create(model="x", prompt="x").choices[0]
    assert choice.logprobs.model_dump() == LISTS
    pieces = [told] if told is LISTS else [{"content": [one]} for one in CHOSEN]
    chunks = [{"model": "Q8_0", "choices": [{"index": 0, "text": "x", "logprobs": piece}]} for piece in pieces]
    chunks += [{"model": "Q8_0", "choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]}]
    sent = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    reply = ask(replies(*sent, DONE), FAST, {**asked, "stream": True}, "/v1/completions")
    read = list(openai_reading(reply.content).completions.create(model="x", prompt="x", stream=True))
    found = [chunk.choices[0].logprobs for chunk in read if chunk.choices[0].logprobs]
    assert {name: [one for logprobs in found for one in getattr(logprobs, name)] for name in LISTS} == LISTS
    assert reply.content.endswith(DONE)


def test_models_tell_when_they_were_made():
    async def run():
        async with gateway(FAST, FAST) as (client, _):
            return (await client.get("/v1/models")).json()["data"], (await client.get("/v1/models/speed")).json()

    listed, speed = asyncio.run(run())
    assert speed in listed and all(one["created"] > 1_600_000_000 for one in listed)


NESTED = {
    "type": "object",
    "properties": {"place": {"$ref": "#/$defs/Place"}},
    "$defs": {"Place": {"type": "object", "properties": {"in": {"$ref": "#"}}}},
}


def engine_tier(**about):
    """A tier that is an engine of our own, which knows whether its model takes tools."""
    return SimpleNamespace(engine=SimpleNamespace(**{"takes_tools": True, **about}), spec=SimpleNamespace(level="Q8_0"))


def chat_request(**more):
    return parse_request(CHAT, json.dumps(chat("quality", **more)).encode())


def test_a_forced_call_is_asked_of_our_own_engines_as_json():
    other = {"type": "function", "function": {"name": "other", "parameters": NESTED}}
    named = {"type": "function", "function": {"name": "weather"}}
    values = tool_values(chat_request(tools=[*TOOLS, other], tool_choice=named), engine_tier())
    schema = values["response_format"]["json_schema"]["schema"]
    assert values["tool_choice"] == "none" and schema["properties"]["name"] == {"const": "weather"}
    assert schema["$defs"] == {"tool0": WEATHER}
    schema = tool_values(chat_request(tools=[*TOOLS, other], tool_choice="required"), engine_tier())
    schema = schema["response_format"]["json_schema"]["schema"]
    assert [one["properties"]["name"]["const"] for one in schema["anyOf"]] == ["weather", "other"]
    moved = schema["$defs"]["tool1"]
    assert moved["properties"]["place"] == {"$ref": "#/$defs/tool1/$defs/Place"}
    assert moved["$defs"]["Place"]["properties"]["in"] == {"$ref": "#/$defs/tool1"}
    for choice in ("auto", "none", None):
        assert tool_values(chat_request(tools=TOOLS, tool_choice=choice), engine_tier()) == {}
    for tools in ([{}], [{"type": "function", "function": {"parameters": 5}}], ["x"]):
        with pytest.raises(Refused, match="functions"):
            tool_values(chat_request(tools=tools, tool_choice="required"), engine_tier())


@pytest.mark.parametrize("choice", ["auto", "required", None])
def test_tools_that_the_template_cannot_tell_of_are_refused(choice):
    with pytest.raises(Refused, match="does not support tools"):
        tool_values(chat_request(tools=TOOLS, tool_choice=choice), engine_tier(takes_tools=False))
    assert tool_values(chat_request(tools=TOOLS, tool_choice="none"), engine_tier(takes_tools=False)) == {}
    if choice != "required":
        assert tool_values(chat_request(tools=TOOLS, tool_choice=choice), engine_tier(takes_tools=None)) == {}


ARGUMENTS = ["{}", '{"city": "Paris"}', '{"a": {"b": {}} }', '{"a": "}}"}', '[1, {"x": []}]', '"}"']


@settings(deadline=None)
@given(
    st.sampled_from(ARGUMENTS),
    st.sampled_from(['{"name":"weather","arguments":%s}', '{\n  "name" : "weather",\n "arguments": %s\n}\n ']),
    st.integers(1, 9),
    st.booleans(),
)
def test_the_json_of_a_call_becomes_the_call(arguments, frame, size, cut):
    text = frame % arguments
    text = text[: -len(text) // 3] if cut else text
    finish = "length" if cut else "stop"
    request = chat_request(tools=TOOLS, tool_choice="required")
    pieces = [{"content": text[at : at + size]} for at in range(0, len(text), size)]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in pieces]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish})

    async def stream():
        for one in choices:
            yield f"data: {json.dumps({'id': 'chatcmpl-1', 'choices': [one]})}\n\n".encode()
        yield DONE

    async def read():
        answer = with_calls(Relayed(200, "text/event-stream", b"", stream()), request, engine_tier())
        return b"".join([piece async for piece in answer.stream])

    sent = asyncio.run(read())
    chunks = list(openai_reading(sent).chat.completions.create(model="x", messages=[], stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    told = "".join(call.function.arguments for call in calls)
    assert chunks[-1].choices[0].finish_reason == ("length" if cut else "tool_calls")
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    message = {"index": 0, "message": {"content": text}, "finish_reason": finish}
    whole = Relayed(200, "application/json", json.dumps({"id": "chatcmpl-1", "choices": [message]}).encode())
    found = json.loads(with_calls(whole, request, engine_tier()).head)["choices"][0]
    assert found["finish_reason"] == ("length" if cut else "tool_calls") and found["message"]["content"] is None
    if not cut:
        assert [(call.function.name, call.id) for call in calls if call.id] == [("weather", "call_10")]
        assert told == arguments == found["message"]["tool_calls"][0]["function"]["arguments"]
    elif calls:
        assert told == found["message"]["tool_calls"][0]["function"]["arguments"]
        assert arguments.startswith(told.rstrip()) or told.startswith(arguments)


@pytest.mark.parametrize("text", ["Sure!", "", '{"arguments": {}}', None])
def test_what_should_be_a_call_and_is_none_goes_to_the_other_tier(text):
    request = chat_request(tools=TOOLS, tool_choice="required")
    message = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
    with pytest.raises(UpstreamFailed, match="without the tool call"):
        with_calls(
            Relayed(200, "application/json", json.dumps({"choices": [message]}).encode()), request, engine_tier()
        )
