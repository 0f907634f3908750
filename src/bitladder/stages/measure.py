"""Steps that measure: what the evidence store has already is taken from there, the rest is measured and stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from bitladder.describe.cache_types import F16_CACHE, CacheTypes
from bitladder.errors import BadInput, UnknownArchitecture, UsageError
from bitladder.progress import LevelNews
from bitladder.records.fidelity import Fidelity, Way
from bitladder.stages.calibration import importance_of
from bitladder.stages.engine_way import (
    announce,
    deployed_fidelities,
    engine_missing,
    instead_of_walk,
    scores_in_engine,
    way_for,
)
from bitladder.stages.forecast import forecast, walking_need
from bitladder.stages.job import AUTO, Build, Job, Work, opened

if TYPE_CHECKING:
    from bitladder.describe.text import Document
    from bitladder.describe.windows import Window
    from bitladder.describe.workload import Input, Workload
    from bitladder.engines.base import Launch
    from bitladder.files.gguf import GgufFile
    from bitladder.kernels import Effort
    from bitladder.levels import Level
    from bitladder.records.evaluation import Answer, Speed
    from bitladder.records.level_file import LevelFile
    from bitladder.stages.calibration import Importance
    from bitladder.stages.fidelity import Candidate
    from bitladder.stages.quantize import SortedLevels
    from bitladder.store.recorded import Recorded, Subject
    from bitladder.walk.head import TokenScores

    Scored = tuple[TokenScores, TokenScores]

T = TypeVar("T")


@dataclass(frozen=True)
class Measuring:
    """What ``measure_model`` compares."""

    levels: Sequence[Level] | None = None
    """None: the ladder, where no files are named; by depth the model itself."""
    reference: Level | None = None
    """None: the model itself."""
    files: Sequence[Path] = ()
    """Files and checkpoint folders that exist."""
    texts: Sequence[Path] = ()
    """To measure on; the one that ships by default."""
    imatrix: str = AUTO
    effort: Effort = "good"
    through: Way | None = None
    """The way; None for the walk where it can go, else the engine."""
    caches: Sequence[CacheTypes] = ()
    """Types of the KV cache that every level is run with, by the engine; none for what the weights alone cost."""
    depths: Sequence[int] = ()
    """Tokens of context to measure behind; of caches the usual ones by default."""


def measure_model(model: str, wanted: Measuring, work: Work) -> list[Fidelity]:
    """Fidelity of levels, and of files and checkpoint folders that exist, against the model or one of its levels; or by
    depth of context, of each with every cache.

    llama.cpp's mixes of types are made on the fly, tensor by tensor. Levels that need calibration are taken where
    evidence knows them, or built in a folder that goes when they are measured; so are all that the engine measures.
    Only evidence is written.

    Raises:
        UsageError: an option that a level would not follow; a cache that the model cannot have.
        BadInput: a file is no level of this model, or a folder is in a format that is not read.
        BitladderError: anything else a user can meet.
    """
    from bitladder.levels import LADDER
    from bitladder.stages.quantize import sort_levels
    from bitladder.store.evidence import Evidence
    from bitladder.store.recorded import Recorded

    everything = wanted.levels is None and not wanted.files
    by_depth = bool(wanted.caches or wanted.depths)
    chosen = LADDER if everything and not by_depth else wanted.levels or ()
    every = dict.fromkeys([*chosen, *([wanted.reference] if wanted.reference else [])])
    levels = sort_levels(list(every), wanted.imatrix)
    texts = documents(wanted.texts)
    with ExitStack() as stack:
        recorded = Recorded(stack.enter_context(Evidence.open()))
        job = stack.enter_context(opened(model, work, warn=False))
        if by_depth:
            wanted = _checked_depths(job, wanted)
        return _Comparison(job, recorded, stack, wanted, texts).fidelities(chosen, levels)


def _checked_depths(job: Job, wanted: Measuring) -> Measuring:
    """The same with what it leaves open; what cannot be measured by depth is refused before any work."""
    from bitladder.describe.cache_types import check_cache
    from bitladder.describe.depths import DEPTHS, check_depths

    if wanted.through is Way.WALK or wanted.reference is not None:
        option = "--reference" if wanted.through is not Way.WALK else "--through walk"
        raise UsageError(
            f"{option} does not go with --kv and --depth.",
            means="A cache is the engine's, which compares with the source in its 16-bit cache.",
            do=f"Leave out {option}.",
        )
    if why := engine_missing(job.source.model):
        raise UnknownArchitecture(f"The engine cannot measure it: {why}.", do="Leave out --kv and --depth.")
    trained = job.source.model.dims.n_ctx_train
    usual = [depth for depth in DEPTHS if not trained or depth <= trained] or [trained]
    caches = tuple(wanted.caches) or (F16_CACHE,)
    for cache in caches:
        check_cache(job.source.model, cache)
    return replace(wanted, caches=caches, depths=check_depths(wanted.depths or usual, trained))


@dataclass(frozen=True)
class _Comparison:
    """Whatever is compared becomes a subject of evidence and, where that knows nothing, a candidate of the walk."""

    job: Job
    recorded: Recorded
    stack: ExitStack
    """What stays open, and what goes, when all is measured."""
    wanted: Measuring
    texts: Sequence[Document]

    def fidelities(self, chosen: Sequence[Level], levels: SortedLevels) -> list[Fidelity]:
        """Of the chosen levels in their order, then of the files."""
        from bitladder.files.names_apart import names_apart
        from bitladder.levels import Needs
        from bitladder.stages.fidelity import made_candidates
        from bitladder.stages.run_facts import level_of
        from bitladder.stages.write_levels import method_name
        from bitladder.store.recorded import Subject

        job, source, reference = self.job, self.job.source, self.wanted.reference
        named = names_apart(self.wanted.files, [level.name for level in chosen])
        given: dict[Subject, Candidate] = {}
        own = Subject(source.sha256, level_of(source.model), file=source.sha256)
        lying = {own: source.path}
        for name, path in named.items():
            subject, candidate = self._given(path, name)
            given[subject], lying[subject] = candidate, path
        job.journal.warn(*job.found.warnings)  # once nothing is wrong with the files
        built = self._built(levels)
        importance = None
        if levels.files and (
            self.wanted.imatrix != AUTO or any(level.needs is Needs.IMPORTANCE for level in levels.files)
        ):
            importance = importance_of(job, self._build(Path()))
        method = method_name(self.wanted.effort, importance)
        of_level = {subject.level: subject for subject in built}
        of_level |= {level.name: Subject(source.sha256, level.name, made=method) for level in levels.files}
        higher = None
        if reference is not None and reference.name != level_of(source.model):
            higher = of_level[reference.name]

        def candidates(missing: Sequence[Subject]) -> list[Candidate]:
            plain = [subject for subject in missing if subject not in built and subject not in given]
            made = made_candidates(
                source, [subject.level for subject in plain], importance=importance, effort=self.wanted.effort,
                threads=job.threads, device=job.device,
            )  # fmt: skip
            ready = dict(zip(plain, made, strict=True)) | given
            ready |= {one: built_candidate(source, built[one], self.stack) for one in missing if one in built}
            return [ready[subject] for subject in missing]

        def files(missing: Sequence[Subject]) -> list[Path]:
            there = lying | {subject: file.path for subject, file in built.items()}
            absent = {subject.level for subject in missing if subject not in there}
            there |= self._written([level for level in levels.files if level.name in absent], importance)
            return [there[subject] for subject in missing]

        subjects = [of_level[level.name] for level in chosen if level != reference] + list(given)
        if self.wanted.caches:
            if not subjects:  # what the caches cost, whatever the level
                subjects = [own]
            pairs = [(subject, cache) for subject in subjects for cache in self.wanted.caches]
            return fidelities_by_depth(job, pairs, self.texts, self.recorded, files=files, depths=self.wanted.depths)
        return fidelities(
            job, subjects, candidates, self.texts, self.recorded, files=files, reference=higher,
            through=self.wanted.through,
        )  # fmt: skip

    def _given(self, path: Path, name: str) -> tuple[Subject, Candidate]:
        """A file or a checkpoint folder that the user names by its path."""
        from bitladder.files.checkpoint_check import format_of_folder
        from bitladder.files.gguf import GgufFile
        from bitladder.stages.fidelity import file_candidate, folder_candidate
        from bitladder.stages.known_files import model_sha256
        from bitladder.store.recorded import Subject

        source, threads = self.job.source, self.job.threads
        if path.is_dir():
            candidate = folder_candidate(source, path, format_of_folder(path), level=name, threads=threads)
            return Subject(source.sha256, name, file=model_sha256(path)), candidate
        file = self.stack.enter_context(GgufFile.open(path))
        candidate = file_candidate(source, file, level=name, threads=threads)
        return Subject(source.sha256, name, file=file.sha256), candidate

    def _build(self, out: Path, folders: Sequence[Path] = ()) -> Build:
        wanted = self.wanted
        return Build(out=out, imatrix=wanted.imatrix, effort=wanted.effort, measured_on=self.texts, folders=folders)

    def _built(self, levels: SortedLevels) -> dict[Subject, LevelFile]:
        """Levels that are made by calibrating, where evidence knows them; the others in a folder of the cache that goes
        when all is measured."""
        calibrating: list[Level] = [*levels.fitted, *levels.folded, *levels.checkpoints]
        if not calibrating:
            return {}
        from bitladder.stages.known_files import identified, known_folders, making_of
        from bitladder.stages.ladder_files import ladder_files
        from bitladder.stages.quantize import calibrate_levels

        build = self._build(self._passing_folder(), known_folders(self.recorded, self.job.source.sha256))
        calibrated = calibrate_levels(self.job, replace(levels, files=()), build)
        importance = importance_of(self.job, build) if levels.folded else None
        files = ladder_files(self.job, calibrating, build, importance=importance, calibrated=calibrated)
        lying = {subject: file for subject, file in files.items() if file.reused}
        known = identified(lying, making_of(self.job, build, importance), self.recorded, self.job)
        return known | {subject: file for subject, file in files.items() if not file.reused}

    def _written(self, levels: Sequence[Level], importance: Importance | None) -> dict[Subject, Path]:
        """Levels for the engine, which reads files, in a folder that goes when all is measured."""
        if not levels:
            return {}
        from bitladder.stages.ladder_files import ladder_files

        files = ladder_files(self.job, levels, self._build(self._passing_folder()), importance=importance)
        return {subject: file.path for subject, file in files.items()}

    def _passing_folder(self) -> Path:
        from bitladder.files.folders import cache_folder

        folder = cache_folder("measured")
        folder.mkdir(parents=True, exist_ok=True)
        return Path(self.stack.enter_context(TemporaryDirectory(dir=folder)))


def built_candidate(source: GgufFile, file: LevelFile, stack: ExitStack) -> Candidate:
    """A level that was built, as the walk reads it; a file stays open as long as ``stack``.

    Raises:
        BadInput, BadFile: it is another model's, or damaged.
    """
    # brings torch, for whose 1.5 s stored figures need not wait
    from bitladder.files.checkpoint_check import format_of_folder
    from bitladder.files.gguf import GgufFile
    from bitladder.stages.fidelity import file_candidate, folder_candidate

    if file.path.is_dir():
        return folder_candidate(source, file.path, format_of_folder(file.path), level=file.level)
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
    job: Job,
    subjects: Sequence[Subject],
    candidates: Callable[[Sequence[Subject]], Sequence[Candidate]],
    texts: Sequence[Document],
    recorded: Recorded,
    *,
    files: Callable[[Sequence[Subject]], Sequence[Path]],
    reference: Subject | None = None,
    through: Way | None = None,
) -> list[Fidelity]:
    """Stored fidelities, and those that are missing: from one walk, or from the engine where the walk cannot go.

    All are measured in one way. Against a level of ``candidates``, or the source.

    Args:
        job: the model.
        subjects: the levels.
        candidates: gives levels as the walk reads them; the reference is the first where it is a level.
        texts: what is measured on.
        recorded: the evidence.
        files: gives levels as files that the engine runs; as ``candidates``.
        reference: the level that the others are compared with; None for the source.
        through: the way; None for the walk where it can go.

    Raises:
        UnknownArchitecture: neither way can go.
        BitladderError: anything else a user can meet.
    """
    return Ways(job, candidates, files, texts, recorded, reference).fidelities(subjects, through)


def fidelities_by_depth(
    job: Job,
    pairs: Sequence[tuple[Subject, CacheTypes]],
    texts: Sequence[Document],
    recorded: Recorded,
    *,
    files: Callable[[Sequence[Subject]], Sequence[Path]],
    depths: Sequence[int],
) -> list[Fidelity]:
    """Stored fidelities by depth of levels that are run with a cache, and those that are missing, from the engine.

    Args:
        job: the model.
        pairs: the levels, each with the cache that it is run with.
        texts: what is measured on.
        recorded: the evidence.
        files: gives levels as files.
        depths: tokens of context, rising.

    Raises:
        BitladderError: whatever a user can meet.
    """
    from bitladder.describe.text import text_hash
    from bitladder.files.folders import cache_key
    from bitladder.stages.job import filler_texts

    run_with = {subject.with_cache(cache): (subject, cache) for subject, cache in pairs}

    def measure(missing: Sequence[Subject]) -> Iterable[Fidelity]:
        bare = dict.fromkeys(run_with[one][0] for one in missing)
        paths = dict(zip(bare, files(list(bare)), strict=True))
        levels = [(one.level, paths[run_with[one][0]]) for one in missing]
        caches = [run_with[one][1] for one in missing]
        return deployed_fidelities(job, levels, caches, job.depth_windows(texts, depths))

    digest = cache_key(job.text_key(texts), "depths", *map(str, depths), text_hash(filler_texts()))
    return _stored_or_measured(job, list(run_with), digest, recorded, None, Way.DEPLOYED, measure)


def _stored_or_measured(
    job: Job,
    subjects: Sequence[Subject],
    digest: str,
    recorded: Recorded,
    reference: Subject | None,
    way: Way,
    measure: Callable[[Sequence[Subject]], Iterable[Fidelity]],
) -> list[Fidelity]:
    """What is known of the subjects on a text with this digest, the rest measured; each is stored when it is there.
    What is the same file, run in the same way, is measured once."""
    stored = {one: recorded.fidelity(one, digest, reference, way=way) for one in subjects}
    found = {subject: fidelity for subject, fidelity in stored.items() if fidelity is not None}
    job.journal.reuse("fidelity", [subject.level for subject in found])
    for subject in subjects:
        if subject not in found:
            job.progress.on_level(LevelNews(subject.level, "measuring"))
    same = recorded.one_of_each([subject for subject in subjects if subject not in found])
    missing = [subject for subject in same if same[subject] == subject]
    if missing:
        for subject, fidelity in zip(missing, measure(missing), strict=True):
            found[subject] = fidelity
            recorded.keep_fidelity(subject, digest, fidelity, reference)
    found |= {subject: replace(found[one], level=subject.level) for subject, one in same.items() if one != subject}
    for subject in subjects:
        job.progress.on_level(LevelNews(subject.level, "measured", kl_mean=found[subject].kl_mean))
    return [found[subject] for subject in subjects]


@dataclass(frozen=True)
class Ways:
    """What fidelity is measured with, by walking or in the engine."""

    job: Job
    candidates: Callable[[Sequence[Subject]], Sequence[Candidate]]
    files: Callable[[Sequence[Subject]], Sequence[Path]]
    texts: Sequence[Document]
    recorded: Recorded
    reference: Subject | None

    def fidelities(self, subjects: Sequence[Subject], through: Way | None = None) -> list[Fidelity]:
        """As the function of this name."""
        if not subjects:
            return []
        return self.tried(lambda way, refusal: self.all_of(subjects, way, refusal), through)

    def tried(self, measure: Callable[[Way, UnknownArchitecture | None], T], through: Way | None = None) -> T:
        """What ``measure`` gives on the way ``through``; by default on the walk where it can go, else in the engine,
        which is told why the walk refused."""
        way = way_for(self.job.source, through)
        try:
            return measure(way, None)
        except UnknownArchitecture as refusal:
            if through is not None or way is Way.ENGINE:
                raise
            return measure(instead_of_walk(self.job.source.model, refusal), refusal)

    def all_of(
        self, subjects: Sequence[Subject], way: Way, refusal: UnknownArchitecture | None = None
    ) -> list[Fidelity]:
        """Fidelities of all subjects, measured in one way."""
        job = self.job
        if way is Way.ENGINE:
            announce(job, "Fidelity is measured", refusal)

        def measure(missing: Sequence[Subject]) -> Iterator[Fidelity]:
            from bitladder.stages.fidelity import fidelity  # brings torch, which stored figures need not wait for

            windows = job.windows(self.texts)
            for subject, (own, beside) in zip(missing, self.scored(missing, windows, way), strict=True):
                yield replace(fidelity(subject.level, own, beside, windows), way=way)

        digest = job.text_key(self.texts)
        return _stored_or_measured(job, subjects, digest, self.recorded, self.reference, way, measure)

    @property
    def against(self) -> str:
        """A name for the reference, by its content."""
        from bitladder.store.evidence import canonical

        return self.job.source.sha256 if self.reference is None else canonical(self.reference.key)

    def scored(self, missing: Sequence[Subject], windows: Sequence[Window], way: Way) -> Iterable[Scored]:
        """Scores of every token of each, and of the reference beside it."""
        return self._in_engine(missing, windows) if way is Way.ENGINE else self._walked(missing, windows)

    def _walked(self, missing: Sequence[Subject], windows: Sequence[Window]) -> Iterable[Scored]:
        import numpy as np

        from bitladder.describe.windows import tokens_hash
        from bitladder.files.folders import cache_folder
        from bitladder.files.kept_array import KeptArray
        from bitladder.stages.fidelity import WalkOptions, token_scores
        from bitladder.store.recorded import protocol

        job = self.job
        name = ("at the head", self.against, tokens_hash(windows), protocol(Way.WALK))
        at_head = KeptArray(cache_folder("scores"), *name, dtype=np.float32)
        options = WalkOptions(progress=job.progress, threads=job.threads, device=job.device)
        options["keep"] = cache_folder("walks")  # a killed walk goes on from the states it left there
        options["remember"] = at_head
        walked = list(self.candidates([*([self.reference] if self.reference else []), *missing]))
        if self.reference is not None:  # made together with the others, so that what they hold alike is made once
            options["reference"] = walked.pop(0)
        levels = [candidate.level for candidate in walked]
        need = walking_need(job.source, windows, levels, beside=not at_head.is_there())
        with forecast(need, job.journal):
            beside, *scores = token_scores(job.source, walked, windows, **options)
        return [(own, beside) for own in scores]

    def _in_engine(self, missing: Sequence[Subject], windows: Sequence[Window]) -> Iterable[Scored]:
        paths = list(self.files([*([self.reference] if self.reference else []), *missing]))
        first = paths.pop(0) if self.reference is not None else self.job.source.path
        levels = [(subject.level, path) for subject, path in zip(missing, paths, strict=True)]
        return scores_in_engine(self.job, first, levels, windows)


def fidelity_of_reference(measured: Fidelity, level: str) -> Fidelity:
    """What is true of the reference beside itself, on the tokens that another level was measured on."""
    zero = dict.fromkeys((name for name in vars(measured) if name.startswith("kl_")), 0.0)
    one = dict.fromkeys((name for name in vars(measured) if name.startswith(("ppl_ratio", "top1"))), 1.0)
    units = (0.0,) * len(measured.unit_kl)
    return replace(measured, level=level, ppl=measured.ppl_reference, unit_kl=units, depths=(), **zero, **one)  # type: ignore[arg-type]


class Replies(NamedTuple):
    """What a model answered to a workload."""

    answers: tuple[Answer, ...]
    speed: Speed | None
    """None where it is measured beside others'."""
    stored: bool
    """Whether nothing had to be asked."""


