"""Measure what decides speed on this machine, through the engine that will run the models, in under twenty
seconds.

Small models without weights (files/hollow.py) are timed in the real engine. Two per qtype, with long and with
short rows, give the rate at which weights of that type stream and multiply, and what a row costs beyond them;
two thin ones of different depth give what a layer costs beyond its bytes; one of little but heads gives the rate
of attention, over the cache and within a prompt. Beside them plain numbers of the machine: reading RAM with all
cores, a 32-bit matrix product, reading the drive.
"""

from __future__ import annotations

import datetime
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitladder import system
from bitladder.describe.machine import Machine
from bitladder.describe.rates import MeasuredMachine, PoolRates
from bitladder.describe.shapes import Shape
from bitladder.engines.base import Launch, Running
from bitladder.engines.registry import start
from bitladder.files.measured import machine_key
from bitladder.files.stub_gguf import N_VOCAB, write_stub
from bitladder.formats.blocks import QTYPES
from bitladder.progress import Progress, silent
from bitladder.units import Basis, MiB

QTYPES_MEASURED = ("F16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_0", "Q3_K", "Q2_K")
"""The types that the ladder's levels and their fallbacks are made of."""
_WIDE = Shape("long rows", "llama", 2, 2048, 8192, 16, 4, N_VOCAB, 8192, tied=True)
_NARROW = Shape("short rows", "llama", 16, 512, 1536, 8, 2, N_VOCAB, 8192, tied=True)
_THIN = Shape("thin", "llama", 4, 64, 64, 1, 1, N_VOCAB, 8192, tied=True)
_HEADS = Shape("heads", "llama", 8, 1024, 64, 8, 8, N_VOCAB, 8192, tied=True)
_PROMPT, _SHORT, _FAR = 128, 8, 512
_DECODED, _REPEATS = 12, 2
_TOKEN = 40


@dataclass(frozen=True)
class _Timing:
    """Seconds: of a whole prompt, and of one decoded token."""

    prompt: float
    token: float


def measure_machine(
    machine: Machine, *, threads: int = 0, engine: Callable[[Launch], Running] = start, progress: Progress = silent
) -> MeasuredMachine:
    """Measure; ``threads`` 0 means every core. ``engine`` starts what runs the stand-in models.

    Raises:
        EngineError: the engine did not run.
        OutputError: no room for the stand-in models (about 300 MB for a moment, as holes).
    """
    began = time.monotonic()
    threads = threads or machine.cores
    steps = 2 * len(QTYPES_MEASURED) + 4
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
            ram_read=ram_read(threads),
            f32_matmul=_f32_matmul(),
            disk_read=_disk_read(Path(work)),
            gpus=_gpus(machine),
        )
    progress("measured", steps, steps)
    return replace(found, seconds=time.monotonic() - began)


