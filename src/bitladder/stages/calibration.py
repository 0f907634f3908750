"""Importance matrices, made from a calibration text and kept; the text itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder import __version__
from bitladder.errors import BadInput, EngineError, TooShort, UnknownArchitecture
from bitladder.records.fidelity import Way
from bitladder.stages.engine_way import announce, engine_matrix, instead_of_walk, way_for
from bitladder.stages.forecast import forecast, walking_need
from bitladder.stages.job import (
    AUTO,
    NONE,
    SELF,
    SHIPPED,
    WIDE,
    Build,
    CalibrationPart,
    Job,
    Work,
    opened,
)
from bitladder.stages.model_route import route_of
from bitladder.stages.own_text import own_documents

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bitladder.describe.text import Document
    from bitladder.describe.windows import Window
    from bitladder.files.gguf import GgufFile
    from bitladder.files.imatrix import ImportanceMatrix
    from bitladder.plan.preflight import JobNeed

    Importance = Mapping[str, NDArray[np.float32]]


def calibration_texts(job: Job, parts: Sequence[CalibrationPart] = ()) -> list[Document]:
    """What is calibrated on: the user's texts, those that ship (several domains, languages and code), those that the
    model writes itself, in the order in which they are named. Where it writes too little that can be used, and nothing
    else is named, those that ship.

    Raises:
        BadInput: a file cannot be read.
        EngineError, NothingFits, OutputError: the model cannot write (``stages.own_text``).
    """
    from bitladder.describe.text import told_apart
    from bitladder.files.texts import read_texts, shipped_texts

    shipped, wider = "calibration", "calibration/wide"
    wanted = list(dict.fromkeys(parts or (SHIPPED,)))
    if WIDE in wanted and SHIPPED in wanted:
        wanted.remove(SHIPPED)  # a part of it
    found: list[Document] = []
    for part in wanted:
        if part == SELF:
            found += job.once(SELF, lambda: own_documents(job))
        elif part in (SHIPPED, WIDE):
            found += shipped_texts(shipped) + (shipped_texts(wider) if part == WIDE else [])
        else:
            found += read_texts([Path(part)])
    return told_apart(found) or shipped_texts(shipped)


def tuning_windows(job: Job, known: Sequence[Window], build: Build) -> list[Window]:
    """The text that a build tunes on, without windows that codes are fitted to or levels are measured on (``known``).

    Raises:
        BadInput: nothing of it is left, or too little to hold some out.
    """
    from bitladder.describe.windows import WINDOW, different
    from bitladder.plan.tuning import LEAST_WINDOWS, held_places

    if not build.tuning:
        return []
    try:
        windows = job.windows(calibration_texts(job, build.tuning))
    except TooShort:  # whose message is about texts that one can leave out
        windows = []
    seen = {window.tokens.tobytes() for window in known}
    own = [one for one in different(windows) if one.tokens.tobytes() not in seen]
    if windows and not own:
        raise BadInput(
            "The text to tune on is the one that codes are fitted to.",
            means="A level's predictions on text that it was fitted to are too good to learn from.",
            do="Give --tune another text, or self: the model writes one.",
        )
    if not held_places([one.document for one in own]):
        raise BadInput(
            f"The text to tune on makes {len(own)} windows of tokens that codes are not fitted to.",
            means="Too few to hold some out: every fifth decides whether tuning helped, and three must at least.",
            do=f"Give --tune a longer text, {LEAST_WINDOWS * WINDOW:,} tokens or more, or self: the model writes one.",
        )
    return own


def calibration_documents(job: Job, build: Build) -> list[Document]:
    """The texts that a build's importance matrix is gathered on, or as many of them, in an order that their hashes fix,
    as its share asks for and an importance matrix needs."""
    from bitladder.describe.text import CHARACTERS_PER_TOKEN, text_hash
    from bitladder.plan.calibration_text import LEAST_TOKENS

    whole = calibration_texts(job, build.importance_text)
    if build.calibration_share >= 1:
        return whole
    wanted = max(
        build.calibration_share * sum(len(one.text) for one in whole), 2.0 * LEAST_TOKENS * CHARACTERS_PER_TOKEN
    )
    taken: list[Document] = []
    for document in sorted(whole, key=lambda one: text_hash([one])):
        if sum(len(one.text) for one in taken) < wanted:
            taken.append(document)
    return [document for document in whole if document in taken]


def importance_file(job: Job, documents: Sequence[Document]) -> Path:
    """Where the importance matrix of a model and a text is kept, as it is gathered on the way that the model can go."""
    from bitladder.files.folders import cache_folder, cache_key

    key = cache_key(__version__, job.source.sha256, job.text_key(documents), route_of(job.source))
    return cache_folder("importance", f"{key[:32]}.gguf")


def importance_of(job: Job, build: Build) -> Importance | None:
    """The importance matrix that levels are built with: a file's, one made from the calibration text, or none; None,
    with a warning, where the model cannot be walked.

    A matrix that was made before from the same model and text is read from the cache.

    Raises:
        UnknownArchitecture: neither way can go; told before anything is started.
        NothingFits: too little memory to make one.
        EngineError: the engine does not run this model.
        BadInput: the calibration text shares passages with the measuring text, or is too short.
        BadFile: the file cannot be used.
    """
    if build.imatrix == NONE:
        return None
    if build.imatrix != AUTO:
        return given_importance(job.source, Path(build.imatrix))
    try:
        return _made_once(job, build).vectors()
    except UnknownArchitecture as error:
        job.journal.warn(f"Levels are made without an importance matrix: {error.found}")
        return None


def given_importance(source: GgufFile, file: Path) -> Importance:
    """The importance matrix of a file.

    Raises:
        BadInput: it cannot be read, or is of another model.
        BadFile: it cannot be used.
    """
    from bitladder.files.imatrix import read_imatrix
    from bitladder.stages.write_levels import fitted_importance

    vectors = read_imatrix(file).vectors()
    try:
        fitted = fitted_importance(source, vectors)
    except BadInput as error:
        error.found = f"{file}: {error.found}"
        raise
    if not fitted:
        raise BadInput(
            f"{file} has the importance of no tensor of {source.path}.",
            means="It was computed for another model.",
            do="Compute one for this model, or leave it away.",
        )
    return vectors


def importance_need(job: Job, build: Build) -> JobNeed | None:
    """What gathering the importance matrix will take; None where that need not be done."""
    documents = calibration_documents(job, build)
    if build.imatrix != AUTO or importance_file(job, documents).exists():
        return None
    return walking_need(job.source, job.windows(documents), (), kind="importance")


def _made_once(job: Job, build: Build) -> ImportanceMatrix:
    from bitladder.describe.text import text_hash
    from bitladder.files.imatrix import read_imatrix, write_imatrix
    from bitladder.plan.calibration_text import check_overlap

    documents = calibration_documents(job, build)
    kept = importance_file(job, documents)
    apart = kept.with_name(f"{kept.stem}-{text_hash(build.measured_on)[:16]}.apart")
    with _saying_how_to_go_without():
        if not kept.exists() or (build.measured_on and not apart.exists()):  # both need the engine's tokenizer
            way_for(job.source)
            check_overlap(job.windows(documents), job.windows(build.measured_on) if build.measured_on else ())
            apart.parent.mkdir(parents=True, exist_ok=True)
            apart.touch()  # these two texts have been found to share nothing
        if not kept.exists():
            write_imatrix(kept, _gathered(job, job.windows(documents), "calibration text"))
    return read_imatrix(kept)


@contextmanager
def _saying_how_to_go_without() -> Iterator[None]:
    """Levels can be made without an importance matrix also where the engine does not run their model."""
    try:
        yield
    except EngineError as error:
        error.do = f"{error.do} Without an importance matrix (--imatrix none) it need not run.".strip()
        raise


def _gathered(job: Job, windows: Sequence[Window], dataset: str, through: Way | None = None) -> ImportanceMatrix:
    """An importance matrix, made; a killed call goes on where it was."""
    refusal = None
    model = job.source.model
    if way_for(job.source, through) is Way.WALK:
        try:
            return _walked(job, windows, dataset)
        except UnknownArchitecture as error:
            if through is not None:
                raise
            instead_of_walk(model, error)
            refusal = error
    announce(job, "Importance is gathered", refusal)
    return engine_matrix(job, windows, dataset)


def _walked(job: Job, windows: Sequence[Window], dataset: str) -> ImportanceMatrix:
    from bitladder.files.folders import cache_folder
    from bitladder.stages.imatrix import importance_matrix  # brings torch: a second to import, for this case alone

    with forecast(walking_need(job.source, windows, (), kind="importance"), job.journal):
        return importance_matrix(
            job.source, windows, dataset=dataset, threads=job.threads, device=job.device, executor=job.executor,
            warn=job.journal.warn,
            keep=cache_folder("walks", "importance"), progress=job.progress,
        )  # fmt: skip


def make_imatrix(
    model: str,
    texts: Sequence[CalibrationPart],
    out: Path,
    work: Work,
    *,
    force: bool = False,
    through: Way | None = None,
) -> Path:
    """Write llama.cpp's importance matrix of a model for a text (or for the default one); returns the path.

    ``force``: replace whatever file is there. ``through``: the way it is gathered; None for the walk where it can go,
    else the engine.

    Raises:
        UnknownArchitecture: neither way can go.
        NothingFits: too little memory.
        UsageError: ``out`` is the model, a text, or no importance matrix that was made of this model.
    """
    from bitladder.files.imatrix import made_from, write_imatrix
    from bitladder.files.outputs import check_output

    files = [Path(text) for text in texts if text not in (SELF, SHIPPED, WIDE)]
    with opened(model, work) as job:
        source = job.source
        check_output(
            out,
            "an importance matrix",
            inputs=[*(header.path for header in source.headers), *files],
            ours=lambda path: made_from(path, source.sha256),
            force=force,
        )
        documents = calibration_texts(job, texts)
        way_for(source, through)
        dataset = ", ".join(str(text) for text in texts) or "bitladder calibration text"
        write_imatrix(out, _gathered(job, job.windows(documents), dataset, through), source_sha256=source.sha256)
    return out
