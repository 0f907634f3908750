"""A GGUF that is no language model is called what it is, by every verb that takes a model."""

import numpy as np
import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.errors import BadInput
from bitladder.files.gguf import read_header
from gguf_bytes import LLAMA_KEYS, flag, string, strings, tiny_weights, u32, write_model

VECTOR = np.ones(32, np.float32)
TOWER = {"v.blk.0.attn_q.weight": np.ones((32, 32), np.float16), "mm.0.weight": np.ones((32, 32), np.float16)}
LORA = {"blk.0.attn_q.weight.lora_a": np.ones((4, 64), np.float32)}
NEXTN = {
    "token_embd.weight": np.ones((96, 64), np.float16),
    "blk.2.nextn.eh_proj.weight": np.ones((64, 128), np.float16),
}
WEIGHTS = tiny_weights()
KINDS = {
    "mmproj": (
        [string("general.type", "mmproj"), string("general.architecture", "clip"),
         flag("clip.has_vision_encoder", value=True)],
        TOWER, "a projector (mmproj, 4.00 KiB): the part of a model that takes in pictures, no language model",
    ),
    "old mmproj": ([string("general.architecture", "clip")], TOWER, "that takes in pictures or sounds"),
    "mmproj of a newer kind": (
        [string("general.type", "mmproj"), string("general.architecture", "llama")], TOWER, "a projector (mmproj",
    ),
    "adapter": (
        [string("general.type", "adapter"), string("adapter.type", "lora"), string("general.architecture", "llama")],
        LORA, "a LoRA adapter of 'llama'",
    ),
    "adapter without a type": (list(LLAMA_KEYS), LORA, "a LoRA adapter of 'llama'"),
    "imatrix": (
        [string("general.type", "imatrix"), strings("imatrix.datasets", ["text"])],
        {"blk.0.attn_q.weight.in_sum2": VECTOR[None], "blk.0.attn_q.weight.counts": VECTOR[:1, None]},
        "an importance matrix",
    ),
    "imatrix without keys": ([], {"a.in_sum2": VECTOR[None]}, "an importance matrix"),
    "control vector": (
        [string("general.architecture", "controlvector")], {"direction.1": VECTOR}, "a control vector",
    ),
    "vocabulary": (
        [*LLAMA_KEYS, string("tokenizer.ggml.model", "gpt2"), strings("tokenizer.ggml.tokens", ["a"])], {},
        "a vocabulary of 'llama' and no weights",
    ),
    "nothing": (list(LLAMA_KEYS), {}, "holds no tensors"),
    "head for several tokens": (
        [*LLAMA_KEYS, u32("llama.nextn_predict_layers", 1)], NEXTN, "the head that predicts several tokens (MTP)",
    ),
    "tower in the model's file": (
        list(LLAMA_KEYS), {**WEIGHTS, **TOWER}, "it holds tensors for pictures and their projection, 4.00 KiB",
    ),
    "another model's vocabulary": (
        [*LLAMA_KEYS, strings("tokenizer.ggml.tokens", ["a", "b", "c"])], WEIGHTS,
        f"Its vocabulary lists 3 tokens, its embedding has {len(WEIGHTS['token_embd.weight'])} rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_is(tmp_path, kind):
    keys, weights, said = KINDS[kind]
    file = write_model(tmp_path / "thing.gguf", weights, keys=keys)
    with pytest.raises(BadInput) as error:
        read_header(file)
    assert said in str(error.value)
    assert "thing.gguf: " in str(error.value)


@pytest.mark.parametrize("kind", ["mmproj", "adapter", "imatrix", "vocabulary", "another model's vocabulary"])
@pytest.mark.parametrize(
    "verb",
    [
        ("plan", "FILE"),
        ("inspect", "FILE"),
        ("quantize", "FILE", "--to", "Q8_0"),
        ("imatrix", "FILE", "--out", "made"),
        ("measure", "FILE", "--levels", "Q8_0"),
        ("recipe", "FILE", "--bpw", "5"),
        ("run", "FILE"),
        ("serve", "FILE"),
    ],
)
def test_every_verb_says_so(tmp_path, monkeypatch, kind, verb):
    monkeypatch.chdir(tmp_path)
    keys, weights, said = KINDS[kind]
    file = write_model(tmp_path / "thing.gguf", weights, keys=keys)
    result = CliRunner().invoke(app, [str(file) if word == "FILE" else word for word in verb])
    assert result.exit_code == 2, result.output
    assert said.partition(" (")[0] in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir() if path.name != "data"] == ["thing.gguf"]


def test_a_hostile_name_is_not_repeated(tmp_path):
    keys = [string("general.type", "adapter"), string("general.architecture", "\x1b[31mred")]
    with pytest.raises(BadInput, match="a LoRA adapter: differences"):
        read_header(write_model(tmp_path / "m.gguf", LORA, keys=keys))


def test_models_are_models(tmp_path):
    extra = {"blk.1.nextn.eh_proj.weight": np.ones((64, 128), np.float16)}
    assert read_header(write_model(tmp_path / "m.gguf", WEIGHTS | extra)).dims.n_layer == 2
    typed = [*LLAMA_KEYS, string("general.type", "model")]
    assert read_header(write_model(tmp_path / "n.gguf", WEIGHTS, keys=typed)).dims.architecture == "llama"


@pytest.mark.parametrize("verb", [("plan",), ("quantize", "--to", "Q8_0", "--out", "made")])
def test_an_adapter_folder_is_called_one(tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"")
    result = CliRunner().invoke(app, [verb[0], "lora", *verb[1:]])
    assert result.exit_code == 2
    assert "is an adapter (PEFT)" in " ".join(result.output.split())