class _Timer:
    """Runs hollow models in the engine and times them."""

    def __init__(
        self, folder: Path, threads: int, steps: int, server: Callable[[Launch], Running], progress: Progress
    ) -> None:
        self.folder, self.threads, self.steps = folder, threads, steps
        self.server, self.progress = server, progress
        self.done = 0
        self.engine = ""
        self.strayed: list[float] = []
        """Every repeat's time over the fastest of its kind."""

    def run(self, shape: Shape, qtype: str, prompts: Sequence[int]) -> dict[int, _Timing]:
        """Per prompt length the best of some repeats."""
        self.progress(f"measuring {shape.name} {qtype}", self.done, self.steps)
        path = self.folder / "hollow.gguf"
        write_stub(path, shape, qtype)
        taken: dict[int, list[_Timing]] = {prompt: [] for prompt in prompts}
        with self.server(Launch(path, n_ctx=1024, threads=self.threads, n_gpu_layers=0)) as server:
            for _ in range(_REPEATS):
                for prompt in prompts:
                    decoded = 2 if prompt == _PROMPT else _DECODED  # that one is for its own time alone
                    taken[prompt].append(_timing(server.time_tokens([_TOKEN] * prompt, max_tokens=decoded)))
            self.engine = str(server.identity)
        path.unlink()
        self.done += 1
        best = {
            prompt: _Timing(min(one.prompt for one in each), min(one.token for one in each))
            for prompt, each in taken.items()
        }
        for prompt, each in taken.items():
            fastest = best[prompt].prompt if prompt == _PROMPT else best[prompt].token
            self.strayed += [(one.prompt if prompt == _PROMPT else one.token) / fastest for one in each]
        return best


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
    thin = [(shape, timer.run(shape, "F16", [_SHORT])[_SHORT]) for shape in (_THIN, replace(_THIN, n_layer=36))]
    heads = timer.run(_HEADS, "F16", [_SHORT, _FAR])
    kv_stream = _heads_bytes(_HEADS, _FAR - _SHORT) / max(1e-6, heads[_FAR].token - heads[_SHORT].token)
    timings = {
        qtype: [(shape, timer.run(shape, qtype, [_SHORT, _PROMPT])) for shape in (_WIDE, _NARROW)]
        for qtype in QTYPES_MEASURED
    }
    byte_s = row_s = 0.0
    for _ in range(3):  # the thin models have small matrices too, whose cost is known once the others' is
        fixed = _fixed_costs(thin, kv_stream, byte_s, row_s)
        byte_s, row_s = _two_costs(*(_decoding(fixed, "F16", *one) for one in timings["F16"]))
    decoding = {qtype: _two_costs(*(_decoding(fixed, qtype, *one) for one in each)) for qtype, each in timings.items()}
    attention = _attention_rate(fixed, heads, timings["F16"], decoding["F16"][0])
    prompting = {
        qtype: _two_costs(*(_prompting(fixed, attention, decoding[qtype][0], qtype, *one) for one in each))
        for qtype, each in timings.items()
    }
    return PoolRates(
        stream={qtype: 1 / byte_s for qtype, (byte_s, _) in decoding.items()},
        matmul={qtype: 1 / operation_s for qtype, (operation_s, _) in prompting.items()},
        kv_stream=kv_stream,
        attention=attention,
        layer_s=fixed.layer_s,
        token_s=fixed.token_s,
        prompt_s=fixed.prompt_s,
        source=Basis.MEASURED,
        row_s={qtype: row_s for qtype, (_, row_s) in decoding.items()},
        prompt_row_s={qtype: row_s for qtype, (_, row_s) in prompting.items()},
        heads_stream=kv_stream,
        noise=sorted(timer.strayed)[int(0.9 * len(timer.strayed))],
    )


@dataclass(frozen=True)
class _Fixed:
    """Seconds of a layer, a token and a prompt beyond their weights; bytes of cache per second."""

    layer_s: float
    token_s: float
    prompt_s: float
    kv_stream: float


def _fixed_costs(thin: Sequence[tuple[Shape, _Timing]], kv_stream: float, byte_s: float, row_s: float) -> _Fixed:
    """From two models of different depth; ``byte_s`` and ``row_s`` are what their small matrices cost in F16."""
    (shape, shallow), (deep, long) = thin
    weights, rows = _matrices(shape)
    own = weights * 2 * byte_s + rows * row_s + _heads_bytes(shape, _SHORT + _DECODED / 2) / shape.n_layer / kv_stream
    whole = (long.token - shallow.token) / (deep.n_layer - shape.n_layer)
    prompt = max(1e-6, shallow.prompt - shape.n_layer * whole)
    return _Fixed(max(1e-7, whole - own), max(1e-6, shallow.token - shape.n_layer * whole), prompt, kv_stream)


_Cost = tuple[float, float, float]
"""Seconds, units of work (bytes or operations), rows."""


