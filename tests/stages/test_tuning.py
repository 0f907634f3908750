"""Files whose numbers are tuned: ordinary files, better on held-out text or as they were, whole after a kill."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny_models
from bitladder.cli.app import app
from bitladder.describe.windows import Window
from bitladder.errors import BadInput, TooShort
from bitladder.files.gguf import GgufFile
from bitladder.formats.blocks import QTYPES
from bitladder.formats.recipes import is_quantizable
from bitladder.kernels.free_numbers import numbers_of, with_numbers
from bitladder.plan.recipe import recipe_bytes
from bitladder.plan.tuning import chosen, held_places, numbers_of_level
from bitladder.records.recipe import Recipe, Tuning
from bitladder.report.recipe import tuning_line
from bitladder.stages import calibration, feedback, mixed, quantize, recipe, tuning
from bitladder.stages.feedback import write_with_feedback
from bitladder.stages.fidelity import file_candidate, walk
from bitladder.stages.forecast import walking_need, with_tuning
from bitladder.stages.job import Build, Job
from bitladder.walk import feedback as walk_feedback
from bitladder.walk.feedback import FeedbackSettings
from bitladder.walk.tuning import TuneSettings

SETTINGS = FeedbackSettings(effort="fast", half=False)
QUICK = TuneSettings(steps=24, rate=0.01, look=8)


class _Killed(BaseException):
    pass


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny model, its recipe, a text to fit to and another to tune on; few steps, large ones. What is fitted has
    scales that are up to 15% off, so that there is something to find."""
    fit = walk_feedback.fit_matrix

    def off(qtype, *given):
        found = fit(qtype, *given)
        numbers = numbers_of(found.data, qtype)
        numbers *= np.random.default_rng(0).uniform(0.85, 1.15, numbers.shape)
        return replace(found, data=with_numbers(found.data, qtype, numbers))

    monkeypatch.setattr(walk_feedback, "fit_matrix", off)
    monkeypatch.setattr(TuneSettings, "for_windows", lambda _: QUICK)
    monkeypatch.setattr(tuning, "SECONDS_BETWEEN", 0.0)
    case = tiny_models.CASES["llama"]
    with GgufFile.open(tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")) as source:
        rng = np.random.default_rng(0)
        windows = [Window(f"text {n}", rng.integers(0, tiny_models.N_VOCAB, 100)) for n in range(32)]
        qtypes = {info.name: "Q8_0" if is_quantizable(info) else info.qtype for info in source.model.tensors}
        size, bpw = recipe_bytes(source.model, qtypes)
        yield source, Recipe("test", "llama", qtypes, size, bpw, None, (), True), windows[:12], windows[12:]


def test_only_numbers_move_and_what_is_said_is_what_the_file_loses(tiny, tmp_path):
    source, made, fitting, own = tiny
    plain = write_with_feedback(source, made, tmp_path / "plain", fitting, settings=SETTINGS)
    tuned = write_with_feedback(source, made, tmp_path / "tuned", fitting, settings=SETTINGS, tuning=own)
    found = tuned.tuning
    assert plain.tuning is None
    assert found.kept
    assert found.after < 0.7 * found.before
    assert tuned.file.bytes - plain.file.bytes < 256  # words of the header
    changed = 0
    with GgufFile.open(plain.file.path) as before, GgufFile.open(tuned.file.path) as after:
        assert before.metadata["bitladder.method"] != after.metadata["bitladder.method"]
        for info in after.model.tensors:
            old, new = before.raw(info.name), after.raw(info.name)
            if info.qtype == "Q8_0":
                kind = QTYPES["Q8_0"]
                at = kind.offset("qs")
                np.testing.assert_array_equal(
                    old.reshape(-1, kind.type_size)[:, at:], new.reshape(-1, kind.type_size)[:, at:]
                )
            changed += not np.array_equal(old, new)
        held = [own[at] for at in held_places([window.document for window in own])]
        assert found.held_out == sum(len(window.tokens) - 1 for window in held)
        whole = [replace(window, begin=1) for window in held]
        lost = [walk(source, [file_candidate(source, file)], whole)[0].kl_mean for file in (before, after)]
    assert changed > 20
    assert lost[0] == pytest.approx(found.before, rel=0.02)
    assert lost[1] == pytest.approx(found.after, rel=0.02)
    again = write_with_feedback(source, made, tmp_path / "tuned", fitting, settings=SETTINGS, tuning=own)
    assert again.file.reused


def test_steps_are_as_many_as_the_text_allows(tiny, tmp_path, monkeypatch):
    source, made, fitting, own = tiny
    asked = []
    monkeypatch.setattr(TuneSettings, "for_windows", lambda count: asked.append(count) or QUICK)
    write_with_feedback(source, made, tmp_path, fitting, settings=SETTINGS, tuning=own)
    assert set(asked) == {len(own)} != {len(fitting)}


def test_a_file_that_tuning_does_not_help_has_the_bytes_it_had(tiny, tmp_path, monkeypatch):
    source, made, fitting, own = tiny
    monkeypatch.setattr(TuneSettings, "for_windows", lambda _: replace(QUICK, rate=500))
    plain = write_with_feedback(source, made, tmp_path / "plain", fitting, settings=SETTINGS)
    tuned = write_with_feedback(source, made, tmp_path / "tuned", fitting, settings=SETTINGS, tuning=own)
    assert not tuned.tuning.kept
    assert "not kept" in tuning_line(tuned.tuning)
    with GgufFile.open(plain.file.path) as before, GgufFile.open(tuned.file.path) as after:
        for info in after.model.tensors:
            np.testing.assert_array_equal(before.raw(info.name), after.raw(info.name))


@pytest.mark.parametrize("where", ["step", "outcome", "writing"])
def test_a_killed_run_ends_with_the_same_bytes(tiny, tmp_path, monkeypatch, where):
    source, made, fitting, own = tiny
    whole = write_with_feedback(source, made, tmp_path / "whole", fitting, settings=SETTINGS, tuning=own).file.path

    def kill(*_):
        raise _Killed

    def killed(what, done, _):
        if where == "step" and "tuning" in what and done == 6:
            raise _Killed

    with monkeypatch.context() as patch:
        put, count = feedback._Out.put, []
        if where == "outcome":
            patch.setattr(tuning._Notes, "keep_outcome", kill)
        if where == "writing":

            def put_some(self, name, pieces):
                count.append(name)
                if len(count) > len(source.model.tensors) + 5:  # all of them were written once
                    raise _Killed
                put(self, name, pieces)

            patch.setattr(feedback._Out, "put", put_some)
        with pytest.raises(_Killed):
            write_with_feedback(source, made, tmp_path / "cut", fitting, settings=SETTINGS, tuning=own, progress=killed)
    assert (tmp_path / "cut" / "tiny-test.gguf.partial.states" / "tuning.npz").exists()
    steps = []
    resumed = write_with_feedback(
        source, made, tmp_path / "cut", fitting, settings=SETTINGS, tuning=own,
        progress=lambda what, done, _: steps.append(done) if "tuning" in what else None,
    ).file.path  # fmt: skip
    assert not [step for step in steps if step < 5 and where == "step"]  # the sixth is told of before it is kept
    assert steps or where == "writing"
    assert resumed.read_bytes() == whole.read_bytes()
    assert [path.name for path in resumed.parent.iterdir()] == [resumed.name]


@pytest.mark.parametrize("left", [b"", b"PK", b"\x93NUMPY"])
def test_notes_that_are_not_whole_are_nothing_to_go_on_from(tmp_path, left):
    notes = tuning._Notes(tmp_path / "tuning.npz", "a")
    notes.save({"moved": np.ones(3)})
    assert list(notes.load()) == ["moved"]
    assert tuning._Notes(tmp_path / "tuning.npz", "b").load() is None
    (tmp_path / "tuning.npz").write_bytes(left)
    assert notes.load() is None


def test_too_few_windows_to_hold_some_out(tiny, tmp_path):
    source, made, fitting, own = tiny
    few = write_with_feedback(source, made, tmp_path, fitting, settings=SETTINGS, tuning=own[:9])
    assert not few.tuning.kept
    assert tuning_line(few.tuning) == "Not tuned: 9 windows of text are too few to hold some out."


def test_every_fifth_document_decides_or_every_fifth_window():
    many = [f"text {n // 2}" for n in range(40)]
    assert held_places(many) == [8, 9, 18, 19, 28, 29, 38, 39]
    assert held_places(["one"] * 16) == [4, 9, 14]
    assert held_places(["one"] * 14) == []


def test_short_text_moves_numbers_together(tiny):
    source, made, *_ = tiny
    tensors, qtypes = source.model.tensors, made.qtypes
    each = numbers_of_level(tensors, qtypes)
    long, short, tiny_text = (chosen(tensors, qtypes.__getitem__, tokens) for tokens in (each, each // 100, 1))
    assert (set(long.grains.values()), long.shares, long.note) == ({"each"}, each, "")
    assert set(short.grains.values()) == {"rows"}
    assert set(tiny_text.grains.values()) == {"whole"}
    assert tiny_text.shares < short.shares < each
    assert f"{each:,} numbers moved by {short.shares:,} shares" in short.note
    assert not [name for name in long.grains if not name.startswith("blk.")]


def test_text_that_codes_are_fitted_to_is_not_tuned_on(tiny, monkeypatch):
    _, _, fitting, own = tiny

    class Job:
        def windows(self, documents):
            return documents

    monkeypatch.setattr(calibration, "calibration_texts", lambda _job, parts: list(parts))
    known = [*fitting, *own[:2]]
    assert calibration.tuning_windows(Job(), known, Build(out=Path())) == []
    assert calibration.tuning_windows(Job(), known, Build(out=Path(), tuning=[*fitting, *own])) == own[2:]
    with pytest.raises(BadInput, match="that codes are fitted to"):
        calibration.tuning_windows(Job(), known, Build(out=Path(), tuning=fitting))
    few = [Window("one", window.tokens) for window in own[2:16]]
    with pytest.raises(BadInput, match=r"14 windows(.|\n)*7,680 tokens"):
        calibration.tuning_windows(Job(), known, Build(out=Path(), tuning=[*few, *few]))


def test_a_text_too_short_for_a_window_is_not_said_to_ship(monkeypatch):
    class Job:
        def windows(self, documents):
            raise TooShort("x")

    monkeypatch.setattr(calibration, "calibration_texts", lambda _job, parts: list(parts))
    with pytest.raises(BadInput, match=r"0 windows(.|\n)*Give --tune a longer text"):
        calibration.tuning_windows(Job(), [], Build(out=Path(), tuning=[Path("short.txt")]))


def test_what_tuning_takes_is_said_before(tiny):
    source, made, fitting, own = tiny
    need = walking_need(source, fitting, ("test",), kind="fit")
    more = with_tuning(need, source, numbers_of_level(source.model.tensors, made.qtypes), own)
    assert more.ram_bytes > need.ram_bytes + 24 * numbers_of_level(source.model.tensors, made.qtypes)
    assert more.seconds > need.seconds
    assert more.what.endswith("and tune it")


def test_tuning_is_for_files_that_are_written(tiny):
    source, *_ = tiny
    for more in ([], ["--to", "vllm"]):
        result = CliRunner().invoke(app, ["recipe", str(source.path), "--bpw", "5", "--tune", "self", *more])
        assert result.exit_code != 0
        assert "--tune is for files that are written" in result.output


COMMANDS = [
    ["recipe", "--bpw", "5.5"], ["recipe", "--level", "Q4_K_M"], ["recipe", "--to", "vllm", "--bpw", "5"],
    ["quantize", "--to", "GPTQ-Q4_K_M"], ["quantize", "--to", "GPTQ-4bit-g32"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("option", ["--tune", "--calibrate"])
def test_a_text_that_is_not_there_is_told_before_anything_else(command, option, tmp_path):
    verb, *options = command
    text = tmp_path / "nowhere.txt"
    model = tmp_path / "no model either.gguf"
    result = CliRunner().invoke(
        app, [verb, str(model), *options, option, str(text), "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert result.exit_code == 2
    assert f"The text {text} cannot be read" in " ".join(result.output.split())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_text_that_teaches_nothing_is_told_before_the_work(command, tmp_path, monkeypatch):
    case = tiny_models.CASES["llama"]
    path = tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")
    windows = [Window(f"t{n}", np.arange(100) % tiny_models.N_VOCAB) for n in range(36)]
    monkeypatch.setattr(Job, "windows", lambda *_: windows)  # one text for all: tiny models have no tokenizer
    (text := tmp_path / "text.txt").write_text("words")
    for place in (recipe, mixed):
        monkeypatch.setattr(place, "weighed_tensors", lambda *_, **__: pytest.fail("the work was begun"))
    for place, name in ((recipe, "write_recipe"), (quantize, "calibrate_levels")):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("the work was begun"))
    verb, *options = command
    result = CliRunner().invoke(
        app, [verb, str(path), *options, "--tune", str(text), "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert "The text to tune on is the one that codes are fitted to" in " ".join(result.output.split())
    assert result.exit_code == 2


def test_a_line_says_what_came_of_it():
    kept = Tuning(kept=True, numbers=9, tokens=12000, held_out=3000, steps=40, before=0.2, after=0.18)
    assert tuning_line(kept) == (
        "Tuned in 40 steps on 12,000 tokens: mean KL 0.200 -> 0.180 on 3,000 tokens that no step saw."
    )


def test_a_level_that_loses_next_to_nothing_is_told_apart_from_one_that_loses_nothing():
    kept = Tuning(kept=True, numbers=9, tokens=12000, held_out=3000, steps=40, before=0.00071, after=0.00003)
    assert "mean KL 0.000710 -> 3e-5 on" in tuning_line(kept)
