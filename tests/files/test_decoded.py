"""Checkpoints in quantized formats become GGUF with their scales: what the file holds is what an independent reader
makes of the checkpoint, rounded to the type of its other weights."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_checkpoints
from bitladder.describe.quantized import KEY_BEFORE
from bitladder.errors import BadFile, BadInput
from bitladder.files import convert
from bitladder.files.checkpoint import read_checkpoint
from bitladder.files.decoded import decoded_bytes, decoding_of, write_decoded
from bitladder.files.describe_source import describe
from bitladder.files.gguf import GgufFile, read_header
from bitladder.files.level_files import draft_level
from bitladder.files.sources import resolve
from bitladder.levels import parse_levels
from bitladder.levels.checkpoints.converter_formats import ReadAs
from bitladder.stages.inspect import inspect_file
from bitladder.stages.job import Build, Work
from bitladder.stages.quantize import build_levels
from bitladder.stages.write_levels import quantize_levels
from packed_checkpoints import alternating, awq, fp8, gptq, groups, int8, mlx, mlx_mxfp4, mxfp4, nvfp4, packed, repack
from tiny_checkpoints import write_tokenizer

GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
FORMATS = {
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        lambda _, weights: awq(weights), ReadAs.FLOATS,
    ),
    "autoround": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32},
        lambda _, weights: gptq(weights), ReadAs.FLOATS,
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False},
        lambda _, weights: gptq(weights), ReadAs.IT_IS,
    ),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"},
        lambda _, weights: gptq(weights, 8, version=2), ReadAs.IT_IS,
    ),
    "gptq of three bits": (
        {"quant_method": "gptq", "bits": 3, "group_size": 32, "checkpoint_format": "gptq"},
        lambda _, weights: gptq(weights, 3), ReadAs.FLOATS,
    ),
    "gptq without indices": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        lambda _, weights: gptq(weights, indexed=False), ReadAs.FLOATS,
    ),
    "gptq of several widths": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:.*down.*": {"bits": 8}}},
        alternating(gptq, lambda weights: gptq(weights, 8, 16)), ReadAs.FLOATS,
    ),
    "packed": (groups(GROUP, layout="pack-quantized"), lambda _, weights: packed(weights, 4, 32), ReadAs.IT_IS),
    "packed, zeros": (
        groups({**GROUP, "symmetric": False}, layout="pack-quantized"),
        lambda _, weights: packed(weights, 4, 32, symmetric=False), ReadAs.IT_IS,
    ),
    "packed by channel": (
        groups({"num_bits": 4, "type": "int", "strategy": "channel"}, layout="pack-quantized"),
        lambda _, weights: packed(weights, 4, weights.shape[1]), ReadAs.FLOATS,
    ),
    "packed, three bits": (
        groups({**GROUP, "num_bits": 3}, layout="pack-quantized"), lambda _, weights: packed(weights, 3, 32),
        ReadAs.FLOATS,
    ),
    "several groups": (
        groups(GROUP, FP8, CHANNEL, layout="mixed-precision"),
        alternating(
            lambda weights: packed(weights, 4, 32), int8,
            lambda weights: fp8(weights, (1, weights.shape[1]), "weight_scale"),
        ), ReadAs.FLOATS,
    ),
    "int8": (groups(CHANNEL, layout="int-quantized"), lambda _, weights: int8(weights), ReadAs.IT_IS),
    "fp8 in blocks": (
        {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"},
        lambda _, weights: fp8(weights, (16, 16)), ReadAs.IT_IS,
    ),
    "fp8 in blocks that do not divide": (
        {"quant_method": "fp8", "weight_block_size": [24, 48]}, lambda _, weights: fp8(weights, (24, 48)), ReadAs.IT_IS,
    ),
    "fp8 in other blocks than said": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]}, lambda _, weights: fp8(weights, (16, 16)),
        ReadAs.FLOATS,
    ),
    "fp8 by tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"}, lambda _, weights: fp8(weights, weights.shape),
        ReadAs.IT_IS,
    ),
    "fp8 by row": (
        {"quant_method": "fbgemm_fp8"}, lambda _, weights: fp8(weights, (1, weights.shape[1]), "weight_scale"),
        ReadAs.FLOATS,
    ),
    "fp8 by channel": (
        groups(FP8, layout="float-quantized"),
        lambda _, weights: fp8(weights, (1, weights.shape[1]), "weight_scale"), ReadAs.IT_IS,
    ),
    "fp8 that no configuration speaks of": (
        None, lambda _, weights: fp8(weights, (16, 16), "weight_scale"), ReadAs.FLOATS,
    ),
    "fp8 by ModelOpt": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        lambda _, weights: fp8(weights, weights.shape, "weight_scale"), ReadAs.IT_IS,
    ),
    "nvfp4 by ModelOpt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, lambda _, weights: nvfp4(weights, divided=False),
        ReadAs.IT_IS,
    ),
    "nvfp4": (
        groups({"num_bits": 4, "type": "float"}, layout="nvfp4-pack-quantized"),
        lambda _, weights: nvfp4(weights, divided=True), ReadAs.IT_IS,
    ),
    "mxfp4": (
        groups({"num_bits": 4, "type": "float"}, layout="mxfp4-pack-quantized"), lambda _, weights: mxfp4(weights),
        ReadAs.SOME,
    ),
    "mlx": ({"group_size": 64, "bits": 4}, lambda _, weights: mlx(weights, 4, 64), ReadAs.FLOATS),
    "mlx, layers of several bits": (
        {"group_size": 32, "bits": 4, "mode": "affine", "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 6}},
        alternating(lambda weights: mlx(weights, 3, 32), lambda weights: mlx(weights, 6, 32)), ReadAs.FLOATS,
    ),
    "mlx, a layer of other groups": (
        {"group_size": 32, "bits": 4, "model.layers.0.self_attn.q_proj": {"group_size": 64, "bits": 8}},
        lambda layer, weights: mlx(weights, 8, 64) if "q_proj" in layer else mlx(weights, 4, 32), ReadAs.FLOATS,
    ),
    "mlx, mxfp4": (
        {"group_size": 32, "bits": 4, "mode": "mxfp4"}, lambda _, weights: mlx_mxfp4(weights), ReadAs.FLOATS,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory, demo_gguf):
    import transformers

    folder = tmp_path_factory.mktemp("plain") / "tiny"
    folder.mkdir()
    config = transformers.LlamaConfig(
        vocab_size=write_tokenizer(folder, demo_gguf), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shown(plain, tmp_path_factory):
    """By format: the folder of a checkpoint and the means of its weights. It is converted once, beside the folder."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("shown") / "packed"
            configuration, make, _ = FORMATS[name]
            made[name] = folder, repack(plain, folder, configuration, make)
        return made[name]

    return of


