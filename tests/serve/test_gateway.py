"""The gateway over fakes: what passes through, what is refused, what happens when an upstream fails."""

import asyncio
import json
import logging
from pathlib import Path

import httpx
import openai
import pytest

from bitladder.records.wording import Substitution, WordingChanges
from bitladder.report import write_run
from bitladder.serve.app import build_app
from bitladder.serve.backends import PHASES, UpstreamFailed
from bitladder.serve.deploy import deployed
from bitladder.serve.router import AutoRule, TagEvidence
from bitladder.serve.settings import Escalation, ServeSettings, TierSpec, UpstreamTimeouts
from ladder_examples import run_record
from upstreams import (
    CHAT,
    DONE,
    QUALITY,
    SPEED,
    FakeReply,
    Upstream,
    chat,
    document,
    event,
    events_of,
    fails,
    gateway,
    replies,
    says,
)

GOOD, FAST = says("the good answer", "Q8_0"), says("the fast answer", "Q4_K_M")
QUICK = UpstreamTimeouts(first_byte=0.3, between=0.3, client=0.3, restart=0.1)


POSTED = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"host", b"localhost")], "query_string": b""}
"""The ASGI scope of a chat request, for tests that play the server themselves."""


def ask(quality, speed, body, headers=None, path=CHAT, /, **settings) -> httpx.Response:
    async def run() -> httpx.Response:
        async with gateway(quality, speed, **settings) as (client, _):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(run())


def text_of(body: bytes) -> str:
    return " ".join(item["choices"][0]["delta"]["content"] for item in events_of(body) if "choices" in item)


def test_reply_names_what_served_it():
    reply = ask(GOOD, FAST, chat("speed"))
    assert reply.status_code == 200
    assert reply.content == document("the fast answer", "Q4_K_M")
    assert reply.headers["x-bitladder-tier"] == "speed"
    assert reply.headers["x-bitladder-level"] == "Q4_K_M"
    assert reply.headers["x-bitladder-file-sha256"] == "b" * 64
    assert reply.headers["x-bitladder-reason"] == "speed named in the request"


def test_level_by_name_names_its_tier_too():
    reply = ask(GOOD, FAST, chat("q8_0"))
    assert reply.headers["x-bitladder-tier"] == "quality"
    assert reply.headers["x-bitladder-reason"] == "level named in the request"


def test_stream_passes_byte_by_byte():
    odd = b'data: {"model": "Q8_0",  "choices":[{"delta":{"content":"\\u00e9"}, "x": 1e2}]}\r\n\r\n'
    pieces = [b": ping\n\n", odd[:20], odd[20:], event("b", "Q8_0"), DONE]
    reply = ask(replies(*pieces), FAST, chat("quality", stream=True))
    assert reply.content == b"".join(pieces)
    assert reply.headers["content-type"] == "text/event-stream"


def test_request_passes_byte_by_byte_but_for_the_models_name():
    quality = says("x", "Q8_0")
    body = b'{ "tools": [1e2, "\\u00e9"], "model" : "quality", "messages":[{"content":"model"}] , "z":1.0}'
    ask(quality, FAST, body)
    assert quality.asked[0].body == body.replace(b'"quality"', b'"Q8_0"')


def test_rules_of_the_evidence_decide_for_auto():
    auto = AutoRule(tags={"easy": TagEvidence(5, 0), "hard": TagEvidence(5, 3)})
    easy = ask(GOOD, FAST, chat("auto"), {"x-bitladder-tag": "easy"}, auto=auto)
    hard = ask(GOOD, FAST, chat("auto"), {"x-bitladder-tag": "hard"}, auto=auto)
    assert easy.headers["x-bitladder-level"] == "Q4_K_M"
    assert hard.headers["x-bitladder-level"] == "Q8_0"
    assert hard.headers["x-bitladder-reason"] == "auto: tag hard: the speed tier lost 3 of 5 inputs"


