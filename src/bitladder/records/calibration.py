"""What a calibrated checkpoint was made from, and what each of its tensors cost."""

from __future__ import annotations

from dataclasses import dataclass

from bitladder.records import Real


@dataclass(frozen=True)
class LinearLoss:
    """One quantized linear layer. ``loss``: squared error of its outputs as a share of their energy on the
    calibration set."""

    name: str
    loss: Real
    tokens: int
    damp: Real = 0.0
    """Share of the mean diagonal added to the Hessian (GPTQ); above 0.05 when factoring had to be rescued."""
    note: str = ""
    """What was done differently here and why; empty when nothing was."""


@dataclass(frozen=True)
class TextSource:
    """One document of a calibration text."""

    name: str
    tokens: int
    languages: tuple[str, ...] = ()
    """Codes of languages that its name says (``de``, ``code``), else the scripts that it is written in (``Latin``)."""
    subject: str = ""
    """What kind of text it is, by its name or its file's."""


@dataclass(frozen=True)
class CalibrationText:
    """The text behind the statistics."""

    documents: int
    windows: int
    tokens: int
    shortest: int
    longest: int
    """Tokens of the shortest and longest window."""
    hash: str
    overlap: Real
    """Share of the measuring text's token runs that occur here too; must be 0 unless it was forced."""
    sources: tuple[TextSource, ...] = ()

    @property
    def languages(self) -> dict[str, int]:
        """Tokens per language, most first; a document of several languages counts in equal parts."""
        counts: dict[str, float] = {}
        for source in self.sources:
            for language in source.languages:
                counts[language] = counts.get(language, 0) + source.tokens / len(source.languages)
        return {name: round(counts[name]) for name in sorted(counts, key=lambda one: -counts[one])}


@dataclass(frozen=True)
class LayerCoverage:
    """How much of the text reached a layer."""

    layer: int
    tokens: int
    """Tokens behind its plain linear layers; 0 where no text was needed."""
    experts: tuple[int, ...] = ()
    """Tokens that reached each expert of a mixture."""
    rounded_plainly: tuple[int, ...] = ()
    """Experts that too few tokens reached."""


@dataclass(frozen=True)
class Preflight:
    """What a calibration takes, predicted before it starts or found after it. Bytes and seconds."""

    seconds: Real
    ram_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class CheckpointReport:
    """A written checkpoint."""

    level: str
    path: str
    bytes: int
    bpw: Real
    """Bits per weight of the quantized linear layers, scales included."""
    seconds: Real
    text: CalibrationText | None
    linears: tuple[LinearLoss, ...]
    notes: tuple[str, ...]
    """What a user should know: engines that refuse the level, experts with too few tokens, rescued
    Hessians."""
    coverage: tuple[LayerCoverage, ...] = ()
    predicted: Preflight | None = None
    """For the whole walk, all its levels together."""
    measured: Preflight | None = None


@dataclass(frozen=True)
class FoldedScales:
    """What AWQ found for a K-quant level, before it is written."""

    level: str
    linears: tuple[LinearLoss, ...]
    """Of the tensors whose inputs something before them can scale."""
    scaled: int
    """Tensors whose scales paid; the others are stored as they were."""


@dataclass(frozen=True)
class CalibrationReport:
    """What a call calibrated, whatever was made of it."""

    text: CalibrationText | None
    coverage: tuple[LayerCoverage, ...]
    predicted: Preflight | None
    """None where everything was there already."""
    measured: Preflight | None
    folded: tuple[FoldedScales, ...] = ()
