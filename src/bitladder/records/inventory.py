"""What Bitladder keeps on this machine: runs, level files, caches, and what points to each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Place(StrEnum):
    """What kind of thing is kept."""

    LEVEL = "level"
    """A level's file that something was measured on."""
    PARTIAL = "partial file"
    """What a stopped job left: the same command goes on from there."""
    CACHE = "cache"
    DOWNLOAD = "download"
    """A file of the hub that has arrived in part."""
    HUB = "hub model"
    """A repository in the hub client's own cache, which other programs use, too."""


@dataclass(frozen=True)
class KeptRun:
    """A run that is in evidence, or whose record lies in a folder that evidence knows."""

    model: str
    """The model's name, or the beginning of its hash where the record is gone."""
    created: str
    """ISO 8601."""
    path: str
    """Its record, run.json."""
    bar: str
    quality: str | None
    speed: str | None
    levels: tuple[str, ...]
    bytes: int
    """Of its levels' files that lie beside its record."""
    gone: bool
    """The record is not there any more: evidence alone remembers its decision."""
    served: bool
    """The one that ``bitladder serve MODEL`` takes."""


@dataclass(frozen=True)
class KeptFile:
    """A file or a folder, with what points to it."""

    place: Place
    name: str
    """The level and model, the kind of cache, or the repository."""
    path: str
    bytes: int
    used: str
    """When it was last read or written, ISO 8601, as the file system has it."""
    kept_by: tuple[str, ...] = ()
    """What points to it, in words; empty where nothing does."""
    stale: bool = False
    """Nothing points to it and it was not used for as long as was given: ``clean`` would delete it."""


@dataclass(frozen=True)
class Inventory:
    """Everything that is kept."""

    store: str
    """Where evidence lies, without a password."""
    cache: str
    runs: tuple[KeptRun, ...]
    files: tuple[KeptFile, ...]

    @property
    def stale(self) -> tuple[KeptFile, ...]:
        """What ``clean`` would delete."""
        return tuple(file for file in self.files if file.stale)
