"""The decision on another machine, at another context or under another bar, from the evidence that is
there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bitladder.describe.cache import padded_context
from bitladder.describe.cache_types import split_name
from bitladder.errors import UsageError
from bitladder.plan.decide import decide
from bitladder.plan.speculation import decided_with_guesses
from bitladder.records.decision import Decision, TierGuesses
from bitladder.records.plan import ELSEWHERE, Container, ContextBytes, LevelPlan, Plan
from bitladder.records.run import RunRecord
from bitladder.units import human_bytes


def what_if(
    run: RunRecord, *, budget_bytes: int | None = None, n_ctx: int | None = None, bar: str | None = None
) -> tuple[Plan, Decision]:
    """Plan and decision of a run, with some of its givens changed.

    The cache and the buffers of another context are the plan's own; weights stay. Losses and speeds are those
    that were measured.

    Raises:
        UsageError: the bar cannot be read, or the context is longer than the model was trained for.
    """
    plan = run.plan
    context = plan.n_ctx if n_ctx is None else n_ctx
    budget = plan.budget_bytes if budget_bytes is None else budget_bytes
    if (context, budget) != (plan.n_ctx, plan.budget_bytes):
        there = None if context == plan.n_ctx else _context_bytes(plan, context)
        usual = None if there is None else _context_bytes(plan, plan.n_ctx).kv_bytes
        levels = tuple(_moved(level, there, budget, usual) for level in plan.levels)
        plan = replace(plan, n_ctx=context, budget_bytes=budget, levels=levels)

    def decide_with(guesses: Mapping[str, TierGuesses]) -> Decision:
        return decide(
            plan,
            run.fidelities,
            run.results,
            bar=run.decision.bar if bar is None else bar,
            reference=run.source.level,
            tags={item.id: item.tags for item in run.inputs},
            guesses=guesses,
        )

    first = decide_with({})
    return plan, decided_with_guesses(first, run.speculation, plan, decide_with) if run.speculation else first


def _context_bytes(plan: Plan, n_ctx: int) -> ContextBytes:
    """What a context takes: as the plan lists it, or on the line between its two neighbours there.

    Caches and buffers grow in straight lines, in steps of 256 tokens, but for windows that fill up. Records from
    before contexts were listed get a cache in proportion to the context, which overstates it for windows.
    """
    known = plan.contexts
    if not known:
        first = plan.levels[0]
        return ContextBytes(n_ctx, round(first.kv_bytes * n_ctx / plan.n_ctx), first.compute_bytes)
    if n_ctx > known[-1].n_ctx:
        raise UsageError(
            f"A context of {n_ctx} tokens is asked for; {plan.model} was trained for {known[-1].n_ctx}.",
            do=f"Choose {known[-1].n_ctx} or less.",
        )
    at = next(number for number, one in enumerate(known) if one.n_ctx >= n_ctx)
    above, below = known[at], known[max(0, at - 1)]
    if at == 0 or above.n_ctx == n_ctx:
        return above  # under the shortest that is listed: a bound
    share = (min(padded_context(n_ctx), above.n_ctx) - below.n_ctx) / (above.n_ctx - below.n_ctx)

    def between(low: int, high: int) -> int:
        return round(low + share * (high - low))

    return ContextBytes(
        n_ctx,
        between(below.kv_bytes, above.kv_bytes),
        between(below.compute_bytes, above.compute_bytes),
    )


def _moved(level: LevelPlan, there: ContextBytes | None, budget: int, usual: int | None = None) -> LevelPlan:
    """A level at another context (None: the same) under another budget. ``usual``: bytes of the cache that ``there``
    speaks of at the plan's context; a level with a cache of other types keeps its share of them."""
    if level.placement == ELSEWHERE:
        return level
    kv, compute = (there.kv_bytes, there.compute_bytes) if there else (level.kv_bytes, level.compute_bytes)
    if there and usual and level.level != split_name(level.level)[0]:
        kv = round(kv * level.kv_bytes / usual)
    total = level.total_bytes - level.kv_bytes - level.compute_bytes + kv + compute
    reason = f"{human_bytes(total)} of {human_bytes(budget)}"
    fits = total <= budget
    if level.container is Container.FOLDER and not level.fits:  # for want of a GPU, of which a budget says nothing
        fits, reason = False, level.reason
    return replace(level, kv_bytes=kv, compute_bytes=compute, total_bytes=total, fits=fits, reason=reason)
