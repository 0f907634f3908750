"""Checkpoint levels of tiny models of every family: names, folding, propagation, resumption, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import tiny_models
from bitladder.describe.windows import Window
from bitladder.errors import BadInput, BadWeights, OutputError, UsageError
from bitladder.files.gguf import GgufFile
from bitladder.levels import parse_level
from bitladder.levels.methods import Feedback
from bitladder.plan.cost import level_size
from bitladder.walk.checkpoint_walk import Settings
from bitladder.walk.driver import Stream
from reference.slow_checkpoint import read_folder
from tiny_checkpoints import cost_of_eight_bits, decoded, difference, loaded, run, tiny, windows_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", sorted(tiny_models.CASES))
def test_every_family_keeps_its_predictions_at_eight_bits(name, tmp_path):
    """Error feedback loses less than independent errors of the same grid would. Smoothing moves weights before they are
    rounded once, so it loses about as much: half as much again is three times what draws of such errors differ by."""
    model, checkpoint, gguf = tiny(name, tmp_path)
    allowed = {"GPTQ-8bit-row": 1.0, "INT8-W8A8-smooth": 1.5}
    run(gguf, list(allowed), tmp_path / "out", checkpoint)
    rounding = cost_of_eight_bits(model)
    assert 0 < rounding < 0.02
    for level, share in allowed.items():
        folder = tmp_path / "out" / f"tiny-{level}"
        found = loaded(folder, decoded(folder, level), tmp_path / "plain" / level)
        assert difference(model, found) < share * rounding, level


def test_an_independent_reader_and_error_feedback(tmp_path):
    """Four bits: the slow reader's weights, in transformers, stay closer than plainly rounded ones."""
    model, checkpoint, gguf = tiny("llama", tmp_path)
    levels = ["GPTQ-4bit-g32", "AWQ-4bit-g32", "GPTQ-4bit-g32-ct", "INT8-W8A16"]
    reports = run(gguf, levels, tmp_path / "out", checkpoint)
    apart = {}
    for level, report in zip(levels, reports, strict=True):
        folder = tmp_path / "out" / f"tiny-{level}"
        apart[level] = difference(model, loaded(folder, read_folder(folder), tmp_path / "plain" / level))
        assert report.path == str(folder)
        assert len(report.linears) == 3 * 7
        assert all(0 <= loss.loss < 0.05 for loss in report.linears)
        assert (folder / "tokenizer.json").read_text() == "{}"
        with GgufFile.open(gguf) as source, safe_open(folder / "model.safetensors", "np") as file:
            arrays = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - safetensors has no iterator
            # this source has 32 bits, so what stays as it was has them too
            written = sum(2 * one.size if one.dtype.kind == "f" else one.nbytes for one in arrays)
            assert level_size(source.model, parse_level(level)).tensor_bytes == written
    config = json.loads((tmp_path / "out/tiny-GPTQ-4bit-g32/quantize_config.json").read_text())
    assert config["bits"] == 4
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                grouped = module.weight.reshape(len(module.weight), -1, 32)
                scale = grouped.abs().amax(-1, keepdim=True) / 7.5
                module.weight.copy_(((grouped / scale).round().clamp(-8, 7) * scale).reshape(module.weight.shape))
    plain = difference(tiny_models.make(tiny_models.CASES["llama"]), model)
    assert apart["GPTQ-4bit-g32"] == pytest.approx(apart["GPTQ-4bit-g32-ct"], rel=0.05)
    assert apart["GPTQ-4bit-g32"] < 0.8 * plain
    assert apart["AWQ-4bit-g32"] < plain
    assert apart["INT8-W8A16"] < 0.02 * plain