JSON = "application/json"
BAD_DOCUMENTS = {
    "unreachable": (fails(), "connect"),
    "another model": (says("impostor", "another-model"), "wrong model"),
    "server error": (replies(b"{}", status=500, kind=JSON), "status"),
    "redirect": (replies(b"", status=302), "status"),
    "page instead of JSON": (replies(b"<html>sorry</html>", kind="text/html"), "garbage"),
    "list instead of object": (replies(b"[]", kind=JSON), "garbage"),
    "truncated": (replies(b'{"model": "Q8_0", "choi', kind=JSON), "garbage"),
    "broken off": (replies(b'{"model"', UpstreamFailed("broken", "It broke off."), kind=JSON), "broken"),
    "deep nesting": (replies(b"[" * 100_000, kind=JSON), "garbage"),
    "error under status 200": (replies(b'{"error": {}}', kind=JSON), "status"),
    "object that is no answer": (replies(b'{"hello": "world"}', kind=JSON), "garbage"),
    "choices that are none": (replies(b'{"choices": ["a"]}', kind=JSON), "garbage"),
    "a model that is no name": (replies(b'{"model": {"a": 1}, "choices": []}', kind=JSON), "garbage"),
    "NaN": (replies(b'{"model": "Q8_0", "choices": [{"x": NaN}]}', kind=JSON), "garbage"),
    "our key refused": (replies(b'{"error": {"message": "no key"}}', status=401, kind=JSON), "status"),
    "its own fault": (replies(b'{"error": {"message": "out of memory"}}', status=500, kind=JSON), "status"),
    "a page for an error": (replies(b"<html>", status=404, kind="text/html"), "garbage"),
    "stream that was not asked for": (replies(event("a", "Q8_0"), DONE), "garbage"),
    "silence": (replies(5.0, document("a", "Q8_0"), kind=JSON), "stalled"),
}
BAD_STREAMS = {
    "unreachable": (fails(), "connect"),
    "another model": (says("impostor", "another-model"), "wrong model"),
    "document instead": (replies(document("a", "Q8_0"), kind=JSON), "garbage"),
    "no stream": (replies(b"garbage\n\n"), "garbage"),
    "binary": (replies(b"data: \xff\xfe\n\n"), "garbage"),
    "error at its start": (replies(b'data: {"error": {"message": "x"}}\n\n'), "status"),
    "end at once": (replies(), "broken"),
    "end before its first event": (
        replies(event("a", "Q8_0")[:30], UpstreamFailed("broken", "It broke off.")),
        "broken",
    ),
    "silence": (replies(5.0, event("a", "Q8_0"), DONE), "stalled"),
}
BAD = [
    (name, *case, stream)
    for stream, cases in ((False, BAD_DOCUMENTS), (True, BAD_STREAMS))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("name", "upstream", "phase", "stream"), BAD)
def test_before_the_first_byte_the_other_tier_answers(name, upstream, phase, stream):
    reply = ask(upstream, FAST, chat("quality", stream=stream), timeouts=QUICK)
    assert reply.status_code == 200
    words = text_of(reply.content) if stream else reply.json()["choices"][0]["message"]["content"]
    assert words == "the fast answer"
    assert reply.headers["x-bitladder-tier"] == "speed"
    assert f"the quality tier {PHASES[phase]}" in reply.headers["x-bitladder-reason"]
    assert all(given.closed for given in upstream.replies)


@pytest.mark.parametrize(("name", "upstream", "phase", "stream"), BAD)
def test_a_level_is_not_replaced_but_its_failure_told(name, upstream, phase, stream):
    reply = ask(upstream, FAST, chat("Q8_0", stream=stream), timeouts=QUICK)
    assert reply.status_code == 503
    assert reply.json()["error"]["message"] == f"No tier could answer: quality: {phase}."
    assert reply.headers["retry-after"] == "2"


