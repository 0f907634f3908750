"""Files by their hashes: which file a measurement is of, where that file lies now, and how to make it once more.

A level is a name, a file is bytes. Whoever measures a level's file stores its hash (`identified`); whoever writes one
asks first whether a file of that name is in evidence (`kept_by_evidence`); whoever wants a measured level looks for the
hash (`find_file`) and builds only what is nowhere, as it was built then (`importance_again`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.errors import BadInput, BitladderError
from bitladder.progress import Progress, silent
from bitladder.records.level_file import LevelFile, Making, StoredFile
from bitladder.stages.calibration import calibration_documents, importance_file, importance_of
from bitladder.stages.job import AUTO, NONE, Build, Job, Journal, Work
from bitladder.store.recorded import Subject

if TYPE_CHECKING:
    from bitladder.files.gguf import GgufFile
    from bitladder.stages.calibration import Importance
    from bitladder.store.recorded import Recorded


def model_sha256(path: Path, progress: Progress = silent) -> str:
    """Hash of the model that a GGUF file belongs to, all its parts together; of a checkpoint folder
    (``checkpoint_sha256``); of anything else the file's own."""
    from bitladder.files.checkpoint_folder import checkpoint_sha256
    from bitladder.files.gguf import joined_sha256, part_paths
    from bitladder.files.hashing import file_sha256

    if path.is_dir():
        return checkpoint_sha256(path, progress)
    try:
        parts = part_paths(path)
    except BitladderError:
        parts = [path]
    return joined_sha256([file_sha256(part, progress) for part in parts])


def kept_by_evidence(journal: Journal) -> Callable[[Path], bool]:
    """Whether a file must not be replaced, since evidence points to it; the store is opened when that is asked."""

    def is_kept(path: Path) -> bool:
        from bitladder.store.evidence import Evidence
        from bitladder.store.recorded import Recorded

        with Evidence.open() as store:
            kept = Recorded(store).points_to(model_sha256(path))
        if kept:
            journal.say(f"{path} stays as it is, since measurements are of that file: the new one gets another name.")
        return kept

    return is_kept


def tell_same_weights(files: Iterable[LevelFile], recorded: Recorded) -> None:
    """Compare files of one size, tensor by tensor, and tell the store which hold the same weights: a small model's rows
    fit few types, and then two levels differ by their headers alone."""
    from bitladder.files.gguf import GgufFile

    first: dict[int, list[LevelFile]] = {}
    for file in files:
        if file.path.is_dir():
            continue
        for other in first.setdefault(file.bytes, []):
            with GgufFile.open(file.path) as one, GgufFile.open(other.path) as two:
                if _same_tensors(one, two):
                    recorded.have_same_weights(file.sha256, other.sha256)
                    break
        else:
            first[file.bytes].append(file)


def _same_tensors(one: GgufFile, other: GgufFile) -> bool:
    import numpy as np

    def kinds(file: GgufFile) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {tensor.name: (tensor.qtype, tuple(tensor.shape)) for tensor in file.model.tensors}

    return kinds(one) == kinds(other) and all(np.array_equal(one.raw(name), other.raw(name)) for name in kinds(one))


