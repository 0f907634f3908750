"""Scalings of positions that the engine computes otherwise are said beforehand, wherever config.json spells them."""

import json

import pytest
from typer.testing import CliRunner

import tiny_configs
from bitladder.cli.app import app
from bitladder.describe.rope_scaling import rope_warnings

YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_scaling": {**YARN, "truncate": False}}, ["truncate: false"]),
        ({"rope_parameters": {**YARN, "truncate": False}}, ["truncate: false"]),
        ({"text_config": {"rope_scaling": {"type": "yarn", "truncate": False}}}, ["truncate: false"]),
        ({"rope_parameters": {"full_attention": {**YARN, "truncate": False}}}, ["truncate: false"]),
        ({"rope_scaling": {**YARN, "truncate": True}}, []),
        ({"rope_scaling": YARN}, []),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "truncate": False}}, []),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 512}, ["beyond 512 tokens"]),
        (
            {"rope_parameters": {"a": {**YARN, "truncate": False}, "b": {"type": "dynamic"}}},
            ["beyond the length it was trained for", "truncate: false"],
        ),
        ({"rope_scaling": {**YARN, "truncate": "false"}, "text_config": [], "rope_parameters": 3}, []),
    ],
)
def test_what_the_engine_computes_otherwise_is_named(config, words):
    found = rope_warnings(config)
    assert len(found) == len(words)
    assert all(word in warning for word, warning in zip(words, found, strict=True))


def test_plan_says_it(tmp_path):
    folder = tiny_configs.write_config("gpt_oss", tmp_path / "gpt_oss")
    config = json.loads((folder / "config.json").read_text())
    for truncate in (False, True):
        config["rope_parameters"] = {**YARN, "rope_theta": 150000.0, "truncate": truncate}
        (folder / "config.json").write_text(json.dumps(config))
        tiny_weights(folder)
        planned = CliRunner().invoke(app, ["plan", str(folder), "--ctx", "64", "--json"])
        assert planned.exit_code == 0, planned.output
        assert ("truncate: false" in " ".join(json.loads(planned.stdout)["notes"])) is not truncate


def tiny_weights(folder):
    """The headers that its class has, over weights of nothing."""
    if not (folder / "model.safetensors").exists():
        kept = (folder / "config.json").read_text()
        tiny_configs.write_checkpoint("gpt_oss", folder)
        (folder / "config.json").write_text(kept)
