"""Runs that must end in time: the clock, the order of what is looked at, intervals at any stop, and a tiny model's run
that is cut off, gone on with, and refused."""

import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from bitladder import pipeline
from bitladder.cli.app import app
from bitladder.describe.windows import Window
from bitladder.describe.workload import Input
from bitladder.errors import UsageError
from bitladder.levels import parse_level
from bitladder.plan.bar import DEFAULT_BAR
from bitladder.plan.schedule import Kind, Piece
from bitladder.progress import LevelNews, Progress
from bitladder.records.evaluation import Answer, LevelAnswers
from bitladder.stages import in_time, measure
from bitladder.stages.ask import UNKNOWN_SPEED
from bitladder.stages.documents import coverage, material
from bitladder.stages.job import Build, Journal
from bitladder.stages.looks import (
    MARGIN,
    RESERVED_S,
    Costs,
    Countdown,
    TimeIsUp,
    TooLittleTime,
    undecided_on_passes,
)
from bitladder.stages.run_facts import AUTO_TIME, RunSettings
from bitladder.stages.run_given import Given
from bitladder.units import human_duration, parse_duration
from engine_model import write_engine_model

INPUTS_ONLY = Piece(Kind.INPUTS, ("Q2_K",), 0, 4)
LEVELS = ("Q8_0", "Q4_K_M", "Q2_K")
DOCUMENTS, INPUTS, FIRST = 12, 8, 6


class Heard(Progress):
    """What a progress was told; ``at`` is done when a step of such a name is first heard of."""

    def __init__(self, name="", at=lambda: None):
        self.steps, self.levels, self._name, self._at = [], [], name, at

    def __call__(self, what, done, total):
        self.steps.append((what, done, total))
        if self._name and what.startswith(self._name):
            self._at()

    def on_level(self, news):
        self.levels.append(news)


def test_a_countdown_shows_the_whole_run_and_ends_what_works_on():
    clock, heard = SimpleNamespace(now=1e6), Heard()
    countdown = Countdown(heard, 100, lambda: clock.now)
    clock.now += 500  # nothing counts before it begins
    countdown("fetch", 1, 2)
    countdown.begin()
    clock.now += 40
    countdown("walk", 1, 2)
    clock.now += 100
    countdown("plan", 1, 2)  # nobody is watched yet
    clock.now -= 100
    countdown.watch()
    assert heard.steps == [("fetch", 1, 2), ("walk", 40, 100), ("plan", 100, 100)]
    assert countdown.left == 100 - 3 - 40
    countdown.reserve(20)
    countdown.reserve(1)
    assert countdown.left == 40
    clock.now += 41
    for tell in (lambda: countdown("walk", 2, 2), lambda: countdown.on_level(LevelNews("A"))):
        with pytest.raises(TimeIsUp):
            tell()
    countdown.end()
    countdown("report", 1, 2)
    assert heard.steps[-1] == ("report", 1, 2) and heard.levels == [LevelNews("A")]


def test_documents_and_inputs_have_one_order_whatever_the_callers():
    rng = random.Random(0)
    windows = [Window(name, np.arange(at, at + 9)) for at, name in enumerate("aabbbcdefg")]
    inputs = [Input(str(at), ({"role": "user", "content": str(at)},), ()) for at in range(20)]
    first = material(windows, inputs)
    assert [len(unit) for unit in first.units] != [2, 3, 1, 1, 1, 1, 1] and len(first.units) == 7
    assert first.totals == {Kind.DOCUMENTS: 7, Kind.INPUTS: 20, Kind.ROUNDS: 3}
    assert [one.id for one in first.inputs] != [one.id for one in inputs]
    by_document = [[one for one in windows if one.document == name] for name in "gfedcba"]
    shuffled = rng.sample(inputs, 20)
    again = material([window for unit in by_document for window in unit], shuffled)
    assert again.inputs == first.inputs
    assert [[id(one) for one in unit] for unit in again.units] == [[id(one) for one in unit] for unit in first.units]
    names = [unit[0].document for unit in first.units]
    assert names == ["abcdefg"[place] for place in first.places] == ["gfedcba"[place] for place in again.places]
    assert len(material(windows[:2], inputs).units) == 2  # a single document is cut into its windows


