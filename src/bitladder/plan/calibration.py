"""What a calibration will take, before it starts: arithmetic, memory of one layer, disk.

For T tokens and a layer of P weights whose matrices read inputs of widths K, the products are 2 T P for the
forward pass and T K (K + 512) for the statistics, whose upper half is all that is computed. GPTQ levels each
take a pass of their own; AWQ and INT8 levels share one over few tokens, and AWQ adds about twelve trial
quantizations of a quarter of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitladder.formats.checkpoint import CheckpointLevel
from bitladder.records.calibration import Preflight

_TRIALS = 12 / 4
_FIXED_BYTES = 600 * 1024**2
"""Python with torch and transformers."""
_BATCH_TOKENS = 4096


def predict(
    levels: Sequence[CheckpointLevel],
    shapes: Mapping[str, tuple[int, int]],
    *,
    n_layer: int,
    n_embd: int,
    other_weights: int,
    tokens: int,
    reference_tokens: int,
    flops_per_s: float,
    state_bytes: int,
) -> Preflight:
    """Seconds, peak RAM and disk for building ``levels``.

    Args:
        levels: What is asked for.
        shapes: ``(outputs, inputs)`` of a layer's matrices.
        n_layer: Layers.
        n_embd: Width of the hidden states.
        other_weights: Weights outside the layers, which stay 16 bits wide.
        tokens: Calibration tokens that GPTQ sees.
        reference_tokens: Tokens that AWQ and INT8 see.
        flops_per_s: What this machine does in products of f32 matrices.
        state_bytes: Hidden states beyond this go to disk.
    """
    layer_weights = sum(rows * columns for rows, columns in shapes.values())
    statistics = sum(columns * (columns + 512) for _, columns in _inputs(shapes))
    sequential = sum(level.method == "GPTQ" for level in levels)
    scaled = sum(level.method == "AWQ" for level in levels)
    needs_text = scaled or any(level.smooth for level in levels)
    seen = min(tokens, reference_tokens) if needs_text else 0
    feedback = sum(rows * columns * columns for rows, columns in shapes.values())
    work: float = sequential * (tokens * (2 * layer_weights + statistics) + feedback)
    work += seen * (2 * layer_weights + statistics) + scaled * _TRIALS * 2 * feedback

    widest = max(columns for _, columns in shapes.values())
    states = tokens * n_embd * 4 if sequential else seen * n_embd * 4
    kept = tokens * (n_embd + widest) * 4 if sequential else 0
    in_memory = min(states, state_bytes) + (kept if kept <= state_bytes else 0)
    grams = sum(columns * columns * 4 for _, columns in _inputs(shapes)) if seen else widest * widest * 4
    ram = _FIXED_BYTES + 2 * layer_weights * 4 + grams + 3 * widest * widest * 8 + in_memory
    ram += _BATCH_TOKENS * 4 * (n_embd + widest) * 4

    folders = sum(n_layer * layer_weights * level.bpw / 8 + other_weights * 2 for level in levels)
    # Layers and finished shards exist side by side for a moment, states are kept twice so that a kill costs
    # one layer only.
    disk = 2 * folders + 2 * states * max(1, sequential) + (kept if kept > state_bytes else 0)
    return Preflight(seconds=n_layer * work / flops_per_s, ram_bytes=int(ram), disk_bytes=int(disk))


def _inputs(shapes: Mapping[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """One matrix for each distinct input: query, key and value read the same, and so do gate and up."""
    shared = ("k_proj", "v_proj", "up_proj")
    return [shape for name, shape in shapes.items() if not name.endswith(shared)]