def answers(
    subject: Subject,
    path: Path,
    workload: Workload,
    recorded: Recorded,
    *,
    n_ctx: int,
    work: Work,
    cache: CacheTypes = F16_CACHE,
    inputs: Sequence[Input] | None = None,
) -> Replies:
    """Answers of one level run with a KV cache, whose speed is measured beside the others' (``stages.speeds``). Every
    new answer is stored as it comes. ``inputs``: those of the workload to ask; all by default. On a busy machine the
    engine has as many threads as there are cores left."""
    from bitladder.describe.workload import questions_of
    from bitladder.engines.llama import with_cache
    from bitladder.engines.registry import start
    from bitladder.files.probe import unused_cores
    from bitladder.stages.as_deployed import refuse_unheard_tools
    from bitladder.stages.evaluate import answer_workload

    engine, launch = engine_of(path, workload, n_ctx=n_ctx, work=work)
    if inputs is not None:
        workload = replace(workload, inputs=tuple(inputs))
    questions = questions_of(workload)
    known = recorded.answers(subject, questions, engine)
    if len(known) == len(set(questions)):
        return Replies(tuple(known[question] for question in questions), None, stored=True)

    def keep(answer: Answer) -> None:
        recorded.keep_answer(subject, answer.question, engine, answer)
        known[answer.question] = answer
        work.progress.on_level(LevelNews(subject.level, answered=len(known), inputs=len(questions)))

    # Threads wait for the slowest of them at every matrix: beside a process that takes one of two cores, two threads
    # answer in 1.7 times the time of one, and decode at a quarter of its speed (benchmarks/engine_threads.py).
    launch = replace(launch, threads=max(1, round(min(launch.threads, unused_cores()))))
    with start(with_cache(launch, cache)) as server:
        refuse_unheard_tools(workload, server)
        found = answer_workload(server, workload, known=dict(known), on_answer=keep)
    return Replies(found, None, stored=False)


def engine_of(path: Path, workload: Workload, *, n_ctx: int, work: Work) -> tuple[dict[str, Any], Launch]:
    """The engine that a file answers a workload through: what answers are stored under, and how it is started."""
    from bitladder.engines.base import Launch
    from bitladder.engines.registry import container_of
    from bitladder.stages.run_facts import engine_facts, slots

    room, parallel = slots(workload, n_ctx)
    stored_as = container_of(path)
    facts = engine_facts(n_ctx=room, n_parallel=parallel, threads=work.threads, container=stored_as, path=path)
    return facts, Launch(path, n_ctx=room, n_parallel=parallel, threads=work.threads)