def test_looks_share_the_error_rate_and_the_last_takes_what_is_left():
    assert coverage([12], 12, last=True) == coverage([3], 12, last=True) == pytest.approx(0.95)
    assert coverage([3], 12, last=False) == pytest.approx(1 - 0.05 / 16)
    ends = ([3], [3, 6], [3, 6, 12])
    assert sum(1 - coverage(each, 12, last=False) for each in ends) == pytest.approx(0.05)
    assert coverage([3, 6], 12, last=True) == pytest.approx(1 - 0.05 * 15 / 16)


def test_predictions_follow_what_pieces_took_kind_by_kind():
    inputs = [Input(str(n), ({"role": "user", "content": str(n)},), (), max_tokens=10) for n in range(8)]
    source = SimpleNamespace(model=SimpleNamespace(tensors=[SimpleNamespace(nbytes=10**9)]))
    costs = Costs(material((), inputs), source, [], "F16")
    few, many = (Piece(Kind.INPUTS, ("Q8_0",), 0, count) for count in (2, 8))
    ratio, timing = costs(many) / costs(few), costs(Piece(Kind.ROUNDS, ("Q8_0",), 0, 1))
    assert 1 < ratio < 4
    costs.learn(few, 100)
    assert costs(few) == pytest.approx(100 * MARGIN) and costs(many) == pytest.approx(100 * MARGIN * ratio)
    costs.learn(few, 25)
    assert costs(few) == pytest.approx(50 * MARGIN)
    assert costs(Piece(Kind.ROUNDS, ("Q8_0",), 0, 1)) == timing
    assert costs.shortest_look([]) == 0 < costs.shortest_look(["Q8_0"]) < costs.shortest_look(["Q8_0", "Q4_K_M"])


def test_documents_that_the_reference_was_measured_on_cost_the_levels_alone(monkeypatch):
    passes = []

    def need(_source, _windows, levels, *, beside):
        passes.append(len(levels) + beside)
        return passes[-1]

    monkeypatch.setattr("bitladder.stages.looks.walking_need", need)
    monkeypatch.setattr("bitladder.stages.looks.corrected_seconds", lambda count: 10.0 * count)
    costs = Costs(material([Window("d", np.zeros(8, np.int64))] * 2, ()), None, [], "F16")
    first, later = (Piece(Kind.DOCUMENTS, (name,), 0, 2) for name in ("Q2_K", "Q8_0"))
    assert costs(first) == 20 * MARGIN
    costs.learn(first, 40.0)
    assert costs(later) == 20 * MARGIN and costs(replace(later, stop=1)) == 40 * MARGIN


def answered(level, passed):
    return LevelAnswers(
        level, tuple(Answer(f"i{n}", "", one, "", "stop", 1, 1) for n, one in enumerate(passed)), UNKNOWN_SPEED
    )


def test_a_bar_on_passes_keeps_levels_open_until_evidence_for_any_time_settles_them():
    inputs = [Input(f"i{n}", ({"role": "user", "content": str(n)},), ()) for n in range(400)]
    wanted = material([Window("a", np.arange(9))], inputs)
    well, badly = [True] * 400, [n % 2 == 0 for n in range(400)]
    answers = [answered("F16", well), answered("Q8_0", well), answered("Q2_K", badly), answered("Q4_K_M", well[:20])]
    bar = "passes >= reference - 5 points"
    assert undecided_on_passes(bar, answers, wanted) == {"Q4_K_M"}
    assert undecided_on_passes("no loss", answers, wanted) == {"Q8_0", "Q2_K", "Q4_K_M"}
    assert undecided_on_passes("kl < 0.1 and no known loss", answers, wanted) == set()


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("10m", 600), ("1.5 h", 5400), ("1h30m", 5400), ("2min", 120), ("2H", 7200)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "10", "m", "-5s", "1e9s", "5d", "0s", "5s junk", "10m;", "1s" * 99999 + "x", "nan"]
)
def test_what_is_no_duration(text):
    with pytest.raises(UsageError, match="duration"):
        parse_duration(text)


