"""Measure what decides speed on this machine, through the engine that will run the models, in under twenty
seconds.

Small models without weights (files/hollow.py) are timed in the real engine: one per qtype, large enough that
its weights do not
fit in a cache, gives the rate at which weights of that type stream and multiply; two thin ones of different
depth give what a
layer costs beyond its bytes; one with wide heads gives the KV cache's rate. Beside them plain numbers of the
machine: reading
RAM with all cores, a 32-bit matrix product, reading the drive.
"""

from __future__ import annotations

import datetime
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitladder.describe.machine import Machine
from bitladder.describe.rates import MeasuredMachine, PoolRates
from bitladder.describe.shapes import Shape
from bitladder.engines.llama import LlamaServer
from bitladder.files.hollow import N_VOCAB, write_hollow
from bitladder.files.measured import machine_key
from bitladder.progress import Progress, silent
from bitladder.units import MiB

QTYPES_MEASURED = ("F16", "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_0", "Q3_K", "Q2_K")
"""The types that the ladder's levels and their fallbacks are made of."""
_WIDE = Shape("wide", "llama", 2, 2048, 8192, 16, 4, N_VOCAB, 8192, tied=True)
_THIN = Shape("thin", "llama", 4, 64, 64, 1, 1, N_VOCAB, 8192, tied=True)
_HEADS = Shape("heads", "llama", 8, 1024, 64, 8, 8, N_VOCAB, 8192, tied=True)
_PROMPT, _DECODED, _REPEATS = 128, 12, 2
_TOKEN = 40


@dataclass(frozen=True)
class _Timing:
    """Seconds: of a whole prompt, and of one decoded token."""

    prompt: float
    token: float


def measure_machine(
    machine: Machine, *, threads: int = 0, engine: type[LlamaServer] = LlamaServer, progress: Progress = silent
) -> MeasuredMachine:
    """Measure; ``threads`` 0 means every core. ``engine`` is what runs the stand-in models.

    Raises:
        EngineError: the engine did not run.
        OutputError: no room for the stand-in models (about 300 MB for a moment, as holes).
    """
    began = time.monotonic()
    threads = threads or machine.cores
    steps = len(QTYPES_MEASURED) + 4
    with tempfile.TemporaryDirectory(prefix="bitladder-measure-") as work:
        timer = _Timer(Path(work), threads, steps, engine, progress)
        rates = _rates(timer)
        progress("measuring RAM, arithmetic and disk", steps - 1, steps)
        found = MeasuredMachine(
            machine=machine_key(machine),
            engine=timer.engine,
            when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=0.0,
            rates=rates,
            ram_read=_ram_read(threads),
            f32_matmul=_f32_matmul(),
            disk_read=_disk_read(Path(work)),
            gpus=_gpus(machine),
        )
    progress("measured", steps, steps)
    return replace(found, seconds=time.monotonic() - began)


class _Timer:
    """Runs hollow models in the engine and times them."""

    def __init__(self, folder: Path, threads: int, steps: int, server: type[LlamaServer], progress: Progress) -> None:
        self.folder, self.threads, self.steps = folder, threads, steps
        self.server, self.progress = server, progress
        self.done = 0
        self.engine = ""

    def run(self, shape: Shape, qtype: str, prompts: Sequence[int]) -> tuple[int, dict[int, _Timing]]:
        """Bytes of the layers' matrices, and per prompt length the best of some repeats."""
        self.progress(f"measuring {shape.name} {qtype}", self.done, self.steps)
        path = self.folder / "hollow.gguf"
        nbytes = write_hollow(path, shape, qtype)
        best: dict[int, _Timing] = {}
        with self.server(path, n_ctx=2048, threads=self.threads, n_gpu_layers=0) as server:
            for _ in range(_REPEATS):
                for prompt in prompts:
                    took = _timing(server.time_tokens([_TOKEN] * prompt, max_tokens=_DECODED))
                    known = best.get(prompt, took)
                    best[prompt] = _Timing(min(took.prompt, known.prompt), min(took.token, known.token))
            self.engine = server.process.engine
        path.unlink()
        self.done += 1
        return nbytes, best


