"""Endpoints that misbehave, and a judge: fakes are functions from request to reply."""

import json
import logging

import httpx
import pytest

from bitladder.describe.workload import Criterion, Input, Workload
from bitladder.engines.base import Chat, Completion
from bitladder.engines.endpoint import Endpoint, EndpointSettings, endpoint_at
from bitladder.engines.judge import Judge, judge_error
from bitladder.engines.names import same_model
from bitladder.errors import EngineGone, EngineReply, EngineTimeout, UsageError, WrongModel

KEY = "sk-a-very-secret-key"
HELLO = [{"role": "user", "content": "Hello"}]


def event(**fields):
    return "data: " + json.dumps({"model": "m", **fields}) + "\n\n"


def said(text, reason=None):
    return event(choices=[{"delta": {"content": text}, "finish_reason": reason}])


GOOD = said("Good ") + said("day", "stop") + event(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 2})
GOOD += "data: [DONE]\n\n"


def stream(text, **fields):
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"}, **fields)


def endpoint(*replies, settings=None, waits=None, **options):
    """An endpoint whose replies come in this order, the last one for ever; errors are raised."""
    asked = []

    def handle(request):
        asked.append(request)
        reply = replies[min(len(asked), len(replies)) - 1]
        if isinstance(reply, Exception):
            raise reply
        return reply

    settings = settings or EndpointSettings("http://fake/v1", model="m", **options)
    waits = waits if waits is not None else []
    made = Endpoint(settings, transport=httpx.MockTransport(handle), sleep=waits.append)
    made.asked = asked
    return made


def test_a_streamed_answer():
    engine = endpoint(stream(GOOD))
    done = engine.chat(Chat(HELLO, 5, seed=3))
    assert (done.text, done.finish_reason, done.prompt_tokens, done.completion_tokens) == ("Good day", "stop", 9, 2)
    assert 0 < done.first_token_s <= done.total_s
    body = json.loads(engine.asked[0].content)
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"], body["stream"]) == (
        "m",
        5,
        0.0,
        3,
        True,
    )


def test_an_engine_that_does_not_stream():
    whole = {"model": "m", "choices": [{"message": {"content": "Good day"}, "finish_reason": "length"}]}
    whole["choices"][0]["logprobs"] = {"content": [{"token": "Good", "logprob": -0.1, "top_logprobs": []}]}
    done = endpoint(httpx.Response(200, json=whole)).chat(Chat(HELLO, 5))
    assert (done.text, done.finish_reason) == ("Good day", "length")
    assert (done.tokens[0].text, done.tokens[0].logprob) == ("Good", -0.1)


def test_the_dialect_of_an_endpoint():
    engine = endpoint(stream(GOOD), max_tokens_field="max_completion_tokens", without=("seed", "temperature"))
    engine.chat(Chat(HELLO, 5, logprobs=3))
    body = json.loads(engine.asked[0].content)
    assert body["max_completion_tokens"] == 5
    assert not {"max_tokens", "seed", "temperature", "logprobs"} & set(body)


ODD_TEXTS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\ufeff"]


@pytest.mark.parametrize("odd", ODD_TEXTS)
def test_only_line_ends_end_a_line(odd):
    text = f"one{odd}two"
    choices = [{"delta": {"content": text}, "finish_reason": "stop"}]
    sent = f"data: {json.dumps({'model': 'm', 'choices': choices}, ensure_ascii=False)}\n\ndata: [DONE]\n\n"
    assert endpoint(stream(sent)).chat(Chat(HELLO, 5)).text == text


