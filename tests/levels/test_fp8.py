"""FP8 folders: bytes, arrays as torch reads them, configuration, inputs at run time, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny_models
from bitladder.errors import BadWeights, UnknownLevel, UsageError
from bitladder.files.checkpoint_check import format_of_folder
from bitladder.files.gguf import GgufFile
from bitladder.levels import parse_level
from bitladder.levels.checkpoints import recognised
from bitladder.levels.checkpoints.fp8 import fp8_groups
from bitladder.plan.cost import level_size
from bitladder.walk.checkpoint_weights import CheckpointWeights
from bitladder.walk.weights import FileWeights
from tiny_checkpoints import decoded, difference, loaded, run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2, "num_key_value_heads": 1}
LEVELS = ["FP8-DYNAMIC", "FP8-BLOCK"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny model in bfloat16, its source and both levels."""
    folder = tmp_path_factory.mktemp("fp8")
    model, checkpoint, _ = tiny("llama", folder, **WIDE)
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    model.float()
    gguf = tiny_models.write(tiny_models.CASES["llama"], model, folder / "source.gguf")
    run(gguf, LEVELS, folder / "out", checkpoint)
    return model, gguf, folder / "out"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("level", LEVELS)
def test_arrays_are_what_torch_reads(level, written, tmp_path):
    model, gguf, out = written
    folder = out / f"tiny-{level}"
    tensors = tensors_of(folder)
    mine = decoded(folder, level)
    linears = [name.removesuffix("_scale") for name in tensors if name.endswith("weight_scale")]
    assert len(linears) == 7 * model.config.num_hidden_layers
    for name in linears:
        codes, scales = tensors[name], tensors[f"{name}_scale"]
        assert (codes.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.bfloat16)
        outputs, inputs = codes.shape
        wide = scales.float()
        if level == "FP8-BLOCK":
            assert scales.shape == (outputs // 128, inputs // 128)
            wide = wide.repeat_interleave(128, 0).repeat_interleave(128, 1)
        else:
            assert scales.shape == (outputs, 1)
        np.testing.assert_array_equal((codes.float() * wide).numpy(), mine[name])
        # the same values rounded plainly by torch lose no less
        own = model.get_parameter(name).detach()
        plain = own.abs().amax(dim=1, keepdim=True) / 448
        if level == "FP8-DYNAMIC":
            theirs = (own / plain).to(torch.float8_e4m3fn).float() * plain
            lost = (torch.from_numpy(mine[name]) - own).square().sum()
            assert lost < 0.999 * (theirs - own).square().sum()
    assert difference(model, loaded(folder, mine, tmp_path / "plain")) < 0.2  # random weights feel three bits
    with GgufFile.open(gguf) as source:
        size = level_size(source.model, parse_level(level))
    assert size.tensor_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("level", LEVELS)
def test_configuration_is_the_schemes_own_and_is_recognised(level, written):
    folder = written[2] / f"tiny-{level}"
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = found["config_groups"]["group_0"]
    weights, inputs = group["weights"], group["input_activations"]
    assert (found["format"], found["ignore"], weights["type"], inputs["type"]) == (
        "float-quantized", ["lm_head"], "float", "float",
    )  # fmt: skip
    expected = ("block", [128, 128], "group", 128) if level == "FP8-BLOCK" else ("channel", None, "token", None)
    assert (weights["strategy"], weights["block_structure"], inputs["strategy"], inputs["group_size"]) == expected
    assert (weights["dynamic"], inputs["dynamic"]) == (False, True)
    assert format_of_folder(folder) == parse_level(level).format
    for key, other in (("num_bits", 4), ("strategy", "tensor"), ("type", "int"), ("symmetric", False)):
        changed = json.loads(json.dumps(found))
        changed["config_groups"]["group_0"]["weights"][key] = other
        assert recognised(changed) is None, key
    static = json.loads(json.dumps(found))
    static["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    assert recognised(static) is None


def test_inputs_are_rounded_as_engines_do(written):
    x = torch.randn(3, 5, 256) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    x[0, 0] = 0
    for level, size in (("FP8-DYNAMIC", 256), ("FP8-BLOCK", 128)):
        found = parse_level(level).format.rounds_inputs(x)
        for at in np.ndindex(3, 5, 256 // size):
            own = x[at[0], at[1], at[2] * size : (at[2] + 1) * size]
            scale = own.abs().max() / 448
            expected = (own / scale).to(torch.float8_e4m3fn).float() * scale if scale > 0 else own
            assert torch.equal(found[at[0], at[1], at[2] * size : (at[2] + 1) * size], expected)
    _, gguf, out = written
    with GgufFile.open(gguf) as source:
        weights = CheckpointWeights(FileWeights(source), out / "tiny-FP8-DYNAMIC", parse_level("FP8-DYNAMIC").format)
        assert weights.qtype("blk.0.attn_q.weight") is fp8_groups
        assert weights.qtype("token_embd.weight") == "F32"


@pytest.mark.parametrize("name", ["fp8-dynamic", "FP8-Dynamic"])
def test_names(name):
    assert parse_level(name) == parse_level("FP8-DYNAMIC")
    assert parse_level(name).name == "FP8-DYNAMIC"


@pytest.mark.parametrize("name", ["FP8", "FP8-STATIC", "FP8-BLOCK-64"])
def test_other_names_are_refused_with_those_that_are(name):
    with pytest.raises(UnknownLevel, match="FP8-DYNAMIC, FP8-BLOCK"):
        parse_level(name)


@pytest.mark.parametrize(
    "sizes", [{"intermediate_size": 192}, {"num_key_value_heads": 2, "num_attention_heads": 4, "hidden_size": 128}]
)
def test_blocks_that_are_not_whole_are_refused_and_what_fits_is_named(sizes, tmp_path):
    case = tiny_models.CASES["llama"]
    source = tiny_models.write(case, tiny_models.make(case, **(WIDE | sizes)), tmp_path / "odd.gguf")
    with GgufFile.open(source) as file:
        with pytest.raises(UsageError, match=r"blocks of 128 x 128(.|\n)*FP8-DYNAMIC"):
            level_size(file.model, parse_level("FP8-BLOCK"))
        assert level_size(file.model, parse_level("FP8-DYNAMIC")).tensor_bytes > 0


@pytest.mark.parametrize("level", LEVELS)
def test_weights_that_no_scale_reaches_are_refused(level):
    """In float16 a scale ends at 65504; the walk adds layer and matrix to the message."""
    weights = np.full((128, 128), 1.0, np.float32)
    weights[3, 5] = 4e7
    form = parse_level(level).format
    with pytest.raises(ValueError, match=r"a scale of 89285\.7 does not fit float16"):
        form.search(weights, None, scale_dtype="float16")
    found = form.search(weights, None, scale_dtype="bfloat16")
    assert np.isfinite(found.decode(found.grid().nearest(weights))).all()


def test_codes_that_are_no_numbers_are_refused_where_they_are_read(written, tmp_path):
    _, gguf, out = written
    folder = out / "tiny-FP8-DYNAMIC"
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = tensors_of(broken)
    name = "model.layers.1.mlp.up_proj.weight"
    raw = tensors[name].view(torch.uint8)
    raw[2, 3] = 0x7F
    tensors[name] = raw.view(torch.float8_e4m3fn)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with GgufFile.open(gguf) as source, safe_open(broken / "model.safetensors", "pt"):
        weights = CheckpointWeights(FileWeights(source), broken, parse_level("FP8-DYNAMIC").format)
        with pytest.raises(BadWeights, match="NaN or infinity"):
            weights("blk.1.ffn_up.weight")