def _gpus(machine: Machine) -> tuple[Mapping[str, float], ...]:
    """GPU rates; torch, slow to import, only where there is a GPU to measure."""
    if not machine.gpus:
        return ()
    from bitladder.engines.gpu_rates import measure_gpus

    return measure_gpus()


def _timing(timings: Mapping[str, float]) -> _Timing:
    decoded = max(1.0, float(timings["predicted_n"]) - 1)  # the first one comes with the prompt
    return _Timing(timings["prompt_ms"] / 1e3, timings["predicted_ms"] / decoded / 1e3)


def _rates(timer: _Timer) -> PoolRates:
    """All rates, from differences between runs so that fixed costs cancel."""
    deep = replace(_THIN, n_layer=36)
    _, shallow = timer.run(_THIN, "F16", [8])
    _, long = timer.run(deep, "F16", [8])
    layer_s = max(1e-7, (long[8].token - shallow[8].token) / (deep.n_layer - _THIN.n_layer))
    token_s = max(1e-6, shallow[8].token - _THIN.n_layer * layer_s)
    prompt_s = max(1e-6, shallow[8].prompt - _THIN.n_layer * layer_s)
    stream, matmul = {}, {}
    for qtype in QTYPES_MEASURED:
        nbytes, timing = timer.run(_WIDE, qtype, [_PROMPT])
        fixed = _WIDE.n_layer * layer_s
        stream[qtype] = nbytes / max(1e-6, timing[_PROMPT].token - token_s - fixed)
        operations = 2 * _weights(_WIDE) * _PROMPT
        matmul[qtype] = operations / max(1e-6, timing[_PROMPT].prompt - prompt_s - fixed)
    kv_stream, attention = _attention_rates(timer, matmul["F16"], prompt_s)
    return PoolRates(stream, matmul, kv_stream, attention, layer_s, token_s, prompt_s, source="measured")


def _attention_rates(timer: _Timer, matmul: float, prompt_s: float) -> tuple[float, float]:
    """The KV cache's rate from decoding after a short and a long prompt; attention's from the long prompt."""
    short, far = 8, 1024
    _, timing = timer.run(_HEADS, "F16", [short, far])
    width = _HEADS.n_head_kv * _HEADS.head
    cached = _HEADS.n_layer * 2 * width * 2 * (far - short)
    kv_stream = cached / max(1e-6, timing[far].token - timing[short].token)
    arithmetic = 2 * _weights(_HEADS) * far / matmul
    operations = _HEADS.n_layer * 2 * _HEADS.n_head * 2 * _HEADS.head * far * far / 2
    left = timing[far].prompt - arithmetic - prompt_s
    return kv_stream, operations / max(left, 0.1 * timing[far].prompt)


def _weights(shape: Shape) -> int:
    kv = shape.n_head_kv * shape.head
    return shape.n_layer * shape.n_embd * (2 * shape.n_head * shape.head + 2 * kv + 3 * shape.n_ff)


def _ram_read(threads: int) -> float:
    """Bytes per second of summing arrays far larger than any cache, one per core at once."""
    arrays = [np.ones(16 * MiB, np.int64) for _ in range(threads)]

    def read() -> None:
        workers = [threading.Thread(target=array.max) for array in arrays]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return sum(array.nbytes for array in arrays) / _best(read, 3)


def _f32_matmul() -> float:
    """Operations per second of a 1024-cubed matrix product."""
    a = np.full((1024, 1024), 0.5, np.float32)
    return 2 * 1024**3 / _best(lambda: a @ a, 4)


def _disk_read(folder: Path) -> float:
    """Bytes per second of reading a fresh file back, dropped from the file system's cache where that is
    allowed.
    """
    size = 64 * MiB
    path = folder / "disk"
    with path.open("wb") as file:
        file.write(os.urandom(MiB) * (size // MiB))
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        while file.read(4 * MiB):
            pass
        return size / (time.perf_counter() - began)


def _best(work: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of some runs: whatever else runs only adds to it."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)
