"""Checkpoint formats, a file each: names, sizes, arrays, configuration, what engines make of them.

To add one: a class as in ``base.py`` in a file of its own, its place in ``FORMATS``, a test. Nothing else knows formats
by name: the plan, the walk, the files and the report ask the level's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from bitladder.errors import UnknownLevel
from bitladder.levels.checkpoints.awq import Awq
from bitladder.levels.checkpoints.base import (
    Arrays,
    CheckpointFormat,
    FolderFormat,
    Parameters,
    Stored,
    digest,
    digest_of_rows,
)
from bitladder.levels.checkpoints.compressed_tensors import IntQuantized, PackQuantized
from bitladder.levels.checkpoints.fp8 import Fp8
from bitladder.levels.checkpoints.gptq import Gptq
from bitladder.levels.checkpoints.mixed import Mixed
from bitladder.levels.checkpoints.mlx import MlxAffine, MlxFloat
from bitladder.levels.checkpoints.mx import Mxfp4, Mxfp8
from bitladder.levels.checkpoints.nvfp4 import Nvfp4
from bitladder.levels.kinds import CheckpointLevel

FORMATS: tuple[type[FolderFormat], ...] = (
    Fp8, IntQuantized, PackQuantized, Gptq, Awq, Nvfp4, Mxfp4, Mxfp8, Mixed, MlxAffine, MlxFloat,
)  # fmt: skip
"""All that are written, in the order in which their levels are offered."""


def parse_checkpoint(name: str) -> CheckpointLevel:
    """The level that a name like ``GPTQ-4bit-g64`` or ``INT8-W8A8`` asks for; upper and lower case are the same.

    Raises:
        UnknownLevel: no such level, or one that no engine can run.
    """
    if (level := named(name)) is not None:
        return level
    raise UnknownLevel(f"'{name}' is not a checkpoint level.", do=f"Levels look like {grammar()}.")


def named(name: str) -> CheckpointLevel | None:
    """As ``parse_checkpoint``; None where no format knows the name."""
    return next((level for form in FORMATS if (level := form.parse(name)) is not None), None)


def recognised(configuration: Mapping[str, Any]) -> FolderFormat | None:
    """The format that a ``quantization_config`` describes, whoever wrote it; None where none of ours reads it."""
    return next((found for form in FORMATS if (found := form.recognise(configuration)) is not None), None)


def prefixes() -> frozenset[str]:
    """First words of the names of checkpoint levels, in upper case: ``GPTQ``, ``INT8``."""
    return frozenset(prefix for form in FORMATS for prefix in form.prefixes)


def grammar() -> str:
    """What the names of all formats look like, for messages."""
    return ", ".join(form.grammar for form in FORMATS)


def offered_names(rows: Collection[int]) -> tuple[str, ...]:
    """Levels to look at when none is named, for a model whose matrices have ``rows`` of so many weights."""
    return tuple(name for form in FORMATS for name in form.offers(rows))


__all__ = [
    "FORMATS", "Arrays", "CheckpointFormat", "FolderFormat", "Mixed", "Parameters", "Stored", "digest",
    "digest_of_rows", "grammar", "named", "offered_names", "parse_checkpoint", "prefixes", "recognised",
]  # fmt: skip
