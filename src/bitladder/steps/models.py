"""Steps about files: find what a deployment needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.progress import Progress

if TYPE_CHECKING:
    from bitladder.records.run import RunRecord


@dataclass(frozen=True)
class TierFile:
    """A level ready to be served. ``memory_bytes`` is what it takes with its context."""

    level: str
    path: Path
    sha256: str
    memory_bytes: int


def tier_file(
    model: str, what: str, *, n_ctx: int, threads: int, out: Path | None = None, progress: Progress
) -> TierFile:
    """``what`` as a file to serve: a GGUF file, or a level of the model, which is built when it is missing.

    Raises:
        UnknownLevel: neither a file nor a level.
    """
    from bitladder.files.gguf import GgufFile
    from bitladder.files.probe import probe_machine
    from bitladder.files.sources import resolve
    from bitladder.formats.recipes import level_named
    from bitladder.stages.facts import level_of
    from bitladder.stages.plan import file_memory
    from bitladder.stages.quantize import quantize_levels

    path, level = Path(what), what
    if path.is_file():
        level = path.stem
    else:
        source = resolve(model, progress)
        with GgufFile.open(source.path) as opened:
            own = level_of(opened.model)
            level = own if what.upper() == own else level_named(what)
            folder = out or Path(f"{source.label}-ladder")
            built = () if level == own else quantize_levels(opened, [level], folder, threads=threads, progress=progress)
            path = built[0].path if built else source.path
    with GgufFile.open(path) as opened:
        return TierFile(level, path, opened.sha256, file_memory(opened.model, probe_machine(), n_ctx=n_ctx))


def latest_run(model: str, progress: Progress) -> tuple[RunRecord | None, Path | None]:
    """The newest run of a model on this machine, and where its record lies; None when there is none."""
    from bitladder.files.gguf import GgufFile
    from bitladder.files.sources import resolve
    from bitladder.report import read_run
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded

    with GgufFile.open(resolve(model, progress).path) as source, Evidence.open() as store:
        path = Recorded(store).latest_run(source.sha256)
    return (read_run(path), path) if path and path.exists() else (None, None)
