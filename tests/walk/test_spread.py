"""A walk whose units are computed on several devices writes the bytes of one that goes on here."""

import numpy as np
import pytest
import torch

import tiny_checkpoints
import tiny_models
from bitladder.errors import BadWeights
from bitladder.executors.devices import Devices
from bitladder.files.gguf import GgufFile
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.walk import coding, units
from bitladder.walk.inputs import InputWatch
from spread_walks import LEVELS, checkpoints, files_of, fitted, short_shards, squares


@pytest.fixture(autouse=True)
def in_shards(monkeypatch, one_thread):
    short_shards(monkeypatch)


@pytest.fixture
def devices():
    with Devices(["cpu", "cpu", "cpu"]) as three:
        yield three


@pytest.mark.parametrize("name", ["llama", "qwen2moe"])
def test_checkpoint_levels(name, devices, tmp_path):
    _, folder, source = tiny_checkpoints.tiny(name, tmp_path)
    levels = LEVELS if name == "llama" else ["GPTQ-4bit-row"]
    here = checkpoints(source, folder, tmp_path / "here", levels=levels)
    assert checkpoints(source, folder, tmp_path / "there", devices, levels=levels) == here
    assert len(here) == len(levels)


@pytest.mark.parametrize("name", ["llama", "qwen2moe"])
def test_fitted_levels(name, devices, tmp_path):
    _, _, source = tiny_checkpoints.tiny(name, tmp_path)
    assert fitted(source, tmp_path / "there", devices) == fitted(source, tmp_path / "here")


def test_gram_matrices_of_experts_are_held_some_at_a_time(devices, tmp_path, monkeypatch):
    """Wherever they are summed; neither that nor NVFP4's scale of all experts together changes a byte."""
    _, folder, source = tiny_checkpoints.tiny("qwen2moe", tmp_path)
    levels = ["GPTQ-4bit-row", "NVFP4"]

    def written(out, executor=None):
        made = checkpoints(source, folder, tmp_path / out / "levels", executor, levels)
        return {**made, **fitted(source, tmp_path / out / "fitted", executor)}

    together = written("together")
    held: list[int] = []
    gather = InputWatch.__init__

    def counted(self, inputs, wants, *, experts=None, **options):
        gather(self, inputs, wants, experts=experts, **options)
        if wants.gram and inputs[0].kind != "linear":
            held.append(len(experts))

    monkeypatch.setattr(InputWatch, "__init__", counted)
    monkeypatch.setattr(coding, "GROUP_BYTES", 2 * 4 * 64**2)
    assert written("here") == together
    assert max(held) == 2
    held.clear()
    assert written("there", devices) == together
    assert max(held) == 2


@pytest.mark.parametrize("name", ["gemma2", "phi3 longrope, part of a head"])
def test_importance_matrices(name, devices, tmp_path):
    _, _, source = tiny_checkpoints.tiny(name, tmp_path)
    here, there = squares(source), squares(source, devices)
    assert here
    for tensor, values in here.items():
        np.testing.assert_array_equal(there[tensor], values)


