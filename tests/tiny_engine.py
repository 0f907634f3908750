"""A tiny random llama that the real engine loads and talks with: byte tokens, ChatML, every row a multiple of 256."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gguf_bytes import f32, flag, ints, string, strings, u32, write_model

TRAINED_CTX = 2048
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_tokens() -> list[str]:
    """The tokens that stand for the 256 bytes in byte-level tokenizers."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _tokenizer(tokens: list[str], template: str = _CHATML) -> list[bytes]:
    """Keys of a tokenizer of bytes."""
    return [
        string("tokenizer.ggml.model", "gpt2"),
        string("tokenizer.ggml.pre", "gpt-2"),
        strings("tokenizer.ggml.tokens", tokens),
        ints("tokenizer.ggml.token_type", [3 if token in _SPECIAL else 1 for token in tokens]),
        strings("tokenizer.ggml.merges", ["\u0120 t"]),
        u32("tokenizer.ggml.bos_token_id", 257),
        u32("tokenizer.ggml.eos_token_id", 259),
        flag("tokenizer.ggml.add_bos_token", value=False),
        string("tokenizer.chat_template", template),
    ]


def write_tiny(
    path: Path,
    *,
    seed: int = 0,
    n_ctx: int = TRAINED_CTX,
    name: str = "Tiny",
    pooling: int | None = None,
    template: str = _CHATML,
    heads: int = 4,
    tokens_more: int = 0,
) -> Path:
    """A model of 1.4 million weights in F16, trained (so it says) for ``n_ctx`` tokens.

    ``heads``: of attention, each of 256 / ``heads`` weights. ``tokens_more``: of another vocabulary.
    ``pooling``: what it says of how it makes one vector of many (4: a rank).
    """
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (0.02 * rng.standard_normal((rows, columns))).astype(np.float16)

    tokens = [*_byte_tokens(), "\u0120t", *_SPECIAL, *(f"more{number}" for number in range(tokens_more))]
    width, hidden, layers = 256, 512, 2
    tensors: dict[str, Any] = {
        "token_embd.weight": matrix(len(tokens), width),
        "output_norm.weight": np.ones(width, np.float32),
    }
    for layer in range(layers):
        block = f"blk.{layer}."
        sizes = {"attn_q": (width, width), "attn_k": (width // 2, width), "attn_v": (width // 2, width)}
        sizes |= {"attn_output": (width, width), "ffn_gate": (hidden, width), "ffn_up": (hidden, width)}
        sizes |= {"ffn_down": (width, hidden)}
        tensors |= {f"{block}{part}.weight": matrix(*size) for part, size in sizes.items()}
        tensors |= {f"{block}{norm}.weight": np.ones(width, np.float32) for norm in ("attn_norm", "ffn_norm")}
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = [
        string("general.architecture", "llama"),
        string("general.name", name),
        u32("llama.context_length", n_ctx),
        u32("llama.embedding_length", width),
        u32("llama.feed_forward_length", hidden),
        u32("llama.block_count", layers),
        u32("llama.attention.head_count", heads),
        u32("llama.attention.head_count_kv", heads // 2),
        f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
        f32("llama.rope.freq_base", 10000.0),
        *_tokenizer(tokens, template),
        *([] if pooling is None else [u32("llama.pooling_type", pooling)]),
    ]
    return write_model(path, tensors, keys=keys)


def write_tiny_with_head(path: Path, *, seed: int = 0, head: bool = True) -> Path:
    """A random mixture of experts (GLM-4.5's architecture, 2 experts) whose last block predicts the token after the
    next one. ``head``: without it the tensors of that block are left out, as files without their heads are published.
    """
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape)).astype(np.float16)

    tokens = [*_byte_tokens(), "\u0120t", *_SPECIAL]
    width, hidden, experts, blocks = 256, 256, 2, 3 if head else 2
    tensors: dict[str, Any] = {
        "token_embd.weight": matrix(len(tokens), width),
        "output_norm.weight": np.ones(width, np.float32),
    }
    for layer in range(blocks):
        block = f"blk.{layer}."
        sizes = {"attn_q": (width, width), "attn_k": (width // 2, width), "attn_v": (width // 2, width)}
        sizes |= {"attn_output": (width, width)}
        if layer == 0:
            sizes |= {"ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden)}
        else:
            sizes |= {f"ffn_{part}_exps": (experts, hidden, width) for part in ("gate", "up")}
            sizes |= {"ffn_down_exps": (experts, width, hidden), "ffn_gate_inp": (experts, width)}
            sizes |= {f"ffn_{part}_shexp": (hidden, width) for part in ("gate", "up")}
            sizes |= {"ffn_down_shexp": (width, hidden)}
            tensors[f"{block}exp_probs_b.bias"] = np.zeros(experts, np.float32)
        tensors |= {f"{block}{part}.weight": matrix(*size) for part, size in sizes.items()}
        norms = ["attn_norm", "post_attention_norm"]
        if layer == 2:
            tensors[f"{block}nextn.eh_proj.weight"] = matrix(width, 2 * width)
            norms += ["nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm"]
        tensors |= {f"{block}{norm}.weight": np.ones(width, np.float32) for norm in norms}
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = [
        string("general.architecture", "glm4moe"),
        string("general.name", "Tiny with a head"),
        u32("glm4moe.context_length", TRAINED_CTX),
        u32("glm4moe.embedding_length", width),
        u32("glm4moe.feed_forward_length", hidden),
        u32("glm4moe.expert_feed_forward_length", hidden),
        u32("glm4moe.block_count", 3),
        u32("glm4moe.nextn_predict_layers", 1),
        u32("glm4moe.leading_dense_block_count", 1),
        u32("glm4moe.expert_count", experts),
        u32("glm4moe.expert_used_count", 1),
        u32("glm4moe.expert_shared_count", 1),
        u32("glm4moe.attention.head_count", 4),
        u32("glm4moe.attention.head_count_kv", 2),
        u32("glm4moe.attention.key_length", 64),
        u32("glm4moe.attention.value_length", 64),
        u32("glm4moe.rope.dimension_count", 32),
        f32("glm4moe.attention.layer_norm_rms_epsilon", 1e-5),
        f32("glm4moe.rope.freq_base", 10000.0),
        *_tokenizer(tokens),
    ]
    return write_model(path, tensors, keys=keys)
