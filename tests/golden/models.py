"""What golden values are made from: tiny models of several families, importance matrices, texts, a workload.

Everything follows from whole numbers of a fixed seed and from sums that IEEE 754 rounds one way, so that every
processor makes the same files. Tokens are bytes, and llama.cpp runs the files.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import tiny_models  # noqa: E402

FAMILIES = ("llama", "qwen3", "mixtral", "qwen3moe", "gemma3", "phi3")
SIZES = {
    "vocab_size": 288,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
}
"""Rows of 256 and 512 take K-quants; those of heads and experts (96, 48) do not, and fall back."""
OTHER_SIZES = {
    "llama": {"num_hidden_layers": 3},
    "gemma3": {"num_hidden_layers": 6},
    "small": {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 256},
}
CASES = {"small": "llama"}
"""``small`` is for work that costs much by the column."""
END = 0
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
WORKLOAD = """\
name: golden
max_tokens: 8
inputs:
  - {id: any-word, prompt: "abc", expect: {max_words: 100}}
  - {id: no-such-word, prompt: "def", expect: {contains_all: "no tiny model says this"}}
  - {id: as-the-reference, prompt: "The quick brown fox", expect: {agrees_with_reference: {at_least: 0.5}}}
  - {id: as-before, prompt: "0 1 2 3 4", expect: {agrees_with_reference: {at_least: 0.9}}}
  - {id: none-of-these, prompt: "xyz", expect: {contains_none: "no tiny model says this"}}
"""


def _rng(*names: object) -> np.random.Generator:
    digest = hashlib.sha256(repr(names).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _weights(rng: np.random.Generator, shape: tuple[int, ...], spread: float) -> np.ndarray:
    """About normal: sums of four uniform numbers; every 97th weight is four times as large."""
    values = sum(rng.random(shape, np.float32) - np.float32(0.5) for _ in range(4)) * np.float32(spread * 1.75)
    flat = values.reshape(-1)
    flat[::97] *= 4
    return values


def _fill(family: str, model: Any) -> None:
    """Weights of a size at which three layers neither explode nor vanish, and answers are decided."""
    plus_one = family == "gemma3"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            if name.endswith("norm.weight"):
                value = _weights(_rng(family, name), shape, 0.1) + np.float32(0.0 if plus_one else 1.0)
            elif "embed_tokens" in name or "lm_head" in name:  # gemma multiplies what it embeds by 16
                value = _weights(_rng(family, name), shape, 0.04 if family == "gemma3" else 0.1)
            else:
                value = _weights(_rng(family, name), shape, 1.2 * shape[-1] ** -0.5 if len(shape) > 1 else 0.02)
            parameter.copy_(torch.from_numpy(value))


def _letters() -> list[str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = {byte: 256 + n for n, byte in enumerate(b for b in range(256) if b not in plain)}
    return [chr(others.get(byte, byte)) for byte in range(256)]


def _byte_tokens(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """A token for each byte, one that ends a text, and some that no text has."""
    tokens = ["<end>", *_letters(), "ab"]
    tokens += [f"<{number}>" for number in range(n_vocab - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (n_vocab - 1)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(END)
    writer.add_eos_token_id(END)
    writer.add_chat_template(TEMPLATE)


def _write_model(family: str, folder: Path) -> Path:
    case = tiny_models.CASES[CASES.get(family, family)]
    model = tiny_models.make(case, **{**SIZES, **OTHER_SIZES.get(family, {})})
    _fill(family, model)
    return tiny_models.write(case, model, folder / f"{family}.gguf", tokenizer=_byte_tokens)


def _write_importance(model: Path, folder: Path) -> None:
    """Both kinds of files that llama.cpp has for the mean squares of a model's inputs."""
    reader = gguf.GGUFReader(model)
    stacks = {t.name: [int(n) for n in t.shape] for t in reader.tensors if len(t.shape) > 1}
    writer = gguf.GGUFWriter(folder / f"{model.stem}-importance.gguf", "", use_temp_file=False)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["golden"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    old = [np.int32(len(stacks)).tobytes()]
    for name, (columns, _, *more) in stacks.items():
        matrices = more[0] if more else 1
        squares = _weights(_rng(model.stem, name, "importance"), (matrices, columns), 1.0) ** 2 + np.float32(2**-10)
        writer.add_tensor(f"{name}.in_sum2", squares * np.float32(4))
        writer.add_tensor(f"{name}.counts", np.full((matrices, 1), 4, np.float32))
        label = name.encode()
        old += [np.int32(len(label)).tobytes(), label, np.array([1, squares.size], np.int32).tobytes()]
        old.append(squares.tobytes())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / f"{model.stem}-importance.dat").write_bytes(b"".join(old))


def _text(seed: str, words: int) -> str:
    """Words of a small invented language: some frequent, most rare."""
    rng = _rng("text", seed)
    known = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(200)]
    at = (200 * rng.random(words) ** 3).astype(int)
    return " ".join(known[n] + ("." if n % 11 == 3 else "") for n in at) + "\n"


def write_sources(folder: Path, models: Sequence[str] = (*FAMILIES, "small")) -> Path:
    """All of it, or some of the models alone, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for family in models:
        _write_importance(_write_model(family, folder), folder)
    (folder / "calibration.txt").write_text(_text("calibration", 450))
    for number in range(3):
        (folder / f"measuring-{number}.txt").write_text(_text(f"measuring {number}", 200))
    (folder / "workload.yaml").write_text(WORKLOAD)
    return folder


if __name__ == "__main__":
    print(write_sources(Path(sys.argv[1]), *([sys.argv[2:]] if sys.argv[2:] else [])))
