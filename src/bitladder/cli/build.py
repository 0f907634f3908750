"""Verbs about files: quantize, inspect, imatrix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from bitladder.cli.completion import level_names
from bitladder.cli.grouped import grouped
from bitladder.cli.terminal import JsonFlag, ModelArgument, print_json, progress_display, say, verb
from bitladder.errors import UsageError
from bitladder.executors.places import LOCAL, devices_named
from bitladder.files.probe import available_cores, bound_cores
from bitladder.records.plan import DEFAULT_CTX
from bitladder.units import check_above_zero, human_bytes, parse_bytes

if TYPE_CHECKING:
    from bitladder.kernels import Effort
    from bitladder.levels import Level
    from bitladder.records.fidelity import Way
    from bitladder.stages.job import Build, CalibrationPart, Work

_CONTEXT = f"{DEFAULT_CTX}, or the model's own if shorter"
Context = Annotated[
    int | None,
    typer.Option("--ctx", min=64, help="Context in tokens.", show_default=_CONTEXT),
]
Levels = Annotated[
    str | None,
    typer.Option(
        "--levels",
        metavar="L1,L2",
        help="Only these levels; all of the ladder by default (a gate needs them).",
        autocompletion=level_names,
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Worker threads.", show_default="all cores it may use")]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="D1,D2", help="Where walks compute and scales are searched for: cpu, cuda, cuda:0,cuda:1."
    ),
]
On = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="local|ray|ADDRESS",
        help="Who computes units of calibrating and quantizing: this process, or a Ray cluster (ray://HEAD:10001).",
    ),
]
UnitNeeds = Annotated[
    str,
    typer.Option("--unit-needs", metavar="N=A,...", help="What a unit takes of a Ray node, like GPU=0.5,memory=8GB."),
]
Importance = Annotated[
    str,
    typer.Option("--imatrix", metavar="FILE|auto|none", help="Importance matrix: a file, or made here."),
]
Calibrate = Annotated[
    list[str] | None,
    typer.Option(
        "--calibrate",
        "--text",
        metavar="self|shipped|wide|FILE",
        help="Calibrate on text that the model writes itself, the one that ships, all that ships, or a file; repeat it "
        "for a mix.",
        show_default="shipped; with --effort best wide",
    ),
]
Tune = Annotated[
    list[str] | None,
    typer.Option(
        "--tune",
        metavar="self|FILE",
        help="Tune scales (of GGUF blocks minima and norms, too) on this text so that predictions match the source's.",
    ),
]
EffortName = Annotated[
    str, typer.Option("--effort", metavar="fast|good|best", help="How long to search for scales and codes.")
]
Through = Annotated[
    str | None,
    typer.Option(
        "--through",
        metavar="walk|engine",
        help="What computes: layers one by one, or llama.cpp on the files as they run.",
        show_default="walk where it knows the layers",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace files of other kinds and sources, too.")]
ALL_CORES = available_cores()
"""Of those that this process may use: more threads would wait for one another."""
CPU = "cpu"


def known_device(name: str, on: str = LOCAL) -> str:
    """The name (or names, with commas between), where torch has such devices here; raises UsageError elsewhere, before
    any work. What a cluster has, its nodes know."""
    for device in devices_named(name) if on == LOCAL else ():
        if device != CPU:
            from bitladder.kernels.gpu import check_device

            check_device(device)
    return name


def split_levels(text: str | None) -> tuple[Level, ...] | None:
    """``"Q8_0,q4_k_m"`` as levels; raises UnknownLevel with the nearest name, UsageError where there is none."""
    from bitladder.levels import parse_levels

    if text is None:
        return None
    levels = parse_levels(part for part in text.split(",") if part.strip())
    if not levels:
        raise UsageError(f"'{text}' names no level.", do="Name one or several, like Q8_0,Q4_K_M.")
    return levels


def effort_named(text: str) -> Effort:
    """An effort by its name; raises UsageError."""
    if text not in ("fast", "good", "best"):
        raise UsageError(f"The --effort must be fast, good or best. Got '{text}' instead.")
    return cast("Effort", text)


def calibration_named(parts: list[str] | None) -> tuple[CalibrationPart, ...]:
    """What to calibrate or tune on; a file called ``self`` is ``./self``. Raises BadInput for files that cannot be
    read: later, minutes of other work would be over."""
    from bitladder.files.texts import read_texts
    from bitladder.stages.job import SELF, SHIPPED, WIDE

    named = tuple(one if one in (SELF, SHIPPED, WIDE) else Path(one) for one in parts or ())
    for part in named:
        if isinstance(part, Path):
            read_texts([part])
    return named


def way_named(text: str | None) -> Way | None:
    """A way of measuring by its name; raises UsageError."""
    from bitladder.records.fidelity import Way

    if text is None:
        return None
    if text not in tuple(Way):
        raise UsageError(f"The --through must be {' or '.join(Way)}. Got '{text}' instead.")
    return Way(text)


@contextmanager
def _libraries_keep_to(threads: int) -> Iterator[None]:
    """Torch and BLAS, which are loaded within, start no more threads than that, nor do child processes. Left to
    themselves they look at the affinity mask and not at quotas. The user's own ``OMP_NUM_THREADS`` wins.
    """
    name = "OMP_NUM_THREADS"
    if name in os.environ or threads >= bound_cores():
        yield
        return
    os.environ[name] = str(threads)
    try:
        yield
    finally:
        os.environ.pop(name, None)


@contextmanager
def working(
    threads: int, device: str = CPU, *, on: str = LOCAL, unit_needs: str = "", quiet: bool = False
) -> Iterator[Work]:
    """Work that shows where it is and says what it has to say, unless ``quiet``; raises UsageError for a device that
    is not here, and as ``executors.places.executor_of`` does."""
    from bitladder.executors.places import executor_of, own_device
    from bitladder.stages.job import Journal, Work

    with _libraries_keep_to(threads), progress_display(quiet=quiet) as progress:
        journal = Journal() if quiet else Journal(say)
        known_device(device, on)
        executor = executor_of(on, device, unit_needs)
        with executor or nullcontext():
            journal.warn(*(executor.warnings if executor else ()))
            own = own_device(executor, device)
            yield Work(threads=threads, device=own, executor=executor, progress=progress, journal=journal)


@dataclass(kw_only=True)
class WorkOptions:
    """With what work is done."""

    threads: Threads = ALL_CORES
    device: Device = CPU
    on: On = LOCAL
    unit_needs: UnitNeeds = ""

    def working(self, *, quiet: bool) -> AbstractContextManager[Work]:
        """As the function of this name."""
        return working(self.threads, self.device, on=self.on, unit_needs=self.unit_needs, quiet=quiet)


@dataclass(kw_only=True)
class QuantizeOptions(WorkOptions):
    """What ``quantize`` is asked."""

    model: ModelArgument
    to: Annotated[str, typer.Option("--to", metavar="L1,L2", help="The levels to write.", autocompletion=level_names)]
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path()
    imatrix: Importance = "auto"
    calibrate: Calibrate = None
    tune: Tune = None
    effort: EffortName = "good"
    split_max_size: Annotated[
        str | None,
        typer.Option("--split-max-size", metavar="SIZE", help="Cut each level into parts of at most SIZE, like 4GB."),
    ] = None
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Also give weights that are MXFP4, NVFP4 or ternary the level's types."),
    ] = False
    force: Force = False

    def build(self) -> Build:
        """Raises UsageError for an effort or a size that is none."""
        from bitladder.stages.job import Build

        split_max_bytes = parse_bytes(self.split_max_size) if self.split_max_size else None
        check_above_zero("--split-max-size", split_max_bytes)
        return Build(
            out=self.out, imatrix=self.imatrix, effort=effort_named(self.effort),
            texts=calibration_named(self.calibrate), tuning=calibration_named(self.tune), force=self.force,
            requantize=self.requantize,
            split_max_bytes=split_max_bytes,
        )  # fmt: skip


@verb
@grouped
def quantize(options: QuantizeOptions, json_output: JsonFlag = False) -> None:
    """Write a model at one or several levels, every tensor read once for all of them.

    GGUF levels (Q4_K_M, AWQ-Q3_K_M; with error feedback GPTQ-Q4_K_M, or the best types for bpw4.25) become files;
    GPTQ-4bit-g64, AWQ-4bit-g64, INT8-W8A8 become checkpoint folders.
    """
    from bitladder.stages.quantize import build_levels

    levels = split_levels(options.to) or ()
    with options.working(quiet=json_output) as work:
        built = build_levels(options.model, levels, options.build(), work)
    journal = work.journal
    if json_output:
        print_json(
            {
                "files": [*built.files, *built.checkpoints],
                "calibration": built.calibration,
                "projector": built.projector,
                "jobs": journal.jobs,
                "own_text": journal.own_text,
                "warnings": journal.warnings,
            }
        )
        return
    if built.calibration:
        from bitladder.report.calibration import calibration_lines

        for line in calibration_lines(built.calibration):
            say(line)
    for file in built.files:
        took = "was already there" if file.reused else f"{file.seconds:.1f} s"
        say(f"{file.path}  {human_bytes(file.bytes)}, {file.bpw:.2f} bits per weight, {took}")
    for report in built.checkpoints:
        bits = f"{report.bpw:.2f} bits per weight of the quantized layers"  # bytes count what stays float, too
        say(f"{report.path}  {human_bytes(report.bytes)}, {bits}, {report.seconds:.1f} s")
        for note in report.notes:
            say(f"  {note}")


@dataclass(kw_only=True)
class ImatrixOptions(WorkOptions):
    """What ``imatrix`` is asked."""

    model: ModelArgument
    out: Annotated[Path, typer.Option("--out", help="File to write.")]
    calibrate: Calibrate = None
    through: Through = None
    force: Force = False


@verb
@grouped
def imatrix(options: ImatrixOptions, json_output: JsonFlag = False) -> None:
    """Write llama.cpp's importance matrix of a model, which llama-quantize reads too."""
    from bitladder.stages.calibration import make_imatrix

    texts, through = calibration_named(options.calibrate), way_named(options.through)
    with options.working(quiet=json_output) as work:
        path = make_imatrix(options.model, texts, options.out, work, force=options.force, through=through)
    if json_output:
        journal = work.journal
        print_json(
            {"path": str(path), "bytes": path.stat().st_size, "jobs": journal.jobs, "own_text": journal.own_text}
        )
    else:
        say(f"{path}  {human_bytes(path.stat().st_size)}")


@verb
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file, or a quantized checkpoint folder.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """What a GGUF or a checkpoint folder really holds, and whether its name or configuration tells the truth."""
    from bitladder.report import folder_table, inspection_table
    from bitladder.stages.inspect import inspect_file, inspect_folder

    if file.is_dir():
        with progress_display(quiet=json_output) as progress:
            folder = inspect_folder(file, progress)
        if json_output:
            print_json(folder)
        else:
            folder_table(folder, tensors=tensors)
        return
    inspection = inspect_file(file)
    if json_output:
        print_json(inspection)
    else:
        inspection_table(inspection, tensors=tensors)


def add_to(app: typer.Typer) -> None:
    """Register this module's verbs."""
    for function in (quantize, inspect, imatrix):
        app.command()(function)
