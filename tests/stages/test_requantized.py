"""A source that is quantized already is labelled, once, by every verb that takes one; floats never are."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.describe.quantized import KEY_BEFORE, checkpoint_note, quantized
from bitladder.files.describe_source import describe
from bitladder.files.gguf import GgufFile, read_header
from bitladder.files.sources import _checkpoint_warnings, resolve
from bitladder.stages.inspect import inspect_file
from bitladder.stages.write_levels import quantize_levels
from gguf_bytes import LLAMA_KEYS, string, strings, tiny_weights, write_model

TOKENS = strings("tokenizer.ggml.tokens", [f"token {number}" for number in range(96)])
SAID = "itself quantized"
MEANS = "every loss is relative to this file, not to the original model"
QUICK = ("--imatrix", "none", "--effort", "fast", "--threads", "1")


def bitladder(*arguments: str | Path):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m-F16.gguf", tiny_weights(width=256, hidden=256), keys=[*LLAMA_KEYS, TOKENS])


def made(source: Path, level: str, out: Path) -> Path:
    with GgufFile.open(source) as opened:
        return quantize_levels(opened, [level], out, effort="fast")[0].path


def test_every_verb_says_it_once(tmp_path, floats):
    four = made(floats, "Q4_K_M", tmp_path / "four")
    for verb in (
        ("plan", four, "--ctx", "64"),
        ("quantize", four, "--to", "Q8_0", "--out", tmp_path / "out", *QUICK),
        ("inspect", four),
    ):
        shown, data = bitladder(*verb), bitladder(*verb, "--json")
        assert (shown.exit_code, data.exit_code) == (0, 0), shown.output
        flat = " ".join(shown.output.split())
        assert (flat.count(SAID), flat.count(MEANS)) == (1, 1), flat
        assert "(Q4_K_M, " in flat
        assert data.stdout.count(SAID) == 1
        assert MEANS in data.stdout
        json.loads(data.stdout)


def test_measure_says_it_once(tmp_path, demo_gguf):
    text = tmp_path / "text.txt"
    text.write_text("The lamp stood in the window all winter, and each evening somebody lit it. " * 4)
    result = bitladder("measure", demo_gguf, "--levels", "Q8_0", "--text", text, *QUICK)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.output.split())
    assert (flat.count(SAID), flat.count(MEANS)) == (1, 1), flat
    data = json.loads(bitladder("measure", demo_gguf, "--levels", "Q8_0", "--text", text, *QUICK, "--json").stdout)
    assert len(data["warnings"]) == 1
    assert "Q4_1" in data["warnings"][0]


def test_floats_are_never_labelled(tmp_path, floats):
    for level in ("F16", "BF16", "F32"):
        file = floats if level == "F16" else made(floats, level, tmp_path)
        assert quantized(read_header(file)) is None
        assert not resolve(str(file)).quantized
        for verb in (
            ("plan", file, "--ctx", "64"),
            ("inspect", file),
            ("quantize", file, "--to", "Q8_0", "--out", tmp_path / level),
        ):
            extra = QUICK if verb[0] == "quantize" else ()
            result = bitladder(*verb, *extra)
            assert result.exit_code == 0, result.output
            assert SAID not in result.output
    inspection = inspect_file(floats)
    assert (inspection.quantized, inspection.made_from) == (None, None)


def test_eight_bits_made_of_four_say_so(tmp_path, floats):
    four = made(floats, "Q4_K_M", tmp_path / "four")
    eight = made(four, "Q8_0", tmp_path / "eight")
    six = made(eight, "Q6_K", tmp_path / "six")
    back = made(four, "F16", tmp_path / "back")
    assert read_header(eight).metadata[KEY_BEFORE] == "Q4_K_M"
    assert read_header(six).metadata[KEY_BEFORE] == "Q4_K_M, then Q8_0"
    inspection = inspect_file(eight)
    assert inspection.truthful
    assert inspection.verdict.startswith("It is what it says: Q8_0. It was made from Q4_K_M.")
    assert inspect_file(six).made_from == "Q4_K_M, then Q8_0"
    assert KEY_BEFORE not in read_header(four).metadata
    # floats made of four bits hold no more than four
    found = quantized(read_header(back))
    assert found is not None
    assert "though stored as F16 (it was made from Q4_K_M)" in found.sentence()
    assert resolve(str(back)).quantized
    # and the tensors are those that they were without the note
    with GgufFile.open(four) as source, GgufFile.open(eight) as file:
        info = source.info("blk.0.attn_q.weight")
        assert np.abs(source.read(info.name) - file.read(info.name)).max() < 2e-3


def test_what_a_header_says_is_not_repeated_unseen(tmp_path):
    for value in ("\x1b[31mred", "x" * 1000, "Q8_0\nQ4_0", ""):
        file = write_model(tmp_path / "m.gguf", tiny_weights(), keys=[*LLAMA_KEYS, string(KEY_BEFORE, value)])
        assert quantized(read_header(file)) is None
    four = write_model(tmp_path / "n.gguf", tiny_weights(), keys=[*LLAMA_KEYS, string(KEY_BEFORE, "Q4_0")])
    assert "Q4_0" in describe(str(four)).notes[0]


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ({"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "\x1b[31m"}}, "method not named"),
        ({"quantization_config": "gptq"}, "method not named"),
        ({"quantization_config": [1]}, "method not named"),
        ({}, ""),
        ({"quantization_config": None, "text_config": 3}, ""),
        ({"quantization_config": {}}, ""),
    ],
)
def test_checkpoints(config, word, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    note = checkpoint_note(config)
    assert _checkpoint_warnings(tmp_path) == ((note,) if note else ())
    assert bool(note) == bool(word)
    assert f"({word})" in note or not word
