"""Loops, thoughts, calls and turns in the terminal, the report and the record; hostile texts are shown as text."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from bitladder.records import to_json
from bitladder.records.evaluation import FaultCount, Reply, Thinking, ToolCall
from bitladder.records.reading import from_json
from bitladder.records.run import RunRecord
from bitladder.report import print_run, render_html
from bitladder.report.answers import compared_answers
from ladder_examples import run_record

LOOPS = FaultCount("loop", 25, 9, 0, ("pens", "formal"), (), 0.25, 0.1, 0.5, begins=204)
SAME = FaultCount("wrong tool", 25, 2, 2, (), (), 1.0, 0.0, 0.2)
THINKING = Thinking(25, 312.4, 250.0, 3, 0)


@pytest.fixture
def record():
    plain = run_record()
    *others, last = plain.answers
    first = last.answers[0]
    told = dataclasses.replace(
        first,
        thought="Is it <b>8</b> or 12?",
        thought_tokens=7,
        calls=(ToolCall("pay", '{"sum": "<script>"}'),),
        earlier=(Reply("An earlier answer.", "stop", 4),),
    )
    answers = (*others, dataclasses.replace(last, answers=(told, *last.answers[1:])))
    results = tuple(
        dataclasses.replace(
            one,
            faults=(LOOPS, SAME),
            thinking=THINKING,
            repetition=(0.0, 0.1, 0.9),
            reference_repetition=(0.0, 0.0, 0.1),
        )
        if one.level == "Q4_K_M"
        else one
        for one in plain.results
    )
    return dataclasses.replace(plain, results=results, answers=answers)


SENTENCE = (
    "loop after about 204 words in 9 of 25 answers (reference 0): pens, formal (arithmetic 1, style 1); "
    "25 thoughts of 312 tokens (reference 250 tokens), 3 without an end; "
    "from word 100 on 90% of its 4-grams stood in the answer before (reference 10%)"
)


def test_the_terminal_says_it_of_the_level_alone(record):
    out = Console(file=io.StringIO(), width=400)
    print_run(record, out)
    lines = [line.split("behaviour: ") for line in out.file.getvalue().splitlines() if "behaviour: " in line]
    assert [(level.strip(), said.rstrip()) for level, said in lines] == [("Q4_K_M", SENTENCE)]
    plain = Console(file=io.StringIO(), width=400)
    print_run(run_record(), plain)
    assert "behaviour" not in plain.file.getvalue()


def test_the_report_shows_thoughts_calls_and_earlier_answers_as_text(record):
    html = render_html(record)
    assert SENTENCE in html
    assert "Is it &lt;b&gt;8&lt;/b&gt; or 12?" in html
    assert "<script>" not in html
    assert "An earlier answer." in html
    assert "A thought of 7 tokens" in html
    assert "How answers behave" not in render_html(run_record())


def test_calls_are_compared_with_the_references(record):
    (flipped,) = [one for one in compared_answers(record) if one.input.id == "pens"]
    words = "".join(segment.text for segment in flipped.shown[-1].segments if segment.kind == "added")
    assert "pay(" in words


def test_the_record_keeps_it(record):
    kept = json.loads(json.dumps(to_json(record)))
    assert to_json(from_json(RunRecord, kept)) == kept
    (found,) = [one for one in kept["results"] if "faults" in one]
    assert (found["level"], found["faults"][0]["begins"]) == ("Q4_K_M", 204)
