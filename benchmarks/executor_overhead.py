"""Claim: a walk on a Ray cluster of this machine takes at most a tenth longer than here.

    scripts/bench executor_overhead --model model-F16.gguf [--tokens 8192] [--repeats 3] [--threads 1]

Each repeat makes an importance matrix here, on a lane in this process and on Ray, in turns, so that other work on the
machine falls on all. Ray has one worker of as many threads as torch has here, started and warm. A repeat's ratio is
its seconds over those here; shown are the median and the range. Vectors must be equal.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bitladder.describe.windows import WINDOW, Window
from bitladder.executors.devices import Devices
from bitladder.executors.needs import Needs
from bitladder.executors.on_ray import connect
from bitladder.files.gguf import GgufFile
from bitladder.stages.imatrix import importance_matrix


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import ray

    ray.init("local", num_cpus=options.threads, include_dashboard=False, log_to_driver=False)
    ratios: dict[str, list[float]] = {"lane": [], "ray": []}
    with GgufFile.open(options.model) as source, connect(None, "cpu", Needs()) as cluster, Devices(["cpu"]) as lane:
        rng = np.random.default_rng(0)
        n_vocab = source.model.dims.n_vocab
        windows = [Window("text", rng.integers(0, n_vocab, WINDOW)) for _ in range(max(1, options.tokens // WINDOW))]
        importance_matrix(source, windows[:1], executor=cluster)  # workers import what they need
        for repeat in range(options.repeats):
            seconds, vectors = {}, {}
            for name, executor in (("here", None), ("lane", lane), ("ray", cluster)):
                began = time.perf_counter()
                vectors[name] = importance_matrix(source, windows, executor=executor).vectors()
                seconds[name] = time.perf_counter() - began
            for name, found in ratios.items():
                assert all(np.array_equal(vectors[name][one], vectors["here"][one]) for one in vectors["here"])
                found.append(seconds[name] / seconds["here"])
            print(f"{repeat + 1}: " + ", ".join(f"{name} {taken:.1f} s" for name, taken in seconds.items()), flush=True)
    ray.shutdown()
    for name, found in ratios.items():
        print(f"{name} over here: {statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})")
    return 0 if statistics.median(ratios["ray"]) <= 1.1 else 1


if __name__ == "__main__":
    sys.exit(main())
