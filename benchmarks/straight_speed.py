"""Claim: FP8 of a checkpoint is written as fast as the disk takes a copy of it, in under 1 GB of memory.

    scripts/bench straight_speed --scratch DIR [--level FP8-DYNAMIC] [--layers 32] [--rounds 1] [--threads 2]

Makes a checkpoint with the shapes of Llama 3 8B (16 GB in bfloat16, several shards; ``--layers`` takes fewer) of random
weights, then in turns copies its files, each flushed to the disk, and makes the level with ``bitladder quantize`` in a
process of its own, from reading to the proof of what was written. The source's pages are dropped from memory before
each. Prints seconds and the rate at which the source went by, processor seconds and the largest resident memory of the
process. Needs room for the checkpoint twice; all of it is removed afterwards.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from bitladder import system
from bitladder.files.safetensors_writer import PiecewiseTensor, write_safetensors

_SHARD = 4 << 30
_NOISE = 1 << 24
_AT_ONCE = 1 << 22


def tensors(options: argparse.Namespace, noise: np.ndarray) -> Iterator[PiecewiseTensor]:
    """All tensors of the model, their weights stretches of ``noise``."""
    width, hidden, kv = options.width, options.hidden, options.width // 4

    def pieces(size: int, start: int) -> Iterator[memoryview]:
        for at in range(0, size, _AT_ONCE):
            first = (start + at) % (_NOISE - _AT_ONCE)
            yield noise[first : first + min(_AT_ONCE, size - at)].data.cast("B")

    def made(name: str, *shape: int) -> PiecewiseTensor:
        size = int(np.prod(shape))
        start = hash_of(name) % _NOISE
        return PiecewiseTensor(name, "BF16", shape, lambda: pieces(size, start))

    yield made("model.embed_tokens.weight", options.tokens, width)
    for layer in range(options.layers):
        own = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", width, width), ("self_attn.k_proj", kv, width), ("self_attn.v_proj", kv, width),
            ("self_attn.o_proj", width, width), ("mlp.gate_proj", hidden, width), ("mlp.up_proj", hidden, width),
            ("mlp.down_proj", width, hidden),
        ):  # fmt: skip
            yield made(f"{own}{name}.weight", rows, columns)
        yield made(f"{own}input_layernorm.weight", width)
        yield made(f"{own}post_attention_layernorm.weight", width)
    yield made("model.norm.weight", width)
    yield made("lm_head.weight", options.tokens, width)


def hash_of(name: str) -> int:
    """Another number for each name, the same in every run."""
    return int.from_bytes(name.encode().ljust(8, b".")[-8:], "little") * 2654435761


def make(folder: Path, options: argparse.Namespace) -> int:
    """The checkpoint; returns its bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    values = (0.02 * rng.standard_normal(_NOISE, np.float32)).view(np.uint32)
    noise = (values >> 16).astype(np.uint16)
    shards: list[list[PiecewiseTensor]] = [[]]
    for tensor in tensors(options, noise):
        if sum(one.nbytes for one in shards[-1]) + tensor.nbytes > _SHARD:
            shards.append([])
        shards[-1].append(tensor)
    index: dict[str, str] = {}
    for number, held in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, held)
        index |= {tensor.name: name for tensor in held}
    total = sum(tensor.nbytes for held in shards for tensor in held)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": options.width,
        "intermediate_size": options.hidden, "num_hidden_layers": options.layers, "vocab_size": options.tokens,
        "num_attention_heads": options.width // 128, "num_key_value_heads": options.width // 512, "head_dim": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1, "</s>": 2}, merges=[])).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return total


def forget(folder: Path) -> None:
    """Drop a folder's pages from memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            system.drop_cached(file.fileno())


def copied(source: Path, target: Path) -> float:
    """Seconds that a copy of the files takes until they are on the disk."""
    started = time.monotonic()
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb") as there, (target / path.name).open("wb") as here:
            shutil.copyfileobj(there, here, 8 << 20)
            here.flush()
            os.fsync(here.fileno())
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--level", default="FP8-DYNAMIC")
    for name, default in (("--layers", 32), ("--rounds", 1), ("--threads", 2)):
        parser.add_argument(name, type=int, default=default)
    for name, default in (("--width", 4096), ("--hidden", 14336), ("--tokens", 128256)):
        parser.add_argument(name, type=int, default=default, help="other shapes, to try the script out")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint, and take one that is there")
    options = parser.parse_args()
    folder = options.scratch / "straight_speed"
    source = folder / "model"
    try:
        if not (source / "tokenizer.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(source, options)
        total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"{options.layers} layers, {total / 1e9:.1f} GB, {options.level}, {options.threads} threads", flush=True)
        for number in range(options.rounds):
            forget(source)
            seconds = copied(source, folder / "copy")
            print(f"round {number + 1}: copy {seconds:.0f} s, {total / seconds / 1e6:.0f} MB/s", flush=True)
            forget(folder / "copy")
            shutil.rmtree(folder / "copy")
            forget(source)
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            environment = {**os.environ, "BITLADDER_CACHE": str(folder / "cache")}
            subprocess.run(
                [sys.executable, "-m", "bitladder", "quantize", str(source), "--to", options.level, "--out",
                 str(folder / "out"), "--threads", str(options.threads)],
                check=True, env=environment, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            seconds, used = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
            made = sum(path.stat().st_size for path in (folder / "out").rglob("*.safetensors"))
            print(
                f"round {number + 1}: {options.level} {seconds:.0f} s, {total / seconds / 1e6:.0f} MB/s read, "
                f"{made / 1e9:.1f} GB written, {cpu:.0f} CPU s, peak {used.ru_maxrss / 1e6:.2f} GB",
                flush=True,
            )
            shutil.rmtree(folder / "out")
            shutil.rmtree(folder / "cache", ignore_errors=True)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
