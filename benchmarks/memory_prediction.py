"""Claim: planned memory is what the engine allocates, every part within 3% or 16 MiB.

Both sides in one run: the plan from a header, and llama.cpp's own load report of the same file (xllamacpp in a child
process, loaded for real; the weights are a hole, which changes nothing about memory).

    python benchmarks/memory_prediction.py [--model GGUF ...] [--levels Q8_0,Q4_K_M] [--contexts 512,8192]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bitladder.describe.cache import cache_bytes, layer_caches
from bitladder.describe.model import Model
from bitladder.files.gguf import read_header
from bitladder.files.level_files import draft_level
from bitladder.files.sources import resolve
from bitladder.formats.recipes import LEVELS
from bitladder.formats.tensors import TensorInfo
from bitladder.plan.memory import compute_buffers
from bitladder.units import MiB

CONTEXTS = (512, 1024, 2048, 4096, 8192)
CACHES = ("f16", "q8_0")
REPACKED = frozenset({"Q4_0", "Q4_K", "IQ4_NL"})
"""Types of which the engine makes a second copy for a CPU's vector units, interleaved by eight rows."""
LOADER = """
import sys, xllamacpp as xl
p = xl.CommonParams()
p.model.path, p.n_ctx, p.n_parallel = sys.argv[1], int(sys.argv[2]), 1
kind = {"f16": xl.ggml_type.GGML_TYPE_F16, "q8_0": xl.ggml_type.GGML_TYPE_Q8_0}[sys.argv[3]]
p.cache_type_k = p.cache_type_v = kind
p.verbosity, p.warmup, p.port = 10, False, 0
p.cpuparams.n_threads = 2
server = xl.Server(p)
"""
DONE = "prompt cache is enabled"
"""A line the engine prints once everything is allocated."""


def engine_report(path: Path, n_ctx: int, cache: str) -> dict[str, float]:
    """MiB the engine says it allocated, by kind, from its last load."""
    child = subprocess.Popen(
        [sys.executable, "-c", LOADER, str(path), str(n_ctx), cache],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    lines = []
    assert child.stderr is not None
    for line in child.stderr:
        lines.append(line)
        if DONE in line:
            break
    child.kill()
    child.wait()
    text = "".join(lines)
    loads = text.split("loading model tensors, this can take a while")
    if len(loads) < 2 or DONE not in text:
        raise RuntimeError("the engine did not load: " + "".join(lines[-5:]))
    last = loads[-1]  # before it stands a dry run that sizes buffers
    amounts = {
        "model": sum(float(value) for value in re.findall(r"model buffer size =\s+([\d.]+) MiB", last)),
        "kv": sum(float(value) for value in re.findall(r"KV buffer size =\s+([\d.]+) MiB", last)),
        "compute": sum(float(value) for value in re.findall(r"compute buffer size =\s+([\d.]+) MiB", last)),
    }
    return {**amounts, "total": sum(amounts.values())}


def repacked_bytes(tensors: Sequence[TensorInfo]) -> int:
    """Bytes of the second copy that a CPU engine keeps of layers' matrices in some types.

    The originals stay mapped from the file and may be dropped by the system, so this is no more memory in the end,
    but the engine reports both, and both are there while it loads.
    """
    return sum(tensor.nbytes for tensor in tensors if _is_repacked(tensor))


def mapped_bytes(tensors: Sequence[TensorInfo]) -> int:
    """Bytes from the first to the last tensor that a CPU engine uses straight from the file (tensors in file
    order).
    """
    used = [number for number, tensor in enumerate(tensors) if not _is_repacked(tensor)]
    return sum(tensor.nbytes for tensor in tensors[used[0] : used[-1] + 1]) if used else 0


def _is_repacked(tensor: TensorInfo) -> bool:
    return (
        tensor.qtype in REPACKED
        and len(tensor.shape) > 1
        and tensor.shape[-2] % 8 == 0
        and tensor.name != "token_embd.weight"
    )


def predicted(path: Path, n_ctx: int, cache: str) -> dict[str, float]:
    """MiB by kind from the header alone."""
    model = read_header(path)
    qtype = cache.upper()
    amounts = {
        "model": (mapped_bytes(model.tensors) + repacked_bytes(model.tensors)) / MiB,
        "kv": cache_bytes(layer_caches(model), n_ctx, type_k=qtype, type_v=qtype).total / MiB,
        "compute": compute_buffers(model, n_ctx).compute / MiB,
    }
    return {**amounts, "total": sum(amounts.values())}


def compare(path: Path, level: str, contexts: Sequence[int]) -> list[dict[str, object]]:
    """One row per context and cache type."""
    rows: list[dict[str, object]] = []
    for cache in CACHES:
        for n_ctx in contexts:
            ours, theirs = predicted(path, n_ctx, cache), engine_report(path, n_ctx, cache)
            worst = max(abs(ours[kind] - theirs[kind]) for kind in ours)
            within = all(abs(ours[kind] - theirs[kind]) <= max(16, 0.03 * theirs[kind]) for kind in ours)
            rows.append(
                {
                    "model": path.stem,
                    "level": level,
                    "n_ctx": n_ctx,
                    "kv": cache,
                    "predicted_mib": round(ours["total"], 2),
                    "engine_mib": round(theirs["total"], 2),
                    "worst_part_mib": round(worst, 2),
                    "within": within,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def hollow_level(model: Model, level: str, folder: Path) -> Path:
    """The file of a level with a hole for its weights: memory does not depend on what they are."""
    part = draft_level(model, level, folder).parts[0]
    with part.path.open("wb") as file:
        file.write(part.header("0" * 64))
        file.truncate(part.plan.size)
    return part.path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="GGUF or name; default: the demo model")
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    options = parser.parse_args()
    contexts = [int(text) for text in options.contexts.split(",")]
    rows: list[dict[str, object]] = []
    for name in options.model or ["smollm2-135m"]:
        model = read_header(resolve(name).path)
        with tempfile.TemporaryDirectory() as work:
            for level in options.levels.split(","):
                rows += compare(hollow_level(model, level, Path(work)), level, contexts)
    errors = [abs(float(str(row["predicted_mib"])) / float(str(row["engine_mib"])) - 1) for row in rows]
    print(
        f"{len(rows)} loads; total off by {max(errors):.2%} at most; "
        f"{sum(bool(row['within']) for row in rows)} of {len(rows)} have every part within 3% or 16 MiB"
    )
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
