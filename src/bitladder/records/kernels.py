"""Which engine runs which scheme on which device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Runs(StrEnum):
    """How an engine runs a scheme."""

    FULL = "full"
    SLOWER = "slower"
    NO = "no"


@dataclass(frozen=True)
class Kernel:
    """An engine and a scheme, as a public source says. Compute capabilities are NVIDIA's; None: on no GPU of theirs."""

    engine: str
    scheme: str
    source: str
    date: str
    native: float | None = None
    """From which capability it has kernels that make the most of the scheme."""
    runs: float | None = None
    """From which it runs at all; None: as ``native``."""
    others: tuple[str, ...] = ()
    """Other devices: ``cpu``, ``amd``, ``apple``."""
    cpu_needs: str = ""
    """An instruction set without which a processor does not run it, as Linux spells it."""
    slower: str = ""
    """What is lost below ``native``."""
    note: str = ""


@dataclass(frozen=True)
class EngineNote:
    """An engine's name, and what is to be known of it."""

    name: str
    note: str = ""


@dataclass(frozen=True)
class KernelTable:
    """All rows, by engine and scheme."""

    rows: tuple[Kernel, ...]
    engines: Mapping[str, EngineNote]
    sources: Mapping[str, str]

    @property
    def schemes(self) -> tuple[str, ...]:
        """Each once, in the order of the rows."""
        return tuple(dict.fromkeys(row.scheme for row in self.rows))

    def of(self, engine: str, scheme: str) -> Kernel | None:
        """The row of both; None where nothing is known to run."""
        return next((row for row in self.rows if (row.engine, row.scheme) == (engine, scheme)), None)
