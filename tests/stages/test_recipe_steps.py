"""Recipes for budgets: chosen, written, read back, applied to another checkpoint, and refused with numbers."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny_models
from bitladder.cli.app import app
from bitladder.cli.build import split_levels
from bitladder.describe.rates import PoolRates
from bitladder.describe.windows import Window
from bitladder.errors import BadInput, NothingFits, UsageError
from bitladder.files import probe, sources
from bitladder.files.gguf import GgufFile
from bitladder.files.imatrix import ImportanceMatrix, write_imatrix
from bitladder.formats.blocks import QTYPES
from bitladder.formats.recipes import is_quantizable, types_for
from bitladder.levels import FeedbackLevel, parse_levels
from bitladder.plan.cost import level_size
from bitladder.plan.recipe import Limits, check, choose, fitted, predicted, reapplied, recipe_bytes
from bitladder.records.calibration import LinearLoss
from bitladder.records.level_file import LevelFile
from bitladder.records.recipe import FittedLevel, Recipe, SensitivityTable, TensorLoss
from bitladder.report.recipe import lost_words, note_lines, recipe_lines
from bitladder.stages import mixed, quantize, weighing
from bitladder.stages import recipe as recipes
from bitladder.stages.feedback import write_with_feedback
from bitladder.stages.job import Build, Job, Journal, Work, opened
from bitladder.stages.ladder_files import ladder_files


@pytest.fixture
def tiny(tmp_path):
    case = tiny_models.CASES["llama with biases"]
    return tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")


def _table(source):
    rng = np.random.default_rng(0)

    def losses(info, weight):
        errors = {qtype: weight * 4.0 ** -QTYPES[qtype].bpw for qtype in types_for(info)}
        return tuple(TensorLoss(q, QTYPES[q].nbytes(info.shape), loss, loss / 2) for q, loss in errors.items())

    matrices = [info for info in source.model.tensors if is_quantizable(info)]
    return SensitivityTable("", "", 1000, {info.name: losses(info, rng.lognormal(0, 1)) for info in matrices})


def test_a_budget_is_kept_and_used(tiny):
    with GgufFile.open(tiny) as source:
        table = _table(source)
        for bpw in (4.8, 5.5, 7.0):
            recipe = choose(table, source.model, Limits(bpw=bpw))
            assert bpw - 0.3 < recipe.bpw <= bpw
            assert recipe_bytes(source.model, recipe.qtypes) == (recipe.bytes, recipe.bpw)
            assert recipe.label == f"bpw{recipe.bpw:.2f}"
            even = dict.fromkeys(table.losses, "Q4_0")
            if recipe.bpw > recipe_bytes(source.model, even)[1]:
                assert recipe.expected_kl < predicted(table, even, feedback=True)


def test_the_smallest_file_for_a_loss(tiny):
    with GgufFile.open(tiny) as source:
        table = _table(source)
        middle = choose(table, source.model, Limits(bpw=6.0))
        again = choose(table, source.model, Limits(kl=middle.expected_kl * 1.001))
        assert again.bytes <= middle.bytes
        assert again.expected_kl <= middle.expected_kl * 1.002


def test_speed_is_a_limit_like_bytes(tiny):
    """A type that is slow here is avoided where there is time for others only."""
    streams = {**dict.fromkeys(("Q5_0", "Q4_0", "IQ4_NL", "Q4_1", "Q8_0", "F32"), 1e9), "Q5_1": 1e6}
    slow = PoolRates(
        stream=streams, matmul={"F32": 1e9}, kv_stream=1e9, attention=1e9,
        layer_s=0, token_s=0, prompt_s=0, source="measured",
    )  # fmt: skip
    with GgufFile.open(tiny) as source:
        table = _table(source)
        free = choose(table, source.model, Limits(bpw=6.3))
        bound = choose(table, source.model, Limits(bpw=6.3, least_decode=4000, rates=slow))
        assert "Q5_1" in free.qtypes.values()
        assert "Q5_1" not in [q for name, q in bound.qtypes.items() if name != "token_embd.weight"]
        with pytest.raises(NothingFits):
            choose(table, source.model, Limits(bpw=6.3, least_decode=1e9, rates=slow))


def test_two_pools_each_keep_their_limit(tiny):
    with GgufFile.open(tiny) as source:
        table = _table(source)
        last = sum(info.elements for info in source.model.tensors if info.name.startswith("blk.2."))
        out = source.info("output.weight").elements
        vram = int((last + out) * 5 / 8)
        recipe = choose(table, source.model, Limits(bpw=7, gpu_layers=1, vram_bytes=vram))
        held = [name for name in table.losses if name.startswith("blk.2.") or name == "output.weight"]
        assert sum(QTYPES[recipe.qtypes[name]].nbytes(source.info(name).shape) for name in held) <= vram


def test_what_cannot_be_is_refused_with_the_least_that_can(tiny):
    with GgufFile.open(tiny) as source:
        table = _table(source)
        with pytest.raises(NothingFits, match="smallest types"):
            choose(table, source.model, Limits(bytes=1000))
        with pytest.raises(UsageError, match="source itself"):
            choose(table, source.model, Limits(bpw=40))
        with pytest.raises(UsageError, match="limit"):
            choose(table, source.model, Limits())
        with pytest.raises(UsageError, match="above 0"):
            choose(table, source.model, Limits(kl=0.0))


def test_predictions_are_scaled_to_measured_recipes(tiny):
    with GgufFile.open(tiny) as source:
        sums = np.array([0.01, 0.1, 0.5, 2.0])
        table = fitted(_table(source), list(zip(sums, 0.6 * sums**0.8, strict=True)))
    assert table.scale == pytest.approx(0.6)
    assert table.power == pytest.approx(0.8)
    assert table.error == pytest.approx(0, abs=1e-6)
    assert table.expected(table.needed(0.05)) == pytest.approx(0.05)


@pytest.fixture
def words(monkeypatch):
    """Tiny models have no tokenizer: their text is random ids."""
    rng = np.random.default_rng(0)
    windows = [Window(f"t{n}", rng.integers(0, tiny_models.N_VOCAB, 100)) for n in range(36)]
    monkeypatch.setattr(Job, "windows", lambda job, texts: windows)


@pytest.mark.usefixtures("words")
def test_the_verb_from_a_budget_to_a_file_and_on_to_another_checkpoint(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    run = CliRunner().invoke
    made = run(app, ["recipe", str(tiny), "--bpw", "5.5", "--out", str(tmp_path / "out"), "--json"])
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    path = record["fitted"]["file"]["path"]
    assert record["recipe"]["bpw"] <= 5.5
    assert 0.3 < record["held_out"]["kl_mean"] / record["recipe"]["expected_kl"] < 3
    shown = run(app, ["recipe", path])
    assert shown.exit_code == 0
    assert f"bpw{record['recipe']['bpw']:.2f}" in shown.stdout
    assert "ffn_down" in shown.stdout

    case = tiny_models.CASES["llama with biases"]
    other = tiny_models.write(case, tiny_models.make(case), tmp_path / "other.gguf")
    again = run(
        app, ["recipe", path, "--apply", str(other), "--out", str(tmp_path / "again"), "--effort", "fast", "--json"]
    )
    assert again.exit_code == 0, again.output
    copied = json.loads(again.stdout)["fitted"]["file"]["path"]
    with GgufFile.open(Path(path)) as one, GgufFile.open(Path(copied)) as two:
        assert str(two.metadata["bitladder.method"]).startswith("feedback fast")
        assert {t.name: t.qtype for t in one.model.tensors} == {t.name: t.qtype for t in two.model.tensors}


@pytest.mark.usefixtures("words")
def test_a_recipe_is_applied_by_any_name_of_a_model_and_brings_the_projector(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    resolve = sources.resolve
    monkeypatch.setattr(sources, "resolve", lambda name, *rest: resolve(str(tiny) if name == "a-name" else name, *rest))
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("bitladder.stages.projector.projector_of", lambda *_: tmp_path / "mmproj-tiny.gguf")
    call = ["recipe", "a-name", "--apply", str(tiny), "--out", str(tmp_path / "out"), "--effort", "fast"]
    made = CliRunner().invoke(app, call)
    assert made.exit_code == 0, made.output
    assert (tmp_path / "out" / "mmproj-tiny.gguf").exists()


def test_a_recipe_for_another_shape_is_refused(tiny, tmp_path):
    case = tiny_models.CASES["qwen2"]
    other = tiny_models.write(case, tiny_models.make(case), tmp_path / "other.gguf")
    recipe = recipes.read_recipe(tiny)
    with GgufFile.open(other) as source, pytest.raises(UsageError, match="qwen2"):
        reapplied(recipe, source.model)


@pytest.mark.parametrize(
    ("options", "words_of_it"),
    [
        (["--bpw", "4", "--budget", "1MB"], "together"),
        (["--vram", "1GB", "--bpw", "4"], "belong together"),
        (["--apply", "x", "--bpw", "4"], "finished file"),
        (["--apply", "x"], "no folder is named"),
        (["--apply", "x", "--out", "o", "--tps", "9"], "--tps was given with --apply"),
        (["--out", "o"], "--out was given without a limit"),
        (["--tps", "9"], "--tps was given without a limit"),
        (["--tune", "self", "--out", "o"], "A recipe needs a limit"),
        (["--ngl", "1", "--vram", "1GB"], "--vram was given without a limit"),
        (["--ctx", "512"], "--ctx was given without a limit"),
        (["--effort", "best"], "--effort was given without a limit"),
        (["--calibrate", "wide"], "--calibrate was given without a limit"),
        (["--level", "Q4_K_M", "--tps", "9"], "--tps was given with --level"),
        (["--level", "Q4_K_M", "--effort", "best"], "--effort was given with --level and no --out"),
        (["--bpw", "4", "--ctx", "512"], "--ctx was given without --fits"),
        (["--bpw", "4", "--effort", "wild"], "fast, good or best"),
    ],
)
def test_options_that_cannot_be(options, words_of_it, tiny):
    result = CliRunner().invoke(app, ["recipe", str(tiny), *options])
    assert result.exit_code == 2
    assert words_of_it in result.stderr


@pytest.mark.usefixtures("words")
def test_a_loss_asked_for_is_held_by_the_file(tiny, tmp_path, monkeypatch):
    """Where predictions are too hopeful, the file that loses too much is replaced by a larger one."""
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    weighed = recipes.weighed_tensors

    def hopeful(*arguments):
        table, kept = weighed(*arguments)
        return replace(table, scale=0.02), kept

    monkeypatch.setattr(recipes, "weighed_tensors", hopeful)
    result = _smallest_for(0.02, tiny, tmp_path / "out")
    assert result.held_out.kl_mean <= 0.02
    assert [path.name for path in (tmp_path / "out").iterdir()] == [result.fitted.file.path.name]


def _smallest_for(kl, tiny, out):
    return recipes.make_recipe(str(tiny), recipes.RecipeRequest(Limits(kl=kl), build=Build(out=out)), Work())


@pytest.mark.usefixtures("words")
def test_a_file_that_loses_far_less_than_asked_is_made_smaller(tiny, tmp_path, monkeypatch):
    """Where predictions are too gloomy, what the first file really lost makes the next one smaller; the same call again
    knows that, and finds the last file."""
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    checked = weighing._checked
    monkeypatch.setattr(weighing, "_checked", lambda *a: replace(checked(*a), scale=20.0))
    first = recipes.make_recipe(str(tiny), recipes.RecipeRequest(Limits(kl=0.3)), Work())
    result = _smallest_for(0.3, tiny, tmp_path / "out")
    assert result.held_out.kl_mean <= 0.3
    assert result.recipe.bytes < first.recipe.bytes
    assert [path.name for path in (tmp_path / "out").iterdir()] == [result.fitted.file.path.name]
    again = _smallest_for(0.3, tiny, tmp_path / "out")
    assert again.fitted.file.reused
    assert again.fitted.file.path == result.fitted.file.path


@pytest.mark.usefixtures("words")
def test_what_was_expected_of_a_file_does_not_make_it_again(tiny, tmp_path):
    with GgufFile.open(tiny) as source:
        recipe = replace(choose(_table(source), source.model, Limits(bpw=6)), expected_kl=0.1)
        windows = [Window("t", np.arange(600) % tiny_models.N_VOCAB)] * 2
        made = write_with_feedback(source, recipe, tmp_path, windows)
        assert not made.file.reused
        assert write_with_feedback(source, replace(recipe, expected_kl=0.2), tmp_path, windows).file.reused


@pytest.mark.usefixtures("words")
def test_fitted_levels_are_levels_like_others(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    made = CliRunner().invoke(
        app, ["quantize", str(tiny), "--to", "GPTQ-Q4_0,Q8_0", "--out", str(tmp_path / "out"), "--json"]
    )
    assert made.exit_code == 0, made.output
    files = {file["level"]: Path(file["path"]) for file in json.loads(made.stdout)["files"]}
    assert set(files) == {"GPTQ-Q4_0", "Q8_0"}
    with GgufFile.open(files["GPTQ-Q4_0"]) as file:
        assert file.info("blk.0.ffn_up.weight").qtype == "Q4_0"
        assert str(file.metadata["bitladder.method"]).startswith("feedback")
    with GgufFile.open(tiny) as source:
        assert level_size(source.model, FeedbackLevel("Q4_0")).file_bytes == files["GPTQ-Q4_0"].stat().st_size


@pytest.mark.usefixtures("words")
def test_a_run_builds_fitted_levels_among_the_others(tiny, tmp_path, monkeypatch):
    """In the order asked for, under the names asked for, each known by how it was made."""
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    levels = ["Q8_0", "GPTQ-Q4_0", "Q5_1"]
    journal = Journal()
    with opened(str(tiny), Work(journal=journal)) as job:

        def build():
            return ladder_files(job, parse_levels(levels), Build(out=tmp_path / "out"), importance=None)

        built = build()
        assert [subject.level for subject in built] == levels
        made = next(subject.made for subject in built if subject.level == "GPTQ-Q4_0")
        assert made.startswith("feedback good")
        assert "types" in made
        assert set(build()) == set(built)
        assert any("GPTQ-Q4_0" in line for line in journal.reused)


def test_a_run_refuses_what_fitted_levels_would_not_heed(tiny):
    result = CliRunner().invoke(app, ["run", str(tiny), "--levels", "gptq-q4_0,Q8_0", "--imatrix", "none"])
    assert result.exit_code == 2
    assert "GPTQ-Q4_0 was asked for with --imatrix none" in result.stderr


def test_names_of_fitted_levels_have_one_spelling():
    assert [str(level) for level in split_levels("gptq-q4_k_m,BPW4.5,bpw4.125,q8_0,bpw4.50")] == [
        "GPTQ-Q4_K_M", "bpw4.50", "bpw4.125", "Q8_0",
    ]  # fmt: skip


@pytest.mark.parametrize("bpw", [4.8, 5.1, 7.3])
def test_a_level_of_bits_per_weight_is_planned_before_anything_is_weighed(bpw, tiny):
    with GgufFile.open(tiny) as source:
        size = level_size(source.model, FeedbackLevel(bpw=bpw))
        assert size.level.name == f"bpw{bpw:.2f}"
        assert size.bpw <= bpw
        assert bpw - size.bpw < 0.4
        matrices = [tensor for tensor in size.tensors if is_quantizable(tensor)]
        held = sorted({QTYPES[tensor.qtype].bpw for tensor in matrices})
        assert held[-1] <= max(2 * held[0], 8.5), "about as many bits for all"
        with pytest.raises(NothingFits, match="smallest types"):
            level_size(source.model, FeedbackLevel(bpw=2))


def test_notes_of_a_fitted_file_are_told_once_each():
    note = "only {} calibration tokens: rounded plainly"
    losses = [LinearLoss(f"blk.{n}.ffn_up_exps.weight", 0.1, n, note=note.format(n)) for n in (3, 9)]
    losses += [LinearLoss("blk.0.attn_q.weight", 0.1, 900), LinearLoss("x.weight", 0.1, 900, 0.1, "damping raised")]
    level = LevelFile("bpw4.00", Path("x.gguf"), 1, 4.0, 1.0, False)
    recipe = Recipe("bpw4.00", "llama", {}, 1, 4.0, None)
    assert list(note_lines(FittedLevel(level, recipe, tuple(losses), 900))) == [
        "bpw4.00, blk.3.ffn_up_exps.weight: only 3 calibration tokens: rounded plainly (and 1 other tensors alike).",
        "bpw4.00, x.weight: damping raised.",
    ]


def test_a_levels_own_types_are_printed_without_any_text(tiny, monkeypatch):
    """They depend on none; a tiny model has no tokenizer to read one by."""
    monkeypatch.setattr(Job, "require_tokenizer", lambda _: None)
    monkeypatch.setattr("bitladder.stages.recipe.recipe_texts", lambda *_: pytest.fail("a text was read"))
    result = CliRunner().invoke(app, ["recipe", str(tiny), "--level", "Q4_K_M"])
    assert result.exit_code == 0, result.output
    assert "Q4_K_M" in result.output


@pytest.mark.parametrize("name", ["GPTQ-Q9_K", "bpw0.5", "bpw99"])
def test_names_of_fitted_levels_that_are_none(name, tiny):
    result = CliRunner().invoke(app, ["quantize", str(tiny), "--to", name])
    assert result.exit_code == 2
    assert "no level" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "words_of_it"),
    [
        (["--bpw", "40"], 2, "source itself"),
        (["--bpw", "2"], 3, "smallest types"),
        (["--budget", "1KB"], 3, "at least"),
        (["--kl", "-1"], 2, "above 0"),
        (["--kl", "0"], 2, "above 0"),
        (["--kl", "inf"], 2, "--kl is inf, which is no number"),
        (["--bpw", "nan"], 2, "--bpw is nan, which is no number"),
        (["--bpw", "inf"], 2, "--bpw is inf, which is no number"),
        (["--bpw", "5", "--tps", "nan"], 2, "--tps is nan"),
        (["--kl", "1", "--tps", "0"], 2, "--tps is 0"),
        (["--to", "vllm", "--kl", "nan"], 2, "--kl is nan, which is no number"),
        (["--budget", "9" * 400], 2, "400 digits"),
        (["--level", "Q9_K"], 2, "no level"),
    ],
)
def test_limits_that_cannot_be_are_refused_before_any_work(options, code, words_of_it, tiny):
    """Tiny models have no tokenizer: whoever asked the engine for one first would fail with another word."""
    result = CliRunner().invoke(app, ["recipe", str(tiny), *options])
    assert result.exit_code == code
    assert words_of_it in result.stderr


def test_speed_and_vram_that_cannot_be_are_told_in_their_units(tiny):
    rates = PoolRates(
        stream={"F32": 1e6}, matmul={"F32": 1e9}, kv_stream=1e9, attention=1e9,
        layer_s=0, token_s=0, prompt_s=0, source="measured",
    )  # fmt: skip
    with GgufFile.open(tiny) as source:
        table = _table(source)
        with pytest.raises(NothingFits, match="ms a token"):
            choose(table, source.model, Limits(bpw=6, least_decode=1000, rates=rates))
        with pytest.raises(NothingFits, match="--tps leaves"):
            check(source.model, Limits(kl=1, least_decode=1000, rates=rates))
        with pytest.raises(NothingFits, match="100 B"):
            choose(table, source.model, Limits(bpw=6, gpu_layers=1, vram_bytes=100))


def test_a_text_of_which_no_window_can_be_held_out_is_refused():
    with pytest.raises(BadInput, match="3 different windows"):
        weighing.parts_of_text([Window("t", np.full(512, n)) for n in range(3)])


def test_what_a_text_repeats_is_not_held_out_as_well():
    once = [Window(f"t{n}", np.full(512, n)) for n in range(12)]
    parts = weighing.parts_of_text([*once, *(Window(f"copy {n}", np.full(512, n)) for n in range(12))])
    held, fitted_to = ({int(window.tokens[0]) for window in own} for own in (parts.held_out, parts.fitting))
    assert len(parts.held_out) == 3
    assert not held & fitted_to
    assert held | fitted_to == set(range(12))
    with pytest.raises(BadInput, match="1 different windows"):
        weighing.parts_of_text(once[:1] * 8)


def test_the_budget_of_a_small_machine_is_what_the_context_leaves(demo_gguf, monkeypatch):
    machine = probe.probe_machine()
    with GgufFile.open(demo_gguf) as source:
        rooms = []
        for ram in (1 << 30, 2 << 30):
            small = replace(machine, ram_total=ram, ram_available=ram, gpus=())
            monkeypatch.setattr(probe, "probe_machine", lambda *_, small=small: small)
            rooms.append(recipes.room_for_weights(source, 2048))
        assert 0 < rooms[0] < 1 << 30
        assert rooms[1] > rooms[0]
        assert recipes.room_for_weights(source, 8192) < rooms[1]


@pytest.fixture
def idle(monkeypatch):
    """No work may begin."""
    for place, name in ((recipes, "weighed_tensors"), (mixed, "weighed_tensors"), (quantize, "calibrate_levels")):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("the work was begun"))


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("options", [["--bpw", "6"], ["--level", "Q4_0"], ["--to", "vllm", "--bpw", "6"]])
def test_where_nothing_can_be_written_is_told_before_the_work(options, tiny, monkeypatch):
    run = CliRunner().invoke
    found = run(app, ["recipe", str(tiny), *options, "--out", str(tiny)])
    assert (found.exit_code, "is no folder" in found.stderr) == (6, True)
    monkeypatch.setattr("os.access", lambda *_: False)
    found = run(app, ["recipe", str(tiny), *options, "--out", str(tiny.parent / "a" / "b")])
    assert (found.exit_code, "is closed to you" in found.stderr) == (6, True)
    assert not (tiny.parent / "a").exists()


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("limit", [["--bpw", "6"], ["--kl", "0.1"]])
def test_room_that_no_types_leave_is_told_before_the_work(limit, tiny):
    found = CliRunner().invoke(app, ["recipe", str(tiny), *limit, "--ngl", "1", "--vram", "100B"])
    assert (found.exit_code, "--vram leaves 100 B" in found.stderr) == (3, True)


@pytest.mark.usefixtures("idle")
def test_a_model_that_fits_as_it_is_is_said_to(tiny, monkeypatch):
    monkeypatch.setattr(recipes, "room_for_weights", lambda *_: 1 << 40)
    found = CliRunner().invoke(app, ["recipe", str(tiny), "--fits", "--out", str(tiny.parent / "out"), "--json"])
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record["fitted"] is None
    assert "fits this machine as it is" in record["warnings"][0]
    with GgufFile.open(tiny) as source:
        assert record["recipe"]["qtypes"] == {info.name: info.qtype for info in source.model.tensors}


@pytest.mark.usefixtures("idle")
def test_levels_that_cannot_be_are_refused_by_their_names_before_the_work(tiny, tmp_path):
    run, out = CliRunner().invoke, ["--out", str(tmp_path / "out")]
    found = run(app, ["quantize", str(tiny), "--to", "GPTQ-4bit-g32,bpw2.00", *out])
    assert (found.exit_code, "bpw2.00: The budget leaves" in found.stderr) == (3, True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny-GPTQ-Q4_0.gguf").write_text("mine")
    found = run(app, ["quantize", str(tiny), "--to", "GPTQ-4bit-g32,GPTQ-Q4_0", *out])
    assert (found.exit_code, "tiny-GPTQ-Q4_0.gguf exists" in found.stderr) == (2, True)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(("name", "said"), [("blk.0.ffn_up.weight", "has 7 values"), ("other", "of no tensor of")])
def test_an_importance_matrix_of_another_model_is_named_before_the_work(name, said, tiny, tmp_path):
    file = tmp_path / "other.gguf"
    write_imatrix(file, ImportanceMatrix({name: np.ones((1, 7), np.float32)}, {name: np.ones(1, np.float32)}))
    call = ["quantize", str(tiny), "--to", "GPTQ-4bit-g32,Q4_0", "--imatrix", str(file), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, call)
    assert found.exit_code == 2
    assert str(file) in found.stderr
    assert said in found.stderr


def test_a_folder_is_called_by_its_whole_name(tiny, tmp_path, monkeypatch):
    (folder := tmp_path / "tiny-CT-bpw5.97").mkdir()
    called = []
    monkeypatch.setattr(recipes, "walking_need", lambda _source, _windows, names: called.extend(names))
    with opened(str(tiny), Work()) as job, pytest.raises(BadInput):
        recipes.measured_on(job, folder, [])
    assert called == ["tiny-CT-bpw5.97"]


def test_one_text_alone_gives_no_interval():
    with_one, with_two = (
        SimpleNamespace(kl_mean=0.1, kl_low=low, kl_high=3 * low, unit="document") for low in (np.nan, 0.08)
    )
    assert lost_words(with_one) == "mean KL 0.100 (one document: no interval)"
    assert lost_words(with_two) == "mean KL 0.100 [0.0800, 0.240]"


def test_parts_of_no_size_are_refused(tiny):
    result = CliRunner().invoke(app, ["quantize", str(tiny), "--to", "Q8_0", "--split-max-size", "0"])
    assert result.exit_code == 2
    assert "--split-max-size is 0" in result.stderr


@pytest.mark.parametrize("option", [["--imatrix", "none"], ["--split-max-size", "1MB"]])
def test_options_that_fitted_levels_do_not_take(option, tiny):
    result = CliRunner().invoke(app, ["quantize", str(tiny), "--to", "GPTQ-Q4_0", *option])
    assert result.exit_code == 2
    assert option[0] in result.stderr


def test_what_is_expected_of_codes_with_feedback_is_not_said_to_be_sure(tiny):
    with GgufFile.open(tiny) as source:
        table = fitted(_table(source), [(0.1, 0.1), (1.0, 1.0)])  # to nearest: predicted to the last digit
        told = "\n".join(recipe_lines(choose(table, source.model, Limits(bpw=5.5))))
        nearest = "\n".join(recipe_lines(choose(table, source.model, Limits(bpw=5.5, feedback=False))))
    assert "mean KL expected" in told
    assert "191M model lost 0.5 to 1.2 times what was expected" in told
    assert "191M" not in nearest
