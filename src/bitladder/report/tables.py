"""What deployments meet beside single questions, as tables: losses by depth of context and KV cache, faults of answers
and of tool calls by kind of work, thoughts, guesses ahead. The terminal, the report, the page and the gate show the
same cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitladder.describe.cache_types import F16_CACHE, split_name
from bitladder.plan.speculation import paying
from bitladder.records.evaluation import FaultCount, WorkloadResult
from bitladder.records.fidelity import Fidelity
from bitladder.records.run import RunRecord
from bitladder.records.speculation import Gain, SpeculationReport
from bitladder.report.rows import UNKNOWN, interval, number, percent, small
from bitladder.units import human_bytes


@dataclass(frozen=True)
class Cell:
    """What stands in a table, and the smaller words beneath it."""

    text: str
    beneath: str = ""
    known: bool = False
    """A loss, a fault or a gain that chance does not explain."""


@dataclass(frozen=True)
class Table:
    """Rows of equal length; the first column names the row."""

    name: str
    title: str
    lead: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def evidence_tables(record: RunRecord) -> list[Table]:
    """Those that there is something to say in."""
    tags = {one.id: one.tags for one in record.inputs}
    made = (
        depth_table(record.fidelities),
        _fault_table(record.results),
        _fault_tags(record.results, tags),
        _thought_table(record.results),
        guess_table(record.speculation, [one.level for one in record.decision.speculate]),
    )
    return [table for table in made if table.rows]


def depth_table(fidelities: Sequence[Fidelity]) -> Table:
    """Losses of each level with each cache behind contexts of every depth, and how much they rise."""
    rows = []
    for one in fidelities:
        level, cache = split_name(one.level)
        rows += [
            (
                Cell(level if at is one.depths[0] else ""),
                Cell(str(cache or F16_CACHE) if at is one.depths[0] else ""),
                Cell(f"{at.depth:,}"),
                Cell(small(at.kl_mean), interval(at.kl_low, at.kl_high, small)),
                Cell(number(at.rise, 3), interval(at.rise_low, at.rise_high, _three), known=at.rises),
                Cell(f"{at.ppl_ratio:.4f}" if math.isfinite(at.ppl_ratio) else UNKNOWN),
                Cell(percent(at.top1, 1)),
            )
            for at in one.depths
        ]
    return Table(
        "depth",
        "Losses by depth of context and cache",
        "The same tokens behind a context of so many tokens, each level with each KV cache; 95% intervals over "
        "documents. A rise over the shallowest depth is marked where it is sure.",
        ("level", "KV cache", "depth", "KL mean", "times shallowest", "ppl ratio", "top-1"),
        tuple(rows),
    )


def _fault_table(results: Sequence[WorkloadResult]) -> Table:
    """How often answers have each fault."""
    faults = list(dict.fromkeys(fault.fault for result in results for fault in result.faults))
    rows = []
    for result in results:
        own = {fault.fault: fault for fault in result.faults}
        if own:
            rows.append((Cell(result.level), *(_fault(own.get(fault)) for fault in faults)))
    return Table(
        "faults",
        "Faults of answers",
        "Answers that have a fault, of those that could, with a 95% interval and the reference's count; marked where "
        "it appeared in more inputs than chance explains, before correcting for the number of levels.",
        ("level", *faults),
        tuple(rows),
    )


_SURE = 0.05


def _fault(found: FaultCount | None) -> Cell:
    if found is None:
        return Cell("0")
    share = interval(found.low, found.high, lambda one: percent(one, 0)) if math.isfinite(found.low) else ""
    beneath = ", ".join(part for part in (share, f"reference {found.reference}") if part)
    return Cell(f"{found.level} of {found.answers}", beneath, known=found.p_value <= _SURE)


def _fault_tags(results: Sequence[WorkloadResult], tags: dict[str, tuple[str, ...]]) -> Table:
    """Inputs in which a fault appeared, and those that it vanished from, by kind of work."""
    kinds = sorted({tag for own in tags.values() for tag in own})
    rows = [
        (Cell(result.level), Cell(fault.fault), *(_changed(fault, tags, tag) for tag in kinds))
        for result in results
        for fault in result.faults
        if fault.appeared or fault.vanished
    ]
    return Table(
        "fault-tags",
        "Faults by kind of work",
        "Inputs of which more answers have the fault than of the reference's (+), and fewer (−).",
        ("level", "fault", *kinds),
        tuple(rows) if kinds else (),
    )


def _changed(fault: FaultCount, tags: dict[str, tuple[str, ...]], tag: str) -> Cell:
    more, fewer = (sum(tag in tags.get(one, ()) for one in names) for names in (fault.appeared, fault.vanished))
    said = " ".join(part for part in (f"+{more}" if more else "", f"−{fewer}" if fewer else "") if part)
    return Cell(said or "=")


def _thought_table(results: Sequence[WorkloadResult]) -> Table:
    rows = [
        (
            Cell(result.level),
            Cell(str(found.thoughts)),
            Cell(number(found.tokens, 3), f"reference {number(found.reference_tokens, 3)}"),
            Cell(str(found.unfinished)),
            Cell(str(found.looping)),
        )
        for result in results
        if (found := result.thinking) is not None
    ]
    return Table(
        "thoughts",
        "Thoughts before answers",
        "What the model thought is never judged as its answer.",
        ("level", "thoughts", "tokens each", "without an end", "in a loop"),
        tuple(rows),
    )


def guess_table(reports: Sequence[SpeculationReport], decided: Sequence[str] = ()) -> Table:
    """What each way to guess gains, over all inputs and by tag.

    Args:
        reports: by level.
        decided: levels that guess, by the decision; their best way is marked.
    """
    surely = paying([result for report in reports for result in report.results])
    rows: list[tuple[Cell, ...]] = []
    for report in reports:
        for result in report.results:
            pays = any(result is one for one in surely)
            same = "same answers" if result.lossless else f"{len(result.differing)} other answers"
            for gain in result.gains:
                first = not gain.tag
                rows.append(
                    (
                        Cell(report.level or report.model) if first else Cell(""),
                        Cell(_way(result.mode), same) if first else Cell(""),
                        Cell(gain.tag or "all inputs", f"{gain.inputs} timed"),
                        Cell(percent(gain.acceptance, 0), f"of {gain.drafted:,}"),
                        _times(gain, known=first and pays),
                        Cell(_standing(report.level, pays=pays, decided=decided)) if first else Cell(""),
                        Cell(human_bytes(result.extra_bytes)) if first else Cell(""),
                    )
                )
    return Table(
        "guesses",
        "Guessing tokens ahead",
        "Time without guesses over time with them, on the same inputs in turns, with its 95% interval. Guesses pay "
        "where that is surely above 1 for all that were tried and every greedy answer stays the same.",
        ("level", "guesses", "inputs", "right", "times as fast", "pays", "memory"),
        tuple(rows),
    )


def _way(mode: str) -> str:
    """Without the folder of a draft."""
    kind, _, draft = mode.partition(":")
    return f"draft {draft.replace(chr(92), '/').rpartition('/')[2]}" if draft else kind


def _times(gain: Gain, *, known: bool) -> Cell:
    return Cell(number(gain.ratio, 3), interval(gain.low, gain.high, _three), known=known)


def _standing(level: str, *, pays: bool, decided: Sequence[str]) -> str:
    if not pays:
        return "not known to"
    return "yes, does so" if level in decided else "yes"


def _three(value: float) -> str:
    return f"{value:.3g}"


def rises(fidelities: Sequence[Fidelity]) -> dict[str, str]:
    """A sentence for each level whose loss surely rises with depth."""
    found = {}
    for one in fidelities:
        last = one.depths[-1] if one.depths else None
        if last is not None and last.rises:
            found[one.level] = (
                f"{one.level}: its loss rises with depth, {number(last.rise, 3)} times from {one.depths[0].depth:,} "
                f"to {last.depth:,} tokens ({_three(last.rise_low)} to {_three(last.rise_high)})."
            )
    return found


def table_notes(record: RunRecord) -> dict[str, str]:
    """Of each level what its tables are sure of, for outputs without tables: a loss that rises, guesses that pay."""
    notes = {level: [said.partition(": ")[2].rstrip(".")] for level, said in rises(record.fidelities).items()}
    for one in record.decision.speculate:
        notes.setdefault(one.level, []).append(f"guesses with {_way(one.guesses)}, {one.ratio:.3g} times as fast")
    return {level: "; ".join(said) for level, said in notes.items()}
