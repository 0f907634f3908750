"""Which levels of a model fit a machine at a context, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence

from bitladder.describe.cache import cache_bytes, layer_caches
from bitladder.describe.machine import Machine
from bitladder.describe.model import Model
from bitladder.errors import UsageError
from bitladder.formats.recipes import LEVELS, level_named
from bitladder.plan.cost import LevelSize, level_size
from bitladder.plan.memory import ENGINE_BYTES, compute_buffers
from bitladder.records.plan import LevelPlan, Plan
from bitladder.units import MiB, human_bytes

RAM_MARGIN = 512 * MiB
"""Left to the system, so that a model that fits does not drive it into swapping."""
VRAM_MARGIN = 512 * MiB
"""Per GPU, for the driver's own context and fragmentation."""


def make_plan(
    model: Model,
    machine: Machine,
    *,
    n_ctx: int = 4096,
    levels: Sequence[str] = LEVELS,
    n_seq: int = 1,
    type_k: str = "F16",
    type_v: str = "F16",
) -> Plan:
    """The ladder of ``model`` on ``machine``, largest level first.

    ``n_ctx`` tokens of context are shared by ``n_seq`` parallel sequences; the KV cache holds ``type_k`` and
    ``type_v``.

    Raises:
        UsageError: a context beyond what the model was trained for, or none.
        UnknownLevel: a level that does not exist.
    """
    check_context(model, n_ctx)
    kv = cache_bytes(layer_caches(model), n_ctx, n_seq=n_seq, type_k=type_k, type_v=type_v).total
    compute = compute_buffers(model, n_ctx, n_seq=n_seq).total
    sizes = [level_size(model, level_named(level)) for level in levels]
    sizes.sort(key=lambda size: -size.file_bytes)
    rows = []
    for size in sizes:
        total = size.tensor_bytes + kv + compute + ENGINE_BYTES
        fits, reason = judge(total, machine)
        rows.append(_row(size, kv, compute, total, fits=fits, reason=reason))
    return Plan(
        model=model.name,
        architecture=model.dims.architecture,
        machine=machine.summary,
        n_ctx=n_ctx,
        budget_bytes=budget(machine),
        levels=tuple(rows),
    )


def check_context(model: Model, n_ctx: int) -> None:
    """Refuse contexts the model cannot use.

    Raises:
        UsageError: the context is not positive, or longer than the model was trained for.
    """
    if n_ctx < 1:
        raise UsageError(
            f"A context of {n_ctx} tokens is none.", do="Give a positive number of tokens with --ctx."
        )
    trained = model.dims.n_ctx_train
    if trained and n_ctx > trained:
        raise UsageError(
            f"A context of {n_ctx} tokens is asked for; {model.name} was trained for {trained}.",
            means="Beyond that its answers break down unless its positions are rescaled, which changes "
            "the model.",
            do=f"Choose --ctx {trained} or less.",
        )


def budget(machine: Machine) -> int:
    """Bytes a model may take: the memory available now, in GPUs and RAM, less a margin each."""
    ram = max(0, machine.ram_available - RAM_MARGIN)
    return ram if machine.unified else ram + _vram(machine)


def _vram(machine: Machine) -> int:
    return 0 if machine.unified else sum(max(0, gpu.vram_free - VRAM_MARGIN) for gpu in machine.gpus)


def judge(total: int, machine: Machine) -> tuple[bool, str]:
    """Whether ``total`` bytes fit, where, and why or why not, in one sentence."""
    vram, limit = _vram(machine), budget(machine)
    need = human_bytes(total)
    if vram and total <= vram:
        return True, f"needs {need}; fits in the GPU's free {human_bytes(vram)}"
    if total <= limit:
        if not vram:
            return True, f"needs {need} of {human_bytes(limit)} that can be used"
        return True, f"needs {need}: {human_bytes(vram)} on the GPU, the rest in RAM"
    short = f"needs {need}, {human_bytes(total - limit)} more than the {human_bytes(limit)} that can be used"
    if total <= limit + machine.ram_total - machine.ram_available:
        return False, short + "; it would fit if other programs gave their memory back"
    return False, short


def _row(size: LevelSize, kv: int, compute: int, total: int, *, fits: bool, reason: str) -> LevelPlan:
    return LevelPlan(
        level=size.level,
        tensor_bytes=size.tensor_bytes,
        file_bytes=size.file_bytes,
        bpw=size.bpw,
        on_label_share=size.on_label_share,
        fallbacks=size.fallbacks,
        kv_bytes=kv,
        compute_bytes=compute,
        total_bytes=total,
        fits=fits,
        reason=reason,
    )
