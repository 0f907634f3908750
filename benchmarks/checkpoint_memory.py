"""Claim: GPTQ of an 8-billion-parameter model needs under 4 GB: one layer, its Hessian, hidden states spilled.

    scripts/bench checkpoint_memory --scratch DIR [--level GPTQ-4bit-g64] [--windows 64] [--layers 1] [--threads 1]

Makes a GGUF file with the shapes of Llama 3 8B (4096 wide, 14,336 in the MLP, 128,256 tokens) and as many of its 32
layers as asked for: random weights in the layers, and holes for the embedding and head except for the rows of the
tokens in use. Memory does not grow with the number of layers, hidden states pass through one after another. Builds
the level, from reading the file to the proof of the written folder, and prints the largest resident memory of the
process and seconds. The file and the folder (about 5 GB, of which 2 GB are holes) are removed afterwards.
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from bitladder.describe.shapes import Shape
from bitladder.describe.windows import WINDOW, Window
from bitladder.files.gguf import GgufFile
from bitladder.files.stub_gguf import write_stub
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.walk.checkpoint_walk import Settings

_TOKENS = 1024
"""Tokens in use: the first ones."""


def peak_bytes() -> int:
    """This process's own peak; ru_maxrss would count whoever started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def make_model(path: Path, shape: Shape) -> None:
    """A hollow file with noise where the walk looks."""
    write_stub(path, shape, "F16")
    rng = np.random.default_rng(0)
    with GgufFile.open(path) as file, path.open("r+b") as target:
        for tensor in file.model.tensors:
            if len(tensor.shape) > 1 and not tensor.name.startswith(("blk.", "token_embd.")):
                continue
            rows = _TOKENS if tensor.name.startswith("token_embd.") else tensor.shape[0]
            target.seek(file.place(tensor.name).offset)
            for start in range(0, rows, 1024):
                size = (min(1024, rows - start), *tensor.shape[1:])
                values = np.ones(size) if len(size) == 1 else 0.02 * rng.standard_normal(size, np.float32)
                target.write(values.astype(np.float32 if tensor.qtype == "F32" else np.float16).tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--level", default="GPTQ-4bit-g64")
    for name, default in (("--windows", 64), ("--layers", 1), ("--threads", 1)):
        parser.add_argument(name, type=int, default=default)
    for name, default in (("--width", 4096), ("--hidden", 14336), ("--tokens", 128256)):
        parser.add_argument(name, type=int, default=default, help="other shapes, to try the script out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = Shape(
        "8B", "llama", options.layers, options.width, options.hidden,
        n_head=options.width // 128, n_head_kv=options.width // 512, n_vocab=options.tokens, n_ctx=8192,
    )  # fmt: skip
    folder = options.scratch / "checkpoint_memory"
    folder.mkdir(parents=True)
    try:
        make_model(folder / "model.gguf", shape)
        rng = np.random.default_rng(1)
        windows = [Window("noise", rng.integers(0, _TOKENS, WINDOW)) for _ in range(options.windows)]
        started, cpu, before = time.monotonic(), time.process_time(), peak_bytes()
        with GgufFile.open(folder / "model.gguf") as source:
            Calibration(
                source, [parse_checkpoint(options.level)], Reading(windows),
                out_dir=folder, name="model", settings=Settings(threads=options.threads),
            ).run()  # fmt: skip
        took = f"{time.monotonic() - started:.0f} s, {time.process_time() - cpu:.0f} CPU s"
        what = f"{options.level}, {options.layers} of 32 layers, {options.windows} windows"
        print(f"{what}: peak {peak_bytes() / 1e9:.2f} GB ({before / 1e9:.2f} before), {took}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
