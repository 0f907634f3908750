"""Quantizing loses less than with ggml's own code, tensor by tensor.

    scripts/bench kernel_error [MODEL.gguf] [--imatrix FILE] [--rows 256]

Both sides quantize the same rows of every matrix of an unquantized GGUF, or, without one, bell-shaped, heavy-tailed
and tiny samples. Three errors, as shares of ggml's: squared error weighted by importance (with one), plain squared
error (without), and without one also the error as ggml weighs it (its own code protects large weights then: |x| in
Q2_K, rms + |x| in Q4_K and Q5_K, x * x in the others). Prints the total over all tensors and the worst tensor; a JSON
line last. Importance comes from a llama.cpp imatrix file; without one it is drawn heavy-tailed, one for each width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from libgguf_here import libgguf_or_exit
from numpy.typing import NDArray

from bitladder.kernels import dequantize, quantize
from bitladder.kernels.rows import AFFINE, EFFORTS, SCALE, Effort

F32 = NDArray[np.float32]
Samples = Iterator[tuple[str, F32, F32]]


def drawn_importance(columns: int) -> F32:
    return np.random.default_rng(columns).lognormal(0, 1.5, columns).astype(np.float32)


def model_samples(path: Path, imatrix: Path | None, rows: int) -> Samples:
    from bitladder.files.gguf import GgufFile

    known: Mapping[str, F32] = {}
    if imatrix is not None:
        from bitladder.files.imatrix import read_imatrix

        known = read_imatrix(imatrix).vectors()
    with GgufFile.open(path) as source:
        for tensor in source.model.tensors:
            if len(tensor.shape) == 2 and tensor.shape[-1] % 256 == 0:
                weights = source.read(tensor.name, slice(0, rows)).astype(np.float32)
                yield tensor.name, weights, known.get(tensor.name, drawn_importance(weights.shape[1]))


def made_samples() -> Samples:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from kernel_samples import KINDS, sample, sample_importance

    for kind in KINDS:
        yield kind, sample(kind), sample_importance()


def ggml_weights(x: F32, qtype: str) -> F32:
    """What ggml multiplies squared errors with when it has no importance matrix."""
    if qtype == "Q2_K":
        return np.abs(x)
    if qtype in ("Q4_K", "Q5_K"):
        parts = x.reshape(-1, 32)
        weights: F32 = np.sqrt((parts * parts).mean(-1, keepdims=True)) + np.abs(parts)
        return weights.reshape(x.shape)
    return x * x


def errors(x: F32, back: F32, qtype: str, importance: F32 | None) -> dict[str, float]:
    square = (x.astype(np.float64) - back) ** 2
    if importance is not None:
        return {"importance": float((square * importance).sum())}
    return {"plain": float(square.sum()), "as ggml weighs": float((square * ggml_weights(x, qtype)).sum())}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", type=Path, nargs="?")
    options.add_argument("--imatrix", type=Path)
    options.add_argument("--rows", type=int, default=256)
    options.add_argument("--formats", default=",".join([*SCALE, *AFFINE]))
    chosen = options.parse_args()
    libgguf = libgguf_or_exit()
    samples = list(model_samples(chosen.model, chosen.imatrix, chosen.rows) if chosen.model else made_samples())
    found: list[dict[str, Any]] = []
    for qtype in chosen.formats.split(","):
        for weighted in (False, True):
            if not weighted and libgguf.quantize_requires_imatrix(libgguf.GGMLQuantizationType[qtype]):
                continue
            shares: dict[tuple[Effort, str], list[tuple[float, float, str]]] = {}
            for name, x, drawn in samples:
                importance = drawn if weighted else None
                stored = libgguf.quantize_rows(x, libgguf.GGMLQuantizationType[qtype], imatrix=importance)
                theirs = errors(x, dequantize(stored.reshape(len(x), -1), qtype), qtype, importance)
                for effort in EFFORTS:
                    back = dequantize(quantize(x, qtype, importance=importance, effort=effort), qtype)
                    for measure, error in errors(x, back, qtype, importance).items():
                        shares.setdefault((effort, measure), []).append((error, theirs[measure], name))
            for (effort, measure), list_of in shares.items():
                total = sum(a for a, _, _ in list_of) / sum(b for _, b, _ in list_of)
                worst, name = max((a / b, name) for a, b, name in list_of)
                least = min(a / b for a, b, _ in list_of)
                print(
                    f"{qtype:7}{measure:15}{effort:5} {total:.4f} of ggml's; "
                    f"tensors {least:.4f} to {worst:.4f} ({name})",
                    flush=True,
                )
                found.append({"qtype": qtype, "measure": measure, "effort": effort, "total": round(total, 4),
                              "least": round(least, 4), "worst": round(worst, 4), "worst_tensor": name})  # fmt: skip
    model = chosen.model.name if chosen.model else None
    print(json.dumps({"benchmark": "kernel_error", "model": model, "tensors": len(samples), "rows": found}))


if __name__ == "__main__":
    main()
