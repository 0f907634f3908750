"""A tiny random model that llama.cpp loads and answers with: a byte tokenizer, ChatML, two layers."""

from pathlib import Path

import gguf
import numpy as np

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WIDTH, _HIDDEN, _HEADS, _KV_HEADS, _LAYERS = 256, 512, 4, 2, 2


WORKLOAD = """
inputs:
  - id: greeting
    prompt: Hello
    max_tokens: 4
    expect: {max_words: 100}
"""
TEXT = "The lamp stood in the window all winter, and each evening somebody lit it. "


def _tokens() -> list[str]:
    """The 256 byte tokens in order of bytes, a merged one, and the special ones."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)] + ["Ġt", *_SPECIAL]


def write_engine_model(path: Path, seed: int = 0) -> Path:
    """Write the model, matrices in F16; returns the path."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (0.05 * rng.standard_normal((rows, columns))).astype(np.float16)

    tokens, narrow = _tokens(), _WIDTH // _HEADS * _KV_HEADS
    ones = np.ones(_WIDTH, np.float32)
    tensors = {"token_embd.weight": matrix(len(tokens), _WIDTH), "output_norm.weight": ones}
    for layer in range(_LAYERS):
        block = f"blk.{layer}."
        tensors |= {
            block + "attn_norm.weight": ones,
            block + "attn_q.weight": matrix(_WIDTH, _WIDTH),
            block + "attn_k.weight": matrix(narrow, _WIDTH),
            block + "attn_v.weight": matrix(narrow, _WIDTH),
            block + "attn_output.weight": matrix(_WIDTH, _WIDTH),
            block + "ffn_norm.weight": ones,
            block + "ffn_gate.weight": matrix(_HIDDEN, _WIDTH),
            block + "ffn_up.weight": matrix(_HIDDEN, _WIDTH),
            block + "ffn_down.weight": matrix(_WIDTH, _HIDDEN),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("Tiny")
    writer.add_context_length(2048)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_HIDDEN)
    writer.add_block_count(_LAYERS)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in _SPECIAL else 1 for token in tokens])
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(259)
    writer.add_add_bos_token(False)
    writer.add_chat_template(_CHATML)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