CUTS = {
    "broken": [event("a", "Q8_0"), UpstreamFailed("broken", "It broke off.")],
    "half an event": [event("a", "Q8_0"), event("b", "Q8_0")[:25], UpstreamFailed("broken", "It broke off.")],
    "silent end": [event("a", "Q8_0")],
    "stall": [event("a", "Q8_0"), 5.0, event("b", "Q8_0"), DONE],
    "garbage": [event("a", "Q8_0"), b"data: {\xff\n\n", event("b", "Q8_0"), DONE],
    "garbage in one piece": [event("a", "Q8_0") + b"\x00\x01noise\n\n" + event("b", "Q8_0") + DONE],
    "not an object": [event("a", "Q8_0"), b"data: [1]\n\n", DONE],
    "choices that are none": [event("a", "Q8_0"), b'data: {"choices": ["b"]}\n\n', DONE],
    "deep nesting": [event("a", "Q8_0"), b"data: " + b"[" * 100_000 + b"\n\n", DONE],
    "another model": [event("a", "Q8_0"), event("b", "Q2_K"), DONE],
    "a model that is no name": [event("a", "Q8_0"), b'data: {"model": [], "choices": []}\n\n', DONE],
    "NaN": [event("a", "Q8_0"), b'data: {"choices": [{"x": NaN}]}\n\n', DONE],
    "DONE in half an event": [event("a", "Q8_0"), b'data: {"b": "\ndata: [DONE]'],
    "an error of its own": [event("a", "Q8_0"), b'data: {"error": {"message": "out of memory"}}\n\n', DONE],
    "an end that is only said": [event("a", "Q8_0"), event("[DONE]", "Q8_0")],
}


@pytest.mark.parametrize("name", CUTS)
def test_after_the_first_byte_an_error_event_says_that_the_answer_is_not_complete(name):
    reply = ask(replies(*CUTS[name]), FAST, chat("quality", stream=True), timeouts=QUICK)
    first, *_, last = events_of(reply.content)
    assert first["choices"][0]["delta"]["content"] == "a"
    assert "not complete" in last["error"]["message"]
    assert DONE not in reply.content and b'"b"' not in reply.content
    assert ("out of memory" in last["error"]["message"]) is (name == "an error of its own")
    assert FAST.asked == [] or reply.headers["x-bitladder-tier"] == "quality"


def test_nothing_follows_the_end():
    reply = ask(replies(event("a", "Q8_0"), DONE + b"noise\n\n", b"more"), FAST, chat("quality", stream=True))
    assert reply.content == event("a", "Q8_0") + DONE


ERRORS = {
    "llama.cpp's": (
        400,
        {"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error"}},
        (400, "too long", "exceed_context_size_error"),
    ),
    "OpenAI's": (
        404,
        {"error": {"message": "no such thing", "type": "invalid_request_error", "param": None, "code": "not_there"}},
        (404, "no such thing", "not_there"),
    ),
    "vLLM's": (
        400,
        {"object": "error", "message": "bad n", "type": "BadRequestError"},
        (400, "bad n", "BadRequestError"),
    ),
    "FastAPI's": (422, {"detail": [{"msg": "x"}]}, (422, '[{"msg": "x"}]', "upstream_422")),
    "a text": (400, {"error": "no\nway"}, (400, "no way", "upstream_400")),
    "nothing": (400, {}, (400, "The upstream refused this with status 400.", "upstream_400")),
    "not started for it": (501, {"error": {"code": 501, "message": "no"}}, (501, "no", "upstream_501")),
    "an image for a blind model": (
        500,
        {"error": {"code": 500, "message": "image input is not supported - hint: mmproj", "type": "server_error"}},
        (400, "image input is not supported - hint: mmproj", "bad_request"),
    ),
    "a request's fault as 500": (
        500,
        {"error": {"message": "no such grammar", "type": "invalid_request_error"}},
        (400, "no such grammar", "bad_request"),
    ),
    "our key": (400, {"error": {"message": "key sk-own-key"}}, (400, "key ***", "upstream_400")),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ERRORS)
def test_the_clients_own_errors_are_passed_on_in_our_shape_and_not_retried(name, stream):
    status, document, expected = ERRORS[name]
    speed = says("never", "Q4_K_M")
    spec = TierSpec("Q8_0", url="http://x.invalid", api_key="sk-own-key")
    upstream = replies(json.dumps(document).encode(), status=status, kind="application/json")
    reply = ask(upstream, speed, chat("quality", stream=stream), quality=spec)
    error = reply.json()["error"]
    assert (reply.status_code, error["message"], error["code"]) == expected
    assert set(error) == {"message", "type", "param", "code"} and speed.asked == []