def known_folders(recorded: Recorded, source: str) -> list[Path]:
    """Folders in which measured files of a model lay and which are still there, the newest first."""
    folders = [Path(file.path).parent for file in recorded.files(source)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def identified(
    built: Mapping[Subject, LevelFile], making: Making, recorded: Recorded, work: Work
) -> dict[Subject, LevelFile]:
    """The same files with their hashes, which are stored as what the measurements to come are of.

    A file that should be the one measured before and has another hash becomes a subject of its own, named by its hash:
    nothing that was measured on the other is said of it.
    """
    from bitladder import __version__

    found = {}
    for subject, file in built.items():
        sha256 = model_sha256(file.path, work.progress)
        before = recorded.hash_of(subject)
        method = subject.made
        if before not in (None, sha256):
            work.journal.warn(
                f"{file.path} is not the file that was measured as {subject.level} before, though made the same way: "
                "it is measured as it is. It was changed since; delete it to have the level built again."
            )
            subject = Subject(subject.source, subject.level, file=sha256)  # noqa: PLW2901 - the same level, another file
        known = StoredFile(
            subject.source, subject.level, sha256, str(file.path.resolve()), file.bytes, method, making, __version__
        )
        recorded.keep_file(subject, known)
        found[subject] = replace(file, sha256=sha256)
    return found


def find_file(
    sha256: str, size: int, places: Iterable[Path], folders: Iterable[Path], progress: Progress
) -> Path | None:
    """The file with a hash, first at these places, then under any name in these folders; None when it is not there.

    Only files of the right size (bytes) are read, and those only when they have changed since they were last hashed.
    """
    from bitladder.files.hashing import file_sha256

    inside = (path for folder in folders for path in sorted(folder.glob("*.gguf")))
    for path in dict.fromkeys([*places, *inside]):
        try:
            if path.is_file() and path.stat().st_size == size and file_sha256(path, progress) == sha256:
                return path
        except OSError:  # whoever may not read it cannot serve it either
            continue
    return None


def making_of(job: Job, build: Build, importance: Importance | None) -> Making:
    """How levels are made, with the importance matrix put by, so that they can be made again when its file is gone."""
    from bitladder.stages.write_levels import importance_hash

    digest = importance_hash(importance)
    if digest:
        _keep_importance(job, build, digest)
    given = build.imatrix if build.imatrix in (AUTO, NONE) else str(Path(build.imatrix).resolve())
    return Making(build.effort, given if digest else NONE, digest, job.threads)


def _kept_importance(digest: str) -> Path:
    from bitladder.files.folders import data_folder

    return data_folder("importance", digest)


def _keep_importance(job: Job, build: Build, digest: str) -> None:
    """Put an importance matrix by under the hash that methods call it by."""
    from bitladder.files.atomic import write_whole

    kept = _kept_importance(digest)
    origin = importance_file(job, calibration_documents(job, build)) if build.imatrix == AUTO else Path(build.imatrix)
    if not kept.is_file():
        write_whole(kept, origin.read_bytes())


def importance_again(job: Job, build: Build, file: StoredFile) -> Importance | None:
    """The importance matrix that a file was made with: as it was put by, else made again as ``build`` says.

    Raises:
        BadInput: it is gone.
    """
    from bitladder.files.imatrix import read_imatrix
    from bitladder.levels import FeedbackLevel, parse_level
    from bitladder.stages.write_levels import importance_hash

    making = file.making
    if not making.importance or isinstance(parse_level(file.level), FeedbackLevel):
        return None
    kept = _kept_importance(making.importance)
    if kept.is_file():
        vectors = read_imatrix(kept).vectors()
        if importance_hash(vectors) == making.importance:
            return vectors
    if making.imatrix != AUTO and not Path(making.imatrix).is_file():
        raise BadInput(
            f"{file.level} cannot be built as it was measured: its importance matrix, {making.imatrix}, is gone.",
            means="Another matrix makes another file, of which nothing is known.",
            do="Put it back, name a GGUF file to serve instead, or run `bitladder run` again.",
        )
    return importance_of(job, build)


def files_made_from(source: GgufFile, level: str, folders: Sequence[Path]) -> list[Path]:
    """Files that say of themselves that they are this level of this model, those with its usual name first."""
    from bitladder.files.gguf import read_header
    from bitladder.formats.gguf import PROVENANCE

    usual = f"{source.model.name}-{level}.gguf"
    found = []
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.glob("*.gguf"), key=lambda path: (path.name != usual, path.name)):
            try:
                metadata = read_header(path).metadata
            except BitladderError:
                continue
            if (metadata.get(PROVENANCE + "source_sha256"), metadata.get(PROVENANCE + "recipe")) == (
                source.sha256,
                level,
            ):
                found.append(path)
    return found