def test_durations_in_words():
    assert [human_duration(one) for one in (0.4, 119, 150, 3600 * 5)] == ["0 s", "119 s", "2 min", "5.0 h"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A tiny model with texts and a workload, in a folder with evidence and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITLADDER_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    write_engine_model(tmp_path / "m-F16.gguf")
    rng = random.Random(1)
    for number in range(DOCUMENTS):
        words = rng.choices(["river", "stone", "lamp", "winter", "bread", "window", "garden", "letter"], k=20)
        (tmp_path / f"t{number}.txt").write_text(" ".join(words))
    lines = [f"  - {{id: i{n}, prompt: Hello {n}, max_tokens: 2, expect: {{max_words: 99}}}}" for n in range(INPUTS)]
    (tmp_path / "w.yaml").write_text("\n".join(["inputs:", *lines]))
    return tmp_path


def settings(home, within, **more):
    return RunSettings(
        str(home / "m-F16.gguf"), levels=tuple(map(parse_level, LEVELS)), workload=home / "w.yaml", bar="kl < 0.02",
        n_ctx=512, texts=tuple(sorted(home.glob("t*.txt"))), out=home / "out", threads=1, imatrix="none",
        within=within, **more,
    )  # fmt: skip


def test_what_is_far_above_the_limit_is_not_asked(home, monkeypatch):
    monkeypatch.setattr(pipeline, "far_off", lambda bar, losses: {"Q4_K_M"} & losses.keys())
    whole = pipeline.run(settings(home, 1000.0), Heard()).record
    assert {one.level for one in whole.results} == {"Q8_0"}


def test_a_run_cut_off_decides_on_what_it_has_and_the_next_goes_on(home, monkeypatch):
    clock, scored, kept = SimpleNamespace(ahead=0.0), [], measure.Ways.scored

    class Clocked(Countdown):
        def __init__(self, inner, seconds):
            super().__init__(inner, seconds, lambda: clock.ahead)

    def counted(self, missing, windows, way):
        scored.append((sorted(one.level for one in missing), len({window.document for window in windows})))
        return kept(self, missing, windows, way)

    def jump():
        clock.ahead = 1e9

    monkeypatch.setattr(pipeline, "Countdown", Clocked)
    monkeypatch.setattr(measure.Ways, "scored", counted)

    cut = pipeline.run(settings(home, 1000.0), Heard("workload: Q8_0", jump)).record
    assert scored == [(sorted(LEVELS), FIRST)]
    assert {one.level: one.units for one in cut.fidelities} == dict.fromkeys(LEVELS, FIRST)
    assert cut.results == () and cut.decision.bar == "kl < 0.02"
    assert "more documents and" in cut.decision.next[-1]
    assert cut.settings["within_s"] == 1000 and "--within 1000s" in cut.commands[0]

    clock.ahead = 0.0
    whole = pipeline.run(settings(home, 1000.0), Heard()).record
    assert scored[1:] and all(documents == DOCUMENTS - FIRST for _, documents in scored[1:])  # the first are kept
    units = {one.level: one.units for one in whole.fidelities}
    tiers = {whole.decision.quality, whole.decision.speed}
    assert tiers <= set(LEVELS) and all(units[tier] == DOCUMENTS for tier in tiers)
    assert {one.level for one in whole.results} == {"Q8_0", "Q4_K_M"}  # Q2_K is known to fail before any question
    assert whole.decision.verdicts[-1].reason.endswith("neither asked nor timed")
    assert all(one.inputs == INPUTS for one in whole.results if one.level in tiers)
    spread = {one.level: one.kl_high / one.kl_low for one in whole.fidelities}
    assert all(np.isfinite(one) for one in spread.values())

    known = len(scored)
    free = pipeline.run(settings(home, None, full=True), Heard()).record
    done = {level for level, count in units.items() if count == DOCUMENTS}
    assert {level for names, _ in scored[known:] for level in names} == set(LEVELS) - done
    same = {one.level: one.kl_mean for one in free.fidelities}
    assert all(one.kl_mean == pytest.approx(same[one.level]) for one in whole.fidelities if one.level in done)

    known = len(scored)
    again = pipeline.run(settings(home, 1000.0), Heard()).record  # all is in the evidence: nothing is measured
    assert len(scored) == known and {one.units for one in again.fidelities} == {DOCUMENTS}
    by_level = {one.level: one for one in whole.fidelities}
    for one in again.fidelities:
        if one.level in done:  # documents come in the same order from the evidence
            assert one.unit_tokens == by_level[one.level].unit_tokens
            assert one.unit_kl == pytest.approx(by_level[one.level].unit_kl)


def test_a_run_without_a_bound_does_what_its_decision_needs_and_says_what_it_left_out(home, monkeypatch):
    asked, scored, kept = [], [], measure.Ways.scored

    def counted(self, missing, windows, way):
        scored.append((sorted(one.level for one in missing), len({window.document for window in windows})))
        return kept(self, missing, windows, way)

    class Noted(Heard):
        def on_level(self, news):
            if news.state in ("answering", "timed"):
                asked.append((news.state, news.level))

    monkeypatch.setattr(measure.Ways, "scored", counted)
    first = pipeline.run(settings(home, None), Noted()).record
    assert scored == [(sorted(LEVELS), DOCUMENTS)]  # a look at some first would cost every interval some width
    assert {level for _, level in asked} == {"F16", "Q8_0", "Q4_K_M"}
    verdicts = {one.level: one.reason for one in first.decision.verdicts}
    assert verdicts["Q2_K"].endswith("; neither asked nor timed")
    assert {one.level for one in first.answers if one.answers} == {
        level for state, level in asked if state == "answering"
    }

    asked.clear()
    known = len(scored)
    again = pipeline.run(settings(home, None), Noted()).record  # from evidence
    assert len(scored) == known and again.fidelities == first.fidelities
    assert again.decision.quality == first.decision.quality

    full = pipeline.run(settings(home, None, full=True), Heard()).record
    assert {one.units for one in full.fidelities} == {DOCUMENTS}
    assert {one.level: one.inputs for one in full.results} == dict.fromkeys(LEVELS, INPUTS)
    assert "--full" in full.commands[0] and full.decision.quality == first.decision.quality


def test_a_later_run_of_another_level_measures_that_alone(home, monkeypatch):
    from bitladder.walk.layers import LayeredModel

    passes, needs, run, need = [], [], LayeredModel.run, measure.walking_need
    monkeypatch.setattr(LayeredModel, "run", lambda self, *given: passes.append(1) or run(self, *given))
    monkeypatch.setattr(
        measure, "walking_need", lambda *given, beside: needs.append(beside) or need(*given, beside=beside)
    )
    counts = []
    for level in ("Q8_0", "Q4_K_M"):
        pipeline.run(replace(settings(home, None), levels=(parse_level(level),)), Heard())
        counts.append(len(passes))
    assert counts[1] * 2 == counts[0] * 3 and needs == [True, False]


def test_where_every_level_is_known_to_fail_nobody_is_asked(home):
    wanted = replace(settings(home, None), bar="kl < 0.0000001", levels=(parse_level("Q2_K"), parse_level("Q4_K_M")))
    record = pipeline.run(wanted, Heard()).record
    assert record.decision.quality is None and record.results == ()
    assert not any(one.answers for one in record.answers)
    assert "No level that fits holds the bar" in record.decision.summary
    assert (home / "out" / "report.html").exists()


def test_without_time_for_kl_the_bar_stays_and_nothing_is_said_to_meet_it(home, monkeypatch):
    monkeypatch.setattr(pipeline.Looks, "next_piece", lambda looks, *_: None if looks.has_something else INPUTS_ONLY)
    record = pipeline.run(replace(settings(home, 1000.0), bar=None), Heard()).record
    assert record.decision.bar == DEFAULT_BAR and record.decision.quality is None
    assert {one.level: one.inputs for one in record.results} == {"Q2_K": 4}


def test_too_little_time_is_refused_with_the_least_that_is_needed(home):
    for seconds in (0.5, 2.0):  # less than what follows the last look, and no more than it
        with pytest.raises(TooLittleTime, match="Q2_K, the smallest level") as refused:
            pipeline.run(settings(home, seconds), Heard())
        named = re.match(r"Write --within (\d+)s or more", refused.value.do)
        assert named and int(named[1]) > RESERVED_S
        assert not (home / "out").exists()


def test_no_more_levels_are_built_than_there_is_time_to_look_at(home, monkeypatch):
    monkeypatch.setattr(in_time.Costs, "losses", lambda _self, levels: 100.0 * len(levels))
    told = []
    made = pipeline.run(settings(home, 260.0), Heard(), say=told.append).record
    assert {one.level for one in made.fidelities} == {"Q8_0", "Q2_K"}
    assert not list((home / "out").glob("*Q4_K_M*"))
    assert [line for line in (*told, *made.warnings) if "no time to build Q4_K_M" in line]


def test_in_the_usual_time_levels_that_are_clearly_out_are_measured_less(home, monkeypatch):
    """The usual time is derived and said; a whole run measures the rest, and decides the same."""
    told = []
    monkeypatch.setattr(in_time, "_LEAST_DEFAULT_S", 1000.0)
    wanted = replace(settings(home, AUTO_TIME), bar="kl < 0.001")
    first = pipeline.run(wanted, Heard(), say=told.append).record
    assert any(line.startswith("Up to 17 min") for line in told)
    assert "--within auto" in first.commands[0]
    units = {one.level: one.units for one in first.fidelities}
    tiers = {first.decision.quality, first.decision.speed}
    assert tiers <= set(LEVELS) and all(units[tier] == DOCUMENTS for tier in tiers)
    assert units["Q2_K"] < DOCUMENTS  # far above the bar
    assert not any("of 8 answers" in line for line in told)
    whole = pipeline.run(replace(wanted, within=None, full=True), Heard()).record
    assert {one.units for one in whole.fidelities} == {DOCUMENTS}
    assert {one.inputs for one in whole.results} == {INPUTS}
    assert (whole.decision.quality, whole.decision.speed) == (first.decision.quality, first.decision.speed)


def test_what_no_time_can_be_predicted_of_is_refused(home):
    for more in (("--also", "http://127.0.0.1:9/v1#m"), ("--levels", "GPTQ-4bit-g64")):
        done = CliRunner().invoke(app, ["run", "m-F16.gguf", "--within", "5m", *more])
        assert done.exit_code == 2 and "--within" in done.stderr
    assert CliRunner().invoke(app, ["run", "m-F16.gguf", "--within", "soon"]).exit_code == 2


@pytest.mark.parametrize(
    ("there", "seconds", "expected"),
    [((), 100, 1), ((), 60, 0.5), ((), 30, 0.25), ((), 0, 0.125), ((0.25,), 100, 0.25), ((0.5, 0.125), 0, 0.5)],
)
def test_a_matrix_that_an_earlier_run_gathered_is_taken_whatever_the_time(monkeypatch, there, seconds, expected):
    def needed(given):
        share = given.build.calibration_share
        return 0.0 if share in there else 100 * share

    given = Given(*[None] * (len(Given.__dataclass_fields__)))
    given = replace(given, build=Build(out=None), job=SimpleNamespace(journal=Journal()))
    monkeypatch.setattr(in_time, "importance_seconds", needed)
    found = in_time.with_less_calibration(given, seconds)
    assert found.build.calibration_share == expected
    assert bool(given.job.journal.warnings) is (expected < 1)
