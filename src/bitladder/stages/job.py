"""What every verb is given: a model that is open, what to do the work with, and whom to tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bitladder.progress import Progress, silent
from bitladder.records.job import JobOutcome

if TYPE_CHECKING:
    from bitladder.describe.depths import DepthWindows
    from bitladder.describe.text import Document
    from bitladder.describe.windows import Window
    from bitladder.executors import Executor
    from bitladder.files.gguf import GgufFile
    from bitladder.files.sources import Source
    from bitladder.kernels import Effort
    from bitladder.records.own_text import OwnTextReport

Say = Callable[[str], None]
CPU = "cpu"
AUTO = "auto"
"""Make an importance matrix from the calibration text."""
NONE = "none"
SELF, SHIPPED, WIDE = "self", "shipped", "wide"
"""Calibration text that the model writes itself, the one that comes with the package, and all that comes with it."""
DEFAULT_CALIBRATION: Mapping[Effort, str] = {"fast": SHIPPED, "good": SHIPPED, "best": WIDE}
"""What measured best of what an effort has the time for (docs/calibrate.md)."""
CalibrationPart = str | Path
"""A file or folder of texts, ``SELF``, ``SHIPPED`` or ``WIDE``."""
T = TypeVar("T")


@dataclass
class Journal:
    """Seconds per stage, jobs beside their predictions, what was reused, and what the user should know."""

    say: Say = lambda _: None
    timings: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    jobs: list[JobOutcome] = field(default_factory=list)
    own_text: OwnTextReport | None = None
    """Of calibration text that the model wrote itself, where that was asked for."""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.monotonic() - start

    def warn(self, *warnings: str) -> None:
        """Say it now, once, and again in the report."""
        for warning in warnings:
            if warning not in self.warnings:
                self.warnings.append(warning)
                self.say(f"! {warning}")

    def reuse(self, what: str, levels: Sequence[str]) -> None:
        """Say what is not done again."""
        if levels:
            line = f"{what} of {', '.join(levels)}"
            self.reused.append(line)
            self.say(f"Reused: {line}.")


@dataclass(frozen=True, kw_only=True)
class Work:
    """How work is done, whatever it is."""

    threads: int = 1
    device: str = CPU
    """Where walks compute and scales are searched for, as torch names it; with an executor, where each unit does."""
    executor: Executor | None = None
    """Computes units of calibrating walks and of writing levels; None: they are computed right here."""
    progress: Progress = silent
    journal: Journal = field(default_factory=Journal)


@dataclass(frozen=True, kw_only=True)
class Job(Work):
    """Work on one model, which is open as long as the job lasts."""

    source: GgufFile
    found: Source
    """Where the model came from."""
    _windows: dict[str, list[Window]] = field(default_factory=dict, repr=False, compare=False)
    _found: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint folder that the source was converted from, where it is at hand."""
        from bitladder.files.convert import checkpoint_of

        return self.found.checkpoint or checkpoint_of(self.source.path)

    def once(self, what: str, find: Callable[[], T]) -> T:
        """What ``find`` gives, called once in a job for each ``what``."""
        if what not in self._found:
            self._found[what] = find()
        found: T = self._found[what]
        return found

    def windows(self, texts: Sequence[Document]) -> list[Window]:
        """Windows of tokens, as ``tokens`` reads them. A text is tokenized once in a job.

        Raises:
            EngineError: the engine does not load the model, and no checkpoint is at hand.
            BadInput: too little text.
        """
        from bitladder.describe.text import text_hash
        from bitladder.describe.windows import text_windows

        digest = text_hash(texts)
        if digest not in self._windows:
            marks = [""] if self.found.unread_tokenizer else []  # what nothing begins with, where no header says it
            read = [*marks, *(document.text for document in texts)]
            ids = dict(zip(read, self.tokens(read), strict=True))
            bos = ids[""][0] if marks and ids[""] else None
            self._windows[digest] = text_windows(texts, ids.__getitem__, self.source.model, bos=bos)
        return self._windows[digest]

    def depth_windows(self, texts: Sequence[Document], depths: Sequence[int]) -> list[DepthWindows]:
        """Windows of these depths, with the calibration text that ships before documents that are shorter.

        Raises:
            EngineError, BadInput: as ``windows``.
        """
        from bitladder.describe.depths import depth_windows
        from bitladder.describe.windows import bos_in_front

        marks = [""] if self.found.unread_tokenizer else []
        filler = filler_texts()
        ids = self.tokens([*marks, *(document.text for document in (*texts, *filler))])
        first = ids.pop(0)[0] if marks and ids[0] else None
        bos = bos_in_front(self.source.model, ids, first)
        named = [(document.name, one) for document, one in zip(texts, ids, strict=False)]
        return depth_windows(named, ids[len(texts) :], depths, bos=bos)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts by the engine's own tokenizer; by the checkpoint's where the engine does not load the model,
        which is said.

        Raises:
            EngineError: the engine does not load the model, and no checkpoint is at hand.
            BadInput: the checkpoint's tokenizer cannot be read either.
        """
        from bitladder.stages.engine_load import engine_ids

        folder = self._own_tokenizer()
        if folder is None:
            return engine_ids(self.source, texts)
        from bitladder.files.companions import token_ids

        return token_ids(folder, texts)

    def require_engine(self) -> None:
        """Refuse a model that the engine does not load, at once and with what still works.

        Raises:
            EngineError: it does not load it, or that cannot be found out.
        """
        from bitladder.stages.engine_load import require_engine

        self.require_tokenizer()
        require_engine(
            self.source,
            self.found.label,
            instead="`measure`, `imatrix`, `recipe` and `quantize` work: they walk the checkpoint's layers."
            if self.checkpoint
            else "`quantize --imatrix none` works; `measure` does with the model's checkpoint folder.",
        )

    def require_layers(self) -> None:
        """Refuse a file that cannot be walked, before its text is read.

        Raises:
            UnknownArchitecture: no row describes its layers, and there is no checkpoint.
        """
        from bitladder.describe.layers import layers_of

        if self.checkpoint is None:
            layers_of(self.source.model)

    def require_tokenizer(self) -> None:
        """Refuse a checkpoint whose file has no tokenizer where files are wanted that an engine runs.

        Raises:
            BadInput: it has none.
        """
        from bitladder.errors import BadInput

        if reason := self.found.unread_tokenizer:
            raise BadInput(
                f"llama.cpp's converter does not read the tokenizer of {self.found.label}: {reason}.",
                means="The tokenizer is of a new kind, or was changed by fine-tuning; a GGUF file without one runs "
                "nowhere.",
                do="Put the original tokenizer files into the folder, or give a GGUF file of the model. `measure`, "
                "`imatrix` and checkpoint levels (GPTQ, AWQ, INT8, FP8, ...) work as it is.",
            )

    def text_key(self, texts: Sequence[Document]) -> str:
        """What tells the tokens of a text from those of others: its hash, and of the tokenizer where that is not the
        engine's.

        Raises:
            EngineError: there is a checkpoint, and whether the engine loads the model cannot be found out.
        """
        from bitladder.describe.text import text_hash
        from bitladder.files.folders import cache_key
        from bitladder.stages.engine_load import tokenizer_key

        folder, digest = self._own_tokenizer(), text_hash(texts)
        return digest if folder is None else cache_key(digest, tokenizer_key(folder))

    def _own_tokenizer(self) -> Path | None:
        """The folder whose tokenizer reads texts, where it is not the engine's."""
        from bitladder.stages.engine_load import refusal_of

        folder = self.checkpoint
        if folder is None or self.found.unread_tokenizer:  # which is said already
            return folder
        reason = refusal_of(self.source)
        if not reason:
            return None
        line = (
            f"The engine does not load {self.found.label} ({reason}): texts are read by the checkpoint's own "
            "tokenizer, and nothing of it can be run here."
        )
        self.journal.warn(line)
        return folder


