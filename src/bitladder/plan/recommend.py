"""One answer to "what should I run here?", with its reasons, what to take instead, and everything that was weighed.

The rule, in order:

1. Room is left for the system and other programs (``usual_reserve``); what remains is for the model.
2. A model counts when it was taught to answer, was made for a context as long as is wanted, and decodes at the least
   speed or faster. Models made for code count for code alone, and there like models of twice their weights.
3. Of each model the smallest level is taken that is expected to lose no more than ``NEGLIGIBLE`` beyond its best one.
   The model with the least expected loss (``plan.quality``: size, age and level weighed on one scale) is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bitladder.describe.machine import Machine
from bitladder.errors import UsageError
from bitladder.files.quality_prior import PublishedCosts
from bitladder.plan.placement import RAM_MARGIN, Usage, place, usable_ram, usable_vram
from bitladder.plan.quality import LevelCost, effective_weights, level_cost, size_loss
from bitladder.plan.search import CatalogueCandidate, MachineRates, Option, option, what_would_give
from bitladder.records.plan import DEFAULT_CTX, Place
from bitladder.units import GiB, human_bytes, human_rate

NEGLIGIBLE = 0.005
"""Nats per token (half a percent of perplexity) that nobody trades memory and speed for."""
LONG_CTX = 32768
"""Tokens of what is called a long context here: a long report, or a small book's chapter list with its chapters."""
INDISTINCT = 0.01
"""Nats per token within which the ranking cannot tell two models apart."""
CODE_FACTOR = 2.0
"""A model made for code counts there like one of twice its weights: a choice, not a measurement."""
_LEAST_RESERVE, _MOST_RESERVE = 2 * GiB, 8 * GiB


@dataclass(frozen=True)
class Use:
    """What a model is wanted for."""

    name: str
    n_ctx: int
    """Tokens of context, unless the user says otherwise."""
    least_decode: float
    """Tokens per second that one can live with."""
    level_weight: float
    """How much a level's cost counts beside size."""
    why: str


USES: dict[str, Use] = {
    use.name: use
    for use in (
        Use("chat", DEFAULT_CTX, 5.0, 1.0, "5 tokens/s is about the pace of reading"),
        Use("code", 16384, 10.0, 2.0, "files are long and one wrong sign counts, so that a level's cost is doubled"),
        Use("extraction", 8192, 10.0, 1.0, "many documents, short answers"),
        Use("long-context", LONG_CTX, 5.0, 1.0, "the whole document lies in the context"),
    )
}  # fmt: skip


def use_named(text: str) -> Use:
    """A use by its name; raises UsageError."""
    if text not in USES:
        raise UsageError(f"There is no use '{text}'.", do=f"Write --for {', '.join(USES)}.")
    return USES[text]


