"""Workload files: what they may say, and each fault with its line."""

import json
import textwrap

import pytest

from bitladder.describe.text import most_tokens
from bitladder.describe.workload import question_hash
from bitladder.describe.workload_file import parse_workload
from bitladder.errors import BadInput, BadWorkload, OutputError, UsageError
from bitladder.files.workloads import (
    load_reference,
    load_workload,
    new_workload,
    trusted_functions,
)
from bitladder.stages.evaluate import judge_answers
from bitladder.stages.run_facts import slots


def parse(text, files=None, **options):
    def read_file(name):
        if name not in (files or {}):
            raise OSError("no such file")
        return files[name]

    return parse_workload(textwrap.dedent(text), source="w.yaml", read_file=read_file, **options)


def test_prompt_variables_files_and_defaults():
    workload = parse(
        """\
        name: contracts
        system: You are {{who}}.
        max_tokens: 7
        inputs:
          - id: rent
            prompt: "How much? {{ clause }}"
            variables: {who: careful}
            files: {clause: a.txt}
            tags: [extraction]
            weight: 2
            expect:
              number: 1250
              max_words: 20
        """,
        {"a.txt": "1,250 euros"},
    )
    one = workload.inputs[0]
    assert one.messages == (
        {"role": "system", "content": "You are careful."},
        {"role": "user", "content": "How much? 1,250 euros"},
    )
    assert (one.weight, one.max_tokens, one.tags, one.line) == (2.0, 7, ("extraction",), 5)
    assert [(criterion.kind, criterion.line) for criterion in one.criteria] == [("number", 12), ("max_words", 13)]
    assert workload.name == "contracts"
    assert workload.kinds == {"number", "max_words"}


def test_messages_and_generated_ids():
    workload = parse(
        """\
        inputs:
          - messages: [{role: system, content: Be brief.}, {role: user, content: Hello}]
            expect: {contains_any: [hi, hello]}
        """
    )
    assert workload.inputs[0].id == "input-1"
    assert workload.name == "w"


def test_json_lines():
    text = '{"prompt": "2 + 2?", "expect": {"number": 4}}\n\n{"prompt": "3?", "expect": {"number": 3}}\n'
    workload = parse(text, json_lines=True)
    assert [(one.id, one.line) for one in workload.inputs] == [("input-1", 1), ("input-2", 3)]


INPUT = "inputs:\n  - prompt: p\n    expect: {exact: a}\n"


def expecting(criterion):
    return f"inputs:\n  - prompt: p\n    expect:\n      {criterion}\n"


def asking(fields):
    return f"inputs:\n  - {fields}\n    expect: {{exact: a}}\n"


