"""W2A16 to W8A16: names of the field's schemes, bytes, codes as a stream of bits, configuration, refusals."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from bitladder.errors import UnknownLevel, UsageError
from bitladder.files.checkpoint_check import format_of_folder
from bitladder.files.gguf import GgufFile
from bitladder.kernels import groups
from bitladder.levels import WHOLE_ROW, parse_level
from bitladder.levels.methods import GPTQ
from bitladder.plan.cost import level_size
from reference.plain_rounding import round_to_nearest
from tiny_checkpoints import decoded, difference, loaded, run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = ["W2A16-g32", "W3A16-g32", "W4A16-g32", "W5A16-channel", "W6A16-g32", "W7A16-g32", "W8A16-channel"]


@pytest.mark.parametrize(
    ("name", "printed", "bits", "group"),
    [
        ("W4A16", "W4A16-g128", 4, 128),
        ("w3a16-G64", "W3A16-g64", 3, 64),
        ("W8A16-Channel", "W8A16-channel", 8, WHOLE_ROW),
        ("w7a16-g32", "W7A16-g32", 7, 32),
    ],
)
def test_names(name, printed, bits, group):
    level = parse_level(name)
    assert (level.name, level.format.bits, level.format.group_size, level.method) == (printed, bits, group, GPTQ)
    assert parse_level(printed) == level


@pytest.mark.parametrize("name", ["W1A16", "W9A16-g64", "W4A16-g48", "W4A16-row", "W4A16-g64-asym", "W4A8-g64"])
def test_other_names_are_refused(name):
    with pytest.raises(UnknownLevel):
        parse_level(name)


def test_folders_hold_streams_of_bits(tmp_path):
    """By a reader of single bits, which shares nothing with the writer; losses fall as bits grow."""
    model, checkpoint, _ = tiny("llama", tmp_path)
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    gguf = tiny_models.write(tiny_models.CASES["llama"], model.float(), tmp_path / "source.gguf")
    run(gguf, LEVELS, tmp_path / "out", checkpoint)
    lost = {}
    for level in LEVELS:
        folder, form = tmp_path / "out" / f"tiny-{level}", parse_level(level).format
        tensors, mine = load_file(folder / "model.safetensors"), decoded(folder, level)
        name = "model.layers.1.mlp.down_proj"
        packed, scales = tensors[f"{name}.weight_packed"].numpy(), tensors[f"{name}.weight_scale"].float().numpy()
        outputs, inputs = tensors[f"{name}.weight_shape"].tolist()
        stream = np.unpackbits(packed.view(np.uint8).reshape(outputs, -1), axis=1, bitorder="little")
        bits = stream[:, : inputs * form.bits].reshape(outputs, inputs, form.bits)
        codes = (bits * 2 ** np.arange(form.bits)).sum(axis=2) - 2 ** (form.bits - 1)
        wide = scales.repeat(inputs // scales.shape[1], axis=1)
        np.testing.assert_array_equal((codes * wide).astype(np.float32), mine[f"{name}.weight"])
        with GgufFile.open(gguf) as source:
            planned = level_size(source.model, parse_level(level)).tensor_bytes
        assert planned == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        found = json.loads((folder / "config.json").read_text())["quantization_config"]
        weights = found["config_groups"]["group_0"]["weights"]
        assert (weights["num_bits"], weights["strategy"]) == (form.bits, "group" if form.group_size else "channel")
        assert format_of_folder(folder) == form
        lost[form.bits] = difference(model, loaded(folder, mine, tmp_path / "plain" / level))
    assert lost[3] < lost[2]
    assert lost[6] < lost[4] < lost[3]
    assert lost[8] < 0.01


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [32, 0])
def test_searched_scales_cost_no_more_than_plain_ones(bits, size):
    weights = np.random.default_rng(bits).standard_t(4, (70, 192)).astype(np.float32)
    importance = np.random.default_rng(1).uniform(0.01, 10, 192).astype(np.float32)
    form = parse_level(f"W{bits}A16-{f'g{size}' if size else 'channel'}").format
    codes, plain = round_to_nearest(weights, bits, size)
    found = form.search(weights, importance, scale_dtype="bfloat16")
    stored = groups.Affine(groups.store_scale(plain.scales, "bfloat16"), plain.zeros, bits, size, 192)

    def cost(decoded):
        return (np.square(decoded - weights) * importance).sum()

    assert cost(found.decode(found.grid().nearest(weights))) < cost(stored.decode(stored.grid().nearest(weights)))
    assert codes.shape == weights.shape


def test_groups_that_do_not_divide_offer_channels():
    shapes = {"q_proj": (576, 576), "down_proj": (576, 1536)}
    parse_level("W3A16-g64").format.check_shapes("W3A16-g64", shapes)
    with pytest.raises(UsageError, match=r"rows of 576 weights(.|\n)*: g32, g64; channel, a scale for each whole row"):
        parse_level("W3A16").format.check_shapes("W3A16-g128", shapes)
    with pytest.raises(UsageError, match="32 codes of 5 bits"):
        parse_level("W5A16-channel").format.check_shapes("W5A16-channel", {"odd": (64, 48)})
