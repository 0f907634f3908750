"""Claim: an 8 GB F16 model goes to three levels in under 1 GB of memory, near the speed of its slower half.

    scripts/bench big_file [--gigabytes 8] [--threads 2] [--effort good] [--folder DIR]

Makes a synthetic llama-shaped F16 GGUF (noise with the spread of real weights), writes Q8_0, Q5_K_M and
Q4_K_M from it in one pass, and compares the time with the slower of two bounds: reading the file once, and
the kernels alone on the same pieces from memory (one piece in sixteen is timed and scaled up). Memory is the
peak of the resident set above an interpreter that has the package imported and its kernels compiled. Needs
about two and a half times the file's size on the disk; everything is removed.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bitladder.files.gguf import GgufFile
from bitladder.files.gguf_writer import encoded, layout
from bitladder.formats import gguf
from bitladder.formats.recipes import assign
from bitladder.formats.tensors import TensorInfo
from bitladder.kernels import Effort, dequantize, first_nonfinite, quantize
from bitladder.stages.write_levels import pieces_of

LEVELS = ("Q8_0", "Q5_K_M", "Q4_K_M")
WIDTH, HIDDEN, HEADS, VOCABULARY = 4096, 14336, 32, 32000
SAMPLE = 16

CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np
from bitladder.files.gguf import GgufFile
from bitladder.kernels import dequantize, quantize
from bitladder.stages.write_levels import quantize_levels
source, out, levels, effort = sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4]
threads = int(sys.argv[5])
few = dequantize(np.zeros((8, 2048), np.uint8), "F16")
for qtype in ("Q8_0", "Q4_K", "Q5_K", "Q6_K"):
    quantize(few, qtype, effort=effort)
def peak():  # not ru_maxrss, which a process inherits from whoever started it
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

before, started, cpu = peak(), time.perf_counter(), time.process_time()
files = quantize_levels(GgufFile.open(Path(source)), levels, Path(out), effort=effort, threads=threads)
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
written = sum(file.bytes for file in files)
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak(), "before": before, "bytes": written}))
"""


def tensors_of(n_layer: int) -> list[TensorInfo]:
    """A llama-shaped model: grouped heads, an output matrix of its own."""
    shapes = {
        "attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 4, WIDTH), "attn_v": (WIDTH // 4, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,), "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }  # fmt: skip
    tensors = [TensorInfo(f"{name}.weight", (VOCABULARY, WIDTH), "F16") for name in ("token_embd", "output")]
    tensors.append(TensorInfo("output_norm.weight", (WIDTH,), "F32"))
    for layer in range(n_layer):
        for name, shape in shapes.items():
            tensors.append(TensorInfo(f"blk.{layer}.{name}.weight", shape, "F32" if len(shape) == 1 else "F16"))
    return tensors


def make_model(path: Path, size: int) -> None:
    """Write about ``size`` bytes: noise from one block, at another offset each time so that pages differ."""
    layer_bytes = sum(tensor.nbytes for tensor in tensors_of(1)) - sum(tensor.nbytes for tensor in tensors_of(0))
    n_layer = max(1, (size - sum(tensor.nbytes for tensor in tensors_of(0))) // layer_bytes)
    numbers = {
        "block_count": n_layer,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "context_length": 4096,
    }
    numbers |= {"attention.head_count": HEADS, "attention.head_count_kv": HEADS // 4}
    numbers |= {"vocab_size": VOCABULARY, "rope.dimension_count": WIDTH // HEADS}
    metadata = {"general.architecture": encoded(gguf.STRING, "llama")}
    metadata["tokenizer.ggml.model"] = encoded(gguf.STRING, "no_vocab")
    metadata["llama.attention.layer_norm_rms_epsilon"] = encoded(gguf.FLOAT32, 1e-5)
    metadata |= {f"llama.{key}": encoded(gguf.UINT32, value) for key, value in numbers.items()}
    tensors = tensors_of(n_layer)
    plan = layout(metadata, tensors, gguf.DEFAULT_ALIGNMENT)
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(32 << 20, np.float32) * 0.02).astype(np.float16).tobytes()
    with path.open("wb") as file:
        file.write(plan.header)
        for offset, tensor in zip(plan.offsets, tensors, strict=True):
            file.seek(offset)
            if tensor.qtype == "F32":
                file.write(struct.pack("<f", 1.0) * tensor.elements)
                continue
            left, start = tensor.nbytes, 2 * int(rng.integers(0, 1 << 20))
            while left:
                left -= file.write(noise[start : start + left])
                start = 0
        file.truncate(plan.size)


def read_seconds(path: Path) -> float:
    buffer, started = bytearray(8 << 20), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def kernel_seconds(path: Path, effort: Effort, threads: int) -> tuple[float, float]:
    """Decode, check and quantize every sixteenth piece from memory, on all threads; scaled to all pieces by
    weights.
    """
    with GgufFile.open(path) as source:
        model = source.model
        mixes = [assign(level, model.tensors, model.dims) for level in LEVELS]
        pieces = [piece for info in model.tensors if info.qtype == "F16" for piece in pieces_of(info)]
        sample = pieces[::SAMPLE]
        raw = [np.array(source.raw(piece.info.name)[piece.start : piece.stop]) for piece in sample]

        def work(index: int) -> None:
            weights = dequantize(raw[index], "F16")
            assert first_nonfinite(weights) is None
            for qtype in {mix[sample[index].info.name] for mix in mixes}:
                quantize(weights, qtype, effort=effort)

        work(0)
        started, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(len(sample))))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    rows = [piece.stop - piece.start for piece in pieces]
    whole = sum(count * piece.info.shape[-1] for count, piece in zip(rows, pieces, strict=True))
    part = sum(array.size // 2 for array in raw)
    return seconds * whole / part, cpu * whole / part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--effort", default="good")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "big-F16.gguf"
        make_model(source, int(options.gigabytes * 1e9))
        reading = read_seconds(source)
        kernels, kernels_cpu = kernel_seconds(source, options.effort, options.threads)
        command = [sys.executable, "-c", CHILD, str(source), str(Path(folder) / "out"), ",".join(LEVELS)]
        command += [options.effort, str(options.threads)]
        environment = {**os.environ, "BITLADDER_CACHE": str(Path(folder) / "cache")}
        done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
        size = source.stat().st_size
    bound = max(reading, kernels)
    print(f"{size / 1e9:.2f} GB F16 to {', '.join(LEVELS)}, effort {options.effort}, {options.threads} threads")
    print(f"reading the file once   {reading:7.1f} s")
    print(f"kernels alone           {kernels:7.1f} s   CPU {kernels_cpu:.1f} s (one piece in {SAMPLE}, scaled)")
    ratio = f"{done['seconds'] / bound:.2f}x the slower of the two"
    print(f"the pass                {done['seconds']:7.1f} s   CPU {done['cpu']:.1f} s   {ratio}")
    print(f"written                 {done['bytes'] / 1e9:7.2f} GB")
    above = (done["peak"] - done["before"]) / 1e6
    print(f"peak memory             {done['peak'] / 1e6:7.0f} MB, {above:.0f} MB above the interpreter with kernels")


if __name__ == "__main__":
    main()
