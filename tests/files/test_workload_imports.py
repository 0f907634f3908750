"""Workloads of other tools: what is imported means the same here, all else is refused by name."""

import json

import pytest

from bitladder.describe.criteria import judge
from bitladder.errors import BadInput, BadWorkload
from bitladder.files.workloads import import_workload, load_workload


def imported(tmp_path, text, name="promptfooconfig.yaml"):
    """The workload that a file becomes, read back from what would be written, and the remarks."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    written, remarks = import_workload(path)
    (tmp_path / "made.yaml").write_text(written, encoding="utf-8")
    return load_workload(tmp_path / "made.yaml"), remarks


def config(assertions, prompt="Say {{x}}", variables="{x: tea}", more=""):
    return f"prompts: ['{prompt}']\ntests:\n  - vars: {variables}\n    assert: [{assertions}]\n{more}"


def asked(workload):
    return [one.messages[-1]["content"] for one in workload.inputs]


TEA = "{type: icontains, value: tea}"


def test_variables_that_are_lists_make_a_test_each(tmp_path):
    text = config(TEA, "To {{language}}: {{text}}", "{language: [French, German], text: [a, b]}")
    workload, _ = imported(tmp_path, text)
    assert asked(workload) == ["To French: a", "To French: b", "To German: a", "To German: b"]
    assert len({one.id for one in workload.inputs}) == 4


def test_values_are_filled_in_as_promptfoo_does(tmp_path):
    text = config(TEA, "{{a}} {{b}} {{c}} {{d}} {{ e }}", "{a: true, b: 3.0, c: null, d: 2.5, e: 'no'}")
    assert asked(imported(tmp_path, text)[0]) == ["true 3  2.5 no"]


def test_files_beside_it_are_read(tmp_path):
    (tmp_path / "in.txt").write_text("contents")
    (tmp_path / "p.txt").write_text("One {{x}}\n---\nTwo {{x}}\n")
    workload, _ = imported(
        tmp_path, f"prompts: [file://p.txt]\ntests:\n  - vars: {{x: file://in.txt}}\n    assert: [{TEA}]\n"
    )
    assert asked(workload) == ["One contents", "Two contents"]


def test_chats_in_json_keep_their_roles(tmp_path):
    chat = '[{"role": "system", "content": "Be brief"}, {"role": "user", "content": "{{x}}"}]'
    workload, _ = imported(tmp_path, config(TEA, chat))
    assert [dict(message) for message in workload.inputs[0].messages] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "tea"},
    ]


MEANINGS = [
    ("{type: contains, value: ing}", "a pricing", "PRICING"),
    ("{type: icontains, value: ING}", "a pricing", "price"),
    ("{type: contains, value: USA}", "USA", "usa"),
    ("{type: contains-any, value: 'red, green'}", "green", "Red"),
    ("{type: contains-all, value: [a, b]}", "ab", "aB"),
    ("{type: not-contains, value: ing}", "ING", "pricing"),
    ("{type: not-icontains-any, value: [x, y]}", "a", "aXb"),
    ("{type: icontains, value: '{{x}}'}", "TEA", "coffee"),
    ("{type: equals, value: 5}", "5", "5.0"),
    ("{type: equals, value: {a: 1}}", '{"a": 1}', '{"a": 2}'),
    ("{type: starts-with, value: 'Yes.'}", "Yes. So", "So Yes."),
    ("{type: regex, value: 't.a'}", "tea", "Tea"),
    ("{type: is-json}", "[1]", "so: [1]"),
    ('{type: is-json, value: \'{"type": "object"}\'}', "{}", "[]"),
    ("{type: is-json, value: {type: object}}", "{}", "[]"),
    ("{type: contains, value: a}, {type: icontains, value: b}", "aB", "Ab"),
    ("{type: regex, value: a}, {type: regex, value: b}", "ba", "bb"),
    ("{type: contains, value: a, weight: 1, metric: good}", "a", "b"),
    ("{type: icontains-all, value: 'A,b'}", "ba", "a"),
]


@pytest.mark.parametrize(("assertions", "right", "wrong"), MEANINGS)
def test_assertions_mean_the_same(tmp_path, assertions, right, wrong):
    one = imported(tmp_path, config(assertions))[0].inputs[0]
    assert judge(one, right).passed
    assert not judge(one, wrong).passed


REFUSED = {
    "a filter": (config(TEA, "Shout {{ x | upper }}"), "template {{ x | upper }}"),
    "a block": (config(TEA, "{% if x %}Yes{% endif %}"), "template {% if x %}"),
    "a remark": (config(TEA, "{# no #}x"), "template {# no #}"),
    "a member": (config(TEA, "{{x.y}}"), "template {{x.y}}"),
    "a template in a variable": (config(TEA, variables="{x: 'a {{y}}'}"), "templates in a variable"),
    "a variable without a value": (config(TEA, "{{y}}"), "variable 'y' has no value"),
    "an assertion's variable": (config("{type: contains, value: '{{y}}'}"), "variable 'y' of the assertion"),
    "an object": (config(TEA, variables="{x: {a: 1}}"), "variable that is a dict"),
    "a list in a list": (config(TEA, variables="{x: [[a]]}"), "variable that is a list"),
    "a script": (config(TEA, variables="{x: file://a.py}"), "'a.py' is none of .txt"),
    "a file that is missing": (config(TEA, variables="{x: file://a.txt}"), "'a.txt' cannot be read: No such file"),
    "a file elsewhere": (config(TEA, variables="{x: file://../a.txt}"), "outside the workload's folder"),
    "a transform": (config(TEA, more="    options: {transform: 'output.trim()'}\n"), "option 'transform'"),
    "a threshold": (config(TEA, more="    threshold: 0.5\n"), "'threshold' of a test"),
    "a weight": (config("{type: contains, value: a, weight: 3}"), "'weight' of the assertion"),
    "a weight of nothing": (config("{type: contains, value: a, weight: 0}"), "'weight' of the assertion"),
    "a threshold of one": (config("{type: llm-rubric, value: a, threshold: 0.8}"), "'threshold' of the assertion"),
    "a transform of one": (config("{type: contains, value: a, transform: x}"), "'transform' of the assertion"),
    "an unknown field": (config(TEA, more="    assertScoringFunction: x\n"), "'assertScoringFunction' of a test"),
    "an assertion set": (config("{type: assert-set, assert: []}"), "assert-set"),
    "json in prose": (config("{type: contains-json}"), "contains-json"),
    "latency": (config("{type: latency, threshold: 5}"), "latency"),
    "not-equals": (config("{type: not-equals, value: tea}"), "not-equals"),
    "a type that is a list": (config("{type: [a]}"), "no counterpart here"),
    "an assertion that is a text": (config("contains"), "no counterpart here"),
    "no assertion": ("prompts: [a]\ntests: [{vars: {x: a}}]\n", "test 1 asserts nothing"),
    "assert of null": ("prompts: [a]\ntests: [{assert: null}]\n", "test 1 asserts nothing"),
    "assert that is a text": ("prompts: [a]\ntests: [{assert: x}]\n", "'assert' is no list"),
    "vars that are a list": ("prompts: [a]\ntests: [{vars: [x], assert: [" + TEA + "]}]\n", "'vars' is no mapping"),
    "defaults in a list": (config(TEA, more="defaultTest: [a]\n"), "defaultTest is a mapping"),
    "scenarios": (config(TEA, more="scenarios: []\n"), "'scenarios' has no counterpart"),
    "tests elsewhere": ("prompts: [a]\ntests: tests.csv\n", "tests are a list here, got 'tests.csv'"),
    "two equals": (config("{type: equals, value: a}, {type: equals, value: b}"), "two assertions 'equals'"),
    "a pattern that is none": (config("{type: regex, value: '('}"), "needs a regular expression"),
    "JavaScript's pattern": (config("{type: regex, value: '(?<n>a)'}"), "needs a regular expression"),
    "a schema that is none": (config("{type: is-json, value: {type: objekt}}"), "needs a JSON schema"),
    "no mapping": ("- a\n", "needs 'prompts' and 'tests'"),
    "no YAML": ("prompts: [\n", "no YAML"),
    "a prompt that is a number": ("prompts: [3]\ntests: [{assert: [" + TEA + "]}]\n", "a prompt is a text"),
    "messages with names": (config(TEA, '[{"role": "user", "content": "a", "name": "b"}]'), "list of messages"),
    "combinations without end": (
        config(TEA, variables="{" + ", ".join(f"v{n}: [a, b]" for n in range(40)) + "}"),
        "more than",
    ),
    "aliases without end": (
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
        "too large",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(tmp_path, name):
    text, message = REFUSED[name]
    with pytest.raises(BadWorkload) as caught:
        imported(tmp_path, text)
    assert message in str(caught.value)
    assert "promptfooconfig.yaml, line " in str(caught.value)


def test_what_is_left_out_or_not_the_same_is_listed(tmp_path):
    text = config(
        "{type: equals, value: tea, metric: m}, {type: llm-rubric, value: polite}",
        more="providers: [a]\nsharing: true\n",
    )
    _, remarks = imported(
        tmp_path, text.replace("  - vars", "  - metadata: {a: 1}\n    options: {provider: b}\n    vars")
    )
    for word in ("'providers'", "'sharing'", "'metadata'", "metrics", "--judge", "equals:", "llm-rubric"):
        assert any(word in remark for remark in remarks), word


def test_descriptions_may_be_the_same_and_anchors_are_followed(tmp_path):
    text = (
        "prompts: [a, {raw: b, label: second}]\nbase: &b {description: basic, assert: ["
        + TEA
        + "]}\ntests:\n  - <<: *b\n  - <<: *b\n"
    )
    workload, remarks = imported(tmp_path, text)
    assert [one.id for one in workload.inputs] == [
        "basic / prompt 1",
        "basic / second",
        "basic / prompt 1 #2",
        "basic / second #2",
    ]
    assert any("'base'" in remark for remark in remarks)


def test_odd_texts_survive_the_writing(tmp_path):
    odd = "a\u2028b\x85c\u2029 'd' \"e\": #f \U0001f600 \\ - x\n\n  y \t"
    workload, _ = imported(tmp_path, json.dumps([{"prompt": odd, "expected": odd}], ensure_ascii=False), "rows.json")
    assert asked(workload) == [odd]


def test_csv(tmp_path):
    text = "\ufeffid,prompt,expected,number,tags,max_words\r\n"
    text += 'cap,"Capital of\nFrance, {{x}}?",Paris|paris,,facts;geo,5\r\nsum,2 + 2?,,4,,\r\n\r\n'
    first, second = imported(tmp_path, text, "rows.csv")[0].inputs
    assert first.messages[0]["content"] == "Capital of\nFrance, {{x}}?"
    assert ({c.kind: c.value for c in first.criteria}, first.tags) == (
        {"one_of": ["Paris", "paris"], "max_words": 5},
        ("facts", "geo"),
    )
    assert second.criteria[0].value["value"] == 4.0
    assert asked(imported(tmp_path, "prompt;expected\na, b;c\n", "rows.csv")[0]) == ["a, b"]
    assert asked(imported(tmp_path, "prompt\texpected\na\tc\n", "rows.tsv")[0]) == ["a"]
    assert asked(imported(tmp_path, "prompt,expected\n" + "x" * 200_000 + ",b\n", "rows.csv")[0]) == ["x" * 200_000]


CSV_REFUSED = [
    ("prompt,answer\na,b\n", "line 1: the column 'answer' means nothing here"),
    ("prompt,number\na,many\n", "line 2: number needs a number, got 'many'"),
    ("prompt,number\na,nan\n", "line 2: number needs"),
    ("prompt,number\na,inf\n", "line 2: number needs"),
    ("prompt,number\na,1e999\n", "line 2: number needs"),
    ("prompt,number\na,1_0\n", "line 2: number"),
    ("prompt,expected\na,b,c\n", "line 2: 3 cells, the header has 2"),
    ("prompt,expected,expected\na,b,c\n", "line 1: there are two columns"),
    ("id,expected\na,b\n", "line 1: there is no column 'prompt'"),
    ("prompt,expected\n,b\n", "line 2: this row has no prompt"),
    ('prompt,expected\n"a\nb",c\nd,\n', "line 4: an input needs 'expect'"),
    ('prompt,expected\na,"b\n', "line 2: this is no row"),
    ("prompt,expected,one_of\na,b,c\n", "line 2: this row has both"),
    ("", "line 1: there is no column"),
    ("prompt,regex\na,(\n", "line 2: regex needs a regular expression"),
    ("prompt,weight\na,0\n", "line 2: weight needs"),
]


@pytest.mark.parametrize(("text", "message"), CSV_REFUSED)
def test_csv_faults_name_their_line(tmp_path, text, message):
    with pytest.raises(BadWorkload) as caught:
        imported(tmp_path, text, "rows.csv")
    assert message in str(caught.value)


def test_csv_that_is_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,expected\na,b\n".encode("utf-16"))
    with pytest.raises(BadInput, match="no UTF-8 text"):
        import_workload(tmp_path / "a.csv")


def test_json_of_several_kinds(tmp_path):
    rows = [
        {"input": [{"role": "user", "content": "hi {{x}}"}], "ideal": ["yo", "hey"]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"prompt": "p", "completion": "c", "tags": ["t"]},
        {"prompt": "p", "expected": "e", "id": "named"},
        {"prompt": "p", "expect": {"number": 3}},
    ]
    for name, text in {"a.json": json.dumps(rows), "a.jsonl": "\n".join(map(json.dumps, rows))}.items():
        workload, remarks = imported(tmp_path, text, name)
        assert asked(workload) == ["hi {{x}}", "hi", "p", "p", "p"]
        assert [one.criteria[0].kind for one in workload.inputs] == ["one_of"] * 4 + ["number"]
        assert workload.inputs[0].criteria[0].value == ["yo", "hey"]
        assert remarks == ["what is expected became one_of: case, quotes and a final full stop do not count (4 times)"]


JSON_REFUSED = [
    ("{}", "a list of objects"),
    ("[]", "a list of objects"),
    ("[3]", "line 1: this is no object: 3"),
    ('[\n{"prompt": "a"}]', "line 2: an object with the fields prompt means nothing"),
    ('[{"prompt": "a", "expected": "b", "mood": 1}]', "field 'mood' means nothing"),
    ('[{"prompt": "a", "expected": 3}]', "a text or a list of texts, got 3"),
    ("[NaN]", "NaN is no JSON"),
    ('[{"messages": [{"role": "user", "content": "a"}]}]', "must end with what the assistant"),
    ('[{"prompt": 3, "expected": "b"}]', "no text and no list of messages"),
    ("[" * 5000, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "message"), JSON_REFUSED)
def test_json_faults_name_their_line(tmp_path, text, message):
    with pytest.raises(BadWorkload) as caught:
        imported(tmp_path, text, "a.json")
    assert message in str(caught.value)


OLD = {
    "doc_id": 0,
    "target": "She pays.\n#### 1,250",
    "arguments": [["Question {{x}}?", {"until": ["\n"], "max_gen_toks": 64}]],
}
NEW = {
    "doc_id": 1,
    "doc_hash": "h",
    "target": ["Paris", "paris"],
    "arguments": {
        "gen_args_0": {"arg_0": '[{"role": "user", "content": "Capital?", "type": "text"}]', "arg_1": {"until": []}}
    },
}


def test_samples_of_lm_eval_in_both_formats(tmp_path):
    lines = "\n".join(map(json.dumps, [OLD, NEW, NEW | {"filter": "strict"}]))
    workload, remarks = imported(tmp_path, lines, "samples_gsm8k.jsonl")
    assert asked(workload) == ["Question {{x}}?", "Capital?"]
    assert [(one.id, one.criteria[0].kind) for one in workload.inputs] == [("doc-0", "number"), ("doc-1", "one_of")]
    assert (workload.inputs[0].criteria[0].value["value"], workload.inputs[0].max_tokens) == (1250.0, 64)
    assert len(remarks) == 4
    whole = json.dumps({"results": {}, "samples": {"gsm8k": [OLD, NEW]}})
    assert asked(imported(tmp_path, whole, "results.json")[0]) == asked(workload)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arguments": [["a", " b"], ["a", " c"]]}, "compares likelihoods"),
        ({"arguments": {"gen_args_0": {"arg_0": "a", "arg_1": " b"}}}, "compares likelihoods"),
        ({"arguments": 3}, "not requests"),
        ({"arguments": [[1, {}]]}, "not requests"),
        ({"target": "x" * 300}, "more than 200 characters"),
        ({"target": None}, "a target is a text"),
        ({"arguments": [["a", {"temperature": 0.7}]]}, "this task samples"),
    ],
)
def test_samples_that_cannot_be_asked_are_refused(tmp_path, change, message):
    with pytest.raises(BadWorkload, match=message):
        imported(tmp_path, json.dumps(OLD | change), "samples.jsonl")


def test_a_table_that_is_refused_changes_nothing_of_how_others_are_read():
    import csv

    from bitladder.describe.rows import from_csv

    before = csv.field_size_limit()
    kept = []
    for text in ("id,nonsense\n1,2\n", "prompt,expect\na,b,c\n", 'prompt\n"a\n'):
        try:
            from_csv(text)
        except Exception as error:
            kept.append(error)  # with its frames, as a caller that shows it does
        assert csv.field_size_limit() == before
    assert kept
