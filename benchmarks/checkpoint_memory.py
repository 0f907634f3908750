"""Claim: GPTQ of an 8-billion-parameter model needs under 4 GB: one layer, its Hessian, hidden states spilled; on Ray,
workers of 2 GiB each will do.

    scripts/bench checkpoint_memory --scratch DIR [--level GPTQ-4bit-g64] [--windows 64] [--layers 1] [--threads 1]
        [--workers 2 [--worker-memory 2]]

Makes a GGUF file with the shapes of Llama 3 8B (4096 wide, 14,336 in the MLP, 128,256 tokens) and as many of its 32
layers as asked for: random weights in the layers, and holes for the embedding and head except for the rows of the
tokens in use. Memory does not grow with the number of layers, hidden states pass through one after another. Builds
the level, from reading the file to the proof of the written folder, and prints the largest resident memory of the
process and seconds. With ``--workers`` units are computed by so many workers of a Ray cluster on this machine, none of
which gets more private memory than asked for (by ``RLIMIT_DATA``; what lies in the object store is shared, and not
counted), and the most that any of them had is printed, too. The file and the folder (about 5 GB, of which 2 GB are
holes) are removed afterwards.
"""

import argparse
import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from bitladder.describe.shapes import Shape
from bitladder.describe.windows import WINDOW, Window
from bitladder.executors import Executor
from bitladder.files.gguf import GgufFile
from bitladder.files.stub_gguf import write_stub
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.units import GiB
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


class Limited:
    """A task whose workers may not have more private memory than this."""

    def __init__(self, task: Any, most: int) -> None:
        self.task, self.threads, self.most = task, task.threads, most

    def compute(self, lane: Any, unit: Any, *held: Any) -> Any:
        """As ``executors.Task``."""
        import resource

        # the limit counts what is only reserved, too: the stacks of Ray's threads
        sizes = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        reserved = [int(sizes[one].split()[0]) * 1024 for one in ("VmData", "RssAnon")]
        resource.setrlimit(resource.RLIMIT_DATA, (self.most + reserved[0] - reserved[1], resource.RLIM_INFINITY))
        return self.task.compute(lane, unit, *held)


@contextlib.contextmanager
def workers(count: int, threads: int, most: int) -> Iterator[Executor]:
    """A Ray cluster of this machine whose workers have so much memory."""
    import cloudpickle
    import ray

    from bitladder.executors.needs import Needs
    from bitladder.executors.on_ray import connect

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    ray.init(
        "local", num_cpus=count * threads, include_dashboard=False, log_to_driver=False, object_store_memory=6 << 30
    )
    try:
        with connect(None, "cpu", Needs()) as cluster:
            start, limited = cluster.start, dict[int, Limited]()
            cluster.start = lambda task, unit, *held, place=None: start(  # type: ignore[method-assign]
                limited.setdefault(id(task), Limited(task, most)), unit, *held, place=place
            )
            yield cluster
    finally:
        ray.shutdown()


class Watching:
    """The most private memory that any worker of Ray's had, looked at five times a second."""

    def __init__(self) -> None:
        self.most = 0
        self._done = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._done.wait(0.2):
            for one in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError, StopIteration):
                    if one.name().startswith("ray::"):
                        lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
                        own = next(line for line in lines if line.startswith("RssAnon"))
                        self.most = max(self.most, int(own.split()[1]) * 1024)

    def end(self) -> int:
        """Stop looking."""
        self._done.set()
        return self.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--level", default="GPTQ-4bit-g64")
    parser.add_argument("--workers", type=int, default=0, help="of Ray; 0: in this process")
    parser.add_argument("--worker-memory", type=float, default=2.0, help="GiB")
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
        limit, watching = int(options.worker_memory * GiB), Watching()
        spread = workers(options.workers, options.threads, limit) if options.workers else contextlib.nullcontext()
        with GgufFile.open(folder / "model.gguf") as source, spread as executor:
            Calibration(
                source, [parse_checkpoint(options.level)], Reading(windows),
                out_dir=folder, name="model", settings=Settings(threads=options.threads), executor=executor,
            ).run()  # fmt: skip
        took = f"{time.monotonic() - started:.0f} s, {time.process_time() - cpu:.0f} CPU s"
        if options.workers:
            most = watching.end() / GiB
            print(f"{options.workers} workers, {options.worker_memory:g} GiB each: at most {most:.2f} GiB of their own")
        what = f"{options.level}, {options.layers} of 32 layers, {options.windows} windows"
        print(f"{what}: peak {peak_bytes() / 1e9:.2f} GB ({before / 1e9:.2f} before), {took}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
