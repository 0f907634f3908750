"""What transformers loads of compressed-tensors folders; runs where compressed-tensors is installed, it is not needed
otherwise (pip install compressed-tensors).
"""

from pathlib import Path

import pytest
import torch

import tiny_models
from bitladder.files.checkpoint_check import CheckpointReader, format_of_folder
from bitladder.files.gguf import GgufFile
from bitladder.levels import parse_level
from bitladder.levels.checkpoints.mixed import FLOAT
from bitladder.records.recipe import Recipe
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.stages.schemes import SchemeStorage
from tiny_checkpoints import decoded, difference, loaded, run, tiny, windows_of

pytest.importorskip("compressed_tensors")

LEVELS = [
    "INT8-W8A8",
    "INT8-W8A8-smooth",
    "INT8-W8A16",
    "W2A16-g32",
    "W3A16-g32",
    "W4A16-g32",
    "W5A16-channel",
    "W6A16-g32",
    "W7A16-channel",
    "W8A16-g32",
    "GPTQ-4bit-g32-ct",
    "AWQ-4bit-g32-ct",
]


@pytest.mark.filterwarnings("ignore")  # of the other package, and of transformers about what it was told
@pytest.mark.parametrize("dequantize", [True, False])
def test_the_weights_are_those_that_were_decoded(dequantize: bool, tmp_path: Path):
    """Left compressed, W8A8 rounds its inputs too; the others predict alike to the last digits either way."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model, checkpoint, gguf = tiny("llama", tmp_path)
    levels = LEVELS if dequantize else LEVELS[:-1]  # the format's notes say why
    run(gguf, levels, tmp_path / "out", checkpoint)
    for level in levels:
        folder = tmp_path / "out" / f"tiny-{level}"
        expected = loaded(folder, decoded(folder, level), tmp_path / "plain" / level)
        config = CompressedTensorsConfig(dequantize=dequantize)
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()
        activations = "W8A8" in level and not dequantize
        assert difference(expected, found) < (2e-2 if activations else 1e-9), level
        assert difference(model, found) < (0.03 if "INT8" in level else 2.0 if "W2" in level else 0.9), level


FLOATS = ["FP8-DYNAMIC", "FP8-BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16"]
WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A tiny model and all levels of small floats."""
    folder = tmp_path_factory.mktemp("floats")
    model, checkpoint, gguf = tiny("llama", folder, **WIDE)
    run(gguf, FLOATS, folder / "out", checkpoint)
    return model, folder / "out"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", FLOATS)
def test_small_floats_are_those_that_were_decoded(level: str, floats):
    """Every weight as its own reader decodes it, up to bfloat16, in which that computes some of them."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    _, out = floats
    folder = out / f"tiny-{level}"
    config = CompressedTensorsConfig(dequantize=True)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    linears = {name: value for name, value in decoded(folder, level).items() if "_proj" in name}
    assert len(linears) == 21
    for name, expected in linears.items():
        own = found.get_parameter(name).detach()
        torch.testing.assert_close(own.float(), torch.from_numpy(expected), rtol=2**-7, atol=1e-7, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", FLOATS)
def test_small_floats_multiply_as_the_walk_has_them(level: str, floats):
    """Left compressed, a layer rounds its inputs as the walk rounds them, by what the folder holds; up to bfloat16, in
    which that computes. The whole model is no test: random weights make any rounding large."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    _, out = floats
    folder = out / f"tiny-{level}"
    config = CompressedTensorsConfig(dequantize=False)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config).eval()
    with torch.no_grad():
        found(torch.zeros(1, 4, dtype=torch.long))  # layers are unpacked when the model first runs
    reader = CheckpointReader(folder, parse_level(level).format)
    for name in ("model.layers.1.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        weights = torch.from_numpy(reader.weights(f"{name}.weight"))
        x = torch.randn(1, 40, weights.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.no_grad():
            own = found.get_submodule(name)(x).float()
        rounds = reader.input_rounding(name)
        expected = (x.float() if rounds is None else rounds(x.float())) @ weights.T
        apart = (own - expected).square().sum() / expected.square().sum()
        assert apart < 1e-3, (name, apart)  # without rounding at run time 4 bits would be 1e-2 apart


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [0, 7])
def test_a_mix_of_schemes_is_read_module_by_module(first: int, tmp_path: Path):
    """Every scheme that recipes choose from, side by side in one folder, whatever comes next to what."""
    from compressed_tensors.compressors import decompress_module
    from transformers import AutoModelForCausalLM

    sizes = {"intermediate_size": 128}
    model, checkpoint, _ = tiny("llama", tmp_path, **sizes)
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    gguf = tiny_models.write(tiny_models.CASES["llama"], model.float(), tmp_path / "source.gguf")
    with GgufFile.open(gguf) as source:
        storage = SchemeStorage(source, checkpoint=checkpoint)
        infos, qtypes = {tensor.name: tensor for tensor in source.model.tensors}, {}
        for at, names in enumerate(storage.linears.groups):
            offered = (*storage.choices.of(infos[names[0]]), FLOAT)
            qtypes |= dict.fromkeys(names, offered[(first + at) % len(offered)])
        level = storage.level(Recipe("", "llama", qtypes, 0, 4.6, None), 4.6)
        job = Calibration(source, [level], Reading(windows_of(1)), out_dir=tmp_path, name="tiny", checkpoint=checkpoint)
        job.run()
    folder = tmp_path / f"tiny-{level.name}"
    reader = CheckpointReader(folder, format_of_folder(folder))
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    schemes = set()
    for name in reader.linears():
        module = found.get_submodule(name)
        decompress_module(module)
        expected = torch.from_numpy(reader.weights(f"{name}.weight"))
        torch.testing.assert_close(module.weight.float(), expected, rtol=2**-7, atol=1e-7, msg=name)
        schemes.add(reader.format_of(name).scheme)
    assert len(schemes) > 8
    stays = [name for name, own in qtypes.items() if own == FLOAT]
    assert len(reader.linears()) == 21 - len(stays)
