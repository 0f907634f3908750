"""llama-quantize reads the importance matrices that Bitladder writes, both kinds, value by value.

    scripts/bench imatrix_read --llama-quantize PATH

PATH is llama.cpp's own program (``cmake --build build --target llama-quantize``). It quantizes a small random model
with each file; every matrix must then hold the very bytes that ggml's quantizer (libgguf) makes with the vectors
that were written, and other bytes than it makes without. Prints a line per file and level.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from libgguf_here import libgguf_or_exit

from bitladder.files.gguf import GgufFile
from bitladder.files.imatrix import ImportanceMatrix, write_imatrix

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from gguf_bytes import key, string, tiny_weights, u32, write_model

WIDTH, HIDDEN = 256, 512
KINDS: tuple[Literal["gguf", "dat"], ...] = ("gguf", "dat")
SHAPE = {
    "block_count": 2,
    "embedding_length": WIDTH,
    "feed_forward_length": HIDDEN,
    "context_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 64,
    "vocab_size": 96,
}
KEYS = (
    string("general.architecture", "llama"),
    string("tokenizer.ggml.model", "no_vocab"),
    key("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
    *(u32(f"llama.{name}", value) for name, value in SHAPE.items()),
)


def random_matrix(source: GgufFile) -> ImportanceMatrix:
    rng = np.random.default_rng(1)
    matrices = [tensor for tensor in source.model.tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
    means = {one.name: rng.lognormal(0, 2, (1, one.shape[1])).astype(np.float32) for one in matrices}
    counts = {name: np.array([512], np.float32) for name in means}
    return ImportanceMatrix(means, counts, chunks=3, chunk_size=512, datasets=("random",))


def equal_tensors(libgguf: Any, source: GgufFile, made: GgufFile, matrix: ImportanceMatrix) -> tuple[int, int]:
    """How many tensors are what ggml makes of them with these vectors, and without any."""
    found = [0, 0]
    for name, vector in matrix.vectors().items():
        kind, bytes_there = libgguf.GGMLQuantizationType[made.info(name).qtype], made.raw(name)
        for number, given in enumerate((vector, None)):
            wanted = libgguf.quantize_rows(source.read(name), kind, imatrix=given)
            found[number] += np.array_equal(wanted.reshape(bytes_there.shape), bytes_there)
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-quantize", required=True, type=Path)
    parser.add_argument("--levels", default="Q4_K_M,Q2_K")
    options = parser.parse_args()
    libgguf = libgguf_or_exit()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with GgufFile.open(write_model(folder / "tiny-F16.gguf", tiny_weights(WIDTH, HIDDEN), keys=KEYS)) as source:
            matrix = random_matrix(source)
            for kind in KINDS:
                file = folder / f"written.{kind}"
                write_imatrix(file, matrix, kind)
                for level in options.levels.split(","):
                    out = folder / f"{kind}-{level}.gguf"
                    command = [options.llama_quantize, "--imatrix", file, source.path, out, level, "1"]
                    subprocess.run(command, check=True, capture_output=True)
                    with GgufFile.open(out) as made:
                        same, unweighted = equal_tensors(libgguf, source, made, matrix)
                    total = len(matrix.mean_squares)
                    print(
                        f"{kind:4} {level:7} {same} of {total} tensors as with these vectors, {unweighted} as without"
                    )


if __name__ == "__main__":
    main()
