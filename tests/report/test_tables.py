"""Depth, caches, faults by kind of work, thoughts and guesses: the same cells in the terminal, the report, the page's
data and the gate."""

import asyncio
import dataclasses
import io

import pytest
from rich.console import Console

from bitladder.records.decision import TierGuesses
from bitladder.records.evaluation import FaultCount, Thinking
from bitladder.records.fidelity import AtDepth
from bitladder.records.speculation import Gain, SpeculationReport, SpeculationResult
from bitladder.report import print_run, render_html, write_run
from bitladder.report.tables import evidence_tables, table_notes
from bitladder.serve.whatif import answer_changes
from ladder_examples import run_record

SHALLOW = AtDepth(3000, 0.005, 0.004, 0.007, 0.1, 1.001, 1.0, 1.002, 0.97, 0.96, 0.98, depth=512)
DEEP = dataclasses.replace(
    SHALLOW, depth=4096, kl_mean=0.41, kl_low=0.33, kl_high=0.53, top1=0.61, rise=82.0, rise_low=70.0, rise_high=97.0
)
PAYS = Gain("", 25, 400, 300, 1.42, 1.3, 1.55, 1e-6)
RESULT = SpeculationResult(
    "draft:/models/<i>small.gguf", 60.0, 3 << 20,
    (PAYS, dataclasses.replace(PAYS, tag="style", ratio=0.8, low=0.7, high=0.9, p_value=1.0)), (), "ab" * 32,
)  # fmt: skip
LOSES = SpeculationResult("ngram", 40.0, 0, (Gain("", 25, 10, 1, 0.97, 0.9, 1.05, 0.8),), ("pens",))


@pytest.fixture
def record():
    plain = run_record()
    fidelities = tuple(
        dataclasses.replace(one, depths=(SHALLOW, DEEP)) if one.level == "Q4_K_M" else one for one in plain.fidelities
    )
    loop = FaultCount("loop", 25, 9, 0, ("pens", "formal"), ("capital",), 0.002, 0.2, 0.56, begins=204)
    results = tuple(
        dataclasses.replace(one, faults=(loop,), thinking=Thinking(25, 312.4, 250.0, 3, 1))
        if one.level == "Q4_K_M"
        else one
        for one in plain.results
    )
    report = SpeculationReport("model", "work", 25, 42.0, (RESULT, LOSES), (), level="Q4_K_M")
    guesses = TierGuesses("Q4_K_M", RESULT.mode, 1.42, 1.3, 1.55, "ab" * 32)
    decision = dataclasses.replace(plain.decision, speculate=(guesses,))
    return dataclasses.replace(plain, fidelities=fidelities, results=results, speculation=(report,), decision=decision)


def cells(record, name):
    (table,) = [one for one in evidence_tables(record) if one.name == name]
    assert all(len(row) == len(table.heads) for row in table.rows)
    return [[cell.text for cell in row] for row in table.rows]


def test_each_table_has_its_cells(record):
    assert [table.name for table in evidence_tables(record)] == ["depth", "faults", "fault-tags", "thoughts", "guesses"]
    assert cells(record, "depth") == [
        ["Q4_K_M", "f16", "512", "0.00500", "–", "1.0010", "97.0%"],
        ["", "", "4,096", "0.410", "82.0", "1.0010", "61.0%"],
    ]
    assert cells(record, "faults") == [["Q4_K_M", "9 of 25"]]
    assert cells(record, "fault-tags") == [["Q4_K_M", "loop", "+1", "−1", "+1"]]  # arithmetic, recall, style
    assert cells(record, "thoughts") == [["Q4_K_M", "25", "312", "3", "1"]]
    assert cells(record, "guesses") == [
        ["Q4_K_M", "draft <i>small.gguf", "all inputs", "75%", "1.42", "yes, does so", "3.00 MiB"],
        ["", "", "style", "75%", "0.800", "", ""],
        ["Q4_K_M", "ngram", "all inputs", "10%", "0.970", "not known to", "0 B"],
    ]


def test_a_cache_stands_apart_from_its_level(record):
    named = tuple(
        dataclasses.replace(one, level="Q4_K_M+q8_0/q4_0") if one.depths else one for one in record.fidelities
    )
    assert cells(dataclasses.replace(record, fidelities=named), "depth")[0][:2] == ["Q4_K_M", "q8_0/q4_0"]


def test_what_is_sure_is_marked_and_nothing_else(record):
    known = {
        (table.name, cell.text) for table in evidence_tables(record) for row in table.rows for cell in row if cell.known
    }
    assert known == {("depth", "82.0"), ("faults", "9 of 25"), ("guesses", "1.42")}


def test_terminal_report_and_page_have_them_and_names_are_text(record, tmp_path):
    out = Console(file=io.StringIO(), width=300)
    print_run(record, out)
    html = render_html(record)
    path = write_run(record, tmp_path / "run.json")
    told = asyncio.run(answer_changes(path))["tables"]
    assert "<i>small" not in html and "&lt;i&gt;small" in html
    for table in evidence_tables(record):
        assert table.title in out.file.getvalue() and table.title in html
    assert [one["name"] for one in told] == [table.name for table in evidence_tables(record)]
    assert told[0]["rows"][1][3] == {"text": "0.410", "beneath": "0.330–0.530", "known": False}


def test_a_run_without_any_shows_none():
    record = run_record()
    assert evidence_tables(record) == [] and table_notes(record) == {}
    assert 'class="evidence"' not in render_html(record)


def test_the_gate_is_told_what_is_sure(record):
    assert table_notes(record) == {
        "Q4_K_M": "its loss rises with depth, 82.0 times from 512 to 4,096 tokens (70 to 97); "
        "guesses with draft <i>small.gguf, 1.42 times as fast"
    }


def over_caches(record):
    """The same ladder, Q4_K_M with another cache."""
    levels = tuple(
        dataclasses.replace(one, level="Q4_K_M+q8_0/q4_0") if one.level == "Q4_K_M" else one
        for one in record.plan.levels
    )
    return dataclasses.replace(record, plan=dataclasses.replace(record.plan, levels=levels))


def printed(record, width):
    out = Console(file=io.StringIO(), width=width, highlight=False)
    print_run(record, out)
    return out.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_of_evidence_fit_a_narrow_terminal_uncut(record, width):
    text = printed(record, width)
    assert "…" not in text and "KL mean" in text and "times as fast" in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    if width < 100:
        (at,) = [place for place, line in enumerate(lines) if " Q4_K_M   f16" in line]
        assert "0.00500" in lines[at] and "0.00400–0.00700" in lines[at + 1]  # beneath
        assert "Left out for width: " in "\n".join(lines[at:])


def test_levels_with_caches_stand_by_their_memory_at_the_context(record):
    several = over_caches(record)
    narrow, plain = printed(several, 80), printed(record, 80)
    assert "Left out for width: file" in narrow and "memory" in plain.partition("Left out for width")[2]
    assert "beats these in memory at 2,048 tokens of context, speed and loss at once: " in " ".join(narrow.split())
    assert "beats these in" not in plain
    with_caches, without = render_html(several), render_html(record)
    assert "memory at 2,048 tokens of context, MiB" in with_caches and "file size, MiB" not in with_caches
    assert "file size, MiB" in without and "beats these in size, speed" in without
