"""The whole story in order: find the model, see the machine, plan, quantize, walk, run the workload, decide, report.

Nothing clever lives here. Each stage is a function from values to a record; this file fetches what is stored already,
calls the stage for the rest, stores what it finds, and hands the record on. A run that was killed goes on from the
last thing it stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder import __version__
from bitladder.errors import NothingFits
from bitladder.progress import Progress
from bitladder.records import to_json
from bitladder.records.fidelity import Fidelity
from bitladder.records.plan import Plan
from bitladder.records.run import FileFacts, InputFacts, RunRecord, SourceFacts

if TYPE_CHECKING:
    from bitladder.describe.text import Document
    from bitladder.describe.windows import Window
    from bitladder.describe.workload import Workload
    from bitladder.files.gguf import GgufFile
    from bitladder.files.sources import Source
    from bitladder.kernels import Effort
    from bitladder.records.evaluation import LevelAnswers, WorkloadResult
    from bitladder.records.level_file import LevelFile
    from bitladder.store.recorded import Recorded, Subject

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunSettings:
    """What a user can ask of a run; everything else is derived."""

    model: str
    levels: tuple[str, ...] | None = None
    workload: Path | None = None
    bar: str | None = None
    n_ctx: int = 4096
    texts: tuple[Path, ...] = ()
    out: Path | None = None
    threads: int = 2
    effort: Effort = "good"


@dataclass(frozen=True)
class RunResult:
    """The record of a run and where its report lies."""

    record: RunRecord
    report: Path


def plan_model(
    model: str, *, n_ctx: int = 4096, levels: Sequence[str] | None = None, progress: Progress
) -> Plan:
    """Which levels of a model fit this machine. A local GGUF's header is all that is read."""
    from bitladder.files.gguf import read_header
    from bitladder.files.probe import probe_machine
    from bitladder.files.sources import resolve
    from bitladder.formats.recipes import LEVELS
    from bitladder.stages.plan import make_plan

    source = resolve(model, progress)
    return make_plan(read_header(source.path), probe_machine(), n_ctx=n_ctx, levels=levels or LEVELS)


def quantize_model(
    model: str,
    levels: Sequence[str],
    out: Path,
    *,
    imatrix: Path | None,
    effort: Effort,
    threads: int,
    progress: Progress,
) -> list[LevelFile]:
    """Write a model at some levels, every tensor read once for all of them."""
    from bitladder.files.gguf import GgufFile
    from bitladder.files.imatrix import read_imatrix
    from bitladder.files.sources import resolve
    from bitladder.stages.quantize import quantize_levels

    importance = read_imatrix(imatrix).vectors() if imatrix else None
    with GgufFile.open(resolve(model, progress).path) as source:
        return quantize_levels(
            source, levels, out, importance=importance, effort=effort, threads=threads, progress=progress
        )


def measure_model(
    model: str,
    levels: Sequence[str] | None,
    *,
    files: Sequence[Path] = (),
    texts: Sequence[Path] = (),
    imatrix: Path | None = None,
    effort: Effort = "good",
    threads: int = 2,
    progress: Progress,
) -> list[Fidelity]:
    """Fidelity of levels made on the fly, and of files that exist, against the model. Only evidence is written."""
    from bitladder.files.gguf import GgufFile
    from bitladder.files.imatrix import read_imatrix
    from bitladder.files.sources import resolve
    from bitladder.formats.recipes import LEVELS
    from bitladder.stages.quantize import method_name
    from bitladder.stages.walk import Candidate, file_candidate, made_candidates
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded, Subject

    made = LEVELS if levels is None and not files else levels or ()
    importance = read_imatrix(imatrix).vectors() if imatrix else None
    with ExitStack() as stack:
        source = stack.enter_context(GgufFile.open(resolve(model, progress).path))
        others = [stack.enter_context(GgufFile.open(path)) for path in files]
        subjects = [Subject(source.sha256, level, made=method_name(effort, importance)) for level in made]
        subjects += [Subject(source.sha256, other.path.stem, file=other.sha256) for other in others]

        def candidates(missing: Sequence[Subject]) -> list[Candidate]:
            levels = [subject.level for subject in missing if not subject.file]
            files = {subject.file for subject in missing}
            return [
                *made_candidates(source, levels, importance=importance, effort=effort, threads=threads),
                *(file_candidate(source, other) for other in others if other.sha256 in files),
            ]

        return _fidelities(
            source,
            subjects,
            candidates,
            documents(texts),
            recorded=Recorded(stack.enter_context(Evidence.open())),
            progress=progress,
        )


def documents(texts: Sequence[Path]) -> list[Document]:
    """The user's texts, or the ones that ship."""
    from bitladder.files.texts import read_texts, shipped_texts

    return read_texts(texts) if texts else shipped_texts()


def _fidelities(
    source: GgufFile,
    subjects: Sequence[Subject],
    candidates: Callable[[Sequence[Subject]], Sequence[Any]],
    texts: Sequence[Document],
    *,
    recorded: Recorded,
    progress: Progress,
) -> list[Fidelity]:
    """Stored fidelities, and one walk for those that are missing."""
    from bitladder.describe.text import text_hash
    from bitladder.stages.walk import text_windows, walk

    digest = text_hash(texts)
    found = {subject: recorded.fidelity(subject, digest) for subject in subjects}
    missing = [subject for subject in subjects if found[subject] is None]
    if missing:
        windows = _tokenized(source, texts, text_windows)
        for subject, fidelity in zip(
            missing, walk(source, candidates(missing), windows, progress=progress), strict=True
        ):
            recorded.keep_fidelity(subject, digest, fidelity)
            found[subject] = fidelity
    return [fidelity for subject in subjects if (fidelity := found[subject]) is not None]


def _tokenized(source: GgufFile, texts: Sequence[Document], text_windows: Callable[..., list[Window]]) -> list[Window]:
    """Token windows by the engine's own tokenizer; the engine maps the file and computes nothing."""
    from bitladder.engines.llama import LlamaServer

    with LlamaServer(source.path, n_ctx=64, threads=1) as engine:
        return text_windows(texts, lambda text: engine.tokenize(text, add_special=True), source.model)
