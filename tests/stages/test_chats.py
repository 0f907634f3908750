"""Chats through an engine that plays recorded replies: turns, results of tools, thoughts, budgets."""

import json
from types import SimpleNamespace

import pytest

from bitladder.describe.workload_file import parse_workload
from bitladder.engines.base import Completion
from bitladder.engines.chat_api import ChatRequest
from bitladder.errors import BadInput, UsageError
from bitladder.records import to_json
from bitladder.records.evaluation import Answer, Speed, ToolCall
from bitladder.records.reading import from_json
from bitladder.stages.as_deployed import as_deployed, refuse_unheard_tools
from bitladder.stages.evaluate import answer_workload, compare, judge_answers, level_answers


class Recorded:
    """Plays one list of replies for each input's first message."""

    name, parallel = "recorded", 1

    def __init__(self, replies):
        self.replies = {first: list(own) for first, own in replies.items()}
        self.asked = []

    def chat(self, chat):
        self.asked.append(chat)
        return self.replies[chat.messages[0]["content"]].pop(0)

    def close(self):
        pass


def said(text="", finish="stop", calls=(), thought="", tokens=5):
    return Completion(
        text, finish, 7, tokens, "recorded", 0.1, 0.3, thought=bool(thought), reasoning=thought,
        thought_tokens=len(thought.split()), calls=tuple(ToolCall(*call) for call in calls),
    )  # fmt: skip


def parse(text):
    return parse_workload(text, source="w.yaml", read_file=str)


TOOL = "{name: weather, parameters: {type: object, properties: {city: {type: string}}, required: [city]}}"
CHAT = parse(
    f"""
tools: [{TOOL}]
inputs:
  - id: trip
    turns:
      - {{user: "Rain in Oslo?", expect: {{tool_call: {{name: weather, arguments: {{city: Oslo}}}}}}}}
      - {{results: {{weather: rain}}, expect: {{contains_all: rain}}}}
      - "Thank you."
    throughout: {{max_words: 4}}
    expect: {{tool_call: none}}
"""
)
OSLO = ("weather", '{"city": "Oslo"}')


def through(replies, workload=CHAT):
    engine = Recorded(replies)
    return judge_answers(workload, answer_workload(engine, workload)), engine


def test_own_answers_and_results_of_tools_stand_between_the_turns():
    (answer,), engine = through({"Rain in Oslo?": [said(calls=[OSLO]), said("Yes, rain."), said("Welcome.")]})
    assert answer.passed
    assert (answer.text, [reply.text for reply in answer.earlier]) == ("Welcome.", ["", "Yes, rain."])
    sent = [(one["role"], one["content"]) for one in engine.asked[2].messages]
    assert sent == [
        ("user", "Rain in Oslo?"), ("assistant", ""), ("tool", "rain"), ("assistant", "Yes, rain."),
        ("user", "Thank you."),
    ]  # fmt: skip
    call = engine.asked[1].messages[1]["tool_calls"][0]
    assert (call["id"], call["function"]["arguments"]) == (engine.asked[1].messages[2]["tool_call_id"], OSLO[1])
    assert from_json(tuple[Answer, ...], json.loads(json.dumps(to_json((answer,))))) == (answer,)


@pytest.mark.parametrize(
    ("replies", "detail"),
    [
        ([said("It rains.")], "answer 1 of 3: no call; 1 is wanted"),
        ([said(calls=[("weather", "{}")]), said("rain"), said()], "answer 1 of 3: weather lacks 'city'"),
        ([said(calls=[OSLO]), said("Sun."), said()], "answer 2 of 3: lacks 'rain'"),
        ([said(calls=[OSLO]), said("rain rain rain rain rain"), said()], "answer 2 of 3: 5 words"),
        ([said(calls=[OSLO]), said("rain"), said(calls=[OSLO])], "answer 3 of 3: no call is wanted"),
    ],
)
def test_the_first_answer_that_fails_is_named(replies, detail):
    (answer,), _ = through({"Rain in Oslo?": replies})
    assert not answer.passed
    assert answer.detail.startswith(detail)


def test_a_chat_that_cannot_go_on_fails():
    unjudged = parse(
        f"tools: [{TOOL}]\ninputs: [{{turns: [a, {{results: {{weather: r}}}}], expect: {{max_words: 9}}}}]"
    )
    (answer,), engine = through({"a": [said("hm")]}, unjudged)
    assert (answer.passed, len(engine.asked)) == (False, 1)
    assert answer.detail == "no tool was called after 1 of 2 answers"


def test_a_thought_is_never_judged_as_the_answer():
    workload = parse("max_tokens: 10\nmax_thought_tokens: 90\ninputs: [{prompt: p, expect: {contains_none: 'no'}}]")
    (answer,), engine = through({"p": [said("yes", thought="no, no")]}, workload)
    assert (answer.passed, answer.thought, answer.thought_tokens) == (True, "no, no", 2)
    assert (engine.asked[0].max_tokens, engine.asked[0].max_thought_tokens) == (100, 90)
    (stopped,), _ = through({"p": [said("", "stop", thought="It is 8.", tokens=8)]}, workload)
    assert (stopped.passed, stopped.detail) == (False, "no answer: its thought ended with nothing behind it")
    (cut,), _ = through({"p": [said("", "length", thought="hm hm", tokens=100)]}, workload)
    assert (cut.passed, cut.detail) == (False, "no answer: its thought did not end within 100 tokens")
    assert from_json(Answer, json.loads(json.dumps(to_json(cut)))) == cut