FAULTS = {
    "no inputs": ("name: x\n", "line 1: a workload needs a list 'inputs' with at least one input"),
    "empty file": ("", "line 1: a workload needs a list 'inputs'"),
    "broken yaml": ("inputs:\n  - prompt: 'a\n", "line 3: this is no YAML: found unexpected end of stream"),
    "colon in a text": (
        "inputs:\n  - prompt: a: b\n",
        "line 2: this is no YAML: mapping values are not allowed in this context",
    ),
    "unknown top field": (INPUT + "inptus: 3\n", "line 4: there is no field 'inptus' here.\nDid you mean 'inputs'?"),
    "unknown input field": (
        "inputs:\n  - prompt: p\n    expct: {exact: a}\n",
        "line 3: there is no field 'expct' here.\nDid you mean 'expect'?",
    ),
    "unknown criterion": (
        expecting("contain_all: [a]"),
        "line 4: there is no field 'contain_all' here.\nDid you mean 'contains_all'?",
    ),
    "field twice": (asking("prompt: p\n    prompt: q"), "line 3: the field 'prompt' stands here twice"),
    "no criterion": ("inputs:\n  - prompt: p\n", "line 2: an input needs 'expect' with at least one criterion"),
    "prompt and messages": (
        asking("prompt: p\n    messages: []"),
        "line 2: an input needs either 'prompt' or 'messages'",
    ),
    "input is a text": ("inputs:\n  - hello\n", "line 2: an input needs fields like prompt and expect, got 'hello'"),
    "bad role": (
        asking("messages:\n      - {role: boss, content: c}"),
        "line 3: entry 1 of messages field 'role' needs one of system, user, assistant, tool, got 'boss'",
    ),
    "assistant last": (
        asking("messages:\n      - {role: user, content: c}\n      - {role: assistant, content: c}"),
        "line 4: the last message must be the user's, or a tool's result",
    ),
    "no value for a variable": (
        asking("prompt: 'a {{b}}'\n    variables: {c: d}"),
        "line 2: the variable 'b' has no value.\nVariables of this input: c.",
    ),
    "missing file": (
        asking("prompt: '{{b}}'\n    files:\n      b: gone.txt"),
        "line 4: the file 'gone.txt' cannot be read: no such file",
    ),
    "yes without quotes": (
        expecting("one_of: yes"),
        "line 4: one_of needs a text, got True; put it in quotes if it is meant as a text",
    ),
    "bad regex": (
        expecting("regex: '('"),
        "line 4: regex needs a regular expression; '(' is none: missing ), unterminated subpattern",
    ),
    "bad number": (expecting("number: {value: x}"), "line 4: number field 'value' needs a number, got 'x'"),
    "negative tolerance": (
        expecting("number: {value: 1, tolerance: -1}"),
        "line 4: number field 'tolerance' needs a number of 0 or more, got -1",
    ),
    "bad schema": (
        expecting("json_schema: {type: objekt}"),
        "line 4: json_schema needs a JSON schema; this one is wrong at $.type",
    ),
    "unknown field of a criterion": (
        expecting("set_recall: {items: [a], atleast: 1}"),
        "line 4: set_recall has no field 'atleast'; it has items, at_least",
    ),
    "share above one": (
        expecting("set_recall: {items: [a], at_least: 2}"),
        "line 4: set_recall field 'at_least' needs a share between 0 and 1, got 2",
    ),
    "python path": (
        "inputs:\n  - prompt: p\n    expect: {python: os.system}\n",
        "line 3: python needs an import path like my_checks:is_polite, got 'os.system'",
    ),
    "weight of nothing": (asking("prompt: p\n    weight: 0"), "line 3: weight needs a number above 0"),
    "tokens": (asking("prompt: p\n    max_tokens: 1.5"), "line 3: max_tokens needs a whole number from 1, got 1.5"),
    "id twice": (
        INPUT.replace("prompt: p", "prompt: p\n    id: x") + "  - prompt: q\n    id: x\n    expect: {exact: a}\n",
        "line 6: two inputs have the id 'x'; the other is in line 2",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_names_its_line(name):
    text, message = FAULTS[name]
    with pytest.raises(BadWorkload) as caught:
        parse(text)
    assert str(caught.value).startswith("w.yaml, " + message)


def test_every_fault_of_a_file_is_named_in_the_order_of_lines():
    text = """\
        inputs:
          - prompt: p
            expct: {exact: a}
            weight: heavy
          - prompt: q
            expect: {number: {value: x}, exact: [a], one_of: fine, contans: y}
            prompt: twice
          - prompt: '{{gone}}'
            id: 3
            expect: {regex: '('}
          - {prompt: fine, expect: {exact: fine}}
        inptus: 3
        """
    with pytest.raises(BadWorkload) as caught:
        parse(text)
    lines = str(caught.value).splitlines()
    assert [int(line.split("line ")[1].split(":")[0]) for line in lines] == [3, 4, 6, 6, 6, 7, 8, 9, 10, 12]
    assert all(line.startswith("w.yaml, line ") for line in lines)


def test_faults_without_end_are_counted():
    with pytest.raises(BadWorkload, match=r"\.\.\. and 80 more faults"):
        parse("inputs:\n" + "  - prompt: p\n" * 100)


def test_every_broken_json_line_is_named():
    text = '{"prompt": "a", "expect": {"exact": "b"}}\n{"prompt": \n'
    text += '{"prompt": "c", "expect": {"number": NaN}}\n{"prompt": 3}\n'
    with pytest.raises(BadWorkload) as caught:
        parse(text, json_lines=True)
    assert [line.split(":")[0][-1] for line in str(caught.value).splitlines()] == ["2", "3", "4", "4"]


def test_a_broken_json_line_is_named():
    with pytest.raises(BadWorkload, match=r"w\.yaml, line 2: this line is no JSON"):
        parse('{"prompt": "a", "expect": {"exact": "b"}}\n{"prompt": \n', json_lines=True)


@pytest.mark.parametrize("kind", ["json lines", "yaml", "json"])
def test_texts_may_hold_what_other_tools_take_for_ends_of_lines(kind):
    odd = "one\u2028two\x85three\u2029four \U0001f600"
    one = {"prompt": odd, "expect": {"exact": odd}}
    text = {
        "json lines": json.dumps(one, ensure_ascii=False),
        "yaml": f"inputs:  # a remark \u2028 of one line\n  - prompt: '{odd}'\n    expect: {{exact: \"{odd}\"}}\n",
        "json": json.dumps({"inputs": [one]}, ensure_ascii=False, indent="\t"),
    }[kind]
    workload = parse(text, json_lines=kind == "json lines", json=kind == "json")
    assert workload.inputs[0].messages[0]["content"] == odd
    assert workload.inputs[0].criteria[0].value == odd


def test_json_documents_name_lines_too():
    text = json.dumps(
        {
            "inputs": [
                {"prompt": "\ud83d\ude00 /", "expect": {"exact": "a"}},
                {"prompt": "p", "expect": {"number": "x"}},
            ]
        },
        indent="\t",
    )
    with pytest.raises(BadWorkload, match=r"w\.yaml, line 12: number field 'value' needs a number, got 'x'"):
        parse(text, json=True)
    with pytest.raises(BadWorkload, match=r"line 2: this is no JSON: Expecting property name"):
        parse("{\n  a: 1}", json=True)
    with pytest.raises(BadWorkload, match="stands here twice"):
        parse('{"inputs": [], "inputs": []}', json=True)


HALVES = [
    {"prompt": "smile \ud83d here"},
    {"id": "\udc00"},
    {"tags": ["\ud83d"]},
    {"system": "\ud83d"},
    {"expect": {"exact": "\ud83d"}},
    {"expect": {"json_schema": {"const": "\ud83d"}}},
    {"expect": {"json_schema": {"properties": {"\ud83d": True}}}},
    {"expect": {"regex": "\ud83d"}},
    {"expect": {"set_recall": [["\ud83d"]]}},
    {"variables": {"x": "\ud83d"}},
    {"expect": {"judge": "\ud83d"}},
]


@pytest.mark.parametrize("change", HALVES)
def test_halves_of_characters_are_refused_by_their_line(change):
    with pytest.raises(BadWorkload, match=r"w\.yaml, line 1: .*half of a surrogate pair"):
        parse(json.dumps({"prompt": "p", "expect": {"exact": "a"}} | change), json_lines=True)


HOSTILE = {
    "a number of 400 digits": expecting(f"number: {'9' * 400}"),
    "a number of 9,000 digits": expecting(f"number: {'9' * 9000}"),
    "a repeat without end": expecting("regex: 'a{99999999999999999999}'"),
    "parentheses": expecting(f"regex: '{'(' * 4000}{')' * 4000}'"),
    "a long pattern": expecting(f"regex: '{'a' * 9000}'"),
    "an empty integer": expecting('number: !!int ""'),
    "a float of underscores": expecting('number: !!float "_"'),
    "a truth that is none": expecting("exact: !!bool maybe"),
    "a time that is none": expecting("exact: !!timestamp x"),
    "an unknown tag": expecting("exact: !!python/object/apply:os.system [ls]"),
    "deep flow": "inputs: " + "[" * 5000,
    "deep blocks": "".join(" " * n + "a:\n" for n in range(2000)),
    "many values": "inputs: [" + "1," * 600_000 + "1]",
    "a large schema": expecting("json_schema: {enum: [" + "1," * 5000 + "2]}"),
    "samples without end": INPUT + "samples: 99999999999\n",
    "a control character": "inputs: [\x00]",
    "a key that is a list": "? [a, b]\n: c\n",
    "two documents": "inputs: []\n---\ninputs: []\n",
    "an alias of nothing": "inputs: *a\n",
    "itself": "inputs: &a [*a]\n",
    "a merge of a text": "<<: text\ninputs: []\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_message(name):
    with pytest.raises(BadWorkload, match=r"w\.yaml, line \d+: "):
        parse(HOSTILE[name])


def test_one_file_a_thousand_times_fills_no_memory():
    text = "inputs:\n  - prompt: '" + "{{a}}" * 2000 + "'\n    files: {a: a.txt}\n    expect: {exact: a}\n"
    with pytest.raises(BadWorkload, match="longer than"):
        parse(text, {"a.txt": "x" * 100_000})


def test_merge_keys():
    text = "inputs:\n  - &a {prompt: p, max_tokens: 8, expect: {exact: a}}\n  - {<<: *a, id: b, max_tokens: 9}\n"
    assert [one.max_tokens for one in parse(text).inputs] == [8, 9]


def test_aliases_cannot_blow_up():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for n in range(1, 12):
        bomb += f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n"
    with pytest.raises(BadWorkload, match="too large"):
        parse(bomb)


WARNINGS = {
    "regex: ''": "line 4: input 'input-1' can never fail: the pattern matches an empty answer",
    "regex: 'a*'": "can never fail: the pattern matches an empty answer",
    "json_schema: false": "can never pass: the schema accepts nothing",
    "contains_none: [x]": "passes even an empty answer",
    "max_words: 5": "passes even an empty answer",
    "set_recall: {items: [a], at_least: 0}": "passes even an empty answer",
    "exact: 'one two three'\n      max_words: 2": "can never pass: what exact allows fails another criterion",
    "contains_all: [new york]\n      contains_none: [york]": "can never pass: contains_all wants what contains_none",
    "agrees_with_reference: {metric: chrf, at_least: 0}": "can never fail: at_least is 0",
}


@pytest.mark.parametrize("expect", WARNINGS)
def test_criteria_that_judge_nothing_are_doubted(expect):
    (warning,) = parse(f"inputs:\n  - prompt: p\n    expect:\n      {expect}\n").warnings
    assert WARNINGS[expect] in warning


def test_sound_criteria_are_not_doubted():
    assert (
        parse("inputs:\n  - prompt: p\n    expect: {contains_all: [a], contains_none: [b], max_words: 5}\n").warnings
        == ()
    )


def test_hash_knows_meaning_from_looks():
    plain, spaced = parse(INPUT), parse("# a remark\nname: other\n\n" + INPUT)
    assert plain.hash == spaced.hash
    assert plain.hash != parse(INPUT.replace("exact: a", "exact: b")).hash
    one, other = plain.inputs[0], parse(INPUT.replace("exact: a", "exact: b")).inputs[0]
    assert question_hash(one, 0.0, 0) == question_hash(other, 0.0, 0)
    assert question_hash(one, 0.0, 0) != question_hash(one, 0.0, 1)


def test_the_starter_workload_is_sound():
    workload = load_workload()
    assert len(workload.inputs) == 25
    assert workload.warnings == ()
    assert len(workload.tags) >= 8
    assert all(one.tags and one.max_tokens <= 64 for one in workload.inputs)


def test_a_new_workload_is_sound_and_never_overwrites(tmp_path):
    path = tmp_path / "mine.yaml"
    new_workload(path)
    assert load_workload(path).warnings == ()
    with pytest.raises(OutputError, match="exists already"):
        new_workload(path)


def test_files_outside_the_folder_are_not_read(tmp_path):
    (tmp_path / "secret.txt").write_text("key")
    folder = tmp_path / "w"
    folder.mkdir()
    path = folder / "w.yaml"
    path.write_text("inputs:\n  - prompt: '{{s}}'\n    files: {s: ../secret.txt}\n    expect: {exact: a}\n")
    with pytest.raises(BadWorkload, match=r"line 3: the file '../secret.txt' cannot be read: it lies outside"):
        load_workload(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        load_workload(tmp_path / "gone.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="no UTF-8 text: byte 0 is 0xff"):
        load_workload(tmp_path / "binary.yaml")


def test_own_functions_run_only_when_trusted(tmp_path):
    (tmp_path / "my_checks_of_this_test.py").write_text("def short(text, info):\n    return len(text) < 5, 'counted'\n")
    path = tmp_path / "w.yaml"
    path.write_text("inputs:\n  - prompt: p\n    expect: {python: 'my_checks_of_this_test:short'}\n")
    workload = load_workload(path)
    with (
        pytest.raises(UsageError, match="runs Python code of its own"),
        trusted_functions(workload, tmp_path, trust=False),
    ):
        pass
    with trusted_functions(workload, tmp_path, trust=True) as functions:
        assert functions["my_checks_of_this_test:short"]("abc", {}) == (True, "counted")
    path.write_text(path.read_text().replace("short", "long"))
    missing = pytest.raises(BadWorkload, match="line 3: 'my_checks_of_this_test:long' cannot be imported")
    with missing, trusted_functions(load_workload(path), tmp_path, trust=True):
        pass


BROKEN_MODULES = {
    "syntax": "def f(:\n",
    "value": "raise ValueError('no')\n",
    "exit": "import sys\nsys.exit(3)\n",
    "recursion": "def g(): g()\ng()\n",
    "nothing": "x = 1\n",
}


@pytest.mark.parametrize("name", BROKEN_MODULES)
def test_own_functions_whose_module_breaks_are_named(tmp_path, name):
    (tmp_path / f"broken_{name}.py").write_text(BROKEN_MODULES[name])
    path = tmp_path / "w.yaml"
    path.write_text(f"inputs:\n  - prompt: p\n    expect: {{python: 'broken_{name}:f'}}\n")
    with (
        pytest.raises(BadWorkload, match=f"line 3: 'broken_{name}:f' cannot be imported"),
        trusted_functions(load_workload(path), tmp_path, trust=True),
    ):
        pass


def test_stored_answers_may_hold_any_character(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes('\ufeff{"id": "input-1", "text": "a\u2028b\x85c \\ud83d"}\r\n'.encode())
    [answer] = load_reference(path, parse(INPUT))
    assert answer.text == "a\u2028b\x85c \ufffd"


def test_stored_answers_as_a_reference(tmp_path):
    workload = parse(
        "inputs:\n  - {id: a, prompt: p, expect: {exact: x}}\n  - {id: b, prompt: p, expect: {exact: x}}\n"
    )
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": "b", "text": "x"}\n\n')
    assert [(answer.input_id, answer.text) for answer in load_reference(path, workload)] == [("b", "x")]
    for line, message in {
        "{": "line 2: this line is no JSON",
        '["b"]': "line 2: an answer needs the texts",
        '{"id": "c", "text": "x"}': "line 2: the workload has no input 'c'",
        '{"id": "b", "text": "y"}': "line 2: a second answer to 'b'",
        '{"id": "a", "text": "", "tool_calls": [{"name": 7}]}': "line 2: tool_calls needs calls",
    }.items():
        path.write_text('{"id": "b", "text": "x"}\n' + line)
        with pytest.raises(BadWorkload, match=message):
            load_reference(path, workload)


def test_stored_answers_hold_calls_and_are_none_of_several_turns(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": "a", "text": "", "tool_calls": [{"name": "clock", "arguments": "{}"}]}\n')
    workload = parse("inputs: [{id: a, prompt: p, tools: [{name: clock}], expect: {tool_call: clock}}]")
    (answer,) = load_reference(path, workload)
    assert judge_answers(workload, [answer])[0].passed
    with pytest.raises(BadWorkload, match="line 1: 'a' is a chat of several turns"):
        load_reference(path, parse("inputs: [{id: a, turns: [p, q], expect: {exact: x}}]"))


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("four", 2), ("契約", 6), ("ab契", 4), ("é", 2), ("สวัสดี", 18)])
def test_scripts_that_a_vocabulary_may_spell_in_bytes_get_room_for_them(text, tokens):
    """A request of Chinese was refused by an engine that had been given half a token a character."""
    assert most_tokens(text) == tokens


def test_a_request_with_tools_has_room_for_what_the_template_says_of_them():
    def room(**more: object) -> int:
        text = json.dumps({"inputs": [{"id": "a", "prompt": "x", "max_tokens": 8, **more}], **more_of_all})
        return slots(parse_workload(text, source="w.json", read_file=str, json=True), 8192)[0]

    more_of_all: dict = {}
    plain = room(expect={"exact": "x"})
    more_of_all = {"tools": [{"name": "f", "parameters": {"type": "object"}}]}
    assert room(expect={"tool_call": "f"}) >= plain + 1024