def filler_texts() -> list[Document]:
    """What stands before a document that is shorter than the context it is measured in: never what is measured on."""
    from bitladder.files.texts import shipped_texts

    return shipped_texts("calibration")


@contextmanager
def opened(model: str, work: Work, *, warn: bool = True) -> Iterator[Job]:
    """The model found (or fetched) and open; what the user should know of it is told, unless not to ``warn``.

    Raises:
        BadInput, FetchError, OutputError: as ``files.sources.resolve``.
        BadFile: it is no sound GGUF file.
    """
    from bitladder.describe.quantized import decoded_from
    from bitladder.files.gguf import GgufFile
    from bitladder.files.sources import resolve

    found = resolve(model, work.progress)
    with GgufFile.open(found.path) as source:
        source.model = decoded_from(source.model, found.origin)
        if found.checkpoint:  # folders of equal content share a converted file, which has the name of the first
            source.model = replace(source.model, name=found.label, file_name=f"{found.label}.gguf")
        if warn:
            work.journal.warn(*found.warnings)
        yield Job(**vars(work), source=source, found=found)


@dataclass(frozen=True, kw_only=True)
class Build:
    """Where levels are written, and what they are made with."""

    out: Path
    imatrix: str = AUTO
    """A file, ``auto`` (made here, where a level's bytes depend on it) or ``none``."""
    effort: Effort = "good"
    """How long to search for scales and codes."""
    texts: Sequence[CalibrationPart] = ()
    """What is calibrated on; ``DEFAULT_CALIBRATION`` of the effort where nothing is named."""
    tuning: Sequence[CalibrationPart] = ()
    """What the numbers beside codes are tuned on, of levels that have such; nothing: they are not."""
    calibration_share: float = 1.0
    """Of the calibration text, that an importance matrix is gathered on: less where there is no time for more."""
    measured_on: Sequence[Document] = ()
    """Texts that levels will be measured on, which calibration must not have seen; none are checked by default."""
    folders: Sequence[Path] = ()
    """Where else levels may lie already, under any name."""
    force: bool | None = None
    """Whether files of other kinds and sources may be replaced; None where the user has no say."""
    split_max_bytes: int | None = None
    """Cut GGUF levels into parts of at most so many bytes of weights."""
    requantize: bool = False
    """Plain GGUF levels change weights in a type that models are trained in, too."""

    @property
    def calibration(self) -> Sequence[CalibrationPart]:
        """What is calibrated on, named or by default."""
        return self.texts or (DEFAULT_CALIBRATION[self.effort],)

    @property
    def importance_text(self) -> Sequence[CalibrationPart]:
        """What an importance matrix is gathered on: its few numbers hardly change with more than the shorter text."""
        return self.texts or (SHIPPED,)
