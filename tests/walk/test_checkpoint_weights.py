"""A written checkpoint as the walk sees it equals the same in transformers, for families of every transform."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bitladder.files.gguf import GgufFile
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.levels.checkpoints.compressed_tensors import int8_tokens
from bitladder.walk.checkpoint_weights import CheckpointWeights
from bitladder.walk.layers import LayeredModel
from bitladder.walk.weights import FileWeights
from tiny_checkpoints import decoded, loaded, run, tiny, windows_of

pytestmark = pytest.mark.usefixtures("one_thread")


def walked_logits(gguf: Path, folder: Path, level: str, tokens: np.ndarray) -> torch.Tensor:
    with GgufFile.open(gguf) as source:
        weights = CheckpointWeights(FileWeights(source), folder, parse_checkpoint(level).format)
        model = LayeredModel(source.model, weights)
        states = model.embed(tokens, weights)
        for layer in range(model.n_layer):
            states = model.run(model.layer(layer, weights), layer, states)
        with torch.no_grad():
            return model.norm(FileWeights(source))(states) @ torch.from_numpy(weights(model.output)).T


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "mixtral", "qwen2moe", "phi3", "glm4", "ernie4_5moe"])
def test_the_walk_sees_what_transformers_sees(name, tmp_path):
    _, checkpoint, gguf = tiny(name, tmp_path)
    level = "INT8-W8A8-smooth"
    run(gguf, [level], tmp_path, checkpoint)
    folder = tmp_path / f"tiny-{level}"
    tokens = np.stack([window.tokens for window in windows_of(3, count=2)])
    with torch.no_grad():
        expected = loaded(folder, decoded(folder, level), tmp_path / "plain")(torch.from_numpy(tokens)).logits
    torch.testing.assert_close(walked_logits(gguf, folder, level, tokens), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2moe", "ernie4_5moe"])
def test_only_int8_activations_are_rounded_and_only_before_quantized_layers(name, tmp_path):
    _, checkpoint, gguf = tiny(name, tmp_path)
    levels = ["INT8-W8A8", "INT8-W8A16"]
    run(gguf, levels, tmp_path, checkpoint)
    with GgufFile.open(gguf) as source:
        names = [tensor.name for tensor in source.model.tensors if len(tensor.shape) > 1]
        rounded = {
            level: {
                name
                for name in names
                if CheckpointWeights(
                    FileWeights(source), tmp_path / f"tiny-{level}", parse_checkpoint(level).format
                ).qtype(name)
                == int8_tokens
            }
            for level in levels
        }
    assert rounded == {
        "INT8-W8A16": set(),
        "INT8-W8A8": {name for name in names if name.startswith("blk.") and "gate_inp" not in name},
    }