def test_a_key_in_the_middle_of_a_stream_is_blotted_out():
    spec = TierSpec("Q8_0", url="http://x.invalid", api_key="sk-own-key")
    upstream = replies(event("a", "Q8_0"), b'data: {"error": "key sk-own-key is used up"}\n\n')
    reply = ask(upstream, FAST, chat("quality", stream=True), quality=spec)
    assert b"sk-own-key" not in reply.content and b"key *** is used up" in reply.content


A, B = event("a", "Q8_0"), event("b", "Q8_0")
DIALECTS = {
    "no empty line after DONE": [A, B, DONE[:-1]],
    "no line end after DONE": [A, B, DONE[:-2]],
    "only carriage return after DONE": [A, B, b"data:[DONE]\r\n"],
    "DONE in pieces": [A, B, b"da", b"ta: [DO", b"NE]"],
    "a byte order mark": [b"\xef\xbb\xbf" + A, B, DONE],
    "a byte order mark in pieces": [b"\xef", b"\xbb\xbf" + A, B, DONE],
    "empty data": [b"data:\n\n" + A, b"data: \n\ndata\n\n", B + b"data:\n\n", DONE],
    "comments": [b": hello\n\n", A, b": hello\n\n", B, DONE],
    "an event in two data lines": [A.replace(b", ", b",\ndata: ", 1), B, DONE],
    "carriage returns": [A.replace(b"\n", b"\r\n"), B.replace(b"\n", b"\r\n"), DONE],
    "no error": [A.replace(b"{", b'{"error": null, ', 1), B.replace(b"{", b'{"error": "", ', 1), DONE],
    "three line ends": [A + b"\n", B + b"\n", DONE],
    "other line ends in a text": [A.replace(b'"a"', '"a\u2028\x85"'.encode()), B, DONE],
}


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_of_event_streams_is_passed_on_whole(name):
    reply = ask(replies(*DIALECTS[name]), FAST, chat("quality", stream=True))
    assert reply.headers["x-bitladder-tier"] == "quality"
    assert reply.content.endswith(DONE) and b"not complete" not in reply.content
    assert not reply.content.startswith(b"\xef\xbb\xbf") and b"data:\n" not in reply.content
    client = openai.OpenAI(
        api_key="x",
        base_url="http://x.invalid/v1",
        http_client=httpx.Client(
            transport=httpx.MockTransport(
                lambda _: httpx.Response(200, content=reply.content, headers={"content-type": "text/event-stream"})
            )
        ),
    )
    with client:
        chunks = client.chat.completions.create(model="quality", messages=[], stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert [letter for letter in text if letter in "ab"] == ["a", "b"]


@pytest.mark.parametrize("count", [-5, 10**400, 1e300, True, "many", None, [1]])
def test_an_odd_count_of_tokens_is_not_counted(count):
    body = json.dumps({"model": "Q8_0", "choices": [{}], "usage": {"completion_tokens": count}}).encode()

    async def run() -> tuple[httpx.Response, dict]:
        async with gateway(replies(body, kind="application/json"), FAST) as (client, _):
            reply = await client.post(CHAT, json=chat("quality"))
            return reply, (await client.get("/bitladder/api/live")).json()

    reply, live = asyncio.run(run())
    assert (reply.status_code, reply.content) == (200, body)
    assert (live["recent"][0]["outcome"], live["recent"][0]["tokens"]) == ("complete", 0)


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 200_000, 196_608])
def test_a_large_document_arrives_whole(size):
    body = document("x" * size, "Q8_0")
    body += b" " * (-len(body) % 65536) if size == 196_608 else b""
    assert ask(replies(body, kind="application/json"), FAST, chat("quality")).content == body


def test_embeddings_never_change_their_tier():
    speed = says("never", "Q4_K_M")
    reply = ask(fails(), speed, {"model": "quality", "input": "x"}, None, "/v1/embeddings")
    assert (reply.status_code, speed.asked) == (503, [])


