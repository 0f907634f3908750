"""A checkpoint becomes a GGUF through llama.cpp's own converter."""

import json
import shutil

import gguf
import numpy as np
import pytest

from bitladder.errors import BadFile, BadInput, UnknownArchitecture
from bitladder.files import convert
from bitladder.files.checkpoint import read_checkpoint
from bitladder.files.converter import Converter, find_converter
from bitladder.files.describe_source import describe
from bitladder.files.gguf import read_header
from bitladder.files.sources import resolve
from tiny_checkpoints import write_tokenizer
from tiny_configs import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, demo_gguf):
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    folder.mkdir()
    vocab = write_tokenizer(folder, demo_gguf)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="2MB")
    return folder


@pytest.mark.model
def test_a_sharded_checkpoint_end_to_end(checkpoint, tmp_path, monkeypatch):
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    steps = []
    source = resolve(str(checkpoint), lambda what, done, total: steps.append((what, done, total)))
    assert source.checkpoint == checkpoint
    model = read_header(source.path)
    assert model.dims.n_layer == 2
    assert model.metadata["tokenizer.ggml.pre"] == "smollm"
    assert {tensor.qtype for tensor in model.tensors} == {"BF16", "F32"}
    reader = gguf.GGUFReader(source.path)
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    from safetensors.torch import load_file

    weights = {}
    for shard in read_checkpoint(checkpoint).shards:
        weights |= load_file(shard)
    want = weights["model.layers.1.mlp.down_proj.weight"].float().numpy()
    got = (stored["blk.1.ffn_down.weight"].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(got, want)
    monkeypatch.setattr(convert, "_run_converter", lambda *_, **__: pytest.fail("converted twice"))
    assert resolve(str(checkpoint)).path == source.path


def copy_of(checkpoint, folder):
    """The checkpoint's files in a folder of their own, to be changed."""
    shutil.copytree(checkpoint, folder)
    return folder


def change(path, **values):
    """Set keys of a JSON file; None removes one."""
    document = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def test_what_a_conversion_depends_on_changes_its_place(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path / "copy")
    converter = find_converter()
    before = convert.content_hash(read_checkpoint(folder), converter)
    assert before == convert.content_hash(read_checkpoint(checkpoint), converter)
    (folder / "tokenizer_config.json").write_text("{}")
    assert convert.content_hash(read_checkpoint(folder), converter) != before
    other = Converter(tmp_path / "other", "another")
    shutil.copytree(converter.folder, other.folder)
    assert convert.content_hash(read_checkpoint(checkpoint), other) == before  # the same files in another place
    (other.folder / "conversion" / "qwen.py").write_text("")
    assert convert.content_hash(read_checkpoint(checkpoint), other) != before


def fake_converter(folder, script):
    """A converter whose program is ``script``."""
    for part in ("conversion", "gguf-py/gguf"):
        (folder / part).mkdir(parents=True)
        (folder / part / "__init__.py").write_text("")
    (folder / "convert_hf_to_gguf.py").write_text("def main():\n" + "".join(f"    {line}\n" for line in script))
    return folder


@pytest.mark.parametrize(
    ("script", "error", "match"),
    [
        ("print('Model FooForCausalLM is not supported'); raise SystemExit(1)", UnknownArchitecture, "FooForCausalLM"),
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized')", BadInput, "does not know the tokenizer"),
        (
            "raise NotImplementedError(\"Quant method is not yet supported: 'awq'\")",
            BadInput,
            r"quantized with awq, which [^\n]*\nGive the checkpoint that it was quantized from",
        ),
        ("raise KeyError('hidden_size')", BadInput, r"(?s)KeyError: 'hidden_size'.*This build of the converter"),
        ("bytearray(1 << 40)", BadInput, "at its bounds of memory"),
        ("import os; os.abort()", BadInput, "at its bounds of memory"),
        ("import os; os.system('true')", BadInput, "where no conversion needs to go"),
        ("pass", BadInput, "exit code 0"),
    ],
)
def test_failures_are_explained_and_leave_nothing(checkpoint, tmp_path, monkeypatch, script, error, match):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BITLADDER_CONVERTER", str(fake_converter(tmp_path / "converter", [script])))
    with pytest.raises(error, match=match):
        resolve(str(checkpoint))
    assert not [path for path in (tmp_path / "cache" / "converted").rglob("*") if path.is_file()]


def test_a_converter_that_never_ends_is_ended(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(
        "BITLADDER_CONVERTER", str(fake_converter(tmp_path / "converter", ["import time", "time.sleep(99)"]))
    )
    monkeypatch.setattr(convert, "_LEAST_SECONDS", 5)
    with pytest.raises(BadInput, match="ended after 6 seconds"):
        resolve(str(checkpoint))


@pytest.mark.parametrize(
    ("scaling", "match"),
    [
        ({"rope_scaling": {"factor": 4.0}}, "by a factor without saying how"),
        ({"rope_scaling": {"type": "wobble", "factor": 4.0}}, "by 'wobble'"),
        ({"rope_parameters": {"rope_type": "wobble", "factor": 4.0, "rope_theta": 1e4}}, "by 'wobble'"),
        ({"text_config": {"rope_scaling": {"type": "wobble"}}}, "by 'wobble'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "wobble"}}}, "by 'wobble'"),
    ],
)
def test_a_scaling_of_positions_that_would_be_lost_is_refused(checkpoint, tmp_path, monkeypatch, scaling, match):
    monkeypatch.setattr(convert, "_run_converter", lambda *_: pytest.fail("converted"))
    folder = copy_of(checkpoint, tmp_path / "copy")
    change(folder / "config.json", **({"rope_parameters": None} | scaling))
    with pytest.raises(BadInput, match=match):
        resolve(str(folder))


@pytest.mark.model
@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_a_scaling_of_positions_arrives_or_is_warned_of(checkpoint, tmp_path, kind):
    folder = copy_of(checkpoint, tmp_path / "copy")
    scaling = {"type": kind, "factor": 4.0, "original_max_position_embeddings": 128}
    change(folder / "config.json", rope_parameters=None, rope_theta=1e4, rope_scaling=scaling)
    source = resolve(str(folder))
    written = read_header(source.path).metadata.get("llama.rope.scaling.type")
    warned = [
        warning for warning in source.warnings if "stretches its positions dynamically beyond 512 tokens" in warning
    ]
    assert (written, len(warned)) == ({"yarn": ("yarn", 0), "dynamic": (None, 1)}[kind])


@pytest.mark.model
@pytest.mark.parametrize("shape", [(1,), ()])
def test_fp8_with_a_scale_per_tensor(checkpoint, tmp_path, shape):
    import torch
    from safetensors.torch import load_file, save_file

    folder = copy_of(checkpoint, tmp_path / "copy")
    stored, truth = {}, {}
    for shard in read_checkpoint(folder).shards:
        for name, tensor in load_file(shard).items():
            stored[name] = tensor
            if name.endswith("proj.weight"):
                scale = (tensor.float().abs().max() / 448).reshape(shape)
                stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
                stored[name.replace(".weight", ".weight_scale")] = scale
                truth[name] = stored[name].float() * scale
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    change(
        folder / "config.json",
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    )
    source = resolve(str(folder))
    assert "itself quantized (compressed-tensors)" in source.warnings[0]
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(source.path).tensors}["blk.0.ffn_down.weight"]
    values = gguf.quants.dequantize(found.data, found.tensor_type)
    want = truth["model.layers.0.mlp.down_proj.weight"].numpy()
    np.testing.assert_allclose(values, want, rtol=2**-8)  # BF16 keeps 8 bits of the product
    assert np.abs(want).max() > 0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_links_that_lead_nowhere(checkpoint, tmp_path, name):
    folder = copy_of(checkpoint, tmp_path / "copy")
    if name == "model.safetensors":
        for path in folder.glob("model*"):
            path.unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/0123abcd")
    with pytest.raises(BadFile, match=r"(?s)a link to \.\./\.\./blobs/0123abcd, which is not there.*Fetch the"):
        resolve(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_lfs_pointers(checkpoint, tmp_path, name):
    folder = copy_of(checkpoint, tmp_path / "copy")
    (folder / "model.safetensors.index.json").unlink()
    (folder / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4" * 64 + "\nsize 269060552\n"
    )
    with pytest.raises(BadFile, match="is a Git LFS pointer"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("names", "layers", "expected"),
    [
        (["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"], 2, True),
        (["model.layers.0.mlp.up_proj.weight", "mtp.fc.weight"], 1, False),
        (["model.layers.0.mlp.up_proj.weight", "model.layers.1.eh_proj.weight"], 1, False),
        (["model.language_model.layers.0.x", "model.visual.layers.7.x"], 1, True),
    ],
)
def test_a_head_for_several_tokens_is_noticed(names, layers, expected):
    from bitladder.files.checkpoint import Checkpoint, CheckpointTensor

    tensors = tuple(CheckpointTensor(name, "BF16", (1,), 2) for name in names)
    assert convert.lacks_mtp(Checkpoint(None, {"num_hidden_layers": layers}, (), tensors)) is expected
    nested = {"text_config": {"num_hidden_layers": layers}}
    assert convert.lacks_mtp(Checkpoint(None, nested, (), tensors)) is expected


FAMILIES = {
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
        "v_head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2,
        "num_experts_per_tok": 2, "topk_group": 1, "first_k_dense_replace": 1,
    },
    "ministral3": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "qwen3_next": {
        "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8,
        "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2,
    },
}  # fmt: skip
"""Families that a converter at odds with its gguf module could not load; Qwen3-Next as fine-tunes are, without mtp."""


@pytest.mark.model
@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("deepseek_v3", "deepseek2"),
        ("ministral3", "mistral3"),
        ("hunyuan_v1_dense", "hunyuan-dense"),
        ("qwen3_next", "qwen3next"),
    ],
)
def test_families_of_late_years(tmp_path, demo_gguf, family, architecture):
    import torch
    import transformers

    folder = tmp_path / family
    folder.mkdir()
    sizes = {
        "vocab_size": write_tokenizer(folder, demo_gguf), "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **{**sizes, **FAMILIES[family]})
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    model = read_header(resolve(str(folder)).path)
    assert model.dims.architecture == architecture
    assert model.dims.n_layer == config.num_hidden_layers


@pytest.mark.model
@pytest.mark.parametrize("architecture", ["nemotron_h", "nemotron_h_moe"])
def test_a_model_without_experts_is_no_mixture(tmp_path, demo_gguf, architecture):
    """transformers has a number of experts for both, and writes it; and has no word for lists of layers as released."""
    folder = tmp_path / architecture
    folder.mkdir()
    write_checkpoint(architecture, folder, write_tokenizer(folder, demo_gguf))
    model = read_header(resolve(str(folder)).path)
    assert model.dims.architecture == architecture
    experts = {key for key in model.metadata if ".expert_" in key}
    assert bool(experts) == architecture.endswith("_moe")
    widths = model.metadata[f"{architecture}.feed_forward_length"]
    assert [width > 0 for width in widths] == [False, False, True, False]


@pytest.mark.model
@pytest.mark.parametrize("ties", [{}, {"tie_word_embeddings": False}])
def test_a_head_beside_an_embedding_that_is_said_to_be_it(checkpoint, tmp_path, ties):
    """Passed over, as transformers and vLLM do, and told; kept where config.json says nothing of the kind."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "tied"
    shutil.copytree(checkpoint, folder)
    vocab, width = next(tensor.shape for tensor in read_checkpoint(folder).tensors if "embed_tokens" in tensor.name)
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    weights = {}
    for shard in read_checkpoint(checkpoint).shards:
        weights |= load_file(shard)
    save_file(
        weights | {"lm_head.weight": torch.ones(vocab, width, dtype=torch.bfloat16)}, folder / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ties))
    source = resolve(str(folder))
    model, planned = read_header(source.path), describe(str(folder)).model
    heads = [tensor.name for tensor in model.tensors if tensor.name == "output.weight"]
    assert heads == (["output.weight"] if ties else [])
    assert {(tensor.name, tensor.shape) for tensor in planned.tensors} == {(t.name, t.shape) for t in model.tensors}
    assert any("the weights hold lm_head.weight: it is left out" in line for line in source.warnings) == (not ties)
