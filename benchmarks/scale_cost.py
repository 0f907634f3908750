"""Claim: the cost model of long jobs (`plan MODEL --job`) is within its factor of 2 of what a job takes.

Makes a GPTQ level of the demo model with one thread in a process of its own, and compares processor seconds with the
prediction from this machine's measured rate of 32-bit products, both in processor seconds, so that other work on the
machine counts less. `--workers 1,2,4` takes the seconds a layer of the same level takes on so many Ray workers with a
thread each, against the phases of a layer (`plan/scale.layer_phases`) on them; of more workers than cores, each is
counted as slower by as much. `--table` prints the model's figures for 8B, 70B, 405B, a mixture of 671B and one of a
trillion instead. JSON is the last line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bitladder.describe.shapes import Shape, model_of
from bitladder.describe.windows import WINDOW, Window
from bitladder.files.catalogue import model_named
from bitladder.files.demo import fetch_demo
from bitladder.files.gguf import GgufFile, read_header
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.plan.scale import TOKENS, ScaleJob, Workers, gpu_workers, layer_phases, scale_cost, spread_seconds
from bitladder.progress import StepsOnly
from bitladder.stages.calibrate import Calibration, Reading

MODELS = (
    "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.1-405B-Instruct",
    "deepseek-ai/DeepSeek-V3",
)  # fmt: skip
TRILLION = Shape(
    "1T mixture", "deepseek2", 61, 7168, 18432, 64, 64, 163840, 131072, n_expert=384, n_expert_used=8, n_ff_expert=2048,
    n_ff_shared=2048, n_dense_layers=1, q_rank=1536, kv_rank=512, qk_nope=128, qk_rope=64, v_head=128,
)  # fmt: skip
"""DeepSeek V3's shape with half as many experts again."""
SIDE = 2048


def product_rate() -> float:
    """Operations per processor second of a large 32-bit product on one thread."""
    import torch

    torch.set_num_threads(1)
    a, b = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    a @ b
    rates = []
    for _ in range(5):
        began = time.process_time()
        a @ b
        rates.append(2 * SIDE**3 / (time.process_time() - began))
    return sorted(rates)[2]


def measured_seconds(model: Path) -> float:
    """Processor seconds of a GPTQ level in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bitladder", "quantize", str(model), "--to", "GPTQ-4bit-g64", "--threads", "1"]
        subprocess.run([*command, "--out", folder], env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class _Enough(Exception):
    """So many layers are timed."""


def layer_seconds(model: Path, workers: int, layers: int, tokens: int) -> float:
    """Median seconds of a layer on Ray workers; the first layer, in which they open the model, is not counted."""
    import ray

    from bitladder.executors.needs import Needs
    from bitladder.executors.on_ray import connect

    began: list[float] = []

    def progress(_what: str, layer: float, _total: float) -> None:
        began.append(time.perf_counter())
        if layer > layers:
            raise _Enough

    rng = np.random.default_rng(0)
    ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        with GgufFile.open(model) as file, connect(None, "cpu", Needs()) as cluster:
            ids = rng.integers(0, file.model.dims.n_vocab, (tokens // WINDOW, WINDOW))
            text, level = Reading([Window("text", one) for one in ids]), parse_checkpoint("GPTQ-4bit-g64")
            with tempfile.TemporaryDirectory() as out:
                work = Calibration(file, [level], text, out_dir=Path(out), name="timed", executor=cluster)
                with contextlib.suppress(_Enough):
                    work.run(StepsOnly(progress))
    finally:
        ray.shutdown()
    return float(statistics.median(np.diff(began)[1 : layers + 1]))


def on_workers(path: Path, counts: list[int], layers: int, tokens: int) -> list[dict[str, object]]:
    import torch

    rate = product_rate()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for count in counts:
        each = rate * min(1.0, len(os.sched_getaffinity(0)) / count)
        shape = Workers("here", count, 1, each, 1 << 40, 4, cores=1, host_flops=each, is_gpu=False)
        phases = layer_phases(read_header(path), 1, ScaleJob.GPTQ, shape, tokens=tokens)
        predicted = sum(spread_seconds(units, count) for units in phases)
        took = layer_seconds(path, count, layers, tokens)
        row: dict[str, object] = {"workers": count, "predicted_s": round(predicted, 2), "seconds": round(took, 2)}
        rows.append(row | {"ratio": round(took / predicted, 2)})
        print(rows[-1], flush=True)
    return rows


def table() -> list[dict[str, object]]:
    models = [*(model_named(name).whole() for name in MODELS), model_of(TRILLION, tensors=True)]
    rows: list[dict[str, object]] = []
    for model in models:
        for job in ScaleJob:
            for workers in gpu_workers("H100 SXM", 989.5, 80):
                cost = scale_cost(model, job, workers)
                rows.append({"model": model.name, "job": job, **vars(cost)})
                print(
                    f"{model.name:32} {job:10} {cost.workers:24} {cost.low_s / 60:8.1f} to {cost.high_s / 60:8.1f} min"
                    f" {cost.memory_bytes / 1e9:7.1f} GB each, {cost.moved_bytes / 1e9:9.0f} GB moved"
                    f" {'' if cost.fits else ' does not fit'}"
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=13_284, help="of the calibration text that ships, for the demo")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--workers", default="", help="Ray workers to time a layer on: 1,2,4")
    parser.add_argument("--layers", type=int, default=5, help="that are timed")
    options = parser.parse_args()
    if options.table:
        print(json.dumps({"tokens": TOKENS, "rows": table()}))
        return
    path = fetch_demo()
    if options.workers:
        counts = [int(one) for one in options.workers.split(",")]
        rows = on_workers(path, counts, options.layers, options.tokens)
        print(json.dumps({"tokens": options.tokens, "rows": rows}))
        return
    rate = product_rate()
    worker = Workers("this machine", 1, 1, rate, 1 << 40, 4, cores=1, host_flops=rate, is_gpu=False)
    predicted = scale_cost(read_header(path), ScaleJob.GPTQ, worker, tokens=options.tokens)
    took = measured_seconds(path)
    row = {
        "rate": rate,
        "predicted_s": round(predicted.seconds, 1),
        "processor_s": round(took, 1),
        "ratio": round(took / predicted.seconds, 2),
    }
    print(json.dumps({"rows": [row]}))


if __name__ == "__main__":
    main()