def test_what_is_sent():
    workload = parse(
        f"""
sampling: {{temperature: 0.6, top_p: 0.9}}
inputs: [{{prompt: p, tools: [{TOOL}], response_format: json_object, max_thought_tokens: 64, expect: {{max_words: 9}}}}]
"""
    )
    _, engine = through({"p": [said("x")]}, workload)
    body = ChatRequest("m", engine.asked[0]).body()
    assert body["tools"] == [dict(workload.inputs[0].tools[0])]
    assert (body["temperature"], body["top_p"], body["thinking_budget_tokens"]) == (0.6, 0.9, 64)
    assert body["response_format"] == {"type": "json_object"}
    plain = parse("inputs: [{prompt: p, expect: {exact: a}}]")
    _, engine = through({"p": [said("x")]}, plain)
    bare = {"model", "messages", "max_tokens", "temperature", "seed", "stream", "stream_options", "logprobs"}
    assert set(ChatRequest("m", engine.asked[0]).body()) == bare | {"top_logprobs"}


def test_answers_to_one_input_are_one_piece_of_evidence():
    """Three of ten inputs lose all of five answers; and all ten lose one of five, which is another thing."""
    workload = parse(
        "repeat: 5\ntemperature: 1\ninputs:\n"
        + "".join(f"  - {{id: i{n}, prompt: p{n}, expect: {{exact: a}}}}\n" for n in range(10))
    )

    def level(fails):
        replies = {f"p{n}": [said("b" if fails(n, seed) else "a") for seed in range(5)] for n in range(10)}
        return level_answers("L", through(replies, workload)[0], Speed(1.0, 1.0, 1.0))

    reference = level(lambda n, seed: False)
    some = compare(reference, level(lambda n, seed: n < 3), workload)
    every = compare(reference, level(lambda n, seed: seed == 0), workload)
    assert [one.share for one in some.differences] == [-1.0] * 3
    assert [one.share for one in every.differences] == [pytest.approx(-0.2)] * 10
    assert (some.pass_rate, every.pass_rate) == (pytest.approx(0.7), pytest.approx(0.8))
    assert compare(reference, reference, workload).differences == ()
    assert (some.pass_high - some.pass_low) > (every.pass_high - every.pass_low)


CHATML = {"tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}


@pytest.mark.parametrize("metadata", [{}, CHATML, {"tokenizer.chat_template": 7}])
def test_tools_for_a_model_without_a_place_for_them_are_refused(metadata):
    with pytest.raises(BadInput, match="1 input gives tools \\(trip\\), and this model's chat template has no place"):
        as_deployed(CHAT, metadata)
    plain = parse("inputs: [{prompt: p, expect: {exact: a}}]")
    assert as_deployed(plain, metadata) == plain


def test_the_engine_has_the_last_word_on_tools():
    assert as_deployed(CHAT, {"tokenizer.chat_template": "{% if tools %}{{ tools }}{% endif %}"}) is CHAT


@pytest.mark.parametrize("metadata", [{}, {"tokenizer.chat_template": ""}])
def test_a_model_without_a_template_is_asked_in_one_it_never_saw(metadata):
    plain = parse("inputs: [{id: a, prompt: Hi, expect: {exact: a}}]")
    told = as_deployed(plain, metadata)
    assert "ChatML" in told.warnings[-1] and told.hash == plain.hash
    assert as_deployed(told, metadata).warnings == told.warnings
    engine = SimpleNamespace(takes_tools=lambda: False)
    with pytest.raises(BadInput, match="has no place for them"):
        refuse_unheard_tools(CHAT, engine)
    for heard in (True, None):
        refuse_unheard_tools(CHAT, SimpleNamespace(takes_tools=lambda heard=heard: heard))
    refuse_unheard_tools(parse("inputs: [{prompt: p, expect: {exact: a}}]"), engine)


RECOMMENDED = parse("sampling: recommended\nrepeat: 2\ninputs: [{prompt: p, expect: {exact: a}}]")


@pytest.mark.parametrize(
    ("metadata", "config", "temperature", "sampling"),
    [
        ({"general.sampling.temp": 0.6000000238, "general.sampling.top_k": 20}, None, 0.6, {"top_k": 20}),
        ({"general.sampling.top_p": 0.949999988}, {"temperature": 0.1}, 1.0, {"top_p": 0.95}),
        ({}, {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.05}, 0.7, {"repeat_penalty": 1.05}),
        ({}, {"do_sample": False, "temperature": 0.7}, 0.0, {}),
        ({"general.sampling.temp": float("nan"), "general.sampling.top_k": -3}, {"top_p": 0.9}, 1.0, {"top_p": 0.9}),
    ],
)  # fmt: skip
def test_the_sampling_that_a_model_recommends(tmp_path, metadata, config, temperature, sampling):
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    found = as_deployed(RECOMMENDED, metadata, tmp_path)
    assert (found.temperature, found.sampling, found.samples, found.recommended) == (temperature, sampling, 2, False)


def test_nothing_is_asked_greedily_instead():
    with pytest.raises(UsageError, match="which is not looked up here"):
        answer_workload(Recorded({}), RECOMMENDED)


@pytest.mark.parametrize("config", [None, "[1]", "{", '{"temperature": "hot"}', '{"temperature": 1e999}'])
def test_a_model_that_recommends_nothing_is_told(tmp_path, config):
    if config is not None:
        (tmp_path / "generation_config.json").write_text(config)
    with pytest.raises(UsageError, match="and it recommends none"):
        as_deployed(RECOMMENDED, {"general.sampling.temp": True}, tmp_path)