ONE, TWO, DONE = said("Good "), said("day", "stop"), "data: [DONE]\n\n"
DIALECTS = {
    "no empty line after DONE": ONE + TWO + "data: [DONE]\n",
    "no line end after DONE": ONE + TWO + "data: [DONE]",
    "no DONE": ONE + TWO,
    "no end of the last event": ONE + TWO[:-2],
    "a byte order mark": "\ufeff" + ONE + TWO + DONE,
    "empty data": ONE + "data:\n\ndata: \n\ndata\n\n" + TWO + DONE,
    "an event in two data lines": ONE.replace(", ", ",\ndata: ", 1) + TWO + DONE,
    "carriage returns": (ONE + TWO + DONE).replace("\n", "\r\n"),
    "no space": (ONE + TWO + DONE).replace("data: ", "data:"),
    "other fields and comments": ": hi\n\nevent: message\nid: 1\nretry: 5\n" + ONE + "what: ever\n" + TWO + DONE,
    "error null": (ONE + TWO).replace("{", '{"error": null, ', 1) + DONE,
    "error empty": (ONE + TWO).replace("{", '{"error": "", ', 1) + DONE,
    "usage null": ONE + event(usage=None, choices=None) + TWO + DONE,
    "no count": ONE + TWO + event(choices=[], usage={"prompt_tokens": None, "completion_tokens": None}) + DONE,
    "counts that cannot be": ONE + TWO + event(usage={"prompt_tokens": -1, "completion_tokens": 1e300}) + DONE,
    "content in parts": said([{"type": "text", "text": "Good"}, {"type": "text", "text": " "}, {"type": "x"}]) + TWO,
}


@pytest.mark.parametrize("cut", [1, 7, 100_000])
@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_of_event_streams_is_read(name, cut):
    data = DIALECTS[name].encode()
    pieces = (data[at : at + cut] for at in range(0, len(data), cut))
    reply = httpx.Response(200, content=pieces, headers={"content-type": "text/event-stream"})
    done = endpoint(reply).chat(Chat(HELLO, 5))
    assert (done.text, done.finish_reason, done.prompt_tokens, done.completion_tokens) == ("Good day", "stop", 0, 0)


WHOLE = {
    "error null": {"error": None},
    "usage null": {"usage": None},
    "counts null": {"usage": {"prompt_tokens": None, "completion_tokens": None}},
    "content in parts": {
        "choices": [{"message": {"content": [{"type": "text", "text": "Hi"}]}, "finish_reason": "stop"}]
    },
}