def converted_beside(folder, monkeypatch):
    """By the user's converter: one that is looked for in another cache is fetched anew."""
    monkeypatch.setenv("BITLADDER_CONVERTER", str(convert.find_converter().folder))
    monkeypatch.setenv("BITLADDER_CACHE", str(folder.parent / "cache"))


def rounded(values, dtype=torch.bfloat16):
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(dtype).float().numpy()


@pytest.mark.parametrize("name", FORMATS)
def test_the_twin_in_floats(plain, tmp_path, name):
    configuration, make, expected = FORMATS[name]
    truth = repack(plain, tmp_path / "packed", configuration, make)
    checkpoint = read_checkpoint(tmp_path / "packed")
    decoding = decoding_of(checkpoint)
    assert decoding.by_converter is expected
    assert decoding.matrices.keys() == truth.keys()
    twin = write_decoded(checkpoint, decoding, tmp_path / "twin")
    assert "quantization_config" not in twin.config
    assert twin.nbytes == decoded_bytes(checkpoint, decoding)
    stored = load_file(twin.shards[0])
    kept = load_file(plain / "model.safetensors")
    assert {name: (value.shape, value.dtype) for name, value in stored.items()} == {
        name: (value.shape, value.dtype) for name, value in kept.items()
    }
    for tensor, value in stored.items():
        want = rounded(truth[tensor]) if tensor in truth else kept[tensor].float().numpy()
        np.testing.assert_array_equal(value.float().numpy(), want)
        np.testing.assert_allclose(want, kept[tensor].float().numpy(), atol=0.05)  # the packed model is this model


