"""What transformers loads of compressed-tensors folders; runs where compressed-tensors is installed, it is not needed
otherwise (pip install compressed-tensors).
"""

from pathlib import Path

import pytest
import torch

from tiny_checkpoints import decoded, difference, loaded, run, tiny

pytest.importorskip("compressed_tensors")

LEVELS = ["INT8-W8A8", "INT8-W8A8-smooth", "INT8-W8A16", "GPTQ-4bit-g32-ct", "AWQ-4bit-g32-ct"]


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
        assert difference(model, found) < (0.03 if "INT8" in level else 0.6), level
