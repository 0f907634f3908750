"""The report: one HTML file that stands alone, the chart's geometry, the terminal's tables, and word differences."""

import dataclasses
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from bitladder.errors import BadInput, OutputError
from bitladder.records import to_json
from bitladder.records.decision import Loss, Outcome, Pairing, Status, TagStatus
from bitladder.records.evaluation import Alternative, Answer, AnswerToken
from bitladder.records.plan import Place
from bitladder.records.reading import from_json
from bitladder.records.run import InputFacts, LevelCost
from bitladder.records.wording import Parting, Substitution, WordingChanges
from bitladder.report import fidelity_table, plan_table, print_run, read_run, render_html, write_html, write_run
from bitladder.report.answers import compared_answers
from bitladder.report.chart import Axis, Point, find_cliff, loss_chart
from bitladder.report.facts import NAMES, facts
from bitladder.report.meanings import HEADS, VERDICTS
from bitladder.report.rows import UNKNOWN, level_rows, number, small
from bitladder.report.wording import ANSWERS_COLUMNS, answers_columns, answers_rows, wording_lines, wording_notes
from bitladder.report.words import word_diff
from bitladder.units import GiB, human_bytes
from ladder_examples import CROWDS, SPEED_TEXTS, answers, crowded_record, fidelities, run_record

VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Checks nesting, and collects what a browser would load and what a screen reader would miss."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.ids, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.loads += [
            attrs[name] for name in ("src", "href") if name in attrs and not attrs[name].startswith(("#", "data:"))
        ]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def find(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def record():
    return run_record()


def shown(show, *values, width):
    out = io.StringIO()
    show(*values, Console(file=out, width=width, highlight=False))
    return out.getvalue()


# ---- the HTML file


def test_the_file_is_whole_and_loads_nothing(record):
    text = render_html(record)
    page = Page(text)
    assert page.loads == []
    assert not page.find("script")
    assert not re.search(r"url\(|@import|https?://", text)
    assert len(page.ids) == len(set(page.ids))
    assert page.find("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.find("meta")
    assert all("scope" in attrs for attrs in page.find("th"))
    assert all(attrs.get("role") == "img" and "aria-labelledby" in attrs for attrs in page.find("svg"))


def test_heads_and_verdicts_say_what_they_mean(record):
    page = Page(render_html(record))
    titles = [attrs["title"] for attrs in page.find("abbr")]
    assert titles == [means for name, means in HEADS.items() if name != "cost"]
    assert {attrs["title"] for attrs in page.find("strong") if "title" in attrs} <= {*VERDICTS.values()}
    assert [*VERDICTS] == [*Status]


def test_it_says_everything_the_table_needs(record):
    text = render_html(record)
    for expected in (
        "Deploy Q6_K for quality", "158 MiB", "228 MiB", "131", "0.0130", "0.0117–0.0143", "1.013", "2/3",
        "quality tier", "in size, speed and loss at once: Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M, Q2_K",
        "bitladder run ref", "ab" * 32, "cd" * 32, "numpy 2.0", "walk 12.5 s", "arithmetic",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_same_record_gives_the_same_file(record):
    assert render_html(record) == render_html(run_record())


def test_markup_in_prompts_answers_and_names_is_shown_as_text(record):
    evil = "<script>alert('x')</script><img src=//evil.example/x onerror=y>"
    hostile = dataclasses.replace(
        record,
        source=dataclasses.replace(record.source, name=evil),
        inputs=(InputFacts(evil, evil, evil, (evil,)),),
        answers=(
            answers("F16", {evil: "plain"}),
            answers("Q6_K", {evil: evil}),
            answers("Q4_K_M", {evil: "</p>" + evil}),
        ),
        warnings=(evil,),
        settings={evil: evil},
        decision=dataclasses.replace(record.decision, summary=evil, next=(evil,)),
    )
    text = render_html(hostile)
    page = Page(text)
    assert not page.find("script")
    assert not page.find("img")
    assert text.count("&lt;script&gt;") >= 9


def test_differences_are_marked_for_the_chosen_tiers(record):
    text = render_html(record)
    assert re.search(r"cost \$<del>8</del><ins>12</ins>\.", text)
    assert re.search(r"file <del>shall</del><ins>will</ins> be", text)
    assert (
        text.index('<span class="id">pens')
        < text.index('<span class="id">formal')
        < text.index('<span class="id">capital')
    )


@pytest.mark.parametrize("bar", ["kl < 0.0001", "passes >= reference - 4 points"])
def test_no_choice_is_said_not_drawn(bar):
    text = render_html(run_record(bar))
    Page(text)
    assert 'class="tier ' not in text
    assert ("No level that fits holds" in text) or ("cannot tell" in text)


def test_a_run_with_nothing_measured_still_renders(record):
    bare = dataclasses.replace(
        record, fidelities=(), results=(), inputs=(), answers=(), files=(), timings={}, commands=()
    )
    text = render_html(bare)
    Page(text)
    assert "<svg" not in text
    assert UNKNOWN in text


def test_a_quantized_source_is_said_loudly(record):
    quantized = dataclasses.replace(record, source=dataclasses.replace(record.source, quantized=True, level="Q4_1"))
    assert "The source is itself quantized" in render_html(quantized)
    assert "itself quantized" in shown(print_run, quantized, width=140)
    said = dataclasses.replace(quantized, warnings=("The source is itself quantized (Q4_1).",))
    assert render_html(said).count("itself quantized") == 1


def test_writing_is_whole_or_not_at_all(record, tmp_path):
    path = write_html(record, tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == render_html(record)
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_html(record, tmp_path / "file" / "report.html")


FACTS = {
    "cpu": "a CPU", "cores": 2, "ram_total": 8 * GiB, "features": ["avx2", "fma"], "unified": False,
    "gpus": [{"name": "RTX 4090", "vram_total": 24 * GiB, "vram_free": 20 * GiB, "bandwidth": 1e12, "flops": 0.0}],
    "text": {"documents": ["essay", "code"], "sha256": "ab"},
    "engine": {
        "engine": "xllamacpp", "version": "1", "n_ctx": 512, "n_parallel": 4, "threads": 2, "cpu": "a CPU",
    },
    "temperature": 0.0, "some_thing": {"n_ctx": 3, "none": None}, "nothing": None, "constructor": 1,
}  # fmt: skip


def test_settings_are_written_in_words():
    found = dict(facts(FACTS))
    assert found == {
        "Processor": "a CPU", "Cores": "2", "Memory": "8.00 GiB", "Instruction sets": "avx2; fma",
        "GPUs": "RTX 4090, 24.0 GiB, of which 20.0 GiB free", "Text measured on": "essay; code; SHA-256 ab",
        "Engine": "xllamacpp 1, 512 tokens for each request, requests at once: 4, threads: 2",
        "Temperature": "0", "Some thing": "n ctx 3", "Constructor": "1",
    }  # fmt: skip
    old = dict(facts({"engine": {"n_ctx": 512, "cpu": None}}))
    assert old == {"Engine": "n ctx 512"}, "a record of another version"


def test_every_fact_of_a_machine_and_of_a_run_has_a_name_in_words():
    from bitladder.describe.machine import Machine

    run = json.loads((Path(__file__).parents[1] / "fixtures" / "records" / "run.json").read_text())
    fields = {field.name for field in dataclasses.fields(Machine)} | run["settings"].keys()
    assert fields <= NAMES.keys()
    text = render_html(run_record(machine=run["machine"], settings=run["settings"]))
    assert "<dt>Processor</dt>" in text
    assert "n ctx" not in text


# ---- records and back


def test_a_run_survives_its_json(record, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(to_json(record)))
    again = read_run(path)
    assert to_json(again) == to_json(record)
    assert again.plan == record.plan
    assert again.decision == record.decision


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bitladder": 3}', "\x00"])
def test_what_is_no_run_is_refused(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(BadInput, match="is not a run"):
        read_run(path)


def test_an_answer_survives_its_json_with_its_tokens():
    token = AnswerToken(7, -0.25, " 12", (Alternative(7, -0.25), Alternative(9, -1.5)))
    answer = Answer("pens", " 12", True, "", "stop", 3, 1, tokens=(token,))
    assert from_json(Answer, json.loads(json.dumps(to_json(answer)))) == answer
    with pytest.raises(ValueError, match=r"of length 2, got 1 - at `\$\.tokens\[0\]\.top\[0\]`"):
        from_json(Answer, to_json(answer) | {"tokens": [to_json(token) | {"top": [[1]]}]})


def test_a_missing_run(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        read_run(tmp_path / "none.json")


def test_a_broken_field_is_named(record, tmp_path):
    data = to_json(record)
    data["plan"]["levels"][2]["file_bytes"] = "many"
    path = tmp_path / "run.json"
    path.write_text(json.dumps(data))
    with pytest.raises(BadInput, match=r"Expected `int`, got `str` - at `\$\.plan\.levels\[2\]\.file_bytes`"):
        read_run(path)


# ---- the chart


POINTS = [
    Point("Q8_0", 200, 0.004, 0.0037, 0.0043),
    Point("Q6_K", 160, 0.013, 0.012, 0.014, "quality"),
    Point("Q4_K_M", 124, 0.07, 0.065, 0.075, "speed"),
    Point("Q4_K_S", 120, 0.08, 0.075, 0.086),
    Point("Q3_K_M", 107, 0.25, 0.23, 0.27),
    Point("Q2_K", 100, 2.5, 2.2, 2.8),
]
SIZE = Axis("file size", "MiB")


def numbers(pattern, text):
    return [tuple(map(float, found)) for found in re.findall(pattern, text)]


def test_dots_stand_where_their_numbers_say():
    svg = loss_chart(POINTS, SIZE, limit=0.1)
    curve = numbers(r"([\d.]+),([\d.]+)", re.search(r'class="curve" points="([^"]+)"', svg)[1])
    assert [x for x, _ in curve] == sorted(x for x, _ in curve)
    by_level = dict(zip([p.label for p in sorted(POINTS, key=lambda p: p.x)], curve, strict=True))
    # logarithmic across and down: equal factors are equally far apart
    per_factor = (by_level["Q8_0"][0] - by_level["Q6_K"][0]) / math.log(200 / 160)
    assert by_level["Q6_K"][0] - by_level["Q4_K_M"][0] == pytest.approx(math.log(160 / 124) * per_factor, abs=0.2)
    per_e_fold = (by_level["Q8_0"][1] - by_level["Q6_K"][1]) / math.log(0.013 / 0.004)
    assert by_level["Q3_K_M"][1] - by_level["Q2_K"][1] == pytest.approx(math.log(10) * per_e_fold, abs=0.3)
    limit = float(re.search(r'class="limit"[^>]* y1="([\d.]+)"', svg)[1])
    assert by_level["Q4_K_S"][1] - limit == pytest.approx(math.log(0.1 / 0.08) * per_e_fold, abs=0.3)


def test_whiskers_span_the_interval():
    svg = loss_chart([*POINTS[:5], Point("wide", 100, 1.0, 0.1, 10.0)], SIZE)
    x, low, high = numbers(r'whisker[^"]*" d="M([\d.]+) ([\d.]+)V([\d.]+)', svg)[0]
    dot = numbers(r'class="dot" cx="([\d.]+)" cy="([\d.]+)"', svg)[0]
    assert dot[0] == x
    assert (low + high) / 2 == pytest.approx(dot[1], abs=0.2)


def covered(svg):
    """Boxes of marks and intervals, and boxes of texts inside the plot."""
    marks = [
        (x - 4.5, y - 4.5, x + 4.5, y + 4.5)
        for x, y in numbers(r'<circle class="dot" cx="([\d.]+)" cy="([\d.]+)"', svg)
    ]
    marks += [(x, y, x + 12, y + 12) for x, y in numbers(r'<rect class="dot \w+" x="([\d.]+)" y="([\d.]+)"', svg)]
    marks += [(x - 8, y, x + 8, y + 16) for x, y in numbers(r'<path class="dot speed" d="M([\d.]+) ([\d.]+)l', svg)]
    bars = numbers(r'class="whisker[^"]*" d="M([\d.]+) ([\d.]+)V([\d.]+)', svg)
    marks += [(x - 4, high, x + 4, low) for x, low, high in bars]
    found = re.findall(
        r'class="((?:cliff-|limit-)?label[^"]*)" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)', svg
    )
    texts = []
    for kind, x, y, anchor, text in found:
        wide = len(text) * (8.0 if " " in kind else 7.2)
        left = float(x) - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
        texts.append((left, float(y) - 10, left + wide, float(y) + 2))
    return marks, texts


def overlap(one, other):
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])


@pytest.mark.parametrize("width", [360, 420, 600])
@pytest.mark.parametrize("crowd", CROWDS)
def test_names_cover_no_dot_no_bar_and_no_other_name(crowd, width):
    svg = loss_chart(CROWDS[crowd], SIZE, limit=0.1, width=width, height=380)
    marks, texts = covered(svg)
    assert len(marks) == 2 * len(CROWDS[crowd])
    assert not [(one, other) for one in texts for other in marks if overlap(one, other)]
    assert not [(one, other) for one, other in itertools.combinations(texts, 2) if overlap(one, other)]
    assert all(box[0] >= 0 and box[2] <= width and box[3] <= 380 - 44 for box in texts)
    names = re.findall(r'class="label[^>]*>([^<]+)', svg)
    assert len(names) == len(CROWDS[crowd]), "every level finds a place for its name"


def test_a_name_far_from_its_dot_is_joined_to_it_and_one_without_a_place_is_left_out():
    crowd = CROWDS["in a row"]
    assert '<line class="leader"' in loss_chart(crowd, SIZE, width=360)
    assert '<line class="leader"' not in loss_chart(crowd[:1], SIZE, width=360)
    heap = [Point(f"Q4_K_{n:03}", 100, 0.05, 0.01, 0.2, "speed" if n == 60 else "") for n in range(100)]
    names = re.findall(r'class="label[^>]*>([^<]+)', loss_chart(heap, SIZE, width=360))
    assert names[0].startswith("Q4_K_060")
    assert 5 < len(names) < 100
    assert loss_chart(heap, SIZE, width=360).count('class="dot"') == 99


def test_the_cliff_is_the_steepest_step_that_matters():
    cliff = find_cliff(POINTS)
    assert (cliff.upper, cliff.lower) == ("Q3_K_M", "Q2_K")
    assert cliff.times == pytest.approx(10)
    assert find_cliff(POINTS[:2]) is None
    gentle = [Point(str(n), 200 - 10 * n, 0.03 * 1.3**n, 0, 1) for n in range(6)]
    assert find_cliff(gentle) is None


def test_the_chart_is_described_in_words():
    svg = loss_chart(POINTS, SIZE)
    said = re.search(r"<desc[^>]*>([^<]+)", svg)[1]
    assert "Q2_K 100 MiB, KL 2.5" in said
    assert "from Q3_K_M to Q2_K: 10.0 times the loss" in said


def test_odd_points_do_not_break_the_chart():
    assert loss_chart([], SIZE) == ""
    assert loss_chart([Point("a", 1, math.nan, 0, 0)], SIZE) == ""
    one = loss_chart([Point("a<b>", 1, 0.0, 0.0, 0.0)], SIZE, limit=1e-9)
    assert "a&lt;b&gt;" in one
    assert "nan" not in one
    assert 'class="limit"' not in one


# ---- words


def test_word_differences():
    told = [(s.kind, s.text) for s in word_diff("The fee shall be $100.", "The fee will be $120 now.")]
    assert told == [
        ("same", "The fee "), ("removed", "shall"), ("added", "will"), ("same", " be $"),
        ("removed", "100"), ("added", "120 now"), ("same", "."),
    ]  # fmt: skip


def test_a_common_space_does_not_split_a_change():
    told = [(s.kind, s.text) for s in word_diff("called Rayleigh Blood, so", "called atmospheric light, so")]
    assert told == [
        ("same", "called "), ("removed", "Rayleigh Blood"), ("added", "atmospheric light"), ("same", ", so"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("", ""),
        ("a b ", "x y "),
        ("x y", "x A B y"),
        ("p  q r", "p q  s"),
        ("", "new"),
        ("old", ""),
        ("a " * 3000, "a " * 2999 + "b c"),
    ],
)
def test_both_texts_can_be_read_back_from_the_differences(one, other):
    segments = word_diff(one, other)
    assert "".join(s.text for s in segments if s.kind != "removed") == other
    assert "".join(s.text for s in segments if s.kind != "added") == one


def test_answers_with_another_outcome_come_first(record):
    assert [(one.input.id, one.kind) for one in compared_answers(record)] == [
        ("pens", "flipped"), ("formal", "differs"), ("capital", "same"),
    ]  # fmt: skip


def test_an_input_without_every_answer_is_still_shown(record):
    partial = dataclasses.replace(record, answers=(record.answers[0], answers("Q4_K_M", {"pens": SPEED_TEXTS["pens"]})))
    assert [len(one.shown) for one in compared_answers(partial)] == [2, 1, 1]


def test_answers_of_levels_in_no_tier_are_there_too_and_the_same_words_once():
    record = crowded_record()
    assert (record.decision.quality, record.decision.speed) == ("Q5_K_M", "Q5_K_S")
    first = compared_answers(record)[0]
    assert [one.level for one in first.shown] == ["F16", "Q5_K_M", "Q5_K_S"]
    assert [one.level for one in first.others] == [
        "Q8_0", "Q6_K", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
    ]  # fmt: skip
    text = render_html(record)
    Page(text)
    assert text.count("<del>8</del>") == 10, "every level's answer, with its differences"
    assert text.count("Canberra.</p>") == 1, "what ten levels said alike is written once"
    assert text.count("The very same words as the reference.") == 10


# ---- the terminal


def test_the_terminal_tells_the_whole_run(record):
    text = shown(print_run, record, width=160)
    for row in level_rows(record):
        assert row.level in text
        assert row.verdict.status in text
    for expected in ("0.0117–0.0143", "2/3", "speed tier", "Deploy Q6_K for quality"):
        assert expected in text


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_table_never_wraps_and_names_what_it_leaves_out(record, width):
    lines = shown(print_run, record, width=width).splitlines()
    table = [line for line in lines if re.match(r"^ (level|Q\d|F16)", line)]
    assert len(table) == 8
    assert all(len(line.rstrip()) <= width for line in table)
    assert all("tier" in line or "bar" in line or "reference" in line for line in table[1:])
    assert any("Left out for width" in line for line in lines) == (width < 130)


def test_plan_and_fidelity_tables(record):
    planned = shown(plan_table, record.plan, width=140)
    assert "Q4_K_M" in planned
    assert "KV cache" in planned
    measured = shown(fidelity_table, fidelities(), width=160)
    assert "0.0630–0.0770" in measured
    assert "over 30 documents" in measured
    for head in ("KL: how far", "ppl ratio: perplexity", "top-1: how often"):
        assert head in measured
    assert "KL: how far" in (run := shown(print_run, record, width=160))
    assert "passes: inputs" in run
    one = dataclasses.replace(fidelities()[0], units=1, unit="window")
    assert "One window is too little for intervals" in shown(fidelity_table, [one], width=160)


def test_levels_that_were_not_asked_have_dashes_which_are_explained(record):
    def left(one):
        kept = {"level": one.level, "decode_tokens_per_s": math.nan if one.level == "Q2_K" else one.decode_tokens_per_s}
        unasked = {"inputs": 0, "passes": 0, "lost": (), "gained": (), "pass_low": math.nan, "pass_high": math.nan}
        return dataclasses.replace(one, **kept, **(unasked if one.level in ("Q8_0", "Q2_K") else {}))

    partly = dataclasses.replace(record, results=tuple(map(left, record.results)))
    text = shown(print_run, partly, width=160)
    assert re.search(r"^ *Q8_0 [^\n]* 98[.\d]* [^\n]* – +[a-z ]+$", text, re.M)
    assert "0/0" not in text and "nan" not in text
    assert "--full" in text and "--full" in render_html(partly) and "0/0" not in render_html(partly)
    assert "--full" not in shown(print_run, record, width=160)
    bounded = dataclasses.replace(partly, settings={"within_s": 60})
    assert "--full" not in shown(print_run, bounded, width=160)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00412, "0.00412"), (0.00001, "1e-5"), (12.345, "12.3"), (1234.5, "1,234"), (math.nan, "–")],
)
def test_numbers(value, text):
    assert small(value) == text
    assert value == 0.00001 or number(value, 3) == text


@pytest.mark.parametrize("vocabulary", [Status, Loss, TagStatus, Outcome, Pairing, Place])
def test_the_words_of_a_decision_are_the_same_in_json_and_back(vocabulary):
    @dataclasses.dataclass(frozen=True)
    class Holder:
        words: tuple[vocabulary, ...]

    plain = json.loads(json.dumps(to_json(Holder(tuple(vocabulary)))))
    assert plain == {"words": [word.value for word in vocabulary]}
    back = from_json(Holder, plain).words
    assert back == tuple(vocabulary)
    assert all(isinstance(word, vocabulary) for word in back)
    for wrong in ("gold tier", "QUALITY", 3, None):
        with pytest.raises(ValueError, match=r"at `\$\.words\[0\]`"):
            from_json(Holder, {"words": [wrong]})


def test_the_words_that_pages_and_scripts_read():
    in_tiers = ["quality tier", "speed tier", "both tiers"]
    assert [*Status] == ["reference", *in_tiers, "meets the bar", "fails the bar", "cannot tell", "does not fit"]
    assert [*Place] == ["gpu", "experts in RAM", "split", "cpu", "none", "elsewhere"]
    assert [*Outcome] == ["met", "not met", "cannot tell"]
    assert [*Pairing] == ["", "one level", "together", "swap"]
    assert [*Loss] == ["none", "not told from zero", "measurable", "known bad", "not known"]
    assert [*TagStatus] == ["no loss seen", "loss seen", "loss known"]


CHANGES = WordingChanges(
    answers=3, changed_answers=2, words=60,
    substitutions=(Substitution("shall", "will", 4), Substitution("", "very", 3), Substitution("a", "the", 1)),
    changed_numbers=("pens", "<b>renewal</b>"), missing_items=(("lease", "indemnity"),), reference_items=99,
    broken_format=("as-json",), looping=("story",),
    partings={
        "pens": Parting(4, "8", "<i>", 0.8, 0.05, 0.06, 0.7), "lease": Parting(9, " a", " the", 0.5, 0.4, 0.4, 0.5),
        "story": Parting(1, "x", "y", 0.6, math.nan, 0.1, 0.5),
    },
)  # fmt: skip
SAID = (
    "catches 99.0% of what F16 catches (98 of 99 items, 95% interval 94.5% to 99.8%), not indemnity (lease); "
    "numbers changed in: pens, <b>renewal</b>; JSON broken in: as-json; ends in a loop: story; "
    "'shall' became 'will' 4 times; 2 of 3 answers differ: 1 at near ties, 2 by a clear change, "
    "most clearly at token 5 of pens: '8' (80% likely) became '<i>' (70%)"
)


def with_changes(**wording):
    record = run_record(wording=wording)
    results = [
        dataclasses.replace(one, items=99, items_kept=98, recall_low=0.945, recall_high=0.998) for one in record.results
    ]
    return dataclasses.replace(record, results=tuple(results))


def test_what_changed_in_the_answers_stands_everywhere_and_is_kept(tmp_path):
    record = with_changes(Q4_K_M=CHANGES, Q2_K=CHANGES)
    assert record.decision.speed == "Q4_K_M"
    assert wording_lines(record) == {"Q4_K_M": SAID}
    for width in (80, 160):
        text = shown(print_run, record, width=width)
        for row in ("Q4_K_M", "Q2_K"):
            assert re.search(rf"^ {row} +1/3 +1 +2 +98/99", text, re.MULTILINE)
        assert "near ties: answers that first differ" in text
        assert " ".join(SAID.split()) in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= width
    page = render_html(record)
    Page(page)
    for count in (">1/3</td>", ">98/99</td>", ">94%–100%</td>"):
        assert page.count(count) == 2
    assert page.count("98 of 99 items") == 2, "of every level"
    assert "<b>renewal" not in page and "<i>&#39;" not in page
    assert read_run(write_run(record, tmp_path / "run.json")).wording == record.wording


def test_answers_that_changed_in_nothing_that_counts_are_not_spoken_of():
    plain = WordingChanges(3, 0, 60, CHANGES.substitutions[1:], (), (), 0, ())
    assert wording_notes(plain) == []
    assert wording_lines(run_record(wording={"Q4_K_M": plain})) == {}
    assert wording_lines(run_record()) == {}
    assert "What changed in the answers" not in render_html(run_record())
    many = dataclasses.replace(plain, changed_numbers=tuple(f"in{number}" for number in range(30)))
    assert wording_notes(many) == ["numbers changed in: in0, in1, in2, in3, in4 and 25 more"]
    columns = [column.title for column in answers_columns(answers_rows(run_record(wording={"Q4_K_M": many})))]
    assert columns == ["same words", "numbers"]


def test_where_answers_part_is_not_guessed():
    """An address tells no tokens, an older record has none."""
    unknown = WordingChanges(3, 2, 60, (), (), (), 0, ())
    assert wording_notes(unknown) == ["2 of 3 answers differ"]
    row = answers_rows(run_record(wording={"Q4_K_M": unknown}))[0]
    cells = {column.title: column.read(row) for column in ANSWERS_COLUMNS}
    assert (cells["near ties"], cells["clear changes"], cells["recall"]) == (UNKNOWN, UNKNOWN, UNKNOWN)
    ties = dataclasses.replace(unknown, partings={"lease": CHANGES.partings["lease"]})
    assert wording_notes(ties) == ["2 of 3 answers differ: 1 at near ties, 0 by a clear change"]


def test_money_saved_stands_beside_the_levels_where_there_are_prices():
    hour = "this machine at 1 an hour (2026-01-31, a quote)"
    costs = (LevelCost("F16", 7.68, hour), LevelCost("Q6_K", 8.0, hour), LevelCost("Q4_K_M", 6.02, hour))
    record = run_record(costs=costs)
    lines = (
        "A million answer tokens cost 8.00 with Q6_K, 4% more than with F16 (7.68).",
        "A million answer tokens cost 6.02 with Q4_K_M, 22% less than with F16 (7.68).",
        f"Prices: {hour}.",
    )
    text = " ".join(shown(print_run, record, width=160).split())
    page = render_html(record)
    Page(page)
    for line in lines:
        assert line in text
        assert line in page
    assert re.search(r"Q4_K_M [^\n]*6\.02 +22% +speed tier", shown(print_run, record, width=160))
    assert '<td role="cell" data-label="Cost">6.02<small>22% saved</small></td>' in page
    assert [attrs["title"] for attrs in Page(page).find("abbr")] == [*HEADS.values()]
    assert "saved" not in shown(print_run, run_record(), width=160)
    unpriced = shown(print_run, run_record(costs=costs[2:]), width=160)
    assert "A million answer tokens cost 6.02 with Q4_K_M." in unpriced, "the reference has no price"


def test_the_decision_stands_before_the_warnings(record):
    text = render_html(dataclasses.replace(record, warnings=("Something to know.",)))
    assert text.index("The decision") < text.index(record.decision.summary[:20]) < text.index("Something to know.")


@pytest.mark.parametrize("width", [60, 80, 100, 150])
def test_a_plan_fits_the_terminal_with_level_size_speed_and_fit_whole(record, width):
    """Reasons move beneath where there is no room beside; nothing is cut off."""
    text = shown(plan_table, record.plan, width=width)
    assert max(map(len, text.splitlines())) <= width
    table = text[: text.index("in memory:")] if "in memory: weights" in text else text
    assert "\u2026" not in text
    for level in record.plan.levels:
        line = next(line for line in table.splitlines() if line.split()[:1] == [level.level])
        assert human_bytes(level.file_bytes) in line
        assert re.search(r"\b(yes|no)\b", line)
        assert all(word in text for word in level.reason.split())
