"""What transformers loads of compressed-tensors folders; runs where compressed-tensors is installed, it is not needed
otherwise (pip install compressed-tensors).
"""

from pathlib import Path

import pytest
import torch

from bitladder.files.checkpoint_check import CheckpointReader
from bitladder.levels import parse_level
from tiny_checkpoints import decoded, difference, loaded, run, tiny

pytest.importorskip("compressed_tensors")

LEVELS = [
    "INT8-W8A8",
    "INT8-W8A8-smooth",
    "INT8-W8A16",
    "W3A16-g32",
    "W5A16-channel",
    "W6A16-g32",
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
        assert difference(model, found) < (0.03 if "INT8" in level else 0.9), level


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
