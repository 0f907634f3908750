"""What a calibration will take, before it starts: arithmetic, memory of one layer, disk.

For T tokens and a layer of P weights whose matrices read inputs of widths K, the products are 2 T P for the
forward pass and T K (K + 128) for the statistics, whose upper half is all that is computed. GPTQ levels each
take a pass of their own and one of the source, whose inputs are compared with theirs (2 T K^2); AWQ, INT8, folded
levels and importance matrices share one over few tokens. AWQ adds about twelve trial quantizations of a quarter of the
rows, and a folded level two of all of them. An importance matrix alone needs no statistics beyond the pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bitladder.levels import CheckpointLevel, FoldedLevel
from bitladder.levels.methods import GPTQ, Statistics
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
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many matrices a layer has of a shape, by its name, where there are several: those of experts."""
    routed: float = 1.0
    """Share of the experts that a token is sent to."""
    layer_weights: int = 0
    """Weights of the largest layer, whatever they are; 0: those of ``shapes``."""
    looks: float = 0.0
    """Layers in 32-bit floats that are held at once while one is looked at before it is walked."""
    shards: int = 1
    """Into how many the text is cut that GPTQ sees; sums of several are held twice."""

    def total(self, of: Mapping[str, int]) -> int:
        """A sum over all matrices of a layer."""
        return sum(value * self.counts.get(name, 1) for name, value in of.items())

    def used(self, of: Mapping[str, int]) -> float:
        """A sum over the matrices that a token is multiplied with."""
        return sum(
            value * self.counts.get(name, 1) * (self.routed if name in self.counts else 1.0)
            for name, value in of.items()
        )


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
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    layer_weights, passed = work.total(sizes), work.used(sizes)
    statistics = work.used({name: columns * (columns + 128) for name, columns in _inputs(shapes).items()})
    feedback = work.total({name: rows * columns * columns for name, (rows, columns) in shapes.items()})
    wanted = [statistics_of(level) for level in levels]
    sequential = wanted.count(Statistics.FEEDBACK)
    needs_gram = Statistics.GRAM in wanted
    needs_pass = needs_gram or Statistics.ENERGIES in wanted
    trials = sum(level.method.trials for level in levels if isinstance(level, CheckpointLevel | FoldedLevel))
    packed = sum(level.method.trials + _K_QUANT_PASSES for level in levels if isinstance(level, FoldedLevel))
    seen = min(tokens, work.reference_tokens) if needs_pass else 0
    drifts = {
        name: columns * columns
        for name, columns in _inputs(shapes).items()
        if name not in work.counts and columns <= GPTQ.widest_drift
    }
    # Weights that make up for drift are two products of each matrix with a square one.
    passes = sequential * (tokens * (4 * passed + statistics + 2 * sum(drifts.values())) + 5 * feedback)
    passes += seen * (2 * passed + (statistics if needs_gram else 0))
    flops: float = passes * flops_per_s / (pass_flops_per_s or flops_per_s) + trials * 2 * feedback
    searched = packed * layer_weights / (SEARCHED_RATE * work.cores)
    seconds = work.n_layer * (flops / (REACHED * flops_per_s) + searched)

    widest = max(columns for _, columns in shapes.values())
    states = 2 * tokens * n_embd * 4 if sequential else seen * n_embd * 4  # the level's and the source's
    kept = tokens * (n_embd + widest) * 4 if sequential else 0
    kept_in_memory = min(kept, max(0, state_bytes - states))
    in_memory = min(states, state_bytes) + kept_in_memory
    read = tokens * sum(columns for name, columns in _inputs(shapes).items() if name in drifts) * 4
    read_in_memory = min(read, state_bytes // 2) if sequential else 0
    layer, square = (work.layer_weights or layer_weights) * 4, widest * widest * 4
    squares = {name: columns * columns * 4 for name, columns in _inputs(shapes).items()}
    passing = _BATCH_TOKENS * 4 * (n_embd + widest) * 4
    sums = 2 if work.shards > 1 else 1  # a shard's, beside those of the shards before it
    grams = sums * work.total(squares) if needs_gram else 0
    # Each level starts from a copy of the layer.
    side_by_side = 2 * layer + grams + (3 * square if needs_gram else 0) + passing
    # GPTQ: the Gram matrix, and the drift beside it, while tokens pass or beside its packed factor; then the coupling
    # beside copies of one matrix.
    copies = 4 * 4 * max(rows * columns for rows, columns in shapes.values())
    summed = sums * max(size * (2 if name in drifts else work.counts.get(name, 1)) for name, size in squares.items())
    one_by_one = layer + summed + read_in_memory + max(passing, square, copies)
    beside = max(side_by_side if sequential < len(levels) else 0, one_by_one if sequential else 0)
    ram = _FIXED_BYTES + in_memory + max(beside, int(work.looks * layer))

    folders = [
        work.n_layer * layer_weights * level.bpw / 8 + work.other_weights * 2
        for level in levels
        if isinstance(level, CheckpointLevel)
    ]
    # A level's layers and finished shards exist side by side for a moment, states are kept twice so that a kill costs
    # one layer only.
    disk = sum(folders) + max(folders, default=0) + 2 * states * max(1, sequential)
    disk += kept - kept_in_memory + (read - read_in_memory if sequential else 0)
    return Preflight(START_SECONDS + seconds if seconds else 0.0, int(ram), int(disk))


def _inputs(shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The width of each distinct input: query, key and value read the same, and so do gate and up. Each under the name
    of the first that reads it."""
    shared = ("k_proj", "v_proj", "up_proj")
    return {name: columns for name, (_, columns) in shapes.items() if not name.endswith(shared)}
