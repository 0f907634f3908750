"""Levels written straight from a checkpoint's files: bytes as by a walk, nothing converted, resumed, refused."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny_models
from bitladder.cli.app import app
from bitladder.errors import BadWeights, UsageError
from bitladder.files import convert
from bitladder.files.checkpoint_folder import fingerprint_of
from bitladder.levels import parse_level
from bitladder.stages import straight
from bitladder.stages.job import Build, Work, opened
from bitladder.stages.quantize import build_levels
from tiny_checkpoints import run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2, "num_key_value_heads": 1}
LEVELS = ["FP8-DYNAMIC", "FP8-BLOCK", "MXFP8A16", "INT8-W8A8"]
SHARDS = "60KB"


def source(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **sizes) -> tuple[Path, Path]:
    """A tiny checkpoint in several shards, and its GGUF."""
    model, checkpoint, _ = tiny(name, folder, **sizes)
    for path in checkpoint.glob("*.safetensors"):
        path.unlink()
    model.to(dtype).save_pretrained(checkpoint, max_shard_size=SHARDS)
    assert len(list(checkpoint.glob("*.safetensors"))) > 2
    return checkpoint, tiny_models.write(tiny_models.CASES[name], model.float(), folder / "source.gguf")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def write(checkpoint: Path, levels: list[str], out: Path, threads: int = 1):
    plain = straight.plain_checkpoint(checkpoint, "tiny")
    assert plain is not None
    build, work = Build(out=out), Work(threads=threads)
    return straight.write_straight(plain, "tiny", [parse_level(level) for level in levels], build, work)


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.bfloat16), ("qwen2", torch.float16), ("phi3", torch.bfloat16)]
)
def test_gives_the_bytes_of_a_walk(name, dtype, tmp_path, monkeypatch):
    """A matrix in several pieces, rounded side by side and not done in their order."""
    checkpoint, gguf = source(name, tmp_path, dtype, **WIDE)
    run(gguf, LEVELS, tmp_path / "walked", checkpoint)
    rounded, pieces = straight._Straight._rounded, list[str]()

    def late(self, target, weight, weights):
        pieces.append(weight)
        time.sleep(0.02 * (len(pieces) % 3 == 1))
        return rounded(self, target, weight, weights)

    monkeypatch.setattr(straight._Straight, "_rounded", late)
    monkeypatch.setattr(straight, "_PIECE", 1)
    reports = write(checkpoint, LEVELS, tmp_path / "straight", threads=3)
    assert len(pieces) >= 2 * len(LEVELS) * len(set(pieces))
    for level, report in zip(LEVELS, reports, strict=True):
        walked, folder = tmp_path / "walked" / f"tiny-{level}", Path(report.path)
        expected, found = tensors(walked), tensors(folder)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
            torch.testing.assert_close(found[key].view(torch.uint8), value.view(torch.uint8), rtol=0, atol=0)
        assert json.loads((folder / "config.json").read_text()) == json.loads((walked / "config.json").read_text())
        assert fingerprint_of(folder) == fingerprint_of(walked)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == found.keys()
        assert all(key in load_file(folder / shard) for key, shard in index["weight_map"].items())


def test_a_walk_takes_what_was_written_straight(tmp_path):
    checkpoint, gguf = source("llama", tmp_path)
    (report,) = write(checkpoint, ["FP8-DYNAMIC"], tmp_path / "out")
    before = (Path(report.path) / "bitladder.json").stat().st_mtime_ns
    run(gguf, ["FP8-DYNAMIC"], tmp_path / "out", checkpoint)
    assert (Path(report.path) / "bitladder.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe"])
def test_experts_go_the_long_way(name, tmp_path):
    _, checkpoint, _ = tiny(name, tmp_path)
    assert straight.plain_checkpoint(checkpoint, "tiny") is None


def test_what_transformers_does_not_know_goes_the_long_way(tmp_path):
    checkpoint, _ = source("llama", tmp_path)
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    held = load_file(shard)
    save_file(held | {"vision.patches.weight": torch.ones(4, 4)}, shard, metadata={"format": "pt"})
    (checkpoint / "model.safetensors.index.json").unlink()
    assert straight.plain_checkpoint(checkpoint, "tiny") is None


def test_quantize_converts_nothing(tmp_path, monkeypatch):
    checkpoint, _ = source("llama", tmp_path)

    def converted(*_):
        raise AssertionError

    monkeypatch.setattr(convert, "convert_checkpoint", converted)
    built = build_levels(str(checkpoint), [parse_level("FP8-DYNAMIC")], Build(out=tmp_path / "out"), Work())
    assert Path(built.checkpoints[0].path) == tmp_path / "out" / "source-FP8-DYNAMIC"
    made = (tmp_path / "out" / "source-FP8-DYNAMIC" / "bitladder.json").stat().st_mtime_ns
    build_levels(str(checkpoint), [parse_level("FP8-DYNAMIC")], Build(out=tmp_path / "out"), Work())
    assert (tmp_path / "out" / "source-FP8-DYNAMIC" / "bitladder.json").stat().st_mtime_ns == made
    with pytest.raises(AssertionError):
        build_levels(str(checkpoint), [parse_level("NVFP4A16")], Build(out=tmp_path / "out"), Work())


def test_goes_on_after_a_kill(tmp_path, monkeypatch):
    checkpoint, _ = source("llama", tmp_path)
    write(checkpoint, ["FP8-DYNAMIC"], tmp_path / "whole")
    read = []
    pieces = straight._pieces

    def counted(shard, plain):
        read.append(shard.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return pieces(shard, plain)

    monkeypatch.setattr(straight, "_pieces", counted)
    with pytest.raises(KeyboardInterrupt):
        write(checkpoint, ["FP8-DYNAMIC"], tmp_path / "out")
    assert not (tmp_path / "out" / "tiny-FP8-DYNAMIC").exists()
    write(checkpoint, ["FP8-DYNAMIC"], tmp_path / "out")
    assert read.count(read[0]) == 1
    assert read.count(read[1]) in (1, 2)  # it may have been about to be read back
    assert read.count(read[2]) == 2
    one, other = (tensors(tmp_path / name / "tiny-FP8-DYNAMIC") for name in ("whole", "out"))
    assert all(torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8)) for key in one)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_weight_that_is_no_number_is_named(tmp_path):
    checkpoint, _ = source("llama", tmp_path)
    shard = sorted(checkpoint.glob("*.safetensors"))[-1]
    held = load_file(shard)
    name = next(key for key in held if key.endswith("proj.weight"))
    held[name][3, 5] = np.nan
    save_file(held, shard, metadata={"format": "pt"})
    with pytest.raises(BadWeights, match=name):
        write(checkpoint, ["FP8-DYNAMIC"], tmp_path / "out")
    assert not (tmp_path / "out" / "tiny-FP8-DYNAMIC").exists()


def test_shapes_and_others_folders_are_refused(tmp_path):
    checkpoint, _ = source("llama", tmp_path)
    with pytest.raises(UsageError, match="FP8-BLOCK"):
        write(checkpoint, ["FP8-BLOCK"], tmp_path / "out")
    place = tmp_path / "out" / "tiny-FP8-DYNAMIC"
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("mine")
    with pytest.raises(UsageError):
        write(checkpoint, ["FP8-DYNAMIC"], tmp_path / "out")
    assert (place / "mine.txt").read_text() == "mine"


def test_a_source_that_changes_meanwhile_is_refused_or_noticed(tmp_path, monkeypatch):
    checkpoint, _ = source("llama", tmp_path)
    write(checkpoint, ["FP8-DYNAMIC"], tmp_path / "out")
    first = fingerprint_of(tmp_path / "out" / "tiny-FP8-DYNAMIC")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    with pytest.raises(UsageError):
        write(checkpoint, ["FP8-DYNAMIC"], tmp_path / "out")
    assert fingerprint_of(tmp_path / "out" / "tiny-FP8-DYNAMIC") == first


def test_levels_are_named_after_the_folder_that_was_named(tmp_path, monkeypatch):
    checkpoint, gguf = source("llama", tmp_path)
    monkeypatch.setattr(convert, "convert_checkpoint", lambda *_: gguf.rename(gguf.with_name("first.gguf")))
    with opened(str(checkpoint), Work()) as job:
        assert (job.source.model.name, job.source.model.file_name) == (checkpoint.name, f"{checkpoint.name}.gguf")


def test_bits_say_which_weights_they_count(tmp_path):
    """`inspect` and `plan` count all weights; what a walk reports are those of the layers that it quantized."""
    checkpoint, _ = source("llama", tmp_path)
    done = CliRunner().invoke(app, ["quantize", str(checkpoint), "--to", "FP8-DYNAMIC", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and "8.00 bits per weight of the quantized layers" in done.stderr
