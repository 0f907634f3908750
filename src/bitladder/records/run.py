"""One run of the whole ladder as one record: what the report draws, the page reads and ``--json`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bitladder.records import OPTIONAL, Real
from bitladder.records.decision import Decision
from bitladder.records.evaluation import LevelAnswers, WorkloadResult
from bitladder.records.fidelity import Fidelity
from bitladder.records.job import JobOutcome
from bitladder.records.plan import Plan
from bitladder.records.speculation import SpeculationReport
from bitladder.records.wording import WordingChanges


@dataclass(frozen=True)
class SourceFacts:
    """The model that was measured against."""

    name: str
    """The model's own name, or the file's."""
    location: str
    """As the user wrote it: ``hf:org/name``, a path, ``smollm2-135m``."""
    sha256: str
    level: str
    """The level that the source itself is: ``F16``, ``BF16``, or a quantized one."""
    architecture: str
    parameters: int
    bytes: int
    quantized: bool = False
    """True when the source is itself quantized: every loss is then relative to that file."""


@dataclass(frozen=True)
class FileFacts:
    """One written file. Sizes in bytes, ``bpw`` over all weights, ``seconds`` to quantize (0 when it was
    there already)."""

    level: str
    path: str
    bytes: int
    bpw: Real
    sha256: str = ""
    seconds: Real = 0.0
    method: str = ""
    """How it was made, as its header says it."""


@dataclass(frozen=True)
class InputFacts:
    """One input of the workload, in the words a reader of the report needs."""

    id: str
    prompt: str
    criterion: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class LevelCost:
    """What a million answer tokens cost, in the currency of the user's prices."""

    level: str
    per_million: Real
    """Here one request at a time: several at once cost less."""
    basis: str
    """The price that it follows from, with its date and source."""


@dataclass(frozen=True)
class RunRecord:
    """Everything a run found out, and everything needed to repeat it."""

    bitladder: str
    """Version of Bitladder."""
    created: str
    """UTC, ISO 8601, seconds."""
    source: SourceFacts
    machine: dict[str, Any]
    """`describe.machine.Machine` as plain data."""
    plan: Plan
    decision: Decision
    files: tuple[FileFacts, ...] = ()
    fidelities: tuple[Fidelity, ...] = ()
    results: tuple[WorkloadResult, ...] = ()
    inputs: tuple[InputFacts, ...] = ()
    answers: tuple[LevelAnswers, ...] = ()
    """Every level's answers, the reference's among them."""
    wording: dict[str, WordingChanges] = field(default_factory=dict)
    """Level to what changed in the words of its answers; empty in older records."""
    costs: tuple[LevelCost, ...] = field(default=(), metadata=OPTIONAL)
    """Of whatever has a price; empty where the user gave none."""
    speculation: tuple[SpeculationReport, ...] = field(default=(), metadata=OPTIONAL)
    """What guessing tokens ahead gains, by level that it was tried on; empty where it was not."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Texts and their hashes, window length, seeds, threads, engine settings: whatever changes a number."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package name to version."""
    commands: tuple[str, ...] = ()
    """What to type to get the same numbers."""
    timings: dict[str, Real] = field(default_factory=dict)
    """Stage to seconds."""
    jobs: tuple[JobOutcome, ...] = ()
    """What was built or measured, with what it was predicted to take."""
    reused: tuple[str, ...] = ()
    """What came from stored evidence instead of being measured again."""
    warnings: tuple[str, ...] = ()
    reference: str = ""
    """What the answers are compared with: the source's level, a higher level, or a model elsewhere; empty in
    records from before there was a choice."""

    @property
    def compared_with(self) -> str:
        """The reference of the answers, whatever the record's age."""
        return self.reference or self.source.level