def _two_costs(wide: _Cost, narrow: _Cost) -> tuple[float, float]:
    """Seconds per unit and per row that explain both; where rows would cost less than nothing, they cost nothing and
    the unit takes what both took together.
    """
    (t, work, rows), (t2, work2, rows2) = wide, narrow
    row_s = (t2 * work - t * work2) / (rows2 * work - rows * work2)
    unit_s = (t - rows * row_s) / work
    if row_s < 0 or unit_s <= 0:
        return max(1e-15, (t + t2) / (work + work2)), 0.0
    return unit_s, row_s


def _decoding(fixed: _Fixed, qtype: str, shape: Shape, timing: Mapping[int, _Timing]) -> _Cost:
    """A decoded token's seconds beyond what is fixed, its bytes and rows."""
    past = _heads_bytes(shape, _SHORT + _DECODED / 2) / fixed.kv_stream
    seconds = timing[_SHORT].token - fixed.token_s - shape.n_layer * fixed.layer_s - past
    weights, rows = _matrices(shape)
    return max(1e-6, seconds), shape.n_layer * weights * QTYPES[qtype].bpw / 8, shape.n_layer * rows


def _prompting(
    fixed: _Fixed, attention: float, byte_s: float, qtype: str, shape: Shape, timing: Mapping[int, _Timing]
) -> _Cost:
    """A prompt's seconds beyond what is fixed, its operations, and its rows times tokens.

    The engine computes the last layer's feed-forward part for the last token alone.
    """
    (weights, rows), (last, last_rows) = _matrices(shape), _feeding(shape)
    operations = shape.n_layer * 2 * shape.n_head * 2 * shape.head * _PROMPT**2 / 2
    seconds = timing[_PROMPT].prompt - fixed.prompt_s - shape.n_layer * fixed.layer_s - operations / attention
    seconds -= last * QTYPES[qtype].bpw / 8 * byte_s
    computed, met = shape.n_layer * weights - last, shape.n_layer * rows - last_rows
    return max(1e-6, seconds), 2 * computed * _PROMPT, met * _PROMPT


def _attention_rate(
    fixed: _Fixed, heads: Mapping[int, _Timing], timings: Sequence[tuple[Shape, Mapping[int, _Timing]]], byte_s: float
) -> float:
    """Operations per second of attention within a prompt: what a long prompt takes beyond its matrices. What those
    take follows from other prompts, of which in turn a part is attention.
    """
    attention = math.inf
    (weights, rows), (last, last_rows) = _matrices(_HEADS), _feeding(_HEADS)
    operations = _HEADS.n_layer * 2 * _HEADS.n_head * 2 * _HEADS.head * _FAR**2 / 2
    whole = heads[_FAR].prompt - fixed.prompt_s - _HEADS.n_layer * fixed.layer_s
    for _ in range(3):
        operation_s, row_s = _two_costs(*(_prompting(fixed, attention, byte_s, "F16", *one) for one in timings))
        own = 2 * (_HEADS.n_layer * weights - last) * operation_s + (_HEADS.n_layer * rows - last_rows) * row_s
        attention = operations / max(whole - _FAR * own, 0.1 * heads[_FAR].prompt)
    return attention


def _heads_bytes(shape: Shape, tokens: float) -> float:
    """16-bit keys and values that the heads of all layers read for one token."""
    return shape.n_layer * 2 * shape.n_head * shape.head * 2 * tokens


def _matrices(shape: Shape) -> tuple[int, int]:
    """Weights and rows of a layer's matrices."""
    inner, kv = shape.n_head * shape.head, shape.n_head_kv * shape.head
    weights, rows = _feeding(shape)
    return weights + shape.n_embd * (2 * inner + 2 * kv), rows + inner + 2 * kv + shape.n_embd


def _feeding(shape: Shape) -> tuple[int, int]:
    """Weights and rows of a layer's feed-forward part."""
    return 3 * shape.n_embd * shape.n_ff, 2 * shape.n_ff + shape.n_embd


def ram_read(threads: int) -> float:
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
        system.drop_cached(file.fileno())
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