UNKNOWN = [b"", b"[]", b'"x"', b"{", b'{"model":"auto"}', b'{"messages":[{}]}', b"\xff\xfe", b"[" * 100_000]
MALFORMED = [
    *UNKNOWN,
    b'{"model":"auto","messages":[{}]} trailing',
    b'{"model":"auto","model":"speed","messages":[{}]}',
    b'{"model":"auto","messages":[{"content":NaN}]}',
    b'{"model":"auto","messages":"hello"}',
    b'{"model":"auto","messages":[]}',
    b'{"model":"auto","messages":["hello"]}',
    b'{"model":"auto","messages":[{}],"stream":"yes"}',
    b'{"model":"auto","messages":[{}],"stream":1}',
    b'{"model":"auto","messages":[{}],"max_tokens":"many"}',
    b'{"model":["auto"],"messages":[{}]}',
    b'{"model":"' + b"a" * 300 + b'","messages":[{}]}',
    b'{"model":"auto","messages":[{}],"n":' + b"9" * 5000 + b"}",
    b'{"model":"auto","messages":' + b'[{"a":' * 50_000,
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:50]))
def test_malformed_bodies_are_refused_with_a_reason(body):
    quality, speed = says("x", "Q8_0"), says("x", "Q4_K_M")
    reply = ask(quality, speed, body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert quality.asked == speed.asked == []


def test_odd_requests_are_let_through():
    quality = says("x", "Q8_0")
    body = chat("quality", "<script>alert(1)</script> {{ 7*7 }} {% for x in y %}", stream=None, unknown={"a": [None]})
    assert ask(quality, FAST, body).status_code == 200
    assert json.loads(quality.asked[0].body) == {**body, "model": "Q8_0"}


def test_what_cannot_fit_is_refused_before_the_engine_sees_it():
    quality = says("x", "Q8_0")
    reply = ask(quality, FAST, chat("quality", "x" * (QUALITY.n_ctx * 64 + 1)))
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert quality.asked == []


def test_a_header_in_a_tag_stays_one_line():
    auto = AutoRule(tags={"a": TagEvidence(1, 0)})
    headers = {b"x-bitladder-tag": "evil\tx-injected: 1 é".encode()}
    reply = ask(GOOD, FAST, chat("auto"), headers, auto=auto)
    assert reply.headers["x-bitladder-reason"] == "auto: no evidence for tag evil?x-injected: 1 ??"
    assert "x-injected" not in reply.headers


def test_a_full_queue_is_told_to_come_back():
    async def run() -> list[httpx.Response]:
        slow = replies(0.5, document("late", "Q8_0"), kind="application/json")
        spec = {"quality": QUALITY.__class__("Q8_0", url="http://x.invalid", slots=1)}
        async with gateway(slow, FAST, max_queue=1, **spec) as (client, _):
            return await asyncio.gather(*(client.post(CHAT, json=chat("quality")) for _ in range(4)))

    given = asyncio.run(run())
    assert sorted(reply.status_code for reply in given) == [200, 200, 429, 429]
    refused = next(reply for reply in given if reply.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_a_client_that_leaves_cancels_the_work_and_frees_its_slot():
    quality = replies(event("a", "Q8_0"), 30.0, DONE)

    async def run() -> None:
        async with deployed(
            ServeSettings(quality=QUALITY, speed=SPEED),
            upstreams={"Q8_0": quality.complete, "Q4_K_M": FAST.complete},
        ) as deployment:
            sent: list[dict] = []
            left = asyncio.Event()
            body = [{"type": "http.request", "body": json.dumps(chat("quality", stream=True)).encode()}]

            async def receive() -> dict:
                if body:
                    return body.pop()
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: dict) -> None:
                sent.append(message)
                if message["type"] == "http.response.body":
                    left.set()

            async with asyncio.timeout(5):
                await build_app(deployment)(POSTED, receive, send)
            assert quality.replies[0].closed
            assert deployment.tiers[0].gate.running == 0
            live = deployment.metrics.live(deployment.tiers)
            assert live["recent"][0]["outcome"] == "client left"

    asyncio.run(run())


def test_a_client_that_reads_nothing_is_given_up_and_its_upstream_waits_meanwhile():
    pulled = []

    async def endless():
        while True:
            pulled.append(1)
            yield event("a", "Q8_0")

    class Endless(FakeReply):
        def chunks(self):
            return endless()

    quality = Upstream(lambda _: Endless(200, {"content-type": "text/event-stream"}, []))

    async def run() -> None:
        settings = ServeSettings(quality=QUALITY, speed=SPEED, timeouts=QUICK)
        upstreams = {"Q8_0": quality.complete, "Q4_K_M": FAST.complete}
        async with deployed(settings, upstreams=upstreams) as deployment:
            body = [{"type": "http.request", "body": json.dumps(chat("quality", stream=True)).encode()}]

            async def receive() -> dict:
                if body:
                    return body.pop()
                await asyncio.sleep(60)
                raise AssertionError

            async def send(message: dict) -> None:
                if message["type"] == "http.response.body":
                    await asyncio.sleep(60)  # as uvicorn waits while the socket is full

            async with asyncio.timeout(5):
                await build_app(deployment)(POSTED, receive, send)
            assert len(pulled) == 1
            assert quality.replies[0].closed
            assert deployment.metrics.live(deployment.tiers)["recent"][0]["outcome"] == "client left"

    asyncio.run(run())


SURE, UNSURE = (-0.1, -0.2, -0.05), (-0.1, -3.0, -0.05)
HARD = AutoRule(tags={"hard": TagEvidence(5, 3)}, escalate=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(("logprobs", "level"), [(SURE, "Q4_K_M"), (UNSURE, "Q8_0")])
def test_escalation_by_the_speed_tiers_own_probabilities(stream, window, logprobs, level):
    speed = says("the fast answer", "Q4_K_M", logprobs)
    rule = Escalation(threshold=-1.0, window=window)
    reply = ask(GOOD, speed, chat("auto", stream=stream), {"x-bitladder-tag": "hard"}, auto=HARD, escalation=rule)
    assert reply.headers["x-bitladder-level"] == level
    assert json.loads(speed.asked[0].body)["logprobs"] is True
    assert b"logprob" not in reply.content
    words = text_of(reply.content) if stream else reply.json()["choices"][0]["message"]["content"]
    assert words == ("the fast answer" if level == "Q4_K_M" else "the good answer")
    if stream:
        assert reply.content.endswith(DONE)
    if level == "Q8_0":
        assert "escalated: a token's probability was 0.050, under 0.368" in reply.headers["x-bitladder-reason"]


def test_a_window_looks_no_further():
    speed = says("a b c", "Q4_K_M", (-0.1, -0.1, -9.0))
    rule = Escalation(threshold=-1.0, window=2)
    headers = {"x-bitladder-tag": "hard"}
    reply = ask(GOOD, speed, chat("auto", stream=True), headers, auto=HARD, escalation=rule)
    assert text_of(reply.content) == "a b c"


@pytest.mark.parametrize("odd", [["x"], {"content": [{"token": "x"}]}, {"token_logprobs": [[]]}, {"content": 1}])
@pytest.mark.parametrize("stream", [False, True])
def test_odd_log_probabilities_are_garbage_and_the_other_tier_answers(odd, stream):
    answer = {"model": "Q4_K_M", "choices": [{"index": 0, "message": {"content": "x"}, "delta": {}, "logprobs": odd}]}
    text = json.dumps(answer).encode()
    speed = replies(b"data: " + text + b"\n\n", DONE) if stream else replies(text, kind=JSON)
    body, headers = chat("auto", stream=stream), {"x-bitladder-tag": "hard"}
    reply = ask(GOOD, speed, body, headers, auto=HARD, escalation=Escalation(threshold=-1.0))
    assert reply.headers["x-bitladder-level"] == "Q8_0"
    assert "the speed tier answered with something that is no answer" in reply.headers["x-bitladder-reason"]


def test_log_probabilities_that_were_asked_for_stay():
    speed = says("a b", "Q4_K_M", (-0.1, -0.1))
    rule = Escalation(threshold=-1.0)
    body = chat("auto", logprobs=True)
    reply = ask(GOOD, speed, body, {"x-bitladder-tag": "hard"}, auto=HARD, escalation=rule)
    assert reply.content == document("a b", "Q4_K_M", (-0.1, -0.1))


def test_when_quality_is_down_an_unsure_answer_is_better_than_none():
    speed = says("the fast answer", "Q4_K_M", UNSURE)
    rule = Escalation(threshold=-1.0)
    reply = ask(fails(), speed, chat("auto"), {"x-bitladder-tag": "hard"}, auto=HARD, escalation=rule)
    assert reply.json()["choices"][0]["message"]["content"] == "the fast answer"
    assert "the quality tier cannot be reached" in reply.headers["x-bitladder-reason"]


def test_metrics_and_live_tell_what_happened():
    async def run() -> tuple[str, dict]:
        async with gateway(fails(), FAST) as (client, _):
            await client.post(CHAT, json=chat("quality"))
            await client.post(CHAT, json=chat("speed", stream=True))
            await client.post(CHAT, json=chat("nobody"))
            return (await client.get("/metrics")).text, (await client.get("/bitladder/api/live")).json()

    metrics, live = asyncio.run(run())
    assert 'bitladder_requests_total{level="Q4_K_M",outcome="complete",routed_by="model",tier="speed"} 2.0' in metrics
    assert 'bitladder_upstream_failures_total{phase="connect",tier="quality"} 1.0' in metrics
    assert [line["outcome"] for line in live["recent"]] == ["refused", "complete", "complete"]
    assert live["tiers"][1]["outcomes"] == {"complete": 2}
    assert live["shadow"] is None


def test_logs_hold_no_prompt_unless_asked(caplog):
    caplog.set_level(logging.INFO, "bitladder.serve")
    ask(GOOD, FAST, chat("speed", "a secret"))
    assert "a secret" not in "".join(str(vars(line)) for line in caplog.records)
    ask(GOOD, FAST, chat("speed", "a secret"), log_prompts=True)
    assert "a secret" in "".join(str(vars(line)) for line in caplog.records)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models/speed", 200),
        ("GET", "/v1/models/q8_0", 200),
        ("GET", "/v1/models/gpt-4", 404),
        ("GET", "/v1/models/a/b%2Fc", 404),
        ("POST", "/v1/responses", 400),
        ("GET", "/v1/responses", 405),
        ("DELETE", "/nope", 404),
        ("POST", "/v1/models", 405),
        ("POST", "/index.html", 405),
        ("GET", "/v1/chat/completions", 405),
    ],
)
def test_paths(method, path, status):
    async def run() -> httpx.Response:
        async with gateway(GOOD, FAST) as (client, _):
            return await client.request(method, path)

    reply = asyncio.run(run())
    assert reply.status_code == status
    if status == 200:
        assert reply.json()["object"] == "model" and reply.json()["id"].lower() == path.rsplit("/", 1)[1]
    else:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_models_health_and_unknown_paths():
    async def run() -> list[httpx.Response]:
        async with gateway(GOOD, FAST) as (client, _):
            paths = ("/v1/models", "/health", "/ready", "/v1/nothing", "/bitladder/api/run", CHAT)
            return [await client.get(path) for path in paths]

    models, health, ready, nothing, run_reply, get_chat = asyncio.run(run())
    assert [item["id"] for item in models.json()["data"]] == ["auto", "quality", "Q8_0", "speed", "Q4_K_M"]
    assert (health.status_code, ready.status_code) == (200, 200)
    assert (nothing.status_code, run_reply.status_code, get_chat.status_code) == (404, 404, 405)


def test_the_run_behind_a_gateway_is_shown_with_what_changed_in_its_answers(tmp_path):
    changes = WordingChanges(3, 2, 60, (Substitution("shall", "will", 4),), (), (), 0, ())
    record = run_record(wording={"Q4_K_M": changes})
    path = write_run(record, tmp_path / "run.json")

    async def run(run_json: Path | None) -> list[httpx.Response]:
        async with gateway(GOOD, FAST, run_json=run_json) as (client, _):
            return [await client.get(f"/bitladder/api/{view}") for view in ("run", "what-if?bar=kl+%3C+1", "answers")]

    whole, what_if, answers = asyncio.run(run(path))
    assert whole.json()["wording"].keys() == {"Q4_K_M"}
    assert what_if.json()["decision"]["bar"] == "kl < 1"
    assert [row["level"] for row in answers.json()["rows"]] == ["Q4_K_M"]
    assert "'shall' became 'will' 4 times" in answers.json()["rows"][0]["notes"]
    assert [reply.status_code for reply in asyncio.run(run(None))] == [404, 404, 404]
