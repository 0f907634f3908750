"""What a calibration was fed, what it reached, and what it took, in lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from bitladder.records.calibration import CalibrationReport, CalibrationText, LayerCoverage
from bitladder.units import human_bytes

_SHOWN = 6


def calibration_lines(report: CalibrationReport) -> Iterator[str]:
    """The text, its coverage, every folded level, and predicted beside measured."""
    if report.text is not None:
        yield from _text(report.text)
    yield from _coverage(report.coverage)
    for scales in report.folded:
        worst = max(scales.linears, key=lambda one: one.loss, default=None)
        end = f"; largest error {worst.loss:.1%}, {worst.name}" if worst is not None else ""
        yield f"{scales.level}: scales paid in {scales.scaled} of {len(scales.linears)} tensors that can have one{end}."
    if report.predicted is not None and report.measured is not None:
        predicted, took = report.predicted, report.measured
        yield (
            f"Walk: {took.seconds:.0f} s ({predicted.seconds:.0f} predicted), "
            f"memory {human_bytes(took.ram_bytes)} ({human_bytes(predicted.ram_bytes)}), "
            f"disk {human_bytes(took.disk_bytes)} ({human_bytes(predicted.disk_bytes)})."
        )


def _text(text: CalibrationText) -> Iterator[str]:
    yield (
        f"Calibrated on {text.documents} documents, {text.tokens:,} tokens in {text.windows} windows "
        f"of {text.shortest} to {text.longest}."
    )
    if text.languages:
        shown = [f"{name} {count:,}" for name, count in text.languages.items()]
        yield f"Languages (tokens): {_listed(shown, 2 * _SHOWN)}."
    subjects = list(dict.fromkeys(source.subject for source in text.sources if source.subject))
    if subjects:
        yield f"Kinds of text: {_listed(subjects, 2 * _SHOWN)}."
    if text.overlap:
        yield f"! {text.overlap:.1%} of the measuring text occurs in it: figures on that text flatter these levels."


def _coverage(layers: tuple[LayerCoverage, ...]) -> Iterator[str]:
    """Layers in one line while all saw the same; experts that too few tokens reached by name."""
    if not layers:
        return
    counts = sorted({layer.tokens for layer in layers})
    seen = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    yield f"Coverage: {seen} tokens in each of {len(layers)} layers."
    mixtures = [layer for layer in layers if layer.experts]
    if mixtures:
        reached = sorted(count for layer in mixtures for count in layer.experts)
        yield (
            f"Experts: {len(reached)}, reached by {reached[0]:,} to {reached[-1]:,} tokens, "
            f"half of them by {reached[len(reached) // 2]:,} or more."
        )
    few = [f"{expert} of layer {layer.layer}" for layer in layers for expert in layer.rounded_plainly]
    if few:
        yield f"! Too few tokens reached {len(few)} experts, which were rounded plainly: {_listed(few, _SHOWN)}."


def _listed(names: list[str], most: int) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
