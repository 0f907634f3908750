"""Steps that measure: what the evidence store has already is taken from there, the rest is measured and stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.errors import BadInput
from bitladder.progress import LevelNews, Progress, silent, tell
from bitladder.records.fidelity import Fidelity
from bitladder.steps.calibrated import AUTO, NONE, importance_of, token_windows
from bitladder.steps.jobs import job, walking_need
from bitladder.steps.journal import Journal

if TYPE_CHECKING:
    from bitladder.describe.text import Document
    from bitladder.describe.workload import Workload
    from bitladder.files.gguf import GgufFile
    from bitladder.kernels import Effort
    from bitladder.levels import Level
    from bitladder.records.evaluation import Answer, Speed
    from bitladder.stages.walk import Candidate
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
    """Fidelity of levels made on the fly, and of files that exist, against the model or one of its levels.

    Only evidence is written.
    """
    from bitladder.files.gguf import GgufFile
    from bitladder.files.sources import resolve
    from bitladder.levels import LADDER, Needs, RecipeLevel, of_kinds
    from bitladder.stages.facts import level_of
    from bitladder.stages.quantize import method_name
    from bitladder.stages.walk import file_candidate, made_candidates
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded, Subject

    asked = LADDER if levels is None and not files else levels or ()
    given = of_kinds(
        [*asked, *([reference] if reference else [])],
        (RecipeLevel,),
        what="Measuring",
        why="Levels are made on the fly here, tensor by tensor; those that need calibration are files first.",
        do="Build it with `bitladder quantize`, and measure the file with --file.",
    )
    made = given[: len(asked)]
    measured_on = documents(texts)
    journal = journal or Journal()
    with ExitStack() as stack:
        found = resolve(model, progress)
        source = stack.enter_context(GgufFile.open(found.path))
        others = [stack.enter_context(GgufFile.open(path)) for path in files]
        journal.warn(*found.warnings)
        importance = None
        if imatrix != AUTO or any(level.needs is Needs.IMPORTANCE for level in made):
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
        subjects = [Subject(source.sha256, level.name, made=method) for level in made if level != reference]
        subjects += [Subject(source.sha256, other.path.stem, file=other.sha256) for other in others]
        higher = None
        if reference is not None and reference.name != level_of(source.model):
            higher = Subject(source.sha256, reference.name, made=method)

        def candidates(missing: Sequence[Subject]) -> list[Candidate]:
            levels = [subject.level for subject in missing if not subject.file]
            files = {subject.file for subject in missing}
            return [
                *made_candidates(source, levels, importance=importance, effort=effort, threads=threads, device=device),
                *(file_candidate(source, other) for other in others if other.sha256 in files),
            ]

        return fidelities(
            source,
            subjects,
            candidates,
            measured_on,
            Recorded(stack.enter_context(Evidence.open())),
            journal,
            reference=higher,
            threads=threads,
            device=device,
            progress=progress,
        )


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
        from bitladder.stages.walk import WalkOptions, walk  # brings torch, which stored figures need not wait for

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
    from bitladder.stages.facts import engine_facts, slots

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
