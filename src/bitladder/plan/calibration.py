"""What a calibration will take, before it starts: arithmetic, memory of one layer, disk.

For T tokens and a layer of P weights whose matrices read inputs of widths K, the products are 2 T P for the
forward pass and T K (K + 128) for the statistics, whose upper half is all that is computed. GPTQ levels each
take a pass of their own; AWQ, INT8, folded levels and importance matrices share one over few tokens. AWQ adds about
twelve trial quantizations of a quarter of the rows, and a folded level two of all of them. An importance matrix
alone needs no statistics beyond the pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitladder.levels import CheckpointLevel, FoldedLevel
from bitladder.levels.methods import Statistics
from bitladder.levels.products import Product, statistics_of
from bitladder.plan.preflight import SEARCHED_RATE
from bitladder.records.calibration import Preflight

_K_QUANT_PASSES = 2
"""Packings of a folded level beside its trials."""
REACHED = 0.6
"""Share of the machine's rate in large products that a walk reaches: attention, norms and searches do none."""
START_SECONDS = 8.0
"""Loading libraries, making a tokenizer, compiled kernels."""
_FIXED_BYTES = 600 * 1024**2
"""Python with torch and transformers."""
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class CalibrationWork:
    """A model and a text, in numbers."""

    shapes: Mapping[str, tuple[int, int]]
    """``(outputs, inputs)`` of a layer's matrices."""
    n_layer: int
    n_embd: int
    other_weights: int
    """Weights outside the layers, which stay 16 bits wide."""
    tokens: int
    """Calibration tokens that GPTQ sees."""
    reference_tokens: int
    """Tokens that everything else sees at most."""
    cores: int = 1


def predict(
    levels: Sequence[Product],
    work: CalibrationWork,
    *,
    flops_per_s: float,
    state_bytes: int,
    pass_flops_per_s: float | None = None,
) -> Preflight:
    """Seconds, peak RAM and disk for making ``levels``.

    Args:
        levels: What is asked for.
        work: The model and the text.
        flops_per_s: What this machine does in products of f32 matrices.
        state_bytes: Hidden states beyond this go to disk.
        pass_flops_per_s: What it does in those of the passes, where they are of another type.
    """
    shapes, n_embd, tokens = work.shapes, work.n_embd, work.tokens
    layer_weights = sum(rows * columns for rows, columns in shapes.values())
    statistics = sum(columns * (columns + 128) for _, columns in _inputs(shapes))
    feedback = sum(rows * columns * columns for rows, columns in shapes.values())
    wanted = [statistics_of(level) for level in levels]
    sequential = wanted.count(Statistics.FEEDBACK)
    needs_gram = Statistics.GRAM in wanted
    needs_pass = needs_gram or Statistics.ENERGIES in wanted
    trials = sum(level.method.trials for level in levels if isinstance(level, CheckpointLevel | FoldedLevel))
    packed = sum(level.method.trials + _K_QUANT_PASSES for level in levels if isinstance(level, FoldedLevel))
    seen = min(tokens, work.reference_tokens) if needs_pass else 0
    passes = sequential * (tokens * (2 * layer_weights + statistics) + feedback)
    passes += seen * (2 * layer_weights + (statistics if needs_gram else 0))
    flops: float = passes * flops_per_s / (pass_flops_per_s or flops_per_s) + trials * 2 * feedback
    searched = packed * layer_weights / (SEARCHED_RATE * work.cores)
    seconds = work.n_layer * (flops / (REACHED * flops_per_s) + searched)

    widest = max(columns for _, columns in shapes.values())
    states = tokens * n_embd * 4 if sequential else seen * n_embd * 4
    kept = tokens * (n_embd + widest) * 4 if sequential else 0
    kept_in_memory = min(kept, max(0, state_bytes - states))
    in_memory = min(states, state_bytes) + kept_in_memory
    layer, square = layer_weights * 4, widest * widest * 4
    passing = _BATCH_TOKENS * 4 * (n_embd + widest) * 4
    grams = sum(columns * columns * 4 for _, columns in _inputs(shapes)) if needs_gram else 0
    # Each level starts from a copy of the layer.
    side_by_side = 2 * layer + grams + (3 * square if needs_gram else 0) + passing
    # GPTQ: the Gram matrix while tokens pass, beside its packed factor, then the coupling beside copies of one matrix.
    copies = 4 * 4 * max(rows * columns for rows, columns in shapes.values())
    one_by_one = layer + square + max(passing, square, copies)
    ram = _FIXED_BYTES + in_memory
    ram += max(side_by_side if sequential < len(levels) else 0, one_by_one if sequential else 0)

    folders = [
        work.n_layer * layer_weights * level.bpw / 8 + work.other_weights * 2
        for level in levels
        if isinstance(level, CheckpointLevel)
    ]
    # A level's layers and finished shards exist side by side for a moment, states are kept twice so that a kill costs
    # one layer only.
    disk = sum(folders) + max(folders, default=0) + 2 * states * max(1, sequential)
    disk += kept - kept_in_memory
    return Preflight(START_SECONDS + seconds if seconds else 0.0, int(ram), int(disk))


def _inputs(shapes: Mapping[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """One matrix for each distinct input: query, key and value read the same, and so do gate and up."""
    shared = ("k_proj", "v_proj", "up_proj")
    return [shape for name, shape in shapes.items() if not name.endswith(shared)]