SHOWN = ("awq", "gptq", "nvfp4 by ModelOpt", "mxfp4")
"""One of each way: decoded here, read by the converter, kept in its blocks, tried and then decoded here."""


@pytest.mark.model
@pytest.mark.parametrize("name", SHOWN)
def test_the_converters_file(shown, name, monkeypatch):
    check_conversion(*shown(name), monkeypatch)


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "origin"),
    [("awq", "awq-4bit"), ("fp8 in blocks", "fp8"), ("gptq", "gptq-4bit"), ("nvfp4 by ModelOpt", "NVFP4")],
)
def test_levels_carry_what_their_weights_were(shown, tmp_path, name, origin, monkeypatch):
    """As levels of quantized GGUF files do; a plan counts the bytes that it takes."""
    folder, _ = shown(name)
    converted_beside(folder, monkeypatch)
    build = Build(out=tmp_path / "out", imatrix="none", effort="fast")
    (file,) = build_levels(str(folder), parse_levels(["Q8_0"]), build, Work()).files
    assert read_header(file.path).metadata[KEY_BEFORE] == origin
    found = inspect_file(file.path)
    assert found.made_from == origin
    assert f"made from {origin}" in found.verdict
    planned = draft_level(describe(str(folder)).model, "Q8_0")
    assert planned.file_bytes == file.path.stat().st_size


def check_conversion(folder, truth, monkeypatch):
    converted_beside(folder, monkeypatch)
    source = resolve(str(folder))
    assert source.quantized or "quantization_config" not in json.loads((folder / "config.json").read_text())
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source.path).tensors}
    for ours, theirs in (("ffn_down", "mlp.down_proj"), ("ffn_gate", "mlp.gate_proj"), ("attn_v", "self_attn.v_proj")):
        stored = tensors[f"blk.0.{ours}.weight"]
        values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        want = truth[f"model.layers.0.{theirs}.weight"]
        if stored.tensor_type.name == "NVFP4":
            values = values * tensors[f"blk.0.{ours}.scale"].data
            np.testing.assert_allclose(values, want, rtol=1e-6)
        else:
            np.testing.assert_array_equal(values, rounded(want))
    assert not list(source.path.parent.glob(".converting-*"))


OWN = (
    "GPTQ-4bit-g32", "GPTQ-8bit-row", "GPTQ-3bit-g32-asym", "GPTQ-4bit-g32-v2", "GPTQ-2bit-g32-ct", "AWQ-4bit-g32",
    "AWQ-4bit-g32-sym", "AWQ-4bit-g32-ct", "INT8-W8A8", "INT8-W8A16",
    "MLX-3bit-g32", "MLX-nvfp4",
)  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_our_own_levels_are_sources(tmp_path):
    _, checkpoint, source = tiny_checkpoints.tiny("llama", tmp_path, num_hidden_layers=1)
    reports = tiny_checkpoints.run(source, list(OWN), tmp_path / "levels", checkpoint)
    assert [report.level for report in reports] == list(OWN)
    for report in reports:
        folder = Path(report.path)
        level = read_checkpoint(folder)
        decoding = decoding_of(level)
        want = tiny_checkpoints.decoded(folder, report.level)
        ends = {"model.embed_tokens.weight"} if report.level.startswith("MLX") else set()
        quantized = {name for name in want if name.endswith("proj.weight")} | ends
        assert decoding.matrices.keys() == quantized
        written = write_decoded(level, decoding, tmp_path / "twins" / report.level)
        assert not {"quantization", "quantization_config"} & written.config.keys()
        twin = load_file(written.shards[0])
        assert twin.keys() == want.keys()
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[decoding.dtype]
        for name, values in want.items():
            np.testing.assert_array_equal(twin[name].float().numpy(), rounded(values, kind), err_msg=name)


