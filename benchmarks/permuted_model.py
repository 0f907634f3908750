"""A second model for quality_per_byte: one that was shipped in 4 bits, so that no block format can undo that.

    .venv/bin/python benchmarks/permuted_model.py SmolLM2-135M-Instruct-Q4_1.gguf permuted.gguf [--seed 0]

Weights that were stored in blocks of 32 with 16 values each fall on such values again when a level with aligned blocks
stores them: Q4_1 would lose nothing at all, and every comparison at 4 bits would say how well a level fits the source's
format. Here the channels of the residual stream, of every feed-forward and of every value head are shuffled (rows of
one matrix together with columns of the next, norms with them), so that a block holds weights of 32 different blocks.
The model computes what it did; weights are stored as F16, norms as they are. For models with the tensors of Llama or
Gemma 3, without biases.
"""

import argparse
import hashlib
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitladder.files.gguf import GgufFile
from bitladder.files.gguf_writer import GgufWriter
from bitladder.files.level_files import draft_level
from bitladder.walk.weights import FileWeights

F32 = NDArray[np.float32]
READS = ("token_embd.weight", "output.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "ffn_gate.weight",
         "ffn_up.weight")  # fmt: skip
"""Matrices whose columns are the residual stream's channels."""
WRITES = ("attn_output.weight", "ffn_down.weight")
NORMS = ("attn_norm.weight", "ffn_norm.weight", "output_norm.weight", "post_attention_norm.weight",
         "post_ffw_norm.weight")  # fmt: skip
UNTOUCHED = ("attn_q_norm.weight", "attn_k_norm.weight")
"""Norms within heads of queries and keys, whose channels stay as they are: RoPE takes them in pairs."""
KNOWN = (*READS, *WRITES, *NORMS, *UNTOUCHED)


class Shuffle:
    """The permutations of one model."""

    def __init__(self, file: GgufFile, seed: int) -> None:
        self._dims, self._seed = file.model.dims, seed
        self._stream = self._permutation("stream", self._dims.n_embd)

    def _permutation(self, what: str, count: int) -> NDArray[np.intp]:
        seed = hashlib.sha256(f"{self._seed} {what}".encode()).digest()
        return np.random.default_rng(list(seed)).permutation(count)

    def _heads(self, layer: str, *, queries: bool) -> NDArray[np.intp]:
        """Channels of the value heads, or of the attention's output: each head's own, alike in all that share one."""
        dims, width = self._dims, self._dims.head_dim_v
        own = [self._permutation(f"{layer} head {head}", width) for head in range(dims.n_head_kv)]
        share = dims.n_head // dims.n_head_kv if queries else 1
        return np.concatenate([own[head // share] + head * width for head in range(dims.n_head_kv * share)])

    def __call__(self, name: str, value: F32) -> F32:
        """A tensor of the shuffled model."""
        layer, _, role = name.rpartition(".")[0].rpartition(".")
        role += ".weight"
        if role in READS:
            value = value[:, self._stream]
        if role in (*WRITES, *NORMS):
            value = value[self._stream]
        if role in ("ffn_gate.weight", "ffn_up.weight"):
            value = value[self._permutation(f"{layer} ff", len(value))]
        if role == "ffn_down.weight":
            value = value[:, self._permutation(f"{layer} ff", value.shape[1])]
        if role == "attn_v.weight":
            value = value[self._heads(layer, queries=False)]
        if role == "attn_output.weight":
            value = value[:, self._heads(layer, queries=True)]
        return np.ascontiguousarray(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with GgufFile.open(options.model) as source:
        names = [tensor.name for tensor in source.model.tensors]
        strange = [name for name in names if re.sub(r"^blk\.\d+\.", "", name) not in KNOWN]
        if source.model.dims.architecture not in ("llama", "gemma3") or strange:
            raise SystemExit(f"only models with Llama's or Gemma 3's tensors can be shuffled here {strange[:3]}")
        shuffle, weights = Shuffle(source, options.seed), FileWeights(source)
        part = draft_level(source.model, "F16", options.out.parent, label="permuted").parts[0]
        writer = GgufWriter(options.out, part.plan, str(options.seed))
        for number, tensor in enumerate(part.plan.tensors):
            whole = weights(tensor.name).reshape(tensor.shape)
            data = shuffle(tensor.name, whole).astype({"F16": np.float16, "F32": np.float32}[tensor.qtype]).tobytes()
            writer.write(number, 0, memoryview(data))
            writer.done(number, hashlib.sha256(data).hexdigest())
            weights.forget(tensor.name)
        writer.finish(part.header(source.sha256))
        writer.close()


if __name__ == "__main__":
    main()