def test_of_large_layers_workers_have_what_a_unit_needs(devices, tmp_path, monkeypatch):
    """Parameters come and go; those that were coded come back as they were coded."""
    _, folder, source = tiny_checkpoints.tiny("llama", tmp_path)
    here = checkpoints(source, folder, tmp_path / "here", levels=LEVELS[:1])
    fed = fitted(source, tmp_path / "fed")
    most: list[int] = []
    fill = units._Worker.fill

    def watched(self, unit, *given):
        block = fill(self, unit, *given)
        filled = sum(value.numel() for value in block.parameters() if not value.is_meta)
        most.append(100 * filled // sum(value.numel() for value in block.parameters()))
        return block

    see_kept, seen = units.LayerPass.see_kept, list[str]()

    def without_weights(self, shared, *given):
        assert all(value.is_meta for value in self._block.parameters())
        seen.append(shared.module)
        return see_kept(self, shared, *given)

    monkeypatch.setattr(units.LayerPass, "see_kept", without_weights)
    monkeypatch.setattr(units._Worker, "fill", watched)
    monkeypatch.setattr(units, "KEPT_BYTES", 0)
    assert checkpoints(source, folder, tmp_path / "there", devices, LEVELS[:1]) == here
    assert max(most) < 70
    assert set(seen) == {"self_attn.o_proj", "mlp.down_proj"}
    assert fitted(source, tmp_path / "fed there", devices) == fed


class Listed(Devices):
    """Writes down what it begins."""

    def __init__(self, devices):
        super().__init__(devices)
        self.begun: list[str] = []

    def start(self, task, unit, *held, place=None):
        if isinstance(unit, units.LayerUnit):
            what = "source" if unit.watched is not None else "finish" if unit.shared is None else "gather"
            self.begun.append(f"{what} {unit.layer}")
        elif isinstance(unit, units.CodeUnit):
            self.begun.append(f"{unit.coder.shared.module} {unit.layer}")
        return super().start(task, unit, *held, place=place)


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_sources_next_layer_fills_the_wait_for_the_last_codes(lanes, tmp_path):
    """Where one matrix alone is left and other workers have nothing to do; each unit is done once all the same."""
    model, folder, source = tiny_checkpoints.tiny("llama", tmp_path)
    n_layer = model.config.num_hidden_layers
    with Listed(["cpu"] * lanes) as listed:
        checkpoints(source, folder, tmp_path / "out", listed, LEVELS[:1])
    begun = listed.begun
    shards = begun.count("source 0")
    assert [begun.count(f"source {layer}") for layer in range(n_layer)] == [shards] * n_layer
    for layer in range(n_layer - 1):
        last, finish = begun.index(f"mlp.down_proj {layer}"), begun.index(f"finish {layer}")
        assert begun[last + 1 : finish] == [f"source {layer + 1}"] * (shards if lanes > 1 else 0)


class Blind(Devices):
    """Whose lanes cannot read any file."""

    def lacking(self, paths):
        return f"{paths[0]} on another machine"


@pytest.mark.parametrize("name", ["llama", "phi3 longrope, part of a head"])
def test_weights_travel_where_workers_cannot_read_them(name, tmp_path):
    _, folder, source = tiny_checkpoints.tiny(name, tmp_path)
    said: list[str] = []
    with Blind(["cpu", "cpu"]) as blind:
        there = checkpoints(source, folder, tmp_path / "there", blind, LEVELS[:1], warn=said.append)
    assert there == checkpoints(source, folder, tmp_path / "here", levels=LEVELS[:1])
    [warning] = said
    assert str(source) in warning
    assert "another machine" in warning


def test_what_a_unit_raises_reaches_the_user(devices, tmp_path):
    """In the words that a walk here has for it."""
    model, folder, source = tiny_checkpoints.tiny("llama", tmp_path)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(1e38)
    tiny_models.write(tiny_models.CASES["llama"], model, source)
    for executor in (None, devices):
        with pytest.raises(BadWeights, match="in layer 1 are not finite"):
            checkpoints(source, folder, tmp_path / "out", executor, LEVELS[:1])


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("begun_here", [True, False])
def test_a_killed_walk_goes_on_elsewhere(begun_here, devices, tmp_path, monkeypatch):
    """The states that were kept are the same, wherever they were computed."""
    monkeypatch.setattr("bitladder.walk.keep.SECONDS_BETWEEN", 0.0)
    _, folder, source = tiny_checkpoints.tiny("llama", tmp_path)
    first, second = (None, devices) if begun_here else (devices, None)
    begun: list[int] = []

    def until(end: int):
        def progress(what, layer, total):
            begun.append(layer)
            if layer == end:
                raise Killed

        return progress

    def walked(executor, progress):
        with GgufFile.open(source) as file:
            text, wanted = Reading(tiny_checkpoints.windows_of(1)), [parse_checkpoint(LEVELS[0])]
            options = {"out_dir": tmp_path / "out", "name": "tiny", "checkpoint": folder, "executor": executor}
            Calibration(file, wanted, text, **options).run(progress)

    with pytest.raises(Killed):
        walked(first, until(2))
    begun.clear()
    walked(second, until(99))
    assert begun[0] == 2
    assert files_of(tmp_path / "out") == checkpoints(source, folder, tmp_path / "whole", levels=LEVELS[:1])
