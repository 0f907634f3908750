"""Everything known of each level, joined, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitladder.describe.cache_types import split_name
from bitladder.records.decision import Status, Verdict
from bitladder.records.evaluation import WorkloadResult
from bitladder.records.fidelity import Fidelity
from bitladder.records.plan import ELSEWHERE, Container, LevelPlan, runs_elsewhere
from bitladder.records.run import FileFacts, LevelCost, RunRecord
from bitladder.units import human_bytes

UNKNOWN = "–"
"""Shown where nothing was measured; never 0."""


@dataclass(frozen=True)
class LevelRow:
    """One level: its place in the plan, and what was measured of it."""

    plan: LevelPlan
    verdict: Verdict
    fidelity: Fidelity | None
    result: WorkloadResult | None
    file: FileFacts | None
    million: LevelCost | None = None
    """What a million answer tokens cost."""
    reference_cost: float = math.nan
    """Of the same with the reference."""

    @property
    def level(self) -> str:
        """Its name."""
        return self.plan.level

    @property
    def bytes(self) -> int:
        """Of the file as written, or as planned."""
        return self.file.bytes if self.file else self.plan.file_bytes

    @property
    def tier(self) -> str:
        """``quality``, ``speed``, ``both`` or empty."""
        return self.verdict.status.tier

    @property
    def size(self) -> str:
        """File size."""
        return UNKNOWN if self.elsewhere else human_bytes(self.bytes)

    @property
    def memory(self) -> str:
        """Weights, cache and buffers at the context."""
        return UNKNOWN if self.elsewhere else human_bytes(self.plan.total_bytes)

    @property
    def bpw(self) -> str:
        """Bits per weight."""
        return UNKNOWN if self.elsewhere else f"{self.file.bpw if self.file else self.plan.bpw:.2f}"

    @property
    def elsewhere(self) -> bool:
        """A model behind an address."""
        return self.plan.placement == ELSEWHERE

    @property
    def on_label(self) -> str:
        """Share of weights really in the named type."""
        return percent(self.plan.on_label_share, 0)

    @property
    def decode(self) -> str:
        """Decoded tokens per second."""
        return number(self.result.decode_tokens_per_s, 3) if self.result else UNKNOWN

    @property
    def kl(self) -> str:
        """Mean KL divergence."""
        return small(self.fidelity.kl_mean) if self.fidelity else UNKNOWN

    @property
    def kl_interval(self) -> str:
        """Its 95% interval."""
        return interval(self.fidelity.kl_low, self.fidelity.kl_high, small) if self.fidelity else ""

    @property
    def ppl_ratio(self) -> str:
        """Perplexity over the reference's."""
        return f"{self.fidelity.ppl_ratio:.3f}" if self.fidelity and math.isfinite(self.fidelity.ppl_ratio) else UNKNOWN

    @property
    def top1(self) -> str:
        """Same most likely token."""
        return percent(self.fidelity.top1, 1) if self.fidelity else UNKNOWN

    @property
    def passes(self) -> str:
        """Passed of asked."""
        return f"{self.result.passes}/{self.result.inputs}" if self.asked and self.result else UNKNOWN

    @property
    def asked(self) -> bool:
        """Whether it answered any input: of levels that could not be chosen at most the speed is known."""
        return self.result is not None and self.result.inputs > 0

    @property
    def pass_interval(self) -> str:
        """95% interval of the pass rate."""
        return (
            interval(self.result.pass_low, self.result.pass_high, lambda share: f"{100 * share:.0f}") + "%"
            if self.asked and self.result
            else ""
        )

    @property
    def cost(self) -> str:
        """Of a million answer tokens."""
        return number(self.million.per_million, 3) if self.million else UNKNOWN

    @property
    def saved(self) -> str:
        """Of the reference's cost; less than nothing where the level costs more."""
        if self.million is None or self.verdict.status == Status.REFERENCE or not self.reference_cost > 0:
            return UNKNOWN
        return percent(1 - self.million.per_million / self.reference_cost, 0)

    @property
    def flips(self) -> str:
        """Inputs lost and gained against the reference."""
        if self.result is None or not self.asked or self.verdict.status == Status.REFERENCE:
            return ""
        return f"−{len(self.result.lost)} +{len(self.result.gained)}"


