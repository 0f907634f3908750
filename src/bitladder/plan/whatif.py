"""The decision on another machine, at another context or under another bar, from the evidence that is
there."""

from __future__ import annotations

from dataclasses import replace

from bitladder.plan.decide import decide
from bitladder.records.decision import Decision
from bitladder.records.plan import LevelPlan, Plan
from bitladder.records.run import RunRecord
from bitladder.units import human_bytes


def what_if(
    run: RunRecord, *, budget_bytes: int | None = None, n_ctx: int | None = None, bar: str | None = None
) -> tuple[Plan, Decision]:
    """Plan and decision of a run, with some of its givens changed.

    The KV cache is taken to grow in proportion to the context, which overstates it for models whose attention
    slides; weights and compute buffers stay. Losses and speeds are those that were measured.

    Raises:
        UsageError: the bar cannot be read.
    """
    context = run.plan.n_ctx if n_ctx is None else n_ctx
    budget = run.plan.budget_bytes if budget_bytes is None else budget_bytes
    plan = run.plan
    if (context, budget) != (plan.n_ctx, plan.budget_bytes):
        levels = tuple(_moved(level, context / plan.n_ctx, budget) for level in plan.levels)
        plan = replace(plan, n_ctx=context, budget_bytes=budget, levels=levels)
    decision = decide(
        plan,
        run.fidelities,
        run.results,
        bar=run.decision.bar if bar is None else bar,
        reference=run.source.level,
        tags={item.id: item.tags for item in run.inputs},
    )
    return plan, decision


def _moved(level: LevelPlan, stretch: float, budget: int) -> LevelPlan:
    """A level at another context under another budget."""
    kv = round(level.kv_bytes * stretch)
    total = level.total_bytes - level.kv_bytes + kv
    fits = total <= budget
    reason = f"{human_bytes(total)} of {human_bytes(budget)}"
    return replace(level, kv_bytes=kv, total_bytes=total, fits=fits, reason=reason)
