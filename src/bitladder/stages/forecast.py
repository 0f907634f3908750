"""Before a job what it will take, with a refusal where it cannot end well; after it what it took."""

from __future__ import annotations

import functools
import glob
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.errors import OutputError
from bitladder.stages.job import Build, Job, Journal
from bitladder.units import Basis, human_bytes

if TYPE_CHECKING:
    from bitladder.describe.model import Model
    from bitladder.describe.windows import Window
    from bitladder.files.gguf import GgufFile
    from bitladder.levels import Level
    from bitladder.plan.preflight import JobNeed

_ASSUMED_RANGE = 2.5
"""Factor either way before any job of a kind has run here: about what the first ones strayed by."""
_WORTH_SAYING_S = 3.0
PASSES = ("", "", "")
"""Beside the way there, in the place of levels: the way back through a model costs three passes more."""


@contextmanager
def forecast(need: JobNeed, journal: Journal, folder: Path | None = None) -> Iterator[None]:
    """Refuse, or say what it will take; afterwards compare, and keep the comparison for the next prediction.

    Args:
        need: the prediction by formula.
        journal: told both, and keeps the outcome for the run's record.
        folder: where the job writes; decides which drive's free space counts.

    Raises:
        NothingFits: too little memory or disk; the message says how much is missing.
    """
    from bitladder.files.job_log import correction, keep_job, read_jobs
    from bitladder.files.probe import probe_machine
    from bitladder.plan.preflight import require
    from bitladder.records.job import JobOutcome

    machine = probe_machine(folder)
    require(need, machine)
    if need.seconds <= 0:  # everything is there already
        yield
        return
    known = correction(read_jobs(machine), need.kind, need.seconds)
    expected, spread = corrected_seconds(need), known.spread or _ASSUMED_RANGE
    if expected >= _WORTH_SAYING_S:
        journal.say(f"{need.what}: {_seconds(expected / spread)} to {_seconds(expected * spread)}, {_room(need)}.")
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    outcome = JobOutcome(
        kind=need.kind,
        what=need.what,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        by_formula_s=need.seconds,
        predicted_s=expected,
        low_s=expected / spread,
        high_s=expected * spread,
        label=Basis.MEASURED if known.jobs else Basis.ASSUMED,
        took_s=took,
        ram_bytes=need.ram_bytes,
        disk_bytes=need.disk_bytes,
    )
    journal.jobs.append(outcome)
    if max(expected, took) >= _WORTH_SAYING_S:
        journal.say(f"{need.what}: predicted {_seconds(expected)}, took {_seconds(took)}.")
    try:
        keep_job(machine, outcome)
    except OutputError as error:  # the work itself is done and safe
        journal.warn(error.found)


def corrected_seconds(need: JobNeed) -> float:
    """What a job will take, corrected by what earlier ones of its kind took on this machine; a walk, where there was
    none and no rate is measured, by what a moment of multiplying tells."""
    from bitladder.files.job_log import correction, read_jobs
    from bitladder.files.probe import probe_machine
    from bitladder.plan.preflight import ASSUMED_FLOPS, WALK_START_S

    if need.seconds <= 0:
        return 0.0
    machine = probe_machine()
    known = correction(read_jobs(machine), need.kind, need.seconds)
    if known.jobs or need.kind not in ("walk", "importance") or need.label is not Basis.ASSUMED:
        return need.seconds * known.factor
    from bitladder.walk.products import wants_half_products

    operations = (need.seconds - WALK_START_S) * ASSUMED_FLOPS * machine.cores
    half = need.kind == "importance" and wants_half_products(None, "cpu")
    return WALK_START_S + operations / (_WALK_SHARE * _rate_of_products(half=half))


_WALK_SHARE = 0.6
"""Of the rate of large products, that a walk reaches."""


@functools.cache
def _rate_of_products(*, half: bool) -> float:
    """Operations per second of products f32[1024, 1024], or of bfloat16, the best of a few."""
    import torch

    from bitladder.walk.products import linear

    one, best = torch.ones(1024, 1024, dtype=torch.bfloat16 if half else torch.float32), 0.0
    for _ in range(4):
        began = time.perf_counter()
        linear(one, one)
        best = max(best, 2 * 1024**3 / (time.perf_counter() - began))
    return best


@functools.cache
def rate_of_reading() -> float:
    """Bytes of memory per second that this machine's cores read together, as a moment tells."""
    from bitladder.files.probe import available_cores
    from bitladder.stages.measure_machine import ram_read

    return ram_read(min(available_cores(), _MOST_READING))


_MOST_READING = 4
"""Cores that are asked: more are seldom quicker, and each takes an array far larger than a cache."""


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _room(need: JobNeed) -> str:
    disk = f", {human_bytes(need.disk_bytes)} of disk" if need.disk_bytes else ""
    return f"up to {human_bytes(need.ram_bytes)} of memory{disk}"


