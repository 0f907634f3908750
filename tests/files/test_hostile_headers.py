"""Headers and config.json that lie: one message that names the key, at once, whatever stands there."""

import json
import math
from dataclasses import replace

import pytest

from bitladder.describe.cache import cache_bytes, layer_caches
from bitladder.describe.config_keys import Config
from bitladder.describe.contradiction import check_config
from bitladder.describe.text import Document
from bitladder.describe.windows import text_windows
from bitladder.errors import BadFile, BitladderError
from bitladder.files.checkpoint import CheckpointTensor
from bitladder.files.describe_source import describe
from bitladder.levels import LADDER
from bitladder.plan.cost import level_size
from bitladder.plan.memory import compute_buffers
from gguf_bytes import F16, LLAMA_KEYS, f32, header, ints, padded, string, strings, tensor, u32


def write(path, keys, names=("token_embd.weight", "blk.0.ffn_down.weight")):
    """A whole GGUF file of 64 by 64 matrices with these keys over a tiny llama's."""
    size = 64 * 64 * 2
    listed = [tensor(name, (64, 64), F16, number * size) for number, name in enumerate(names)]
    replaced = {key[8 : 8 + int.from_bytes(key[:8], "little")] for key in keys}
    kept = [key for key in LLAMA_KEYS if key[8 : 8 + int.from_bytes(key[:8], "little")] not in replaced]
    path.write_bytes(padded(header([*kept, *keys], listed)) + bytes(size * len(names)))
    return path


def plan(source):
    """Everything that `plan` computes from a header."""
    model = describe(str(source)).model
    for level in LADDER:
        assert level_size(model, level).bpw > 0
    assert compute_buffers(model, 512).total > 0
    return cache_bytes(layer_caches(model), 512).total


def test_the_sound_file_is_planned(tmp_path):
    assert plan(write(tmp_path / "m.gguf", [])) > 0


NUMBERS = [
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "context_length", "expert_count", "attention.sliding_window", "attention.kv_lora_rank",
    "rope.dimension_count", "ssm.conv_kernel", "ssm.inner_size", "attention.shared_kv_layers",
    "leading_dense_block_count", "expert_feed_forward_length",
]  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [
        lambda name: string(name, "many"),
        lambda name: f32(name, math.inf),
        lambda name: strings(name, ["a", "b"]),
        lambda name: ints(name, [-1, -2]),
        lambda name: f32(name, math.nan),
    ],
    ids=["text", "infinity", "texts", "negative", "nan"],
)
def test_whatever_stands_where_a_number_belongs(tmp_path, name, value):
    keys = [value("llama." + name)]
    if name in ("expert_feed_forward_length", "leading_dense_block_count"):
        keys.append(u32("llama.expert_count", 4))
    if name == "rope.dimension_count":
        keys.append(u32("llama.attention.kv_lora_rank", 16))
    with pytest.raises(BadFile, match=name):
        plan(write(tmp_path / "m.gguf", keys))


@pytest.mark.parametrize("layers", [10_001, 10_000_000, 2_000_000_000])
def test_layers_without_end(tmp_path, layers):
    with pytest.raises(BadFile, match="block_count"):
        plan(write(tmp_path / "m.gguf", [u32("llama.block_count", layers)]))


def test_a_context_of_nothing(tmp_path):
    with pytest.raises(BadFile, match=r"context_length' is 0"):
        plan(write(tmp_path / "m.gguf", [u32("llama.context_length", 0)]))


def test_a_vocabulary_alone(tmp_path):
    with pytest.raises(BitladderError, match="no tensors"):
        plan(write(tmp_path / "m.gguf", [], names=()))


def test_tokens_that_are_a_number(tmp_path):
    path = write(tmp_path / "m.gguf", [u32("tokenizer.ggml.tokens", 7)], names=("blk.0.ffn_down.weight",))
    with pytest.raises(BadFile, match=r"tokenizer\.ggml\.tokens"):
        plan(path)


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
    "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip


@pytest.mark.parametrize("classes", [["LlamaForCausalLM"], ["NobodyForCausalLM"]])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 1 << 30), ("num_hidden_layers", "2"), ("num_hidden_layers", -1), ("hidden_size", [[1]]),
        ("vocab_size", {"a": 1}), ("num_attention_heads", True), ("vocab_size", 1 << 40), ("hidden_size", 1e300),
    ],
)  # fmt: skip
def test_a_config_that_lies(tmp_path, classes, key, value):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "architectures": classes, key: value}))
    with pytest.raises(BitladderError) as error:
        describe(str(tmp_path))
    assert key in str(error.value) or "are not known here" in str(error.value)


@pytest.mark.parametrize("classes", [3, {"a": 1}, [], [{}], [None], "LlamaForCausalLM", ["x" * 10_000]])
def test_classes_of_any_kind(tmp_path, classes):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "architectures": classes}))
    with pytest.raises(BitladderError, match="shapes are not known here"):
        describe(str(tmp_path))


def test_a_share_that_is_none(tmp_path):
    config = {**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "partial_rotary_factor": "x"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFile, match="partial_rotary_factor"):
        describe(str(tmp_path))


def stored(**shapes):
    return [CheckpointTensor(name.replace("__", "."), "BF16", shape, 0) for name, shape in shapes.items()]


LAYERS = {f"model__layers__{layer}__mlp__down_proj__weight": (64, 96) for layer in range(2)}
EMBEDDING = {"model__embed_tokens__weight": (128, 64)}


class TestContradictions:
    def test_what_agrees(self):
        check_config("m", LLAMA, stored(**LAYERS, **EMBEDDING))
        check_config("m", LLAMA, [])
        check_config("m", LLAMA, stored(**LAYERS, **EMBEDDING, visual__blocks__7__x__weight=(1, 1)))
        head = {"model__layers__2__eh_proj__weight": (64, 128), "model__layers__2__mlp__down_proj__weight": (64, 96)}
        check_config("m", LLAMA, stored(**LAYERS, **EMBEDDING, **head))
        check_config(
            "m", {**LLAMA, "quantization_config": {"bits": 4}}, stored(**LAYERS, model__embed_tokens__weight=(128, 8))
        )

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"num_hidden_layers": 3}, "3 layers, the weights have 2"),
            ({"num_hidden_layers": 1}, "1 layers, the weights have 2"),
            ({"hidden_size": 32}, "vectors of 32"),
            ({"vocab_size": 100}, "100 tokens"),
        ],
    )
    def test_what_does_not(self, change, match):
        with pytest.raises(BadFile, match=match):
            check_config("m", {**LLAMA, **change}, stored(**LAYERS, **EMBEDDING))


def test_figures_of_parts_are_found_in_parts():
    nested = {"thinker_config": {"text_config": {"hidden_size": 7}}, "hidden_size": 9}
    assert Config("m", nested).n_embd == 7


def test_a_file_that_says_nothing_of_its_context(tmp_path):
    model = describe(str(write(tmp_path / "m.gguf", []))).model
    silent = replace(model, dims=replace(model.dims, n_ctx_train=0))
    windows = text_windows([Document("words", "")], lambda _: [1] * 1000, silent)
    assert [len(one.tokens) for one in windows] == [512, 488]
