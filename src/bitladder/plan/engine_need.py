"""What measuring in the engine takes: models open side by side, mapped from their files.

Mapped pages can be dropped and read again, so files larger than the free memory slow the work down and do not end it;
what the engine allocates for itself has to fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bitladder.describe.cache import cache_bytes, layer_caches
from bitladder.describe.cache_types import F16_CACHE, CacheTypes, slow_on_processor
from bitladder.describe.machine import Machine
from bitladder.describe.model import Model
from bitladder.plan.memory import ENGINE_BYTES, compute_buffers
from bitladder.plan.preflight import BASE_BYTES, JobNeed
from bitladder.units import Basis, human_bytes

START_S = 3.0
FILE_SHARE = 0.8
"""Of the free memory, for mapped files that are open together: the rest is for what is computed on them."""
_RATE = 1.5e10
"""Operations per second and core, where nothing was measured."""
_SLOW_ATTENTION = 5.0
"""Times as long as an operation of attention takes over a cache of fewer than 16 bits: with eight bits some three
times, with four or five bits five times and more (``benchmarks/kv_prompt.py``, ``kv_depth.py``)."""


def attention_operations(model: Model, spans: Iterable[tuple[int, int]], cache: CacheTypes = F16_CACHE) -> float:
    """Operations of attention over spans of positions, each from a first token to one past the last, as long as those
    of other products take. A sliding window counts as none: what it spares is little in a short context."""
    dims = model.dims
    pairs = sum((stop * stop - start * start) / 2 for start, stop in spans)
    layers = sum(layer.count for layer in layer_caches(model) if layer.k_width)
    slow = _SLOW_ATTENTION if slow_on_processor(cache) else 1.0
    return slow * 2 * pairs * dims.n_head * (dims.head_dim_k + dims.head_dim_v) * layers


def context_bytes(model: Model, window: int, piece: int, cache: CacheTypes = F16_CACHE) -> int:
    """Bytes that the engine allocates for one model: its cache for a window of tokens, its compute buffers, and the
    logits of a piece, once in the graph and once handed out."""
    logits = 2 * 4 * piece * model.dims.n_vocab
    buffers = compute_buffers(model, window, n_ubatch=piece)
    kept = cache_bytes(layer_caches(model), window, n_ubatch=piece, type_k=cache.k.upper(), type_v=cache.v.upper())
    return kept.total + buffers.total + logits


def together(file_bytes: Sequence[int], reference_bytes: int, context: int, free: int) -> list[slice]:
    """Levels in groups, each measured beside the reference in one go: as many as fit into free memory, at least one."""
    groups: list[slice] = []
    start, held = 0, 0
    room = FILE_SHARE * free - reference_bytes - context
    for at, size in enumerate(file_bytes):
        if at > start and held + size + context > room:
            groups.append(slice(start, at))
            start, held = at, 0
        held += size + context
    return [*groups, slice(start, len(file_bytes))] if file_bytes else []


def engine_need(
    what: str, file_bytes: Sequence[int], context: int, operations: Sequence[float], machine: Machine, threads: int
) -> JobNeed:
    """Of a pass of all these files (the reference's first) over a text.

    Args:
        what: in words that name levels or text.
        file_bytes: of each file that is open.
        context: bytes that the engine allocates for each (``context_bytes``).
        operations: of each model over the text (2 * weights * tokens, and attention).
        machine: its free memory says whether the files stay there.
        threads: of the engine.
    """
    own = BASE_BYTES + ENGINE_BYTES + len(file_bytes) * context
    mapped = sum(file_bytes)
    room = max(0, machine.ram_available - own)
    if 0 < room < mapped:
        what += (
            f" ({human_bytes(mapped)} of files, of which {human_bytes(room)} stay in memory: the rest is read again)"
        )
    seconds = START_S + sum(operations) / (_RATE * max(1, min(threads, machine.cores)))
    return JobNeed(what, own + min(mapped, room), 0, 0, seconds, Basis.ASSUMED, "engine")
