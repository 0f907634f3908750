"""Checkpoint levels whose scales are tuned: slopes against differences, folders that read back, wholeness after a kill,
and what does not help, left alone."""

import re

import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

import tiny_families
from bitladder.cli.app import app
from bitladder.files.gguf import GgufFile
from bitladder.files.layer_store import LayerStore
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.stages import tuning
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.walk.checkpoint_walk import CalibrationWalk, Settings
from bitladder.walk.tuned_checkpoint import StoredLevel, basis_of, numbers_of
from bitladder.walk.tuning import TuneSettings, TuningPass
from tiny_checkpoints import tiny, windows_of

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = TuneSettings(steps=24, rate=0.01, look=8)
LEVELS = ["GPTQ-4bit-g32", "GPTQ-4bit-g32-asym", "AWQ-4bit-g32", "W4A16-g32", "W8A16-channel", "MLX-4bit-g32"]


class _Killed(BaseException):
    pass


@pytest.fixture
def off(monkeypatch):
    """Scales that are up to 15% off when tuning begins, few large steps, and what was told of each level."""
    plain = CalibrationWalk.run

    def run(walk, windows, progress, spread=None):
        plain(walk, windows, progress, spread)
        for level, store in walk.stores.items():
            if (mark := store.partial / "off").exists():
                continue
            mark.touch()
            stored = StoredLevel(walk.model, walk.weights, level.format, store)
            rng = np.random.default_rng(0)
            stored.numbers = {name: stored.start(name) for name in stored.shapes()}
            for name, own in stored.numbers.items():
                stored.numbers[name] = (own * rng.uniform(0.85, 1.15, own.shape)).astype(np.float32)
            stored.write()

    monkeypatch.setattr(CalibrationWalk, "run", run)
    monkeypatch.setattr(TuneSettings, "for_windows", lambda _: QUICK)
    monkeypatch.setattr(tuning, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr("bitladder.walk.keep.SECONDS_BETWEEN", 0.0)


def made(gguf, checkpoint, levels, out, **reading):
    wanted = [parse_checkpoint(level) for level in levels]
    with GgufFile.open(gguf) as source:
        text = Reading(windows_of(1), **reading)
        job = Calibration(
            source, wanted, text, out_dir=out, name="tiny", checkpoint=checkpoint, settings=Settings(half=False)
        )
        return job.run()


@pytest.mark.parametrize("level", LEVELS)
def test_arrays_are_linear_in_what_is_tuned(level):
    form = parse_checkpoint(level).format.forms[0]
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(64, 128)).astype(np.float32)
    parameters = form.search(weights, None)
    arrays = form.encode(parameters.nearest(weights), parameters)
    numbers = numbers_of(form, arrays)
    assert numbers.shape == (64, 128 // (form.group_size or 128), len(form.tunable))
    basis = basis_of(form, arrays).reshape(len(form.tunable), *numbers.shape[:2], -1)
    whole = np.einsum("krgc,rgk->rgc", basis, numbers)
    np.testing.assert_allclose(whole.reshape(weights.shape), form.decode(arrays), rtol=2e-3, atol=1e-5)


def _pass_over(gguf, checkpoint, level, folder, monkeypatch):
    """A pass over a level in its store, which is not finished."""
    stores = []
    monkeypatch.setattr(Calibration, "_finished", lambda job, *_: stores.append(job))
    monkeypatch.setattr(Calibration, "_collected", lambda *_: None)
    source = GgufFile.open(gguf)
    job = Calibration(
        source, [parse_checkpoint(level)], Reading(windows_of(1)), out_dir=folder, name="tiny", checkpoint=checkpoint,
        settings=Settings(half=False),
    )  # fmt: skip
    job.run()
    [store] = job._missing.values()
    stored = StoredLevel(job._walk.model, job._walk.weights, parse_checkpoint(level).format, store)
    passes = TuningPass(job._walk.model, job._walk.weights, stored, windows_of(4, count=6, n=24), state_bytes=1 << 30)
    passes.learn()
    return source, store, stored, passes


@pytest.mark.parametrize(
    ("family", "level"),
    [
        ("llama", "GPTQ-4bit-g32"),
        ("gemma2", "AWQ-4bit-g32"),
        ("mixtral", "MLX-4bit-g32"),
        ("phi3", "W4A16-g32"),
        ("gpt2", "W4A16-channel"),
        ("gpt-oss", "W4A16-channel"),
    ],
)
def test_slopes_are_those_of_the_loss(family, level, tmp_path, monkeypatch):
    if family in tiny_families.FAMILIES:
        [(_, checkpoint, gguf)] = tiny_families.write_all(tmp_path, [family]).values()
    else:
        _, checkpoint, gguf = tiny(family, tmp_path)
    source, _, stored, passes = _pass_over(gguf, checkpoint, level, tmp_path / "out", monkeypatch)
    names = list(stored.shapes())
    start = {name: stored.start(name) for name in names}
    stored.numbers = dict(start)
    which = range(len(passes.windows))
    before = passes.lost(which)
    found = passes.slopes(which, frozenset(names))
    np.testing.assert_allclose(found.kl, before.kl)
    assert set(found.slopes) == set(names)
    # half precision is coarser than the steps that a difference wants, so all numbers of a layer move together
    number = re.compile(r"\.(?:layers|h)\.(\d+)\.")
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(int(number.search(f".{name}")[1]), []).append(name)
    if family in ("mixtral", "gpt-oss"):  # what moves before a router changes which experts are chosen, and that jumps
        groups = {max(groups): [name for name in groups[max(groups)] if "experts" in name]}
    for layer, own in groups.items():
        sides = []
        for share in (0.0007, -0.0007):
            moved = {n: start[n] + np.float32(share) * np.sign(found.slopes[n]) * np.abs(start[n]) for n in own}
            moved = {name: one.astype(np.float16).astype(np.float32) for name, one in moved.items()}
            stored.numbers = {**start, **moved}
            lost = passes.lost(which)
            sides.append((moved, lost.kl.sum() / lost.tokens.sum()))
        by_slope = sum(float(np.vdot(found.slopes[n], sides[0][0][n] - sides[1][0][n])) for n in own)
        assert by_slope > 0
        assert sides[0][1] - sides[1][1] == pytest.approx(by_slope, rel=0.15), layer
    source.close()


@pytest.mark.parametrize(
    ("family", "level"),
    [("llama", "GPTQ-4bit-g32"), ("llama", "MLX-4bit-g32"), ("mixtral", "MLX-4bit-g32"), ("qwen2", "AWQ-4bit-g32")],
)
def test_scales_that_are_off_are_found_again(family, level, tmp_path, off):
    _, checkpoint, gguf = tiny(family, tmp_path)
    text = windows_of(5, count=60)
    found = made(gguf, checkpoint, [level], tmp_path / "out", tuning=text)
    tuned = found.tuned[level]
    [report] = found.checkpoints  # the folder was read back: what is decoded is what was noted
    if family != "mixtral":  # over random weights the choice of experts jumps: whether slopes help is the processor's
        assert tuned.kept
        assert tuned.after < 0.95 * tuned.before
    words = "Tuned in" if tuned.kept else "Tuning was not kept"
    assert any(words in note for note in report.notes)
    again = made(gguf, checkpoint, [level], tmp_path / "out", tuning=text)
    assert again.kept == {level}
    assert not again.tuned
    other = made(gguf, checkpoint, [level], tmp_path / "other")
    assert other.fingerprints != found.fingerprints
    assert found.report.predicted.seconds > other.report.predicted.seconds  # of all that was measured
    assert found.report.predicted.ram_bytes > other.report.predicted.ram_bytes


def test_what_is_no_float_stays_as_it_is(tmp_path, off):
    """NVFP4's scales have eight bits; nothing of it moves, and nothing is said."""
    _, checkpoint, gguf = tiny("llama", tmp_path)
    text = {"tuning": windows_of(5, count=60)}
    tuned, plain = (
        made(gguf, checkpoint, ["NVFP4A16"], tmp_path / name, **own) for name, own in (("tuned", text), ("plain", {}))
    )
    assert tuned.tuned == {}
    assert tuned.fingerprints == plain.fingerprints


def test_a_killed_run_goes_on_and_writes_the_same_bytes(tmp_path, off, monkeypatch):
    _, checkpoint, gguf = tiny("llama", tmp_path)
    text = windows_of(5, count=60)
    made(gguf, checkpoint, ["GPTQ-4bit-g32"], tmp_path / "whole", tuning=text)
    plain_slopes, plain_save = TuningPass.slopes, LayerStore.replace_layers
    steps = []

    def until_killed(passes, *given):
        steps.append(1)
        if len(steps) == 9:
            raise _Killed
        return plain_slopes(passes, *given)

    def half_written(store, layers, digests):
        if not steps:
            return plain_save(store, layers, digests)
        next(iter(layers))
        raise _Killed

    monkeypatch.setattr(TuningPass, "slopes", until_killed)
    with pytest.raises(_Killed):
        made(gguf, checkpoint, ["GPTQ-4bit-g32"], tmp_path / "killed", tuning=text)
    monkeypatch.setattr(LayerStore, "replace_layers", half_written)
    with pytest.raises(_Killed):  # goes on with its steps, and is killed while it writes
        made(gguf, checkpoint, ["GPTQ-4bit-g32"], tmp_path / "killed", tuning=text)
    assert len(steps) == 9 + QUICK.steps - 8
    monkeypatch.setattr(LayerStore, "replace_layers", plain_save)
    made(gguf, checkpoint, ["GPTQ-4bit-g32"], tmp_path / "killed", tuning=text)
    assert len(steps) == 9 + QUICK.steps - 8
    files = [tmp_path / name / "tiny-GPTQ-4bit-g32" / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_tuning_that_does_not_help_changes_nothing(tmp_path, monkeypatch):
    _, checkpoint, gguf = tiny("llama", tmp_path)
    monkeypatch.setattr(TuneSettings, "for_windows", lambda _: TuneSettings(steps=12, rate=500, look=2))
    tuned = made(gguf, checkpoint, ["GPTQ-4bit-g32"], tmp_path / "tuned", tuning=windows_of(5, count=60))
    plain = made(gguf, checkpoint, ["GPTQ-4bit-g32"], tmp_path / "plain")
    assert not tuned.tuned["GPTQ-4bit-g32"].kept
    assert plain.tuned == {}
    files = [tmp_path / name / "tiny-GPTQ-4bit-g32" / "model.safetensors" for name in ("tuned", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_levels_without_such_scales_are_refused(tmp_path):
    _, _, gguf = tiny("llama", tmp_path)
    for levels in ("Q4_K_M", "GPTQ-4bit-g32,NVFP4", "FP8-DYNAMIC"):
        result = CliRunner().invoke(
            app, ["quantize", str(gguf), "--to", levels, "--tune", "self", "--out", str(tmp_path / "out")]
        )
        assert result.exit_code != 0
        assert f"--tune does nothing for {levels.rpartition(',')[2]}" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gpt-oss", "qwen3 next", "gpt2"])
def test_families_without_a_row(family, tmp_path, off):
    """Stacks of experts under names of their own, turned matrices, layers of several kinds."""
    [(_, checkpoint, gguf)] = tiny_families.write_all(tmp_path, [family]).values()
    found = made(gguf, checkpoint, ["W4A16-channel"], tmp_path / "out", tuning=windows_of(5, count=40))
    [report] = found.checkpoints  # read back: what is decoded is what was noted
    tuned = found.tuned["W4A16-channel"]
    assert tuned.after <= tuned.before  # over random weights experts are chosen anew by the least step: it may not help
    assert tuned.numbers == sum(
        int(np.prod(shape)) for shape in _shapes(tmp_path / "out" / "tiny-W4A16-channel", report.linears)
    )


def _shapes(folder, linears):
    with safe_open(folder / "model.safetensors", "np") as file:
        return [file.get_slice(f"{one.name}.weight_scale").get_shape() for one in linears]
