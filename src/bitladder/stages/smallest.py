"""The smallest level that meets a bar, with as few inputs asked as the decision needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.errors import NothingFits, UsageError
from bitladder.stages.ask import require_room
from bitladder.stages.calibration import importance_of
from bitladder.stages.criteria_help import criteria_help
from bitladder.stages.job import AUTO, Build, Work, opened
from bitladder.stages.known_files import identified, known_folders, making_of
from bitladder.stages.ladder_files import ladder_files
from bitladder.stages.measure import answers
from bitladder.stages.quantize import calibrate_levels, sort_levels

if TYPE_CHECKING:
    from bitladder.describe.criteria import Context
    from bitladder.describe.workload import Input, Workload
    from bitladder.engines.base import Engine
    from bitladder.files.gguf import GgufFile
    from bitladder.levels import Level
    from bitladder.records.evaluation import Answer
    from bitladder.records.search import LadderOutcome

Open = Callable[[str], "AbstractContextManager[Engine]"]
"""Starts the engine of a level."""
Known = Callable[[str], "Mapping[str, Answer]"]
"""Answers of a level, by question hash, that need not be asked for again."""


@dataclasses.dataclass(frozen=True)
class SmallestRequest:
    """What ``find_smallest`` is asked."""

    model: str
    bar: str
    workload: Path | None = None
    levels: tuple[Level, ...] | None = None
    n_ctx: int | None = None
    out: Path | None = None
    imatrix: str = AUTO
    trust_python: bool = False


def find_smallest(search: SmallestRequest, work: Work) -> LadderOutcome:
    """The smallest level of a model that holds a bar on passes, with few levels built and few inputs asked.

    Levels are built when they are asked, unless a run or another search left them somewhere, and every answer is kept,
    so that a full run goes on from there.

    Raises:
        UsageError: the bar is not one clause on passes that allows a loss.
        NothingFits: no level fits this machine.
        BitladderError: anything else a user can meet.
    """
    from bitladder.engines.base import Launch
    from bitladder.engines.registry import start
    from bitladder.files.workloads import STARTER, load_workload
    from bitladder.plan.ladder import usable_context
    from bitladder.stages.as_deployed import as_deployed, refuse_unheard_tools
    from bitladder.stages.evaluate import judge_answers
    from bitladder.stages.run_facts import engine_facts, level_of, slots
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded, Subject

    margin = margin_of(search.bar)
    workload = load_workload(search.workload or STARTER)
    with ExitStack() as stack:
        folder = (search.workload or Path()).parent
        context = stack.enter_context(criteria_help(workload, folder, trust_python=search.trust_python))
        job = stack.enter_context(opened(search.model, work))
        source = job.source
        workload = as_deployed(workload, source.metadata, job.checkpoint)
        recorded = Recorded(stack.enter_context(Evidence.open()))
        job.journal.warn(*workload.warnings)
        n_ctx = usable_context(source.model, search.n_ctx)
        levels = _levels(source, search, n_ctx)
        job.require_engine()
        require_room(workload, n_ctx, job)
        out = search.out or Path(f"{job.found.label}-ladder")
        build = Build(out=out, imatrix=search.imatrix)
        calibrated = calibrate_levels(job, sort_levels(list(levels.values())), build)
        importance = importance_of(job, build)
        room, parallel = slots(workload, n_ctx)
        engine = engine_facts(n_ctx=room, n_parallel=parallel, threads=job.threads)

        own = Subject(source.sha256, level_of(source.model), file=source.sha256)
        job.progress(f"workload: {own.level}", 0, 1)
        replies = answers(own, source.path, workload, recorded, n_ctx=n_ctx, work=job).answers
        reference = judge_answers(workload, replies, context=context)

        making = making_of(job, build, importance)
        opened_as: dict[str, Subject] = {}

        @contextmanager
        def open_engine(level: str) -> Iterator[Engine]:
            where = dataclasses.replace(build, folders=[out, *known_folders(recorded, source.sha256)])
            built = ladder_files(job, [levels[level]], where, importance=importance, calibrated=calibrated)
            ((opened_as[level], file),) = identified(built, making, recorded, job).items()
            job.progress(f"workload: {level}", 0, 1)
            with start(Launch(file.path, n_ctx=room, n_parallel=parallel, threads=job.threads)) as server:
                refuse_unheard_tools(workload, server)
                yield server

        def known(level: str) -> dict[str, Answer]:
            return recorded.answers(opened_as[level], [one.question for one in replies], engine)

        return smallest_level(
            list(levels),
            workload,
            reference,
            open_engine,
            margin=margin,
            context=context,
            known=known,
            on_answer=lambda level, answer: recorded.keep_answer(opened_as[level], answer.question, engine, answer),
        )


def margin_of(bar: str) -> float:
    """The loss that a bar on passes allows, as a share.

    Raises:
        UsageError: it says something else, or allows none: no number of inputs can prove a loss of nothing.
    """
    from bitladder.plan.bar import parse_bar

    clauses = parse_bar(bar).clauses
    if len(clauses) != 1 or not clauses[0].relative or clauses[0].tag or clauses[0].value <= 0:
        raise UsageError(
            f"The search stops at a bar on passes alone, and '{bar}' is another.",
            means="It asks inputs until a loss of so many points is ruled out.",
            do='Write --bar "passes >= reference - 4 points"; for other bars use `bitladder run`.',
        )
    return clauses[0].value


def _levels(source: GgufFile, search: SmallestRequest, n_ctx: int) -> dict[str, Level]:
    """Those that fit by their names, largest first, without the source's own."""
    from bitladder.files.probe import probe_machine
    from bitladder.levels import LADDER, FeedbackLevel, FoldedLevel, RecipeLevel, of_kinds
    from bitladder.plan.ladder import make_plan
    from bitladder.stages.run_facts import level_of

    wanted = of_kinds(
        search.levels or LADDER,
        (RecipeLevel, FeedbackLevel, FoldedLevel),
        what="The search",
        why="Its answers come from llama.cpp, which runs GGUF files; folders are run by vLLM, TGI and transformers.",
        do="Measure it with `bitladder run --also LEVEL=URL#MODEL`, where URL is the engine that serves it.",
    )
    sort_levels(wanted, search.imatrix)
    plan = make_plan(source.model, probe_machine(), n_ctx=n_ctx, levels=wanted)
    named = {level.name: level for level in wanted}
    own = level_of(source.model)
    fitting = {row.level: named[row.level] for row in plan.levels if row.fits and row.level != own}
    if not fitting:
        raise NothingFits(
            f"No level of {plan.model} besides the source fits this machine at a context of {plan.n_ctx} tokens.",
            do="Ask for a shorter context with --ctx, or choose a smaller model.",
        )
    return fitting


