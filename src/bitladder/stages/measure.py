"""Steps that measure: what the evidence store has already is taken from there, the rest is measured and stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bitladder.errors import BadInput
from bitladder.progress import LevelNews, Progress, silent, tell
from bitladder.records.fidelity import Fidelity
from bitladder.stages.calibration import AUTO, NONE, importance_of, token_windows
from bitladder.stages.forecast import job, walking_need
from bitladder.stages.job import Journal

if TYPE_CHECKING:
    from bitladder.describe.text import Document
    from bitladder.describe.workload import Workload
    from bitladder.files.gguf import GgufFile
    from bitladder.files.sources import Source
    from bitladder.kernels import Effort
    from bitladder.levels import Level
    from bitladder.records.evaluation import Answer, Speed
    from bitladder.records.level_file import LevelFile
    from bitladder.stages.fidelity import Candidate
    from bitladder.store.recorded import Recorded, Subject


def measure_model(
    model: str,
    levels: Sequence[Level] | None,
    *,
    reference: Level | None = None,
    files: Sequence[Path] = (),
    texts: Sequence[Path] = (),
    imatrix: str = NONE,
    effort: Effort = "good",
    threads: int = 2,
    device: str = "cpu",
    journal: Journal | None = None,
    progress: Progress,
) -> list[Fidelity]:
    """Fidelity of levels, and of files and checkpoint folders that exist, against the model or one of its levels.

    llama.cpp's mixes of types are made on the fly, tensor by tensor. Levels that need calibration are taken where
    evidence knows them, or built in a folder that goes when they are measured. Only evidence is written.

    Raises:
        UsageError: an option that a level would not heed.
        BadInput: a file is no level of this model, or a folder is in a format that is not read.
        BitladderError: anything else a user can meet.
    """
    from bitladder.files.gguf import GgufFile
    from bitladder.files.sources import resolve
    from bitladder.levels import LADDER, Needs
    from bitladder.stages.fidelity import made_candidates
    from bitladder.stages.quantize import refuse_unheard, refuse_unweighed, sort_levels
    from bitladder.stages.run_facts import level_of
    from bitladder.stages.write_levels import method_name
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded, Subject

    chosen = LADDER if levels is None and not files else levels or ()
    asked = sort_levels(list(dict.fromkeys([*chosen, *([reference] if reference else [])])))
    refuse_unheard(asked.fitted, imatrix)
    refuse_unweighed(asked.folded, imatrix)
    measured_on = documents(texts)
    journal = journal or Journal()
    with ExitStack() as stack:
        recorded = Recorded(stack.enter_context(Evidence.open()))
        found = resolve(model, progress)
        source = stack.enter_context(GgufFile.open(found.path))
        given = [_given(source, path, stack, threads) for path in files]
        journal.warn(*found.warnings)
        to_build: list[Level] = [*asked.fitted, *asked.folded, *asked.checkpoints]
        built: dict[Subject, LevelFile] = {}
        if to_build:
            built = _built(
                source, found, to_build, recorded, stack, imatrix=imatrix, measured_on=measured_on, effort=effort,
                threads=threads, device=device, journal=journal, progress=progress,
            )  # fmt: skip
        importance = None
        if asked.files and (imatrix != AUTO or any(level.needs is Needs.IMPORTANCE for level in asked.files)):
            importance = importance_of(
                source,
                imatrix,
                measured_on=measured_on,
                threads=threads,
                device=device,
                journal=journal,
                progress=progress,
            )
        method = method_name(effort, importance)
        of_level = {subject.level: subject for subject in built}
        of_level |= {level.name: Subject(source.sha256, level.name, made=method) for level in asked.files}
        outside = dict(given)
        subjects = [of_level[level.name] for level in chosen if level != reference] + list(outside)
        higher = None
        if reference is not None and reference.name != level_of(source.model):
            higher = of_level[reference.name]

        def candidates(missing: Sequence[Subject]) -> list[Candidate]:
            plain = [subject for subject in missing if subject not in built and subject not in outside]
            made = made_candidates(
                source, [one.level for one in plain], importance=importance, effort=effort, threads=threads,
                device=device,
            )  # fmt: skip
            ready = dict(zip(plain, made, strict=True))
            ready |= {one: built_candidate(source, built[one], stack) for one in missing if one in built}
            return [ready[one] if one in ready else outside[one] for one in missing]

        return fidelities(
            source,
            subjects,
            candidates,
            measured_on,
            recorded,
            journal,
            reference=higher,
            threads=threads,
            device=device,
            progress=progress,
        )


def _given(source: GgufFile, path: Path, stack: ExitStack, threads: int) -> tuple[Subject, Candidate]:
    """A file or a checkpoint folder that the user names."""
    from bitladder.files.checkpoint_check import format_of_folder
    from bitladder.files.gguf import GgufFile
    from bitladder.stages.fidelity import file_candidate, folder_candidate
    from bitladder.stages.known_files import model_sha256
    from bitladder.store.recorded import Subject

    if path.is_dir():
        name = path.resolve().name
        candidate = folder_candidate(source, path, format_of_folder(path), level=name, threads=threads)
        return Subject(source.sha256, name, file=model_sha256(path)), candidate
    opened = stack.enter_context(GgufFile.open(path))
    return Subject(source.sha256, path.stem, file=opened.sha256), file_candidate(source, opened, threads=threads)


def _built(
    source: GgufFile,
    found: Source,
    levels: Sequence[Level],
    recorded: Recorded,
    stack: ExitStack,
    *,
    imatrix: str,
    measured_on: Sequence[Document],
    effort: Effort,
    threads: int,
    device: str,
    journal: Journal,
    progress: Progress,
) -> dict[Subject, LevelFile]:
    """Levels that are made by calibrating, where evidence knows them; the others in a folder of the cache that goes
    with ``stack``."""
    from bitladder.files.folders import cache_folder
    from bitladder.levels import FoldedLevel
    from bitladder.stages.known_files import identified, known_folders, making_of
    from bitladder.stages.ladder_files import ladder_files
    from bitladder.stages.quantize import calibrate_levels, sort_levels

    room = cache_folder("measured")
    room.mkdir(parents=True, exist_ok=True)
    out = Path(stack.enter_context(TemporaryDirectory(dir=room)))
    folders = known_folders(recorded, source.sha256)
    calibrated = calibrate_levels(
        source, found, sort_levels(levels), out, imatrix=imatrix, measured_on=measured_on, threads=threads,
        device=device, folders=folders, journal=journal, progress=progress,
    )  # fmt: skip
    importance = None
    if any(isinstance(level, FoldedLevel) for level in levels):
        importance = importance_of(
            source, imatrix, measured_on=measured_on, threads=threads, device=device, journal=journal,
            progress=progress,
        )  # fmt: skip
    files = ladder_files(
        source, levels, out, importance=importance, calibrated=calibrated, effort=effort, threads=threads,
        folders=folders, device=device, journal=journal, progress=progress,
    )  # fmt: skip
    lying = {subject: file for subject, file in files.items() if file.reused}
    making = making_of(source, imatrix, importance, effort=effort, threads=threads)
    known = identified(lying, making, recorded, journal, progress)
    return known | {subject: file for subject, file in files.items() if not file.reused}


def built_candidate(source: GgufFile, file: LevelFile, stack: ExitStack) -> Candidate:
    """A level that was built, as the walk reads it; a file stays open as long as ``stack``.

    Raises:
        BadInput, BadFile: it is another model's, or damaged.
    """
    # brings torch, for whose 1.5 s stored figures need not wait
    from bitladder.files.gguf import GgufFile
    from bitladder.levels.checkpoints import parse_checkpoint
    from bitladder.stages.fidelity import file_candidate, folder_candidate

    if file.path.is_dir():
        return folder_candidate(source, file.path, parse_checkpoint(file.level).format, level=file.level)
    return file_candidate(source, stack.enter_context(GgufFile.open(file.path)), level=file.level)


def documents(texts: Sequence[Path]) -> list[Document]:
    """The user's texts, or the ones that ship.

    Raises:
        BadInput: no text, or one that whatever tokenizer cannot cut into a window: a token has at least one byte.
    """
    from bitladder.describe.windows import SHORTEST
    from bitladder.files.texts import read_texts, shipped_texts

    found = read_texts(texts) if texts else shipped_texts()
    longest = max(len(document.text.encode()) for document in found)
    if longest < SHORTEST:
        raise BadInput(
            f"The text is too short to measure on: its longest document has {longest} bytes; at least {SHORTEST} "
            "tokens in one document are needed.",
            means="Each prediction needs context before it, and an average needs many predictions.",
            do="Give a longer text, a few thousand words say, or leave out --text to use the one that ships.",
        )
    return found


def fidelities(
    source: GgufFile,
    subjects: Sequence[Subject],
    candidates: Callable[[Sequence[Subject]], Sequence[Candidate]],
    texts: Sequence[Document],
    recorded: Recorded,
    journal: Journal,
    *,
    reference: Subject | None = None,
    threads: int,
    device: str = "cpu",
    progress: Progress,
) -> list[Fidelity]:
    """Stored fidelities, and one walk for those that are missing; against a level of ``candidates``, or the source."""
    from bitladder.describe.text import text_hash

    digest = text_hash(texts)
    stored = {subject: recorded.fidelity(subject, digest, reference) for subject in subjects}
    found = {subject: fidelity for subject, fidelity in stored.items() if fidelity is not None}
    missing = [subject for subject in subjects if subject not in found]
    journal.reuse("fidelity", [subject.level for subject in found])
    for subject in missing:
        tell(progress, LevelNews(subject.level, "measuring"))
    if missing:
        from bitladder.files.folders import cache_folder
        from bitladder.stages.fidelity import WalkOptions, walk  # brings torch, which stored figures need not wait for

        windows = token_windows(source, texts)
        options = WalkOptions(progress=progress, threads=threads, device=device)
        options["keep"] = cache_folder("walks")  # a killed walk goes on from the states it left there
        walked = list(candidates([*([reference] if reference else []), *missing]))
        if reference is not None:  # made together with the others, so that what they hold alike is made once
            options["reference"] = walked.pop(0)
        with job(walking_need(source, windows, [candidate.level for candidate in walked]), journal):
            measured = walk(source, walked, windows, **options)
        for subject, fidelity in zip(missing, measured, strict=True):
            recorded.keep_fidelity(subject, digest, fidelity, reference)
            found[subject] = fidelity
    for subject in subjects:
        tell(progress, LevelNews(subject.level, "measured", kl_mean=found[subject].kl_mean))
    return [found[subject] for subject in subjects]


def of_itself(measured: Fidelity, level: str) -> Fidelity:
    """What is true of the reference beside itself, on the tokens that another level was measured on."""
    zero = dict.fromkeys((name for name in vars(measured) if name.startswith("kl_")), 0.0)
    one = dict.fromkeys((name for name in vars(measured) if name.startswith(("ppl_ratio", "top1"))), 1.0)
    return replace(measured, level=level, ppl=measured.ppl_reference, **zero, **one)  # type: ignore[arg-type]


def answers(
    subject: Subject,
    path: Path,
    workload: Workload,
    recorded: Recorded,
    *,
    n_ctx: int,
    threads: int,
    progress: Progress = silent,
) -> tuple[tuple[Answer, ...], Speed, bool]:
    """Answers and speed of one level, and whether all of it was stored. Every new answer is stored as it comes.

    A speed that other programs disturbed is measured again.
    """
    from bitladder.describe.workload import questions_of
    from bitladder.engines.base import Launch
    from bitladder.engines.registry import container_of, start
    from bitladder.stages.evaluate import answer_workload, measure_speed
    from bitladder.stages.run_facts import engine_facts, slots

    room, parallel = slots(workload, n_ctx)
    engine = engine_facts(n_ctx=room, n_parallel=parallel, threads=threads, container=container_of(path))
    questions = questions_of(workload)
    known = recorded.answers(subject, questions, engine)
    speed = recorded.speed(subject, engine)
    if speed is not None and speed.disturbed:
        speed = None
    stored = speed is not None and len(known) == len(set(questions))
    if stored and speed is not None:
        return tuple(known[question] for question in questions), speed, True

    def keep(answer: Answer) -> None:
        recorded.keep_answer(subject, answer.question, engine, answer)
        known[answer.question] = answer
        tell(progress, LevelNews(subject.level, answered=len(known), inputs=len(questions)))

    with start(Launch(path, n_ctx=room, n_parallel=parallel, threads=threads)) as server:
        found = answer_workload(server, workload, known=dict(known), on_answer=keep)
        if speed is None:
            speed = measure_speed(server)
            recorded.keep_speed(subject, engine, speed)
    return found, speed, False