@pytest.mark.parametrize("levels", [["GPTQ-4bit-g32", "AWQ-4bit-g32", "INT8-W8A8"]])
def test_a_killed_run_goes_on_and_writes_the_same_bytes(levels, tmp_path, monkeypatch):
    _, checkpoint, gguf = tiny("qwen2", tmp_path)
    run(gguf, levels, tmp_path / "whole", checkpoint)
    monkeypatch.setattr("bitladder.walk.keep.SECONDS_BETWEEN", 0.0)
    original = Stream.through
    done = []

    def until_killed(self, layer):
        done.append((type(self.members[-1]).__name__, layer))
        if len(done) == 4:  # in the second layer, after one stream and before the other
            raise KeyboardInterrupt
        return original(self, layer)

    monkeypatch.setattr(Stream, "through", until_killed)
    with pytest.raises(KeyboardInterrupt):
        run(gguf, levels, tmp_path / "killed", checkpoint)
    assert not list((tmp_path / "killed").glob("tiny-*"))
    done.clear()
    monkeypatch.setattr(
        Stream, "through", lambda self, n: (done.append((type(self.members[-1]).__name__, n)), original(self, n))[1]
    )
    run(gguf, levels, tmp_path / "killed", checkpoint)
    assert sorted(done) == [("GptqLevel", 1), ("GptqLevel", 2), ("Member", 2)]
    for level in levels:
        files = [folder / f"tiny-{level}" / "model.safetensors" for folder in (tmp_path / "whole", tmp_path / "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert not list((tmp_path / "killed").glob(".*partial"))
    done.clear()
    run(gguf, levels, tmp_path / "killed", checkpoint)
    assert not done


def test_gptq_is_told_how_far_a_level_is_from_the_source(tmp_path, monkeypatch):
    """Of inputs that are not too wide; the first is the source's own."""
    _, checkpoint, gguf = tiny("llama", tmp_path)
    told = []

    def looking(self, gram, **known):
        told.append(known["drift"])
        return original(self, gram, **known)

    original = Feedback.prepare
    monkeypatch.setattr(Feedback, "prepare", looking)
    run(gguf, ["GPTQ-2bit-g32"], tmp_path / "out", checkpoint)
    first, *later = told
    assert not first.any()
    assert later
    assert all(drift.any() for drift in later)
    told.clear()
    monkeypatch.setattr(Feedback, "widest_drift", 0)
    run(gguf, ["GPTQ-3bit-g32"], tmp_path / "out", checkpoint)
    assert told == [None] * (1 + len(later))


def test_a_level_made_with_other_products_is_made_again(tmp_path):
    """GPTQ's bytes depend on whether the processor multiplies in bfloat16; those of INT8 do not."""
    _, checkpoint, gguf = tiny("llama", tmp_path)
    levels = ["GPTQ-4bit-g32", "INT8-W8A16"]
    shards = [tmp_path / f"tiny-{level}" / "model.safetensors" for level in levels]
    run(gguf, levels, tmp_path, checkpoint, settings=Settings(half=False))
    before = [shard.stat().st_mtime_ns for shard in shards]
    run(gguf, levels, tmp_path, checkpoint, settings=Settings(half=True))
    assert [shard.stat().st_mtime_ns != then for shard, then in zip(shards, before, strict=True)] == [True, False]


def test_a_changed_file_is_not_passed_off_as_proved(tmp_path):
    _, checkpoint, gguf = tiny("llama", tmp_path)
    run(gguf, ["GPTQ-4bit-g32"], tmp_path, checkpoint)
    shard = tmp_path / "tiny-GPTQ-4bit-g32" / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 64
    shard.write_bytes(raw)
    with pytest.raises(OutputError, match="does not decode to what was computed"):
        run(gguf, ["GPTQ-4bit-g32"], tmp_path, checkpoint)


def test_foreign_folders_are_left_alone(tmp_path):
    _, checkpoint, gguf = tiny("llama", tmp_path)
    (tmp_path / "tiny-INT8-W8A16").mkdir()
    with pytest.raises(UsageError, match="a folder that Bitladder did not write"):
        run(gguf, ["INT8-W8A16"], tmp_path, checkpoint)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_two_models_of_one_name_are_told_apart(tmp_path):
    _, checkpoint, gguf = tiny("llama", tmp_path)
    (first,) = run(gguf, ["INT8-W8A16"], tmp_path, checkpoint)
    before = (Path(first.path) / "bitladder.json").read_bytes()
    _, second, other = tiny("llama", tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="did not write from the same source"):
        run(other, ["INT8-W8A16"], tmp_path, second)
    assert (Path(first.path) / "bitladder.json").read_bytes() == before


def test_what_is_refused_leaves_nothing_behind(tmp_path):
    _, checkpoint, gguf = tiny("llama", tmp_path)
    with pytest.raises(UsageError, match="do not divide"):
        run(gguf, ["GPTQ-4bit-g128"], tmp_path / "out", checkpoint)
    assert not (tmp_path / "out").exists()


def test_experts_without_tokens_are_named(tmp_path):
    _, checkpoint, gguf = tiny("mixtral", tmp_path)
    windows = [Window("one", np.full(64, 7)) for _ in range(20)]  # the same token over and over: two experts of four
    (report,) = run(gguf, ["GPTQ-4bit-g32"], tmp_path, checkpoint, windows=windows)
    noted = [loss for loss in report.linears if "rounded plainly" in loss.note]
    assert noted
    assert all(".experts." in loss.name and loss.tokens < 64 for loss in noted)
    assert any("done differently" in note for note in report.notes)


def test_refusals_come_before_the_work(tmp_path):
    _, checkpoint, gguf = tiny("llama", tmp_path)
    with pytest.raises(UsageError, match="groups of 64 do not divide"):
        run(gguf, ["GPTQ-4bit-g64"], tmp_path, checkpoint)
    with pytest.raises(BadInput, match="also occurs in the calibration text"):
        run(gguf, ["GPTQ-4bit-g32"], tmp_path, checkpoint, measuring=[Window("x", windows_of(1)[3].tokens[5:50])])
    for windows, says in (
        ([], "0 tokens in 0 windows"),
        ([Window("x", np.array([5]))] * 30, "30 tokens in 30 windows"),
        ([Window("x", np.full(2000, 96))], "holds token 96; the model has 96 tokens"),
    ):
        with pytest.raises(BadInput, match=says):
            run(gguf, ["GPTQ-4bit-g32"], tmp_path, checkpoint, windows=windows)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="has no tokenizer"):
        run(gguf, ["INT8-W8A16"], tmp_path, checkpoint, windows=[])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tiny-")]


def test_activations_that_overflow_name_the_layer(tmp_path):
    case = tiny_models.CASES["llama"]
    model = tiny_models.make(case)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.mul_(1e25)
    checkpoint = tmp_path / "source"
    model.save_pretrained(checkpoint)
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(BadWeights, match=r"mlp.gate_proj in layer 1 are not finite"):
        run(tiny_models.write(case, model, tmp_path / "s.gguf"), ["GPTQ-4bit-g32"], tmp_path, checkpoint)


def test_weights_too_large_for_the_format_are_named(tmp_path):
    case = tiny_models.CASES["llama"]
    model = tiny_models.make(case)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e10)
    checkpoint = tmp_path / "source"
    model.save_pretrained(checkpoint)
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(BadWeights, match=r"layer 1, mlp.up_proj.weight: a scale of .* does not fit float16"):
        run(tiny_models.write(case, model, tmp_path / "s.gguf"), ["GPTQ-4bit-g32"], tmp_path, checkpoint)


def test_states_on_disk_change_nothing(tmp_path):
    _, checkpoint, gguf = tiny("llama", tmp_path)
    run(gguf, ["GPTQ-4bit-g32"], tmp_path / "memory", checkpoint)
    run(gguf, ["GPTQ-4bit-g32"], tmp_path / "disk", checkpoint, settings=Settings(state_bytes=0))
    files = [tmp_path / place / "tiny-GPTQ-4bit-g32" / "model.safetensors" for place in ("memory", "disk")]
    assert files[0].read_bytes() == files[1].read_bytes()
    shutil.rmtree(tmp_path / "disk")
