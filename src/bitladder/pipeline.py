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
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder import __version__
from bitladder.errors import NothingFits, UnknownArchitecture
from bitladder.progress import Progress
from bitladder.records import to_json
from bitladder.records.fidelity import Fidelity
from bitladder.records.plan import Plan
from bitladder.records.run import RunRecord
from bitladder.units import human_bytes

if TYPE_CHECKING:
    from bitladder.describe.machine import Machine
    from bitladder.describe.text import Document
    from bitladder.describe.workload import Workload
    from bitladder.files.gguf import GgufFile
    from bitladder.kernels import Effort
    from bitladder.records.evaluation import Answer, LevelAnswers, Speed
    from bitladder.records.level_file import LevelFile
    from bitladder.stages.walk import Candidate
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


@dataclass
class _Journal:
    """What a run has to tell beside its results."""

    say: Say
    timings: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.monotonic() - start

    def warn(self, *warnings: str) -> None:
        """Say it now, and again in the report."""
        for warning in warnings:
            self.warnings.append(warning)
            self.say(f"! {warning}")

    def reuse(self, what: str, levels: Sequence[str]) -> None:
        """Say what is not done again."""
        if levels:
            line = f"{what} of {', '.join(levels)}"
            self.reused.append(line)
            self.say(f"Reused: {line}.")


@dataclass(frozen=True)
class RunResult:
    """The record of a run and where its report lies."""

    record: RunRecord
    report: Path


def plan_model(model: str, *, n_ctx: int = 4096, levels: Sequence[str] | None = None, progress: Progress) -> Plan:
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
    split_max_bytes: int | None = None,
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
            source,
            levels,
            out,
            importance=importance,
            effort=effort,
            threads=threads,
            split_max_bytes=split_max_bytes,
            progress=progress,
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
    from bitladder.stages.walk import file_candidate, made_candidates
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
            Recorded(stack.enter_context(Evidence.open())),
            _Journal(lambda _: None),
            progress,
        )


def run(settings: RunSettings, progress: Progress, *, say: Say = lambda _: None) -> RunResult:
    """Walk a model down the ladder and decide.

    Raises:
        NothingFits: no level fits this machine at the context.
        BitladderError: anything else a user can meet; what was finished is stored and is not done again.
    """
    from bitladder.files.gguf import GgufFile
    from bitladder.files.probe import probe_machine
    from bitladder.files.sources import resolve
    from bitladder.files.workloads import STARTER, load_workload
    from bitladder.plan.bar import DEFAULT_BAR, parse_bar
    from bitladder.plan.decide import decide
    from bitladder.report import write_html, write_run
    from bitladder.stages import facts
    from bitladder.stages.evaluate import compare
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded

    bar = parse_bar(settings.bar or DEFAULT_BAR)
    workload = load_workload(settings.workload or STARTER)
    texts = documents(settings.texts)
    journal = _Journal(say)

    with ExitStack() as stack:
        with journal.timed("fetch"):
            found = resolve(settings.model, progress)
            source = stack.enter_context(GgufFile.open(found.path))
        journal.warn(*found.warnings, *workload.warnings)
        out = settings.out or Path(f"{found.label}-ladder")
        machine = probe_machine(out)
        recorded = Recorded(stack.enter_context(Evidence.open()))

        plan = _fitting(source, machine, settings)
        with journal.timed("quantize"):
            built = _built(source, plan, out, settings, journal, progress)
        with journal.timed("walk"):
            fidelities = _measured(source, built, texts, recorded, journal, progress)
        with journal.timed("workload"):
            reference, *levels = _asked(source, built, workload, recorded, settings, journal, progress)
        results = [compare(reference, level, workload) for level in levels]

        decision = decide(
            plan,
            fidelities,
            results,
            bar=bar,
            reference=facts.level_of(source.model),
            tags={one.id: one.tags for one in workload.inputs},
        )
        recorded.keep_decision(source.sha256, bar.text, decision)
        record = RunRecord(
            bitladder=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            source=facts.source_facts(source, found, settings.model),
            machine=to_json(machine),
            plan=plan,
            decision=decision,
            files=tuple(facts.file_facts(file) for file in built.values()),
            fidelities=tuple(fidelities),
            results=tuple(results),
            inputs=facts.input_facts(workload),
            answers=facts.shown_answers((reference, *levels), decision),
            settings=facts.settings_facts(settings, texts, workload),
            versions=facts.versions(),
            commands=facts.commands(settings, out),
            timings=journal.timings,
            reused=tuple(journal.reused),
            warnings=tuple(journal.warnings),
        )
    write_run(record, out / "run.json")
    return RunResult(record, write_html(record, out / "report.html"))


def _fitting(source: GgufFile, machine: Machine, settings: RunSettings) -> Plan:
    """The plan, when at least one level fits."""
    from bitladder.formats.recipes import LEVELS
    from bitladder.stages.plan import make_plan

    plan = make_plan(source.model, machine, n_ctx=settings.n_ctx, levels=settings.levels or LEVELS)
    if not any(level.fits for level in plan.levels):
        smallest = plan.levels[-1]
        raise NothingFits(
            f"No level of {plan.model} fits this machine at a context of {plan.n_ctx} tokens: "
            f"{smallest.level}, the smallest, needs {human_bytes(smallest.total_bytes)} "
            f"of {human_bytes(plan.budget_bytes)}.",
            means=smallest.reason,
            do="Close other programs, ask for a shorter context with --ctx, or choose a smaller model.",
        )
    return plan


