"""NVFP4, MXFP4 and MXFP8 folders: bytes, arrays as the formats' own definitions read them, global scales of fused
matrices, configuration, inputs at run time, refusals."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from bitladder.errors import BadFile, UsageError
from bitladder.files.checkpoint_check import CheckpointReader, format_of_folder
from bitladder.files.gguf import GgufFile
from bitladder.kernels import minifloat_scales
from bitladder.levels import CheckpointLevel, parse_level
from bitladder.levels.checkpoints import recognised
from bitladder.levels.methods import ROUNDING, Prepared
from bitladder.plan.cost import level_size
from bitladder.stages.inspect import inspect_folder
from bitladder.walk.checkpoint_weights import CheckpointWeights
from bitladder.walk.weights import FileWeights
from tiny_checkpoints import decoded, difference, loaded, run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = ["NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16"]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny model in bfloat16, its source and all levels."""
    folder = tmp_path_factory.mktemp("floats")
    model, checkpoint, _ = tiny("llama", folder)
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    gguf = tiny_models.write(tiny_models.CASES["llama"], model.float(), folder / "source.gguf")
    run(gguf, LEVELS, folder / "out", checkpoint)
    return model, gguf, folder / "out"


def read_as_defined(tensors: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """A matrix by what the specifications say, from a layer's tensors."""
    scale = tensors[f"{prefix}.weight_scale"]
    if f"{prefix}.weight_packed" in tensors:
        packed = tensors[f"{prefix}.weight_packed"]
        values = E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()]
    else:
        values = tensors[f"{prefix}.weight"].float()
    if scale.dtype == torch.uint8:
        held = torch.pow(2.0, scale.float() - 127)
    else:
        assert scale.dtype == torch.float8_e4m3fn
        held = scale.float() / tensors[f"{prefix}.weight_global_scale"]
    return values * held.repeat_interleave(values.shape[1] // held.shape[1], 1)


@pytest.mark.parametrize("level", LEVELS)
def test_arrays_are_what_the_definitions_say(level, written, tmp_path):
    model, gguf, out = written
    folder = out / f"tiny-{level}"
    tensors, mine = load_file(folder / "model.safetensors"), decoded(folder, level)
    prefixes = sorted({name.rpartition(".")[0] for name in tensors if name.endswith("weight_scale")})
    assert len(prefixes) == 7 * model.config.num_hidden_layers
    for prefix in prefixes:
        np.testing.assert_array_equal(read_as_defined(tensors, prefix).numpy(), mine[f"{prefix}.weight"])
        assert (f"{prefix}.input_global_scale" in tensors) == (level == "NVFP4")
    lost = difference(model, loaded(folder, mine, tmp_path / "plain"))
    assert lost < (0.2 if "FP8" in level else 0.9)  # random weights feel each bit
    with GgufFile.open(gguf) as source:
        size = level_size(source.model, parse_level(level))
    assert size.tensor_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    found = inspect_folder(folder)
    assert found.truthful, found.faults
    assert found.linears == len(prefixes)


def test_matrices_that_engines_fuse_share_their_global_scales(written):
    for level in ("NVFP4", "NVFP4A16"):
        tensors = load_file(written[2] / f"tiny-{level}" / "model.safetensors")
        for layer in range(3):
            for owner, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
                for suffix in ("weight_global_scale", "input_global_scale")[: 2 if level == "NVFP4" else 1]:
                    found = {float(tensors[f"model.layers.{layer}.{owner}.{name}.{suffix}"]) for name in names}
                    assert len(found) == 1, (level, layer, owner, suffix)
        apart = {float(value) for name, value in tensors.items() if name.endswith("weight_global_scale")}
        assert len(apart) > 6  # those of other inputs have their own


def test_shared_scales_never_cost_more_than_the_plain_one():
    """The plain one is the first tried: the largest weight has the largest scale."""
    rng = np.random.default_rng(0)
    form = parse_level("NVFP4A16").format
    for seed in range(4):
        matrices = [np.random.default_rng(seed + n).standard_t(3, (24, 64)).astype(np.float32) * 3**n for n in range(3)]
        importance = rng.uniform(0.1, 5, 64).astype(np.float32)
        bound = form.joined(matrices, importance, 12.5)
        plain = float(np.float32(2688) / max(np.abs(one).max() for one in matrices))
        assert bound.input_divisor == pytest.approx(2688 / 12.5)
        theirs = sum(minifloat_scales.two_levels(m, 16, importance, plain, around=(0,))[1] for m in matrices)
        mine = 0.0
        for one in matrices:
            found = bound.search(one, importance)
            assert found.divisor == bound.divisor
            mine += float((np.square(found.decode(found.grid().nearest(one)) - one) * importance).sum())
        assert mine < 0.95 * theirs
    assert form.joined([np.zeros((4, 16), np.float32)], None, None).divisor == 1


@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16"])
def test_feedback_loses_less_than_nearest_codes(name):
    """On the same scales' search, by the error of the outputs."""
    rng = np.random.default_rng(3)
    mixing = rng.standard_normal((64, 64)).astype(np.float32)
    inputs = rng.standard_normal((4000, 64)).astype(np.float32) @ mixing
    gram = inputs.T @ inputs
    weights = rng.standard_t(4, (48, 64)).astype(np.float32)
    level = parse_level(name)
    fed = level.method.apply(level.format, level.method.prepare(gram), weights)
    plain = ROUNDING.apply(level.format, Prepared(gram), weights)
    assert fed.loss < 0.8 * plain.loss


@pytest.mark.parametrize("level", LEVELS)
def test_configuration_is_recognised_and_no_other_is(level, written):
    folder = written[2] / f"tiny-{level}"
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert format_of_folder(folder) == parse_level(level).format
    group = found["config_groups"]["group_0"]
    assert (group["input_activations"] is None) == level.endswith("A16")
    assert group["weights"]["scale_dtype"] == ("torch.float8_e4m3fn" if level.startswith("NV") else "torch.uint8")
    for key, other in (("num_bits", 6), ("group_size", 64), ("strategy", "channel"), ("type", "int")):
        changed = json.loads(json.dumps(found))
        changed["config_groups"]["group_0"]["weights"][key] = other
        assert recognised(changed) is None, key


def nearest(x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    return steps[(x[..., None] - steps).abs().argmin(-1)]


def test_inputs_are_rounded_as_engines_do(written):
    """By the definitions, written out; what lies between two steps may fall to either."""
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    x[2, :32] = 0
    _, gguf, out = written
    with GgufFile.open(gguf) as source:
        for level in LEVELS:
            form = parse_level(level).format
            weights = CheckpointWeights(FileWeights(source), out / f"tiny-{level}", form)
            rounds = weights.qtype("blk.1.attn_k.weight")
            assert weights.qtype("token_embd.weight") == "F32"
            if level.endswith("A16"):
                assert rounds == "F32"
                continue
            size = form.group_size
            groups = x.reshape(-1, size)
            peak = groups.abs().amax(1, keepdim=True)
            if level == "NVFP4":
                tensors = load_file(out / f"tiny-{level}" / "model.safetensors")
                divisor = tensors["model.layers.1.self_attn.k_proj.input_global_scale"]
                scale = (peak / 6 * divisor).clamp(max=448).to(torch.float8_e4m3fn).float() / divisor
            else:
                power = torch.floor(torch.log2(peak))
                power = power + (peak >= 1.75 * 2**power) - (2 if form.bits == 4 else 8)
                scale = torch.where(peak > 0, 2**power, 0)
            safe = torch.where(scale > 0, scale, 1)
            if level == "MXFP8":
                expected = (groups / safe).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
            else:
                expected = nearest(groups / safe, E2M1.unique()) * scale
            assert torch.equal(rounds(x), expected.reshape(x.shape)), level


@pytest.mark.parametrize("level", ["NVFP4", "NVFP4A16", "MXFP4", "MXFP8"])
def test_rows_that_groups_do_not_divide_are_refused_and_what_fits_is_named(level, tmp_path):
    case = tiny_models.CASES["llama"]
    source = tiny_models.write(case, tiny_models.make(case, intermediate_size=72), tmp_path / "odd.gguf")
    with (
        GgufFile.open(source) as file,
        pytest.raises(UsageError, match=r"rows of 72(.|\n)*FP8-DYNAMIC or W4A16-channel"),
    ):
        level_size(file.model, parse_level(level))


HOSTILE = {
    "no global scale": lambda t: t.pop("weight_global_scale"),
    "two global scales": lambda t: t.update(weight_global_scale=np.ones(2, np.float32)),
    "zero": lambda t: t.update(weight_global_scale=np.zeros(1, np.float32)),
    "not a number": lambda t: t.update(weight_global_scale=np.full(1, np.nan, np.float32)),
    "scales of others": lambda t: t.update(weight_scale=t["weight_scale"][:, :-1]),
    "a vector": lambda t: t.update(weight_packed=t["weight_packed"][0]),
    "floats": lambda t: t.update(weight_packed=t["weight_packed"].astype(np.float32)),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_arrays_that_contradict_one_another_are_refused(damage):
    form = parse_level("NVFP4").format
    weights = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    found = form.search(weights, None)
    arrays = form.encode(found.grid().nearest(weights), found)
    assert np.isfinite(form.decode(arrays)).all()
    HOSTILE[damage](arrays)
    with pytest.raises((ValueError, KeyError)):
        form.decode(arrays)


def test_an_input_scale_that_is_no_number_is_refused_where_it_is_read(written, tmp_path):
    from safetensors.torch import save_file

    folder = written[2] / "tiny-NVFP4"
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.input_global_scale"].fill_(float("inf"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader = CheckpointReader(tmp_path, parse_level("NVFP4").format)
    with pytest.raises(BadFile, match="input_global_scale"):
        reader.input_rounding("model.layers.1.self_attn.k_proj")


@pytest.mark.parametrize(("level", "family"), [("NVFP4", "qwen3moe"), ("MXFP4", "mixtral")])
def test_experts(level, family, tmp_path):
    """Every expert's gate and up share a global scale; the folder holds what was made."""
    _, checkpoint, gguf = tiny(family, tmp_path)
    run(gguf, [level], tmp_path / "out", checkpoint)
    folder = tmp_path / "out" / f"tiny-{level}"
    assert inspect_folder(folder).truthful
    tensors = load_file(folder / "model.safetensors")
    if level == "NVFP4":
        for expert in range(4):
            stem = f"model.layers.1.mlp.experts.{expert}"
            for suffix in ("weight_global_scale", "input_global_scale"):
                assert tensors[f"{stem}.gate_proj.{suffix}"] == tensors[f"{stem}.up_proj.{suffix}"]


def test_levels_are_compared_by_what_is_stored_not_by_what_was_bound():
    form = parse_level("NVFP4").format
    assert form.joined([np.ones((2, 16), np.float32)], None, 3.0) == form
    assert CheckpointLevel("NVFP4", form, parse_level("NVFP4").method) == parse_level("NVFP4")
