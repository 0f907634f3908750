"""Checkpoint folders that somebody wrote: their format is recognised, and what they hold is said."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.errors import BadInput, BitladderError
from bitladder.files.checkpoint_folder import checkpoint_sha256
from bitladder.files.gguf import GgufFile
from bitladder.levels.checkpoints import parse_checkpoint, recognised
from bitladder.stages.fidelity import folder_candidate
from bitladder.stages.inspect import inspect_folder
from tiny_checkpoints import run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = (
    "GPTQ-4bit-g64", "GPTQ-2bit-g32-asym", "GPTQ-8bit-row", "GPTQ-4bit-g128-v2", "GPTQ-3bit-row-asym-ct",
    "AWQ-4bit-g32", "AWQ-4bit-g64-sym", "AWQ-4bit-g128-ct", "INT8-W8A8", "INT8-W8A8-smooth", "INT8-W8A16",
)  # fmt: skip


@pytest.mark.parametrize("name", LEVELS)
def test_what_is_written_is_recognised(name):
    form = parse_checkpoint(name).format
    assert recognised(json.loads(json.dumps(form.configuration(ignored=("lm_head",))))) == form


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
PACKED = parse_checkpoint("GPTQ-4bit-g64-ct").format.configuration(ignored=())
INT8 = parse_checkpoint("INT8-W8A8").format.configuration(ignored=())


def other(configuration: dict, **weights: object) -> dict:
    copied = json.loads(json.dumps(configuration))
    copied["config_groups"]["group_0"]["weights"] |= weights
    return copied


@pytest.mark.parametrize(
    "configuration",
    [
        {}, {"quant_method": "fp8"}, {"quant_method": []}, GPTQ | {"bits": 5}, GPTQ | {"bits": True},
        GPTQ | {"bits": "4"}, GPTQ | {"group_size": 0}, GPTQ | {"group_size": 1 << 60}, GPTQ | {"group_size": None},
        GPTQ | {"dynamic": {"layer": {"bits": 8}}}, GPTQ | {"checkpoint_format": "marlin"}, GPTQ | {"sym": "yes"},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
        {"quant_method": "awq", "bits": 8, "group_size": 128}, {"quant_method": "awq", "bits": 4, "group_size": -1},
        PACKED | {"config_groups": None}, PACKED | {"config_groups": {}}, PACKED | {"format": "nvfp4-pack-quantized"},
        PACKED | {"config_groups": PACKED["config_groups"] | {"group_1": {}}}, PACKED | {"config_groups": {"a": 1}},
        other(PACKED, type="float"), other(PACKED, num_bits=4.0), other(PACKED, strategy="tensor"),
        other(PACKED, actorder="group"), other(PACKED, group_size=-5), other(INT8, strategy="tensor"),
        other(INT8, num_bits=4), other(INT8, symmetric=False),
    ],
)  # fmt: skip
def test_what_is_not_read_exactly_is_not_recognised(configuration):
    assert recognised(configuration) is None


def test_groups_in_the_order_of_activations_are_read():
    form = parse_checkpoint("GPTQ-4bit-g32").format
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((32, 64)).astype(np.float32)
    parameters = form.search(weights, None)
    codes = rng.integers(0, 16, weights.shape).astype(np.uint8)
    arrays = form.encode(codes, parameters)
    plain = form.decode(arrays)
    order = rng.permutation(64)
    arrays["g_idx"] = arrays["g_idx"][order]
    moved = form.decode(arrays)
    scales = np.asarray(arrays["scales"], np.float32).T
    expected = (codes.astype(np.float32) - 8) * scales[:, arrays["g_idx"]]
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
    assert not np.array_equal(moved, plain)
    for wrong in (arrays["g_idx"] + 9, arrays["g_idx"] - 9, arrays["g_idx"][:-1]):
        with pytest.raises(ValueError, match="groups"):
            form.decode(arrays | {"g_idx": wrong})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny model's GGUF and some of its levels."""
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITLADDER_CACHE", str(home / "cache"))
        _, checkpoint, gguf = tiny("llama", home)
        run(gguf, ["INT8-W8A8", "INT8-W8A16"], home, checkpoint)
    return home


def test_inspect_says_what_a_folder_holds(made):
    seen = inspect_folder(made / "tiny-INT8-W8A8")
    assert (seen.format, seen.bits, seen.group_size, seen.symmetric) == ("int-quantized", 8, -1, True)
    assert seen.truthful
    assert seen.faults == ()
    assert seen.linears == len(
        [name for name in load_file(made / "tiny-INT8-W8A8/model.safetensors") if "_scale" in name]
    )
    assert 0 < seen.quantized_share < 1
    assert any("embed_tokens" in name for name in seen.stays_float)
    done = CliRunner().invoke(app, ["inspect", str(made / "tiny-INT8-W8A16")])
    assert done.exit_code == 0, done.output
    assert "pack-quantized: 8 bits, whole rows, symmetric" in done.output
    record = json.loads(CliRunner().invoke(app, ["inspect", str(made / "tiny-INT8-W8A16"), "--json"]).stdout)
    assert record["bits"] == 8


def changed(folder: Path, out: Path, change) -> Path:
    """A copy whose tensors were changed."""
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


def drop(suffix: str):
    def change(tensors):
        del tensors[next(name for name in sorted(tensors) if name.endswith(suffix))]

    return change


def cut(suffix: str):
    def change(tensors):
        name = next(name for name in sorted(tensors) if name.endswith(suffix))
        tensors[name] = tensors[name][:-1].copy()

    return change


def spoil(tensors):
    name = next(name for name in sorted(tensors) if name.endswith("weight_scale"))
    tensors[name] = np.full_like(tensors[name], np.inf)


@pytest.mark.parametrize("change", [drop("weight_scale"), drop("weight_packed"), cut("weight_scale"), spoil])
def test_inspect_sees_where_configuration_and_tensors_disagree(made, tmp_path, change):
    seen = inspect_folder(changed(made / "tiny-INT8-W8A16", tmp_path / "changed", change))
    assert not seen.truthful
    assert seen.verdict == seen.faults[0]


@pytest.mark.parametrize("change", [drop("weight_packed"), cut("weight_scale"), cut("embed_tokens.weight")])
def test_a_changed_folder_is_another(made, tmp_path, change):
    copied = changed(made / "tiny-INT8-W8A16", tmp_path / "changed", change)
    assert checkpoint_sha256(copied) != checkpoint_sha256(made / "tiny-INT8-W8A16")


def test_a_folder_of_another_model_is_refused(made, tmp_path):
    _, _, wider = tiny("llama", tmp_path / "wider", hidden_size=96)
    form = parse_checkpoint("INT8-W8A8").format
    with GgufFile.open(wider) as source:
        weights = folder_candidate(source, made / "tiny-INT8-W8A8", form).weights
        with pytest.raises(BadInput, match="is no checkpoint of"):
            weights("blk.0.attn_q.weight")


@pytest.mark.parametrize("content", [{}, {"quantization_config": {"quant_method": "fp8"}}, {"quantization_config": 3}])
def test_folders_in_other_formats_are_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(BitladderError, match="quantiz"):
        inspect_folder(tmp_path)