def building_need(job: Job, levels: Sequence[Level], build: Build) -> JobNeed:
    """What writing those of the levels will take that are not there yet, where they are written or in other folders."""
    from bitladder.files.probe import probe_machine
    from bitladder.plan.cost import level_size
    from bitladder.plan.preflight import quantize_need, weights_to_convert

    source, places = job.source, [build.out, *build.folders]
    missing = [
        level
        for level in dict.fromkeys(levels)
        if not any(_is_there(place, f"{source.model.name}-{level}") for place in places)
    ]
    sizes = [level_size(source.model, level) for level in missing]
    need = quantize_need(
        weights_to_convert(sizes),
        [size.file_bytes for size in sizes],
        probe_machine(build.out),
        threads=job.threads,
        effort=build.effort,
    )
    return need.named(f"quantize {', '.join(map(str, missing)) or 'nothing'}")


def _is_there(out: Path, name: str) -> bool:
    """Whole, or in parts."""
    return (out / f"{name}.gguf").exists() or any(out.glob(f"{glob.escape(name)}-00001-of-*.gguf"))


def walking_need(
    source: GgufFile,
    windows: Sequence[Window] | int,
    levels: Sequence[str],
    *,
    kind: str = "walk",
    beside: bool = True,
) -> JobNeed:
    """What one pass over the layers will take: of the source and ``levels`` beside it, on windows or a number of tokens
    that is estimated. Without ``beside`` of the levels alone."""
    from bitladder.files.measured import load_measured
    from bitladder.files.probe import probe_machine
    from bitladder.plan.abilities import Route
    from bitladder.plan.preflight import LOOKED_AT, walk_need
    from bitladder.stages.model_route import route_of

    machine = probe_machine()
    measured = load_measured(machine)
    dims = source.model.dims
    tokens = windows if isinstance(windows, int) else sum(len(window.tokens) for window in windows)
    head = dims.n_vocab * dims.n_embd if levels else 0
    used, alone = weights_used(source.model) + head, len(levels) if beside else len(levels) - 1
    need = walk_need(
        4 * largest_layer(source.model), 4 * head, tokens, dims.n_embd, alone, 2 * used * tokens, machine,
        flops=measured.f32_matmul if measured else 0.0,
        layers_held=LOOKED_AT if route_of(source) is Route.DERIVED else 2.0,
    )  # fmt: skip
    names = f"measure {', '.join(levels)}" if levels else "gather an importance matrix"
    return need.named(f"{names} on {tokens} tokens", kind)


def with_tuning(need: JobNeed, source: GgufFile, numbers: int, windows: Sequence[Window]) -> JobNeed:
    """What making a level takes of which so many numbers are tuned afterwards: these with their slopes and two running
    means of each, a layer's gradient, states of all layers of a step; and the time of its steps, forward, back and
    forward again."""
    from bitladder.plan.preflight import STATE_BYTES
    from bitladder.plan.tuning import held_places
    from bitladder.walk.tuning import TuneSettings

    settings, dims = TuneSettings.for_windows(len(windows)), source.model.dims
    longest = max(len(window.tokens) for window in windows)
    step = settings.windows * longest
    held = len(held_places([window.document for window in windows])) * longest * settings.steps // settings.look
    once = walking_need(source, 4 * step * settings.steps + held + len(windows) * longest, ("",))
    held_numbers = 6 * 4 * numbers
    states = (
        4 * (dims.n_layer + 2) * step * dims.n_embd + 4 * sum(len(window.tokens) for window in windows) * dims.n_embd
    )
    ram = held_numbers + 8 * largest_layer(source.model) + min(states, STATE_BYTES)
    return replace(
        need, what=f"{need.what}, and tune it", ram_bytes=need.ram_bytes + ram,
        disk_bytes=need.disk_bytes + max(0, states - STATE_BYTES) + held_numbers,
        seconds=need.seconds + once.seconds / 2, kind=f"{need.kind} and tune",
    )  # fmt: skip


def largest_layer(model: Model) -> int:
    """Weights of the largest layer."""
    layers: dict[str, int] = {}
    for tensor in model.tensors:
        if tensor.name.startswith("blk."):
            layer = tensor.name.split(".", 2)[1]
            layers[layer] = layers.get(layer, 0) + tensor.elements
    return max(layers.values(), default=0)


def weights_used(model: Model) -> float:
    """Weights of the layers that a token is multiplied with, on average; of experts those it is routed to."""
    from bitladder.formats.parts import parts_of

    dims = model.dims
    layers = [tensor for tensor in model.tensors if tensor.name.startswith("blk.")]
    experts = sum(tensor.elements for tensor in model.tensors if "experts" in parts_of([tensor]))
    active = dims.n_expert_used / dims.n_expert if dims.n_expert else 1.0
    return sum(tensor.elements for tensor in layers) - (1 - active) * experts
