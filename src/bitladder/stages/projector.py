"""The part of a model that takes in pictures and sounds, put beside its levels: it serves all of them as it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.errors import BadInput, OutputError
from bitladder.progress import Progress
from bitladder.stages.job import Journal
from bitladder.units import human_bytes

if TYPE_CHECKING:
    from bitladder.files.sources import Source


def deliver_projector(found: Source, out: Path, journal: Journal, progress: Progress) -> Path | None:
    """Convert a checkpoint's projector, or copy the one beside a GGUF file, to ``out``; what was done is said.

    Returns:
        Where it lies; None where the model has none, or none that can be made, which is said, too.

    Raises:
        OutputError: it cannot be written.
        FetchError: the converter cannot be fetched.
    """
    made = projector_of(found, journal, progress)
    return None if made is None else deliver(made, out, journal)


def deliver(made: Path, out: Path, journal: Journal) -> Path:
    """Copy a projector that is there to ``out``; what was done is said.

    Returns:
        Where it lies.

    Raises:
        OutputError: it cannot be written.
    """
    target = out / made.name
    if target.exists() and target.samefile(made):
        journal.say(f"{target}  takes in pictures or sounds, and serves every level as it is")
        return target
    if _is_other(target, made):
        journal.warn(f"{target} is another file than this model's projector, and stays; the latter is {made}.")
        return made
    if not target.exists():
        _copy(made, target)
    size = human_bytes(target.stat().st_size)
    journal.say(f"{target}  {size}, takes in pictures or sounds, and serves every level as it is")
    return target


def unmeasured_note(projector: Path) -> str:
    """The sentence for a run, whose text says nothing of pictures."""
    size = human_bytes(projector.stat().st_size)
    return (
        f"The model takes in pictures or sounds, too ({projector.name}, {size}, counted in memory): what is measured "
        "here is its language part alone."
    )


def projector_of(found: Source, journal: Journal, progress: Progress) -> Path | None:
    """The projector where it is now: in the cache, made when it is not there, or beside the model's file; None, which
    is said, where it cannot be made.

    Raises:
        OutputError, FetchError: as ``deliver_projector``.
    """
    from bitladder.files.beside import PICTURES, SOUNDS, parts_beside, projector_beside, towers
    from bitladder.files.checkpoint import read_checkpoint
    from bitladder.files.convert import convert_projector

    if found.checkpoint is None:
        return projector_beside(found.path)
    checkpoint = read_checkpoint(found.checkpoint)
    parts = parts_beside(checkpoint.tensors, checkpoint.config)
    senses = [what for what in (PICTURES, SOUNDS) if what in parts]
    if not senses:
        return None
    try:
        return convert_projector(found.checkpoint, found.label, progress)
    except BadInput as error:
        reason = error.found.strip().splitlines()
        last = f" {reason[-1].strip()}" if len(reason) > 1 else ""
        journal.warn(
            f"What takes in {' and '.join(senses)} ({towers(parts)}) is left out, and levels read text alone: "
            f"{reason[0].rstrip(':')}.{last}"
        )
        return None


def _is_other(target: Path, made: Path) -> bool:
    from bitladder.files.hashing import file_sha256

    if not target.exists():
        return False
    same = target.is_file() and target.stat().st_size == made.stat().st_size
    return not (same and file_sha256(target) == file_sha256(made))


def _copy(made: Path, target: Path) -> None:
    from bitladder.files.atomic import written_aside

    try:
        with written_aside(target) as file, made.open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 22)
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written: {error.strerror or error}.", do="Free some space, or name another folder."
        ) from error
