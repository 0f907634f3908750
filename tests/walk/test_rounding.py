"""Activation rounding as llama.cpp's CPU kernels do it."""

import gguf
import numpy as np
import pytest
import torch

import tiny_models
from bitladder.describe.windows import Window
from bitladder.files.gguf import GgufFile
from bitladder.levels.checkpoints.compressed_tensors import int8_tokens
from bitladder.stages.fidelity import Candidate, token_scores
from bitladder.walk.layers import LayeredModel
from bitladder.walk.rounding import round_inputs, rounded_input
from bitladder.walk.weights import FileWeights, MadeWeights, Quantizer
from tiny_models import CASES, N_VOCAB


def values(columns: int = 512) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((6, columns)).astype(np.float32)
    x[2] = 0
    return x


def test_blocks_of_32_equal_those_of_gguf():
    x = values()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    np.testing.assert_array_equal(rounded_input(torch.from_numpy(x), "Q5_0").numpy(), expected)


def test_blocks_of_256_by_their_definition():
    """quantize_row_q8_K, block by block: iscale = -127 / max, q = min(127, nearest(iscale x)), d = 1 /
    iscale."""
    x = values()
    expected = np.zeros_like(x)
    for row, out in zip(x.reshape(-1, 256), expected.reshape(-1, 256), strict=True):
        peak = row[np.abs(row).argmax()]
        if peak:
            iscale = np.float32(-127) / peak
            out[:] = np.minimum(127, np.rint(iscale * row)) * (1 / iscale)
    np.testing.assert_allclose(rounded_input(torch.from_numpy(x), "Q4_K").numpy(), expected, rtol=1e-6)


def test_floats_meet_their_own_type():
    x = torch.from_numpy(values(48))
    assert rounded_input(x, "F32") is x
    np.testing.assert_array_equal(rounded_input(x, "F16").numpy(), x.numpy().astype(np.float16))
    assert 0 < (rounded_input(x, "BF16") - x).abs().max() < 0.02


def test_a_token_of_int8_by_its_definition():
    x = values(48)
    expected = np.zeros_like(x)
    for row, out in zip(x, expected, strict=True):
        scale = np.abs(row).max() / np.float32(127)
        if scale:
            out[:] = np.rint(row / scale) * scale
    found = rounded_input(torch.from_numpy(x).reshape(2, 3, 48), int8_tokens)
    np.testing.assert_array_equal(found.numpy().reshape(x.shape), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2moe", "ernie4_5moe"])
def test_every_linear_layer_rounds_by_its_own_type(name, tmp_path):
    case = CASES[name]
    asked = []
    with GgufFile.open(tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")) as source:
        model = LayeredModel(source.model, FileWeights(source))
        block = model.layer(1, FileWeights(source))
        round_inputs(block, model.kind(1), 1, lambda tensor: asked.append(tensor) or "F16")
    hooked = {path for path, module in block.named_modules() if module._forward_pre_hooks}
    linear = {path for path, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    assert hooked == linear | ({"mlp.experts"} if "moe" in name else set())
    assert "blk.1.attn_q.weight" in asked


def test_rounding_happens_where_it_is_asked_for_and_not_at_f32(tmp_path):
    case = CASES["llama"]
    path = tiny_models.write(case, tiny_models.make(case), tmp_path / "tiny.gguf")
    windows = [Window("a", np.random.default_rng(1).integers(0, N_VOCAB, 64))]
    with GgufFile.open(path) as source:
        q8_0 = {info.name: "Q8_0" for info in source.model.tensors if len(info.shape) > 1}
        exact, rounded = (
            token_scores(
                source,
                [Candidate("Q8_0", MadeWeights(Quantizer(FileWeights(source)), q8_0))],
                windows,
                engine_rounding=rounding,
            )
            for rounding in (False, True)
        )
    np.testing.assert_array_equal(exact[0].nll, rounded[0].nll)
    assert 0 < np.abs(exact[1].nll - rounded[1].nll).max() < 1