def test_eight_bits_without_scales_are_refused(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_run_converter", lambda *_: pytest.fail("converted"))

    def bare(_, weights):
        arrays, means = fp8(weights, weights.shape)
        return {"weight": arrays["weight"]}, means

    for number, configuration in enumerate((None, {"quant_method": "fp8", "weight_block_size": [128, 128]})):
        folder = tmp_path / f"packed{number}"
        repack(plain, folder, configuration, bare)
        with pytest.raises(BadInput, match=r"layers\.0\.mlp\.down_proj\.weight is stored as FP8 without a scale"):
            resolve(str(folder))


def test_damaged_arrays_are_refused_and_leave_nothing(plain, tmp_path, monkeypatch):
    folder = tmp_path / "packed"
    converted_beside(folder, monkeypatch)
    monkeypatch.setattr(convert, "_run_converter", lambda *_: pytest.fail("converted"))
    configuration, make, _ = FORMATS["awq"]
    repack(plain, folder, configuration, make)
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    for change, match in (
        ({f"{name}.scales": torch.ones(3, 128, dtype=torch.float16)}, "3 groups do not divide"),
        (
            {f"{name}.scales": torch.full((2, 128), torch.inf, dtype=torch.float16)},
            "up_proj.weight decodes to weights of",
        ),
        ({f"{name}.qzeros": torch.zeros(1, 16, dtype=torch.int32)}, "up_proj.weight contradicts itself"),
        ({f"{name}.scales": None}, "up_proj.scales is missing"),
    ):
        changed = {key: value for key, value in (whole | change).items() if value is not None}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(BadFile, match=match):
            resolve(str(folder))
    assert not [path for path in (tmp_path / "cache" / "converted").rglob("*") if path.is_file()]


@pytest.mark.model
def test_experts_published_in_mxfp4_stay_bit_for_bit(tmp_path, demo_gguf, monkeypatch):
    """As in gpt-oss: codes and scales of stacked experts, gate and up in turn by rows."""
    import transformers

    folder = tmp_path / "tiny"
    folder.mkdir()
    config = transformers.GptOssConfig(
        vocab_size=write_tokenizer(folder, demo_gguf), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=512, sliding_window=128,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    stored, truth = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = value
            continue
        rows = value.float().numpy().swapaxes(1, 2)  # the file holds a row for each output
        made = [mxfp4(np.ascontiguousarray(expert)) for expert in rows]
        codes = torch.stack([arrays["weight_packed"] for arrays, _ in made])
        stored[f"{name}_blocks"] = codes.reshape(*codes.shape[:2], -1, 16)
        stored[f"{name}_scales"] = torch.stack([arrays["weight_scale"] for arrays, _ in made])
        truth[name] = np.stack([means for _, means in made])
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(document))
    assert decoding_of(read_checkpoint(folder)).by_converter is ReadAs.IT_IS
    monkeypatch.setenv("BITLADDER_CONVERTER", str(convert.find_converter().folder))
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    source = resolve(str(folder))
    assert source.quantized
    assert [warning for warning in source.warnings if "of its weights are MXFP4" in warning]
    with GgufFile.open(source.path) as opened:
        sizes = {}
        for level in quantize_levels(opened, ["F16", "Q8_0", "Q4_K_M"], tmp_path / "out", effort="fast"):
            sizes[level.level] = level.bytes
            with GgufFile.open(level.path) as file:
                for layer in range(2):
                    up = truth[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
                    for role, want in (
                        ("ffn_gate_exps", up[:, ::2]), ("ffn_up_exps", up[:, 1::2]),
                        ("ffn_down_exps", truth[f"model.layers.{layer}.mlp.experts.down_proj"]),
                    ):  # fmt: skip
                        assert file.info(f"blk.{layer}.{role}.weight").qtype == "MXFP4"
                        np.testing.assert_array_equal(file.read(f"blk.{layer}.{role}.weight"), want)
        assert sizes["Q4_K_M"] <= sizes["Q8_0"] < source.path.stat().st_size  # it was larger than its source
