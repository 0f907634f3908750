"""Steps that calibrate: texts and their tokens, importance matrices, which are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.progress import Progress
from bitladder.stages.forecast import job, walking_need
from bitladder.stages.job import Journal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bitladder.describe.text import Document
    from bitladder.describe.windows import Window
    from bitladder.files.gguf import GgufFile
    from bitladder.files.imatrix import ImportanceMatrix

    Importance = Mapping[str, NDArray[np.float32]]

AUTO = "auto"
"""Make an importance matrix from the calibration text."""
NONE = "none"


def token_windows(source: GgufFile, texts: Sequence[Document]) -> list[Window]:
    """Windows by the engine's own tokenizer, so that tokens are those that users get; nothing is computed there."""
    from bitladder.engines.base import Launch
    from bitladder.engines.registry import start
    from bitladder.stages.fidelity import text_windows

    with start(Launch(source.path, n_ctx=64, threads=1)) as engine:
        return text_windows(texts, lambda text: engine.tokenize(text, add_special=True), source.model)


def calibration_texts(texts: Sequence[Path]) -> list[Document]:
    """The user's calibration texts, or the ones that ship: several domains, languages and code."""
    from bitladder.files.texts import read_texts, shipped_texts

    return read_texts(texts) if texts else shipped_texts("calibration")


def importance_file(source: GgufFile, documents: Sequence[Document]) -> Path:
    """Where the importance matrix of a model and a text is kept."""
    from bitladder.describe.text import text_hash
    from bitladder.files.folders import cache_folder

    return cache_folder("importance", f"{source.sha256[:16]}-{text_hash(documents)[:16]}.gguf")


def importance_of(
    source: GgufFile,
    choice: str,
    *,
    texts: Sequence[Path] = (),
    measured_on: Sequence[Document] = (),
    threads: int = 1,
    device: str = "cpu",
    journal: Journal | None = None,
    progress: Progress,
) -> Importance | None:
    """The importance matrix that a user asked for: a file's, one made from the calibration text, or none.

    A matrix that was made before from the same model and text is read from the cache.

    Args:
        choice: a file's path, ``auto`` or ``none``.
        texts: the user's calibration texts.
        measured_on: texts that levels will be measured on; calibrating on them would flatter every level.
        device: where one is made, as torch names it.
        journal: told what making one will take, and what it took.

    Raises:
        NothingFits: too little memory to make one.
        BadInput: the calibration text shares passages with the measuring text, or is too short.
        BadFile: the file cannot be used.
    """
    from bitladder.describe.text import text_hash
    from bitladder.files.imatrix import read_imatrix, write_imatrix
    from bitladder.plan.calibration_text import check_overlap

    if choice == NONE:
        return None
    if choice != AUTO:
        return read_imatrix(Path(choice)).vectors()
    documents = calibration_texts(texts)
    kept = importance_file(source, documents)
    apart = kept.with_name(f"{kept.stem}-{text_hash(measured_on)[:16]}.apart")
    checked = apart.exists() or not measured_on
    if not kept.exists() or not checked:  # both need the engine's tokenizer
        windows = token_windows(source, documents)
        check_overlap(windows, token_windows(source, measured_on) if measured_on else ())
        apart.parent.mkdir(parents=True, exist_ok=True)
        apart.touch()  # these two texts have been found to share nothing
    if not kept.exists():
        found = _gathered(source, windows, "calibration text", threads, device, journal or Journal(), progress)
        write_imatrix(kept, found)
    return read_imatrix(kept).vectors()


def _gathered(
    source: GgufFile,
    windows: Sequence[Window],
    dataset: str,
    threads: int,
    device: str,
    journal: Journal,
    progress: Progress,
) -> ImportanceMatrix:
    """An importance matrix, made; a killed call goes on where it was."""
    from bitladder.files.folders import cache_folder
    from bitladder.stages.imatrix import importance_matrix  # brings torch: a second to import, for this case alone

    with job(walking_need(source, windows, (), kind="importance"), journal):
        return importance_matrix(
            source,
            windows,
            dataset=dataset,
            threads=threads,
            device=device,
            keep=cache_folder("walks", "importance"),
            progress=progress,
        )


def make_imatrix(
    model: str,
    texts: Sequence[Path],
    out: Path,
    *,
    threads: int,
    force: bool = False,
    device: str = "cpu",
    journal: Journal | None = None,
    progress: Progress,
) -> Path:
    """Write llama.cpp's importance matrix of a model for a text (or for the one that ships); returns the path.

    ``journal`` is told what it will take, and what it took. ``force``: replace whatever file is there.

    Raises:
        NothingFits: too little memory.
        UsageError: ``out`` is the model, a text, or no importance matrix that was made of this model.
    """
    from bitladder.files.gguf import GgufFile
    from bitladder.files.imatrix import made_from, write_imatrix
    from bitladder.files.outputs import check_output
    from bitladder.files.sources import resolve

    documents = calibration_texts(texts)
    with GgufFile.open(resolve(model, progress).path) as source:
        check_output(
            out,
            "an importance matrix",
            inputs=[*(header.path for header in source.headers), *texts],
            ours=lambda path: made_from(path, source.sha256),
            force=force,
        )
        windows = token_windows(source, documents)
        dataset = ", ".join(str(text) for text in texts) or "bitladder calibration text"
        found = _gathered(source, windows, dataset, threads, device, journal or Journal(), progress)
        write_imatrix(out, found, source_sha256=source.sha256)
    return out