def _built(
    source: GgufFile, plan: Plan, out: Path, settings: RunSettings, journal: _Journal, progress: Progress
) -> dict[Subject, LevelFile]:
    """A file for each level that fits; the source itself is the file of its own level."""
    from bitladder.stages.facts import level_of
    from bitladder.stages.quantize import method_name, quantize_levels
    from bitladder.store.recorded import Subject

    own = level_of(source.model)
    levels = [level.level for level in plan.levels if level.fits and level.level != own]
    files = quantize_levels(source, levels, out, effort=settings.effort, threads=settings.threads, progress=progress)
    journal.reuse("files", [file.level for file in files if file.reused])
    method = method_name(settings.effort, None)
    return {Subject(source.sha256, file.level, made=method): file for file in files}


def _measured(
    source: GgufFile,
    built: Mapping[Subject, LevelFile],
    texts: Sequence[Document],
    recorded: Recorded,
    journal: _Journal,
    progress: Progress,
) -> list[Fidelity]:
    """Fidelity of the files that were written; none, and a warning, for a family that the walk does not know."""
    from bitladder.files.gguf import GgufFile
    from bitladder.stages.walk import file_candidate

    with ExitStack() as stack:

        def candidates(missing: Sequence[Subject]) -> list[Candidate]:
            opened = [stack.enter_context(GgufFile.open(built[subject].path)) for subject in missing]
            return [
                file_candidate(source, file, level=subject.level) for subject, file in zip(missing, opened, strict=True)
            ]

        try:
            return _fidelities(source, list(built), candidates, texts, recorded, journal, progress)
        except UnknownArchitecture as error:
            journal.warn(
                f"No fidelity was measured: {error.found} {error.means} The decision rests on the workload alone."
            )
            return []


def documents(texts: Sequence[Path]) -> list[Document]:
    """The user's texts, or the ones that ship."""
    from bitladder.files.texts import read_texts, shipped_texts

    return read_texts(texts) if texts else shipped_texts()


def _fidelities(
    source: GgufFile,
    subjects: Sequence[Subject],
    candidates: Callable[[Sequence[Subject]], Sequence[Candidate]],
    texts: Sequence[Document],
    recorded: Recorded,
    journal: _Journal,
    progress: Progress,
) -> list[Fidelity]:
    """Stored fidelities, and one walk for those that are missing."""
    from bitladder.describe.text import text_hash
    from bitladder.engines.llama import LlamaServer
    from bitladder.stages.walk import text_windows, walk

    digest = text_hash(texts)
    stored = {subject: recorded.fidelity(subject, digest) for subject in subjects}
    found = {subject: fidelity for subject, fidelity in stored.items() if fidelity is not None}
    missing = [subject for subject in subjects if subject not in found]
    journal.reuse("fidelity", [subject.level for subject in found])
    if missing:
        # The engine's own tokenizer, so that tokens are those that users get; it maps the file and computes nothing.
        with LlamaServer(source.path, n_ctx=64, threads=1) as engine:
            windows = text_windows(texts, lambda text: engine.tokenize(text, add_special=True), source.model)
        for subject, fidelity in zip(
            missing, walk(source, candidates(missing), windows, progress=progress), strict=True
        ):
            recorded.keep_fidelity(subject, digest, fidelity)
            found[subject] = fidelity
    return [found[subject] for subject in subjects]


def _asked(
    source: GgufFile,
    built: Mapping[Subject, LevelFile],
    workload: Workload,
    recorded: Recorded,
    settings: RunSettings,
    journal: _Journal,
    progress: Progress,
) -> list[LevelAnswers]:
    """The workload through the real engine: the source first, then every level."""
    from bitladder.stages.evaluate import judge_answers, level_answers
    from bitladder.stages.facts import level_of
    from bitladder.store.recorded import Subject

    reference = Subject(source.sha256, level_of(source.model), file=source.sha256)
    paths = {reference: source.path, **{subject: file.path for subject, file in built.items()}}
    asked: list[LevelAnswers] = []
    reused = []
    for number, (subject, path) in enumerate(paths.items()):
        progress(f"workload: {subject.level}", number, len(paths))
        answers, speed, stored = _answers(subject, path, workload, recorded, settings)
        said = judge_answers(workload, answers, reference=asked[0].answers if asked else None)
        asked.append(level_answers(subject.level, said, speed))
        reused += [subject.level] if stored else []
    progress("workload", len(paths), len(paths))
    journal.reuse("answers and speed", reused)
    return asked


def _answers(
    subject: Subject, path: Path, workload: Workload, recorded: Recorded, settings: RunSettings
) -> tuple[tuple[Answer, ...], Speed, bool]:
    """Answers and speed of one level, and whether all of it was stored. Every new answer is stored as it comes."""
    from bitladder.describe.workload import question_hash
    from bitladder.engines.llama import LlamaServer
    from bitladder.stages.evaluate import answer_workload, measure_speed
    from bitladder.stages.facts import engine_facts, slots

    room, parallel = slots(workload, settings.n_ctx)
    engine = engine_facts(n_ctx=room, n_parallel=parallel, threads=settings.threads)
    questions = [
        question_hash(one, workload.temperature, sample)
        for one in workload.inputs
        for sample in range(workload.samples)
    ]
    known = {
        question: answer for question in questions if (answer := recorded.answer(subject, question, engine)) is not None
    }
    speed = recorded.speed(subject, engine)
    stored = speed is not None and len(known) == len(set(questions))
    if stored and speed is not None:
        return tuple(known[question] for question in questions), speed, True
    with LlamaServer(path, n_ctx=room, n_parallel=parallel, threads=settings.threads) as server:
        answers = answer_workload(
            server,
            workload,
            known=known,
            on_answer=lambda answer: recorded.keep_answer(subject, answer.question, engine, answer),
        )
        if speed is None:
            speed = measure_speed(server)
            recorded.keep_speed(subject, engine, speed)
    return answers, speed, False