def smallest_level(
    levels: Sequence[str],
    workload: Workload,
    reference: Iterable[Answer],
    open_engine: Open,
    *,
    margin: float,
    alpha: float = 0.05,
    beta: float = 0.1,
    context: Context | None = None,
    known: Known = lambda _: {},
    on_answer: Callable[[str, Answer], None] = lambda _level, _answer: None,
) -> LadderOutcome:
    """Search a ladder by halving; each level's engine is started at most once.

    Args:
        levels: from the largest to the smallest.
        workload: asked in part; inputs that the reference did not answer are left out.
        reference: its answers, judged.
        open_engine: starts the engine of a level.
        margin: loss of pass rate that the bar allows, as a share.
        alpha: chance that the level found does not meet the bar.
        beta: chance that a level which meets it is set aside.
        context: judge and functions, where criteria need them.
        known: a level's answers that are stored.
        on_answer: hears every new answer with its level.

    Raises:
        UsageError: the workload needs something that is not there.
        EngineError: an engine failed; the answers before it were handed to ``on_answer``.
    """
    from bitladder.plan.halving import measure_ladder
    from bitladder.stages.evaluate import answer_workload, check_help, judge_answers, pass_shares

    check_help(workload, context)
    expected = list(reference)
    before = pass_shares(expected)
    inputs = [one for one in workload.inputs if one.id in before]

    with ExitStack() as running:
        current: dict[str, Engine] = {}

        def ask(level: str, wanted: Sequence[Input]) -> list[float]:
            if level not in current:
                running.close()
                current.clear()
                current[level] = running.enter_context(open_engine(level))
            part = dataclasses.replace(workload, inputs=tuple(wanted))
            said = answer_workload(
                current[level],
                part,
                known=known(level),
                on_answer=lambda answer: on_answer(level, answer),
            )
            shares = pass_shares(judge_answers(part, said, reference=expected, context=context))
            return [shares[one.id] - before[one.id] for one in wanted]

        return measure_ladder(levels, inputs, ask, margin=margin, alpha=alpha, beta=beta)
