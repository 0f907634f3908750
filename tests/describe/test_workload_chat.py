"""Inputs as deployments have them: tools, calls with results, several turns, thoughts, grammar, sampling."""

import hashlib
import json
import textwrap
from pathlib import Path

import pytest

from bitladder.describe.workload import question_hash
from bitladder.describe.workload_file import parse_workload
from bitladder.errors import BadWorkload
from bitladder.files.workloads import load_workload


def parse(text):
    return parse_workload(textwrap.dedent(text), source="w.yaml", read_file={"t.txt": "One. Two. Three."}.__getitem__)


TOOL = "{name: weather, parameters: {type: object, properties: {city: {type: string}}, required: [city]}}"


def test_tools_and_calls_with_their_results():
    one = parse(
        f"""
        tools: [{TOOL}]
        inputs:
          - messages:
              - {{role: user, content: "Paris?"}}
              - {{role: assistant, tool_calls: [{{name: weather, arguments: {{city: Paris}}}}]}}
              - {{role: tool, content: "18 degrees"}}
              - {{role: assistant, content: "18 degrees."}}
              - {{role: user, content: "And Oslo?"}}
            expect: {{tool_call: {{name: weather, arguments: {{city: Oslo}}}}}}
        """
    ).inputs[0]
    assert one.tools[0]["function"]["parameters"]["required"] == ["city"]
    call = one.messages[1]["tool_calls"][0]
    assert call == {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
    }
    assert one.messages[2] == {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"}
    assert one.tags == ("tools",)
    assert all(isinstance(message["content"], str) for message in one.messages)


def test_turns_with_own_and_given_answers_and_results():
    one = parse(
        f"""
        system: Answer in French.
        inputs:
          - tools: [{TOOL}]
            turns:
              - "Capital of Italy?"
              - {{user: "Of Spain?", answer: "Madrid."}}
              - {{user: "Weather in {{{{city}}}}?", expect: {{tool_call: weather}}}}
              - results: {{weather: "rain in {{{{city}}}}"}}
            variables: {{city: Lisbon}}
            throughout: {{max_words: 9}}
            expect: {{contains_any: pluie}}
        """
    ).inputs[0]
    assert [message["role"] for message in one.messages] == ["system", "user"]
    second, third = one.turns
    assert [message["content"] for message in second.messages] == ["Of Spain?", "Madrid.", "Weather in Lisbon?"]
    assert (third.messages, third.results) == ((), {"weather": "rain in Lisbon"})
    kinds = [[criterion.kind for criterion in turn.criteria] for turn in one.turns]
    assert kinds == [["max_words"], ["tool_call", "max_words"]]
    assert [criterion.kind for criterion in one.criteria] == ["contains_any", "max_words"]
    assert one.tags == ("tools", "turns")


def test_json_by_grammar_is_told_from_free_json():
    workload = parse(
        """
        inputs:
          - {id: held, prompt: p, response_format: json_schema, expect: {json_schema: {type: object}}}
          - {id: free, prompt: p, expect: {json_schema: {type: object}}, tags: [mine]}
          - {id: any, prompt: p, response_format: json_object, expect: {regex: a}}
        """
    )
    assert [one.tags for one in workload.inputs] == [("JSON by grammar",), ("mine", "JSON free"), ("JSON by grammar",)]
    assert workload.inputs[0].response_format["json_schema"]["schema"] == {"type": "object"}
    alone = parse("inputs: [{prompt: p, expect: {json_schema: {type: object}}}]")
    assert alone.inputs[0].tags == ()


def test_sampling_and_repeats():
    workload = parse(
        "repeat: 5\nsampling: {temperature: 0.6, top_k: 20, min_p: 0}\ninputs: [{prompt: p, expect: {exact: a}}]"
    )
    assert (workload.samples, workload.temperature, workload.sampling) == (5, 0.6, {"top_k": 20, "min_p": 0.0})
    assert parse("sampling: recommended\ninputs: [{prompt: p, expect: {exact: a}}]").recommended
    one = workload.inputs[0]
    assert workload.question(one, 0) != question_hash(one, 0.6, 0)


def test_a_needle_in_a_haystack():
    def content(depth, extra=""):
        field = f"{{needle: The code is 7431., tokens: 1000, depth: {depth}{extra}}}"
        asked = parse(f"inputs: [{{prompt: '{{{{haystack}}}} Code?', haystack: {field}, expect: {{number: 7431}}}}]")
        return asked.inputs[0].messages[0]["content"]

    text = content(0.5)
    assert 3900 < len(text) < 4500
    assert 0.4 < text.index("The code is 7431.") / len(text) < 0.6
    assert content(0).startswith("The code is 7431.")
    assert content(1).endswith("The code is 7431. Code?")
    assert content(0.5, ", text: t.txt").startswith("One. Two. Three. One.")
    assert text == content(0.5)


def test_the_example_is_sound():
    found = load_workload(Path(__file__).parents[2] / "examples" / "assistant" / "assistant.yaml")
    assert found.tags == ("tools", "turns", "JSON by grammar", "JSON free", "retrieval")
    assert found.warnings == ()


PLAIN = "inputs:\n  - {prompt: p, expect: {exact: a}}\n"


def test_inputs_without_any_of_it_are_found_under_their_old_keys():
    def digest(plain):
        return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    workload = parse(PLAIN)
    messages = [{"role": "user", "content": "p"}]
    asked = {"messages": messages, "max_tokens": 256, "temperature": 0.0, "seed": 0}
    assert workload.question(workload.inputs[0], 0) == digest(asked)
    plain = {"id": "input-1", "messages": messages, "criteria": [["exact", "a"]], "tags": [], "weight": 1.0}
    meaning = {"inputs": [plain | {"max_tokens": 256}], "temperature": 0.0, "samples": 1}
    assert workload.hash == digest(meaning)


def with_tools(rest):
    return f"inputs:\n  - tools: [{TOOL}]\n{textwrap.indent(textwrap.dedent(rest).strip(), '    ')}\n"


MESSAGES = "messages: [{role: user, content: p}, %s, {role: user, content: q}]\nexpect: {exact: a}"
FAULTS = {
    "no tools": ("inputs: [{prompt: p, expect: {tool_call: weather}}]", "tool_call needs an input with 'tools'"),
    "a tool that is not there": (with_tools("prompt: p\nexpect: {tool_call: wether}"), "there is no tool 'wether'"),
    "a tool's schema": (
        "inputs: [{prompt: p, tools: [{name: a, parameters: {type: x}}], expect: {exact: a}}]",
        "tools field 'parameters' needs a JSON schema",
    ),
    "turns and messages": (
        "inputs: [{turns: [a], messages: [], expect: {exact: a}}]",
        "either 'prompt' or 'messages', or 'turns'",
    ),
    "a result without a call": (
        with_tools(MESSAGES % "{role: tool, content: c}"),
        "a tool's result without a call: no call stands before it",
    ),
    "a result of another call": (
        with_tools(
            MESSAGES % "{role: assistant, tool_calls: [{name: weather}]}, {role: tool, name: clock, content: c}"
        ),
        "the call that it names is not there",
    ),
    "a call without a result": (
        with_tools(MESSAGES % "{role: assistant, tool_calls: [{name: weather}]}"),
        "the call of 'weather' before has no result",
    ),
    "a call of no tool": (
        with_tools(MESSAGES % "{role: assistant, tool_calls: [{name: rm}]}"),
        "calls 'rm', which is none",
    ),
    "results first": (
        with_tools("turns: [{results: {weather: r}}]\nexpect: {exact: a}"),
        "come after an answer that calls one",
    ),
    "results of no tool": (with_tools("turns: [a, {results: {rm: r}}]\nexpect: {exact: a}"), "there is no tool 'rm'"),
    "results without tools": (
        "inputs: [{turns: [a, {results: {x: r}}], expect: {exact: a}}]",
        "this input has no tools",
    ),
    "a last answer that is given": (
        "inputs: [{turns: [{user: a, answer: b}], expect: {exact: a}}]",
        "the last answer is the model's",
    ),
    "a given answer judged": (
        "inputs: [{turns: [{user: a, answer: b, expect: {exact: b}}, c], expect: {exact: a}}]",
        "is not judged",
    ),
    "an empty chat": ("inputs: [{turns: [], expect: {exact: a}}]", "turns needs a list of turns that is not empty"),
    "a turn that is a number": ("inputs: [{turns: [3], expect: {exact: a}}]", "a turn is a text or has fields"),
    "agreement in between": (
        "inputs: [{turns: [{user: a, expect: {agrees_with_reference: true}}, b], expect: {exact: a}}]",
        "judges the last answer",
    ),
    "throughout of one answer": (
        "inputs: [{prompt: p, throughout: {max_words: 3}, expect: {exact: a}}]",
        "'throughout' is of several turns",
    ),
    "repeat 0": ("repeat: 0\n" + PLAIN, "repeat needs a whole number from 1, got 0"),
    "repeat and samples": ("repeat: 2\nsamples: 2\n" + PLAIN, "'repeat' and 'samples' say the same"),
    "sampling that is a word": ("sampling: hot\n" + PLAIN, "sampling is 'recommended' or names settings"),
    "sampling that is none": ("sampling: {top_q: 1}\n" + PLAIN, "sampling has no field 'top_q'"),
    "two temperatures": (
        "sampling: {temperature: 1}\ntemperature: 1\n" + PLAIN,
        "the temperature stands in 'sampling', too",
    ),
    "grammar without a schema": (
        "inputs: [{prompt: p, response_format: json_schema, expect: {exact: a}}]",
        "needs the criterion 'json_schema'",
    ),
    "grammar of no kind": (
        "inputs: [{prompt: p, response_format: {type: lark}, expect: {exact: a}}]",
        "needs one of json_object, json_schema",
    ),
    "a schema that is none": (
        "inputs:\n  - prompt: p\n    response_format: {type: json_schema, json_schema: {schema: {type: x}}}\n"
        "    expect: {exact: a}",
        "needs a JSON schema",
    ),
    "a haystack beyond measure": (
        "inputs: [{prompt: p, haystack: {needle: n, tokens: 9000000}, expect: {exact: a}}]",
        "at most 500000",
    ),
    "thoughts of no length": (
        "inputs: [{prompt: p, max_thought_tokens: 0, expect: {exact: a}}]",
        "max_thought_tokens needs a whole number",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_is_refused_by_its_line(name):
    text, said = FAULTS[name]
    with pytest.raises(BadWorkload, match=r"^w\.yaml, line \d+: ") as caught:
        parse(text)
    assert said in str(caught.value).partition("\n")[0]