def usual_reserve(ram_total: int) -> int:
    """Bytes that a person leaves to the system and other programs: a quarter of the memory, 2 GiB at least and 8 GiB at
    most."""
    return min(max(ram_total // 4, _LEAST_RESERVE), _MOST_RESERVE)


def with_room(machine: Machine, reserve: int, shareable: int) -> Machine:
    """The machine with all its memory for the model but ``reserve`` bytes, whatever other programs hold just now.

    ``shareable``: the most that a model may take where CPU and GPU share one memory.
    """
    left = max(0, min(machine.ram_total - reserve, shareable))
    return replace(machine, ram_available=left + RAM_MARGIN)


@dataclass(frozen=True)
class Rated:
    """One model at one level that fits, with what it is expected to lose."""

    option: Option
    weight_bytes: int
    """What is downloaded."""
    cost: LevelCost
    """Of the level, nats per token."""
    expected_loss: float
    """Of size and level together, nats per token above what no model avoids; it serves to rank alone."""
    effective: float
    """Weights of a dense model of today that is expected to be as able."""

    @property
    def decode(self) -> float:
        """Tokens per second."""
        return self.option.speed.decode.value

    @property
    def short_name(self) -> str:
        """Without its owner."""
        return self.option.name.split("/")[-1]


@dataclass(frozen=True)
class Alternative:
    """What to take instead, and for what."""

    purpose: str
    pick: Rated


@dataclass(frozen=True)
class SizeVerdict:
    """Whether a model of a usual size runs at Q4_K_M, in words."""

    size: str
    model: str
    verdict: str
    placement: Place


@dataclass(frozen=True)
class Recommendation:
    """The answer and what it rests on."""

    machine: str
    use: str
    n_ctx: int
    least_decode: float
    """Tokens per second."""
    reserve_bytes: int
    usable_bytes: int
    """For the model: memory of the GPUs and RAM."""
    answer: Rated | None
    """None: nothing fits and is fast enough."""
    reasons: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    sizes: tuple[SizeVerdict, ...]
    table: tuple[Rated, ...]
    """Per model its best level, the least expected loss first."""


def rate_all(
    candidates: Iterable[CatalogueCandidate],
    machine: Machine,
    rates: MachineRates,
    wish: Usage,
    use: Use,
    published: Sequence[PublishedCosts],
) -> list[Rated]:
    """Every level of every model that counts for the use and fits."""
    usable = [one for one in candidates if _counts(one, wish, use)]
    newest = max((one.released for one in usable), default="")
    found = []
    for candidate in usable:
        effective = effective_weights(candidate, newest) * (CODE_FACTOR if candidate.made_for == "code" else 1.0)
        for level in candidate.levels:
            cost = level_cost(level.level, candidate.params, published)
            if cost is not None and place(candidate.model, level, machine, wish).kind != Place.NONE:
                loss = size_loss(effective) + use.level_weight * cost.value
                row = option(candidate, level, machine, rates, wish)
                found.append(Rated(row, level.total, cost, loss, effective))
    return found


def _counts(candidate: CatalogueCandidate, wish: Usage, use: Use) -> bool:
    suits = candidate.made_for in ("chat", *(["code"] if use.name == "code" else []))
    return suits and candidate.model.dims.n_ctx_train >= wish.n_ctx


def best_of(rows: Iterable[Rated], least_decode: float) -> Rated | None:
    """The answer among those fast enough; None when there is none."""
    return next(iter(best_per_model(rows, least_decode)), None)


def best_per_model(rows: Iterable[Rated], least_decode: float) -> list[Rated]:
    """Per model the smallest level that is as good as its best one, of those fast enough; the most able first."""
    models: dict[str, list[Rated]] = {}
    for row in rows:
        if row.decode >= least_decode:
            models.setdefault(row.option.name, []).append(row)
    found = [_smallest_as_good(levels) for levels in models.values()]
    return sorted(found, key=lambda row: (row.expected_loss, row.option.name))


def _smallest_as_good(levels: Sequence[Rated]) -> Rated:
    most = min(row.expected_loss for row in levels) + NEGLIGIBLE
    return min((row for row in levels if row.expected_loss <= most), key=lambda row: row.weight_bytes)


def alternatives(
    rows: Sequence[Rated], long_rows: Sequence[Rated], answer: Rated, least_decode: float
) -> tuple[Alternative, ...]:
    """For speed, for long contexts (``long_rows`` were rated at one), and for those who can wait."""
    faster = best_of(rows, max(2 * answer.decode, least_decode))
    longer = best_of(long_rows, least_decode)
    able = best_of(rows, min(1.0, least_decode))
    found = []
    if faster:
        found.append(Alternative("for speed", faster))
    if longer:
        found.append(Alternative(f"for long context ({LONG_CTX:,} tokens)", longer))
    if able and able.expected_loss < answer.expected_loss - NEGLIGIBLE:
        found.append(Alternative("for those who can wait", able))
    return tuple(found)


def reasons(
    answer: Rated, rows: Sequence[Rated], machine: Machine, reserve: int, use: Use, least_decode: float
) -> tuple[str, ...]:
    """Why this one: room, the level's cost, what larger models would be, speed."""
    ram, vram = usable_ram(machine), usable_vram(machine)
    room = f"{human_bytes(ram)} of RAM" + (f" and {human_bytes(vram)} on the GPU" if vram else "")
    placement, decode = answer.option.placement, answer.option.speed.decode
    found = [
        f"It needs {human_bytes(placement.total_bytes)}, {_where(answer, machine)}; {room} are left for a model when "
        f"the system and other programs keep {human_bytes(reserve)} of {human_bytes(machine.ram_total)} "
        "(--reserve changes it)",
        _level_reason(answer),
    ]
    table = best_per_model(rows, least_decode)
    larger = [row for row in table if row.effective > 1.15 * answer.effective]
    if larger:
        rival = max(larger, key=lambda row: row.effective)
        found.append(
            f"{rival.short_name} is larger and fits, too, at {rival.option.level}: that is expected to cost "
            f"{cost_words(rival.cost)}, more than its size is worth"
        )
    equals = [row for row in table if row.option.name != answer.option.name]
    near = [row for row in equals if row.expected_loss <= answer.expected_loss + INDISTINCT]
    if near:
        names = ", ".join(f"{row.short_name} at {row.option.level}" for row in near[:3])
        found.append(
            f"About as able, judged by size, age and level: {names}. Training and task are not part of this "
            "ranking: try two"
        )
    found.append(
        f"About {human_rate(decode.value)} tokens/s ({human_rate(decode.low)} to {human_rate(decode.high)}, "
        f"{decode.label}); at least {least_decode:g} were wanted for {use.name}: {use.why}"
    )
    return tuple(found)


def _level_reason(answer: Rated) -> str:
    level, cost = answer.option.level, answer.cost
    if cost.value == 0:
        return f"{level} is the model as it was published: nothing is lost"
    return f"{level} is expected to cost {cost_words(cost)}; `bitladder run` measures it"


def cost_words(cost: LevelCost) -> str:
    """``2.1% of perplexity (1.7 to 2.5% by published models)``."""
    value, low, high = (100 * math.expm1(nats) for nats in (cost.value, cost.low, cost.high))
    spread = f" ({low:.2g} to {high:.2g}% by published models)" if f"{low:.2g}" != f"{high:.2g}" else ""
    return f"{value:.2g}% of perplexity{spread}"


def _where(row: Rated, machine: Machine) -> str:
    placement, layers = row.option.placement, row.option.n_layer
    if placement.kind == Place.GPU:
        return "wholly on the GPU"
    if placement.kind == Place.SPLIT:
        return f"partly offloaded ({placement.n_gpu_layers} of {layers} layers on the GPU)"
    if placement.kind == Place.EXPERTS_IN_RAM:
        return f"on the GPU but for the experts of {placement.n_cpu_experts} of {layers} layers"
    return "in the memory that CPU and GPU share" if machine.unified else "in RAM"


SIZES = (
    ("3B", "meta-llama/Llama-3.2-3B-Instruct"),
    ("7B", "mistralai/Mistral-7B-Instruct-v0.3"),
    ("13B", "meta-llama/Llama-2-13b-chat-hf"),
    ("32B", "Qwen/Qwen3-32B"),
    ("70B", "meta-llama/Llama-3.3-70B-Instruct"),
    ("123B", "mistralai/Mistral-Large-Instruct-2407"),
)
"""Usual sizes, and the model of the catalogue that stands for each."""
_SIZE_LEVEL = "Q4_K_M"


def size_verdicts(
    candidates: Iterable[CatalogueCandidate], machine: Machine, rates: MachineRates
) -> tuple[SizeVerdict, ...]:
    """What of the usual sizes runs at 4 bits with the usual context: comfortably, just, partly offloaded, or not."""
    by_name = {one.name: one for one in candidates}
    found = []
    for size, name in SIZES:
        if name in by_name:
            verdict, place = _size_verdict(by_name[name], machine, rates)
            found.append(SizeVerdict(size, name.split("/")[-1], verdict, place))
    return tuple(found)


def _size_verdict(candidate: CatalogueCandidate, machine: Machine, rates: MachineRates) -> tuple[str, Place]:
    level = next(one for one in candidate.levels if one.level == _SIZE_LEVEL)
    row = option(candidate, level, machine, rates, Usage())
    placement = row.placement
    need, speed = human_bytes(placement.total_bytes), f"about {human_rate(row.speed.decode.value)} tokens/s"
    if placement.kind == Place.NONE:
        return f"does not fit: it {what_would_give(candidate, level, machine, rates, Usage())}", placement.kind
    if placement.kind == Place.SPLIT:
        layers = candidate.model.dims.n_layer
        told = f"partly offloaded: {placement.n_gpu_layers} of {layers} layers on the GPU, the rest in RAM"
        return f"{told}; {need}, {speed}", placement.kind
    if placement.kind == Place.GPU:
        return f"wholly on the GPU; {need}, {speed}", placement.kind
    how = "comfortably" if 2 * placement.ram_bytes <= machine.ram_total else "fits"
    return f"{how}; {need}, {speed}", placement.kind