def over_caches(record: RunRecord) -> bool:
    """Whether levels were run with several KV caches: rows of one file then differ in memory, not in size."""
    return any(split_name(level.level)[1] for level in record.plan.levels)


def front_line(record: RunRecord) -> str:
    """Which rows no other beats, in a sentence; empty where nothing was measured."""
    if not record.decision.front:
        return ""
    what = f"memory at {record.plan.n_ctx:,} tokens of context" if over_caches(record) else "size"
    return f"No other level beats these in {what}, speed and loss at once: {', '.join(record.decision.front)}."


def level_rows(record: RunRecord) -> list[LevelRow]:
    """Rows in the plan's order, largest level first; then models behind addresses."""
    verdicts = {verdict.level: verdict for verdict in record.decision.verdicts}
    fidelities = {fidelity.level: fidelity for fidelity in record.fidelities}
    results = {result.level: result for result in record.results}
    files = {file.level: file for file in record.files}
    costs = {cost.level: cost for cost in record.costs}
    reference = costs.get(record.compared_with)
    here = [plan.level for plan in record.plan.levels]
    elsewhere = [runs_elsewhere(name) for name in verdicts if name not in here]
    return [
        LevelRow(
            plan=plan,
            verdict=verdicts.get(plan.level, Verdict(plan.level, Status.UNKNOWN, "not judged")),
            fidelity=fidelities.get(plan.level),
            result=results.get(plan.level),
            file=files.get(plan.level),
            million=costs.get(plan.level),
            reference_cost=reference.per_million if reference else math.nan,
        )
        for plan in (*record.plan.levels, *elsewhere)
    ]


def left_out(record: RunRecord, rows: Sequence[LevelRow]) -> str:
    """What dashes mean where levels were not asked or timed because they could not be chosen; empty where none was, and
    where time was short."""
    if "within_s" in record.settings:
        return ""
    measured = [row for row in rows if row.fidelity and row.plan.container is Container.FILE]
    measured = [row for row in measured if row.verdict.status != Status.REFERENCE]
    known = [[row.asked for row in measured], [row.decode != UNKNOWN for row in measured]]
    if not any(any(one) and not all(one) for one in known):
        return ""
    return f"{UNKNOWN}: not asked or not timed, since nothing that this shows could make it a tier; --full does both."


def number(value: float, digits: int) -> str:
    """With so many significant digits and no exponent; a dash when undefined."""
    if not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def small(value: float) -> str:
    """Three significant digits down to 0.0001, then as a power of ten."""
    if not math.isfinite(value):
        return UNKNOWN
    if value == 0 or abs(value) >= 1e-4:
        return number(value, 3)
    return f"{value:.0e}".replace("e-0", "e-")


def percent(share: float, decimals: int) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{decimals}f}%" if math.isfinite(share) else UNKNOWN


def interval(low: float, high: float, show: Callable[[float], str]) -> str:
    """Two bounds with a dash between; empty when there is none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{show(low)}–{show(high)}"


def cost_lines(record: RunRecord) -> list[str]:
    """What each tier costs and saves beside the reference, and by which prices; empty where there are none."""
    costs = {cost.level: cost for cost in record.costs}
    reference = costs.get(record.compared_with)
    lines = []
    for level in dict.fromkeys((record.decision.quality, record.decision.speed)):
        if level is None or level not in costs:
            continue
        cost = costs[level].per_million
        line = f"A million answer tokens cost {number(cost, 3)} with {level}"
        if reference is not None and reference.per_million > 0:
            change = 1 - cost / reference.per_million
            less = f"{percent(abs(change), 0)} {'less' if change >= 0 else 'more'}"
            line += f", {less} than with {reference.level} ({number(reference.per_million, 3)})"
        lines.append(f"{line}.")
    if lines:
        named = dict.fromkeys(cost.basis for cost in record.costs)
        lines.append(f"Prices: {'; '.join(named)}. Here one request at a time: several at once cost less.")
    return lines
