"""Slopes of free numbers against differences, tuning that lowers the loss of held-out text, and what is not kept."""

import numpy as np
import pytest

import tiny_models
from bitladder.describe.windows import Window
from bitladder.files.gguf import GgufFile
from bitladder.plan.tuning import held_places
from bitladder.stages.write_levels import quantize_levels
from bitladder.walk.layers import LayeredModel
from bitladder.walk.tuned import FileBytes, TunedWeights
from bitladder.walk.tuning import Adam, TuneSettings, TuningPass, helps, tune
from bitladder.walk.weights import FileWeights


@pytest.fixture
def level(request, tmp_path):
    """A tiny model, its level of a type, and a pass over some windows."""
    name, kind = request.param
    case = tiny_models.CASES[name]
    source = GgufFile.open(tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf"))
    [made] = quantize_levels(source, [kind], tmp_path)
    rng = np.random.default_rng(0)
    windows = [Window(f"t{n}", rng.integers(0, tiny_models.N_VOCAB, 40 + n)) for n in range(12)]
    file = GgufFile.open(made.path)
    weights = FileWeights(source)
    passes = TuningPass(
        LayeredModel(source.model, weights), weights, TunedWeights(FileBytes(file)), windows, state_bytes=1 << 30
    )
    passes.learn()
    yield passes, file
    source.close()
    file.close()


def _tunable(passes, file):
    layers = [info.name for info in file.model.tensors if info.name.startswith("blk.") or "norm" in info.name]
    return [name for name in layers if passes.tuned.start(name).size]


@pytest.mark.parametrize(
    "level", [("llama", "Q4_1"), ("gemma2", "Q4_0"), ("phi3", "Q4_0")], indirect=True, ids="-".join
)
def test_slopes_are_those_of_the_loss(level):
    passes, file = level
    names = _tunable(passes, file)
    passes.tuned.numbers = {name: passes.tuned.start(name) for name in names}
    start = dict(passes.tuned.numbers)
    which = range(len(passes.windows))
    found = passes.slopes(which, frozenset(names))
    assert set(found.slopes) == set(names)
    for name, slope in found.slopes.items():
        toward = np.sign(slope) * np.abs(start[name])  # all of them uphill, by a share of themselves
        sides = []
        for share in (0.0005, -0.0005):
            moved = start[name] + np.float32(share) * toward
            if passes.tuned.qtype(name) != "F32":
                moved = moved.astype(np.float16).astype(np.float32)
            passes.tuned.numbers = {**start, name: moved}
            lost = passes.lost(which)
            sides.append((moved, lost.kl.sum() / lost.tokens.sum()))
        by_slope = float(np.vdot(slope, sides[0][0] - sides[1][0]))
        assert by_slope > 0, name
        assert sides[0][1] - sides[1][1] == pytest.approx(by_slope, rel=0.1), name


def _disturbed(passes, file):
    """The level's matrices with numbers 15% off, as if they had been badly searched for."""
    names = [name for name in _tunable(passes, file) if "norm" not in name]
    rng = np.random.default_rng(2)
    off = {name: passes.tuned.start(name) for name in names}
    off = {name: (own * rng.uniform(0.85, 1.15, own.shape)).astype(np.float32) for name, own in off.items()}
    passes.tuned.numbers = off
    packed = {name: passes.tuned.packed(name) for name in names}
    plain = passes.tuned.level.raw
    passes.tuned.level.raw = lambda name, rows=None: (
        plain(name, rows) if name not in packed else packed[name] if rows is None else packed[name][rows]
    )
    return names


HELD = [1, 4, 7, 10]


@pytest.mark.parametrize("level", [("llama", "Q8_0")], indirect=True)
def test_numbers_that_are_off_are_found_again(level):
    passes, file = level
    names = _disturbed(passes, file)
    found = tune(passes, dict.fromkeys(names, "each"), HELD, TuneSettings(steps=30, rate=0.01))
    assert found.best > 0
    assert found.after.sum() < 0.6 * found.before.sum()
    stored = passes.lost(HELD)  # what a file with these numbers loses is what is said
    np.testing.assert_allclose(stored.kl, found.after, rtol=1e-5)


@pytest.mark.parametrize("level", [("llama", "Q8_0")], indirect=True)
def test_what_does_not_help_held_out_text_is_not_kept(level):
    passes, file = level
    names = _tunable(passes, file)
    before = {name: passes.tuned(name) for name in names}
    found = tune(passes, dict.fromkeys(names, "each"), HELD, TuneSettings(steps=60, rate=5, look=2))
    assert (found.best, found.numbers) == (0, {})
    assert found.steps == 6  # three looks were enough, each with shorter steps than the last
    np.testing.assert_array_equal(found.after, found.before)
    for name, own in before.items():
        np.testing.assert_array_equal(passes.tuned(name), own)


@pytest.mark.parametrize("level", [("llama", "Q8_0")], indirect=True)
def test_steps_that_are_too_large_for_a_level_become_shorter(level):
    passes, file = level
    names = _disturbed(passes, file)
    looks = []
    found = tune(
        passes, dict.fromkeys(names, "each"), HELD, TuneSettings(steps=36, rate=0.5, look=4),
        told=lambda what, _: looks.append(float(what.split()[-1])) if "held-out" in what else None,
    )  # fmt: skip
    assert looks[1] > looks[0]  # the first ones led away
    assert found.after.sum() < 0.8 * found.before.sum()


def test_a_fall_must_be_more_than_chance():
    before = np.array([5.0, 6.0, 7.0, 8.0])
    assert helps(before, before - [0.5, 0.4, 0.6, 0.5])
    assert not helps(before, before - [2.0, -1.0, 2.0, -1.0])
    assert not helps(before, before)
    assert not helps(before[:1], before[:1] - 1)


def test_first_steps_are_short_and_steps_along_what_stays_are_whole():
    adam = Adam({"w": np.ones(4, np.float32)}, {"w": "each"}, TuneSettings(steps=100, rate=0.01))
    slope, places = np.array([1, -1, 1e-3, -1e3], np.float32), [np.zeros(4)]
    for _ in range(50):
        adam({"w": slope})
        places.append(adam.moved["w"])
    np.testing.assert_allclose(places[1] - places[0], -0.001 * np.sign(slope), rtol=1e-3)
    np.testing.assert_allclose(places[50] - places[49], -0.01 * np.sign(slope), rtol=0.02)


@pytest.mark.parametrize("level", [("llama", "Q8_0")], indirect=True)
def test_a_level_that_loses_little_is_moved_little(level):
    passes, file = level
    grains, settings = dict.fromkeys(_tunable(passes, file), "each"), TuneSettings(steps=1, rate=0.01)
    lost = passes.lost(HELD)
    share = lost.kl.sum() / lost.tokens.sum() / 0.1
    assert share < 0.5  # or it is no such level
    moved = []

    def told(_, step):
        if step:
            start = {name: passes.tuned.start(name) for name in grains}
            moved.append(max(np.abs(passes.tuned.numbers[name] / own - 1).max() for name, own in start.items()))

    tune(passes, grains, HELD, settings, told=told)
    assert moved == [pytest.approx(0.01 * 0.1 * share, rel=0.02)]


def test_a_longer_text_is_tuned_on_in_more_steps_and_seen_about_once():
    short, long, longest = (TuneSettings.for_windows(count) for count in (20, 240, 100_000))
    assert (short.steps, longest.steps) == (40, 120)
    moving = 240 - len(held_places(["one"] * 240))
    assert 0.9 * moving <= long.steps * long.windows <= moving
    assert len({one.key for one in (short, long, longest)}) == 3


class _Notes:
    """Keeps what was saved last; stops the work after some steps."""

    def __init__(self, stop=None):
        self.kept, self.stop = None, stop

    def load(self):
        return self.kept

    def due(self):
        return True

    def save(self, arrays):
        self.kept = {name: np.array(own) for name, own in arrays.items()}
        if int(arrays["step"]) == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("rate", [0.01, 0.5])  # with the latter steps have become shorter before it is killed
@pytest.mark.parametrize("level", [("llama", "Q8_0")], indirect=True)
def test_a_killed_call_goes_on_and_finds_the_same_numbers(level, rate):
    passes, file = level
    names = _disturbed(passes, file)
    settings = TuneSettings(steps=12, rate=rate, look=4)
    whole = tune(passes, dict.fromkeys(names, "each"), HELD, settings)
    notes = _Notes(stop=7)
    with pytest.raises(KeyboardInterrupt):
        tune(passes, dict.fromkeys(names, "each"), HELD, settings, notes=notes)
    steps = []
    notes.stop = None
    resumed = tune(
        passes, dict.fromkeys(names, "each"), HELD, settings, notes=notes, told=lambda _, step: steps.append(step)
    )
    assert steps == [7, 8, 9, 10, 11, 12]
    assert resumed.best == whole.best
    for name in names:
        np.testing.assert_array_equal(resumed.numbers[name], whole.numbers[name])