@pytest.mark.parametrize("name", WHOLE)
def test_every_dialect_of_documents_is_read(name):
    whole = {"model": "m", "choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}], **WHOLE[name]}
    assert endpoint(httpx.Response(200, json=whole)).chat(Chat(HELLO, 5)).text == "Hi"


FAULTS = {
    "cut short": (stream(said("Good ")), EngineReply, "stops after 5 characters without saying why"),
    "no json in the stream": (stream("data: {oops\n\n"), EngineReply, "something that is not JSON: {oops"),
    "a web page": (
        httpx.Response(200, text="<html>", headers={"content-type": "application/json"}),
        EngineReply,
        "not JSON: <html>",
    ),
    "an error in the stream": (stream(said("a") + event(error={"message": "lost"})), EngineReply, "lost"),
    "llama.cpp's error line": (stream(said("a") + "error: out of memory\n\n"), EngineReply, "gave up.*out of memory"),
    "not an object": (stream("data: [1]\n\n"), EngineReply, "an event that is no object"),
    "content that is none": (stream(said(5, "stop")), EngineReply, "no completion"),
    "a count that is none": (stream(TWO + event(usage={"completion_tokens": "2"})), EngineReply, "no completion"),
    "cut in an event": (stream(ONE + TWO[:40]), EngineReply, "stops after 5 characters"),
    "no event at all": (stream("x" * 5_000_000), EngineReply, "hold no whole event"),
    "bad request": (httpx.Response(400, text="too long"), EngineReply, "status 400: too long"),
    "without end": (stream(said("x" * 999) * 9), EngineReply, "asked for 5 tokens and has sent 1998 characters"),
    "wrong key": (httpx.Response(401, text="no"), EngineReply, "key is missing or wrong"),
    "nobody there": (httpx.ConnectError("refused"), EngineGone, "cannot be reached: refused"),
    "broken off": (httpx.RemoteProtocolError("peer closed"), EngineReply, "broke off in the middle"),
    "slow to connect": (httpx.ConnectTimeout("t"), EngineTimeout, "not answer in time while connecting"),
    "stalled": (httpx.ReadTimeout("t"), EngineTimeout, "not answer in time while waiting for its reply"),
    "slow to take": (httpx.WriteTimeout("t"), EngineTimeout, "not answer in time while sending"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_misbehaviour_has_its_error(name):
    reply, error, message = FAULTS[name]
    with pytest.raises(error) as caught:
        endpoint(reply, retries=0).chat(Chat(HELLO, 5))
    assert caught.match(message)


def test_trying_again_waits_as_told_then_longer():
    waits = []
    busy = httpx.Response(429, headers={"retry-after": "7"}, text="slow down")
    engine = endpoint(busy, httpx.Response(503), stream(said("cut")), stream(GOOD), waits=waits)
    assert engine.chat(Chat(HELLO, 5)).text == "Good day"
    assert waits == [7.0, 2.0, 4.0]


def test_what_cannot_help_is_not_tried_again():
    engine = endpoint(httpx.Response(401, text="no"))
    with pytest.raises(EngineReply):
        engine.chat(Chat(HELLO, 5))
    assert len(engine.asked) == 1


def test_tries_end():
    engine = endpoint(httpx.Response(500, text="oops"), retries=2)
    with pytest.raises(EngineReply, match="status 500"):
        engine.chat(Chat(HELLO, 5))
    assert len(engine.asked) == 3


def test_another_model_answers():
    with pytest.raises(WrongModel, match="was asked for 'm' and answered as 'tiny'"):
        endpoint(stream(GOOD.replace('"m"', '"tiny"'))).chat(Chat(HELLO, 5))


def test_the_model_is_exchanged_on_the_way():
    dated = [stream(GOOD.replace('"m"', f'"m-{date}"')) for date in ("2026-01-01", "2026-02-02")]
    engine = endpoint(*dated)
    engine.chat(Chat(HELLO, 5))
    with pytest.raises(WrongModel, match="as 'm-2026-01-01' first and as 'm-2026-02-02' now"):
        engine.chat(Chat(HELLO, 5))


@pytest.mark.parametrize(
    ("wanted", "served", "same"),
    [
        ("gpt-x", "gpt-x-2026-01-31", True),
        ("gpt-x", "gpt-x-mini", False),
        ("llama3", "llama3:latest", True),
        ("llama3", "llama3:8b", False),
        ("org/Model", "model.gguf", True),
        ("a", "b", False),
    ],
)
def test_names_of_one_model(wanted, served, same):
    assert same_model(wanted, served) is same


def test_probing():
    listed = httpx.Response(200, json={"data": [{"id": "m"}, {"id": "n"}]})
    assert endpoint(listed).probe() == ("m", "n")
    assert endpoint(httpx.Response(404)).probe() == ()
    assert endpoint(httpx.Response(401), stream(GOOD)).probe() == ()  # the list is closed to a key that may chat
    with pytest.raises(EngineReply, match="key is missing or wrong"):
        endpoint(httpx.Response(401)).probe()
    with pytest.raises(WrongModel, match="does not serve 'm'"):
        endpoint(httpx.Response(200, json={"data": [{"id": "n"}]})).probe()
    with pytest.raises(EngineReply, match="lists its models in a way"):
        endpoint(httpx.Response(200, json=["m"])).probe()


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("FAKE_KEY", KEY)
    repeats = httpx.Response(401, text=f"Incorrect API key provided: {KEY}")
    engine = endpoint(repeats, key_env="FAKE_KEY")
    with pytest.raises(EngineReply) as caught:
        engine.chat(Chat(HELLO, 5))
    assert engine.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert "[key]" in str(caught.value)
    for shown in (str(caught.value), repr(caught.value), repr(engine), repr(engine.settings), caplog.text):
        assert KEY not in shown


def test_settings_that_cannot_be(monkeypatch):
    monkeypatch.delenv("FAKE_KEY", raising=False)
    with pytest.raises(UsageError, match="FAKE_KEY is empty"):
        endpoint(stream(GOOD), key_env="FAKE_KEY")
    with pytest.raises(UsageError, match="no address"):
        EndpointSettings("fake/v1")
    with pytest.raises(UsageError, match="neither a user, a password nor a query"):
        EndpointSettings(f"http://user:{KEY}@fake/v1")


def test_requests_are_spread_over_the_minute():
    waits = []
    engine = endpoint(stream(GOOD), requests_per_minute=6, waits=waits)
    for _ in range(3):
        engine.chat(Chat(HELLO, 5))
    assert [round(wait) for wait in waits] == [10, 20]


def test_an_address_names_model_and_key():
    cloud = endpoint_at("https://api.anthropic.com/v1#claude-x")
    assert (cloud.base_url, cloud.model, cloud.key_env) == (
        "https://api.anthropic.com/v1",
        "claude-x",
        "ANTHROPIC_API_KEY",
    )
    here = endpoint_at("http://127.0.0.1:8000/v1/#org/name%20x")
    assert (here.base_url, here.model, here.key_env) == ("http://127.0.0.1:8000/v1", "org/name x", "")
    assert (here.label, here.address) == ("name x@127.0.0.1:8000", "http://127.0.0.1:8000/v1#org/name x")
    assert endpoint_at("https://api.openai.com/v1#m", key_env="MINE").key_env == "MINE"
    with pytest.raises(UsageError, match="no address"):
        endpoint_at("Q4_K_M")


def refusal(name):
    return httpx.Response(400, json={"error": {"message": f"Unsupported parameter: '{name}'"}})


def test_a_field_that_is_refused_is_left_out_and_said_if_it_matters():
    engine = endpoint(refusal("seed"), refusal("temperature"), stream(GOOD))
    assert engine.chat(Chat(HELLO, 5)).text == "Good day"
    first, second, last = (json.loads(one.content) for one in engine.asked)
    assert {"seed", "temperature"} <= set(first)
    assert "seed" not in second
    assert not {"seed", "temperature"} & set(last)
    assert "sampled, not greedy" in engine.notes[0]
    engine.chat(Chat(HELLO, 5))
    assert len(engine.asked) == 4  # remembered
    with pytest.raises(EngineReply, match="Unsupported parameter: 'messages'"):
        endpoint(refusal("messages")).chat(Chat(HELLO, 5))


def test_the_newer_name_of_the_limit():
    said = {"error": {"message": "'max_tokens' is not supported; use 'max_completion_tokens' instead."}}
    engine = endpoint(httpx.Response(400, json=said), stream(GOOD))
    engine.chat(Chat(HELLO, 5))
    assert json.loads(engine.asked[1].content)["max_completion_tokens"] == 5


def test_silence_is_waited_for_twice_only():
    engine = endpoint(httpx.ReadTimeout("slow"))
    with pytest.raises(EngineTimeout):
        engine.chat(Chat(HELLO, 5))
    assert len(engine.asked) == 2


class FakeJudge:
    """A judge model that is a function of the prompt."""

    name, parallel = "judge", 1

    def __init__(self, answer):
        self.answer = answer

    def chat(self, chat):
        return Completion(self.answer(chat.messages[0]["content"]), "stop", 1, 1, "judge", 0.1, 0.1)

    def close(self):
        pass


QUESTION = Input("i", ({"role": "user", "content": "Greet me."},), ())
RUBRIC = {"rubric": "It is kind.", "against": "none", "examples": []}
PAIR = {**RUBRIC, "against": "reference"}


def test_a_judge_is_asked_in_both_orders():
    prompts = []
    assert Judge(FakeJudge(lambda prompt: prompts.append(prompt) or "PASS"))(QUESTION, RUBRIC, "Dear!", None).passed
    assert prompts[0].index("Dear!") < prompts[0].index("It is kind.")
    assert prompts[1].index("Dear!") > prompts[1].index("It is kind.")


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (lambda prompt: "PASS" if "PASS or FAIL" in prompt else "FAIL", "undecided: the judge changes its mind"),
        (lambda prompt: "Well, it depends.", "undecided: the judge said neither"),
        (lambda prompt: "PASS or FAIL? FAIL", "undecided: the judge said neither"),
        (lambda prompt: "FAIL.", "the judge says FAIL"),
    ],
)
def test_only_a_verdict_that_survives_the_order_counts(answer, detail):
    outcome = Judge(FakeJudge(answer))(QUESTION, RUBRIC, "Dear!", None)
    assert not outcome.passed
    assert outcome.detail.startswith(detail)


def test_against_the_reference():
    judge = Judge(FakeJudge(lambda prompt: "A" if "A:\n<<<\nworse" not in prompt else "B"))
    assert not judge(QUESTION, PAIR, "worse", "better").passed
    first_wins = Judge(FakeJudge(lambda prompt: "A"))
    assert first_wins(QUESTION, PAIR, "worse", "better").passed
    assert first_wins(QUESTION, PAIR, "is the reference itself", None).passed
    assert Judge(FakeJudge(lambda prompt: "?"))(QUESTION, PAIR, "a", "b").detail.startswith("undecided")


def test_the_judges_own_error():
    examples = [
        {"answer": "kind", "passes": True},
        {"answer": "rude", "passes": False},
        {"answer": "so", "passes": True},
    ]
    criterion = Criterion("judge", {**RUBRIC, "examples": examples})
    workload = Workload("w", (Input("i", QUESTION.messages, (criterion,)),))
    strict = Judge(FakeJudge(lambda prompt: "PASS" if "\nkind\n" in prompt else "FAIL"))
    error = judge_error(strict, workload)
    assert (error.examples, error.wrong, error.undecided) == (3, 1, 0)
    assert error.rate == pytest.approx((0.0084, 0.9057), abs=1e-3)
    silent = judge_error(Judge(FakeJudge(lambda prompt: "hm")), workload)
    assert (silent.wrong, silent.undecided) == (3, 3)


def test_halves_of_characters_are_joined_or_replaced():
    sent = "".join(said(piece) for piece in ("a \ud83d", "\ude00 b \ud83d c")) + said("", "stop")
    assert endpoint(stream(sent)).chat(Chat(HELLO, 5)).text == "a \U0001f600 b \ufffd c"


@pytest.mark.parametrize(
    "reply", ["[" * 100_000, '{"choices": 3}', '{"timings": {"predicted_n": 1e999}}', '{"usage": []}']
)
def test_json_that_is_no_completion(reply):
    headers = {"content-type": "application/json"}
    with pytest.raises(EngineReply):
        endpoint(httpx.Response(200, text=reply, headers=headers), retries=0).chat(Chat(HELLO, 5))


@pytest.mark.parametrize(
    ("whole", "text", "thought"),
    [
        ("<think>\nIs it 4 or 5?\n</think>\n\n4", "4", True),
        ("Is it 4?</think>4", "4", True),
        (" <thinking>hm</thinking> 4", "4", True),
        ("<think></think>4", "4", True),
        ("<think>Is it 5", "", True),
        ("4", "4", False),
        ("write <think> before it", "write <think> before it", False),
        ("  indented", "  indented", False),
        ("", "", False),
    ],
)
def test_thoughts_are_no_answer(whole, text, thought):
    done = endpoint(stream("".join(said(letter) for letter in whole) + said("", "stop"))).chat(Chat(HELLO, 99))
    assert done.text == text
    assert done.thought is thought


def test_answers_that_were_cut_while_the_model_thought_are_told():
    apart = event(choices=[{"delta": {"reasoning_content": "Is it 5"}, "finish_reason": "length"}])
    for cut in (stream(said("<think>Is it 5", "length")), stream(apart)):
        engine = endpoint(cut)
        engine.chat(Chat(HELLO, 5))
        assert [note.partition(":")[0] for note in engine.notes][
            1
        ] == "1 answers of m@fake were cut while it still thought"
    plain = endpoint(stream(GOOD))
    plain.chat(Chat(HELLO, 5))
    assert plain.notes == ()


CALLS = [("weather", '{"city": "Oslo"}'), ("clock", "{}")]


def streamed_calls():
    """As servers stream them: name first, arguments in pieces, each call under its place."""
    pieces = [
        {"index": 0, "id": "a", "function": {"name": "weather", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"city": '}},
        {"index": 1, "id": "b", "function": {"name": "clock", "arguments": "{}"}},
        {"index": 0, "function": {"arguments": '"Oslo"}'}},
    ]
    events = [event(choices=[{"delta": {"tool_calls": [piece]}}]) for piece in pieces]
    return stream("".join(events) + event(choices=[{"delta": {}, "finish_reason": "tool_calls"}]))


def whole_calls(arguments):
    calls = [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": arguments}}]
    calls.append({"id": "b", "type": "function", "function": {"name": "clock"}})
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    return httpx.Response(200, json={"model": "m", "choices": [{"message": message, "finish_reason": "tool_calls"}]})


@pytest.mark.parametrize(
    ("reply", "calls"),
    [
        (streamed_calls(), CALLS),
        (whole_calls('{"city": "Oslo"}'), [CALLS[0], ("clock", "")]),
        (whole_calls({"city": "Oslo"}), [CALLS[0], ("clock", "")]),  # the object itself
    ],
)
def test_calls_of_tools_in_every_dialect(reply, calls):
    done = endpoint(reply).chat(Chat(HELLO, 99))
    assert [(call.name, call.arguments) for call in done.calls] == calls
    assert (done.text, done.finish_reason, done.thought) == ("", "tool_calls", False)


@pytest.mark.parametrize(
    "calls",
    ["x", [7], [{"function": 7}], [{"function": {"name": 7}}], [{"index": None}], [{"index": n} for n in range(200)]],
)
def test_calls_that_are_none_end_in_one_error(calls):
    reply = event(choices=[{"delta": {"tool_calls": calls}, "finish_reason": "stop"}])
    with pytest.raises(EngineReply, match="JSON that is no completion"):
        endpoint(stream(reply)).chat(Chat(HELLO, 99))


def test_a_thought_is_kept_with_its_length():
    apart = event(choices=[{"delta": {"reasoning_content": "Is it 4? Yes. "}}]) + said("4444", "stop")
    usage = {"prompt_tokens": 1, "completion_tokens": 18}
    done = endpoint(stream(apart + event(choices=[], usage=usage))).chat(Chat(HELLO, 99))
    assert (done.text, done.reasoning, done.thought_tokens) == ("4444", "Is it 4? Yes. ", 14)  # by its characters
    counted = {**usage, "completion_tokens_details": {"reasoning_tokens": 11}}
    done = endpoint(stream(apart + event(choices=[], usage=counted))).chat(Chat(HELLO, 99))
    assert done.thought_tokens == 11
    marked = endpoint(stream(said("[THINK]Is it 5?[/THINK]5", "stop"))).chat(Chat(HELLO, 99))
    assert (marked.text, marked.reasoning) == ("5", "Is it 5?")
    assert not endpoint(stream(GOOD)).chat(Chat(HELLO, 99)).reasoning


def test_what_an_endpoint_refuses_of_a_thoughts_limit_and_of_sampling_is_told():
    engine = endpoint(refusal("thinking_budget_tokens"), refusal("top_k"), stream(GOOD))
    engine.chat(Chat(HELLO, 5, temperature=0.6, sampling={"top_k": 20, "top_p": 0.9}, max_thought_tokens=3))
    sent = [json.loads(request.content) for request in engine.asked]
    assert [set(sent[0]) - set(body) for body in sent[1:]] == [
        {"thinking_budget_tokens"}, {"thinking_budget_tokens", "top_k"},
    ]  # fmt: skip
    assert sent[2]["top_p"] == 0.9
    said_of = " ".join(engine.notes)
    assert "refuses top_k: it samples otherwise than the levels" in said_of
    assert "takes no limit for a thought" in said_of
