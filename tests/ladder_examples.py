"""Invented measurements of a ladder, for the decision, the report and the page."""

from __future__ import annotations

import dataclasses
import math

from bitladder.plan.decide import decide
from bitladder.records.evaluation import Answer, LevelAnswers, Speed, WorkloadResult
from bitladder.records.fidelity import Fidelity
from bitladder.records.plan import LevelPlan, Plan
from bitladder.records.run import FileFacts, InputFacts, RunRecord, SourceFacts
from bitladder.report.chart import Point
from bitladder.units import MiB

SIZES = {"F16": 384, "Q8_0": 205, "Q6_K": 158, "Q5_K_M": 141, "Q4_K_M": 124, "Q3_K_M": 107, "Q2_K": 89}
KL = {"Q8_0": 0.004, "Q6_K": 0.013, "Q5_K_M": 0.035, "Q4_K_M": 0.07, "Q3_K_M": 0.25, "Q2_K": 1.2}
SPEEDS = {"F16": 60, "Q8_0": 98, "Q6_K": 104, "Q5_K_M": 116, "Q4_K_M": 131, "Q3_K_M": 127, "Q2_K": 139}


def level_plan(level: str, *, fits: bool = True) -> LevelPlan:
    size = SIZES[level] * MiB
    reason = "fits" if fits else "needs more memory than there is"
    return LevelPlan(level, size, size, SIZES[level] / 24, 0.9, 0, 50 * MiB, 20 * MiB, size + 70 * MiB, fits, reason)


def plan(*, budget: int = 2048 * MiB, levels: tuple[str, ...] = tuple(SIZES)) -> Plan:
    rows = tuple(level_plan(level, fits=(SIZES[level] + 70) * MiB <= budget) for level in levels)
    return Plan("reference", "llama", "2 cores, 8 GiB", 2048, budget, rows)


def fidelity(level: str, kl: float | None = None, *, width: float = 0.1) -> Fidelity:
    kl = KL[level] if kl is None else kl
    low, high = kl * (1 - width), kl * (1 + width)
    top1 = max(0.0, 1 - 0.35 * math.sqrt(kl))
    return Fidelity(
        level=level, tokens=9000, units=30, unit="document",
        kl_mean=kl, kl_low=low, kl_high=high, kl_median=kl / 2, kl_p99=kl * 9, kl_max=kl * 50,
        ppl=30 * (1 + kl), ppl_reference=30, ppl_ratio=1 + kl, ppl_ratio_low=1 + low, ppl_ratio_high=1 + high,
        top1=top1, top1_low=top1 - 0.01, top1_high=min(1, top1 + 0.01),
    )  # fmt: skip


def fidelities(**changed: float) -> list[Fidelity]:
    return [fidelity(level, changed.get(level)) for level in KL]


def result(level: str, *, lost: int = 0, gained: int = 0, inputs: int = 25, p: float | None = None) -> WorkloadResult:
    passes = inputs - 5 - lost + gained
    p_value = p if p is not None else 1.0 if lost < 6 else 2 * 0.5**lost
    lost_inputs = tuple(f"in{n}" for n in range(lost))
    gained_inputs = tuple(f"in{inputs - 1 - n}" for n in range(gained))
    same, decode = inputs - lost - gained, SPEEDS[level]
    return WorkloadResult(
        level, passes, inputs, 0.6, 0.9, lost_inputs, gained_inputs, same, p_value, decode, 6.0 * decode
    )


def results(**lost: int) -> list[WorkloadResult]:
    return [result(level, lost=lost.get(level, 0)) for level in SIZES]


def answers(level: str, texts: dict[str, str], *, failed: tuple[str, ...] = ()) -> LevelAnswers:
    made = tuple(
        Answer(name, text, name not in failed, "not 8" if name in failed else "", "stop", 20, len(text.split()))
        for name, text in texts.items()
    )
    return LevelAnswers(level, made, Speed(200, SPEEDS.get(level, 100), 1.0))


REFERENCE_TEXTS = {"pens": "So they cost $8.", "capital": "Canberra.", "formal": "The file shall be sent."}
SPEED_TEXTS = {"pens": "So they cost $12.", "capital": "Canberra.", "formal": "The file will be sent."}


def run_record(bar: str = "kl < 0.1 and no known loss", **changed: object) -> RunRecord:
    inputs = (
        InputFacts("pens", "What do 12 pens cost?", "number 8", ("arithmetic",)),
        InputFacts("capital", "Capital of Australia?", "one of Canberra", ("recall",)),
        InputFacts("formal", "Say it formally.", "none of gonna", ("style",)),
    )
    base = plan()
    measured = [
        dataclasses.replace(
            result(level, inputs=3),
            passes=3 - (level == "Q4_K_M"),
            lost=("pens",) if level == "Q4_K_M" else (),
        )
        for level in SIZES
    ]
    tags = {item.id: item.tags for item in inputs}
    decision = decide(base, fidelities(), measured, bar=bar, reference="F16", tags=tags)
    record = RunRecord(
        bitladder="0.1.0",
        created="2026-01-02T03:04:05+00:00",
        source=SourceFacts("Reference 191M", "reference-f16.gguf", "ab" * 32, "F16", "llama", 191_000_000, 384 * MiB),
        machine={"cpu": "a CPU", "cores": 2},
        plan=base,
        decision=decision,
        files=tuple(FileFacts(level, f"out/{level}.gguf", SIZES[level] * MiB, 4.5, "cd" * 32) for level in KL),
        fidelities=tuple(fidelities()),
        results=tuple(measured),
        inputs=inputs,
        answers=(
            answers("F16", REFERENCE_TEXTS),
            answers("Q6_K", REFERENCE_TEXTS),
            answers("Q4_K_M", SPEED_TEXTS, failed=("pens",)),
        ),
        settings={"text": "shipped", "seed": 7},
        versions={"numpy": "2.0"},
        commands=("bitladder run reference-f16.gguf",),
        timings={"walk": 12.5},
    )
    return dataclasses.replace(record, **changed)


CROWDS = {
    "in a row": [Point(f"Q{n}_K_M", 100 + n * 3, 0.05 * 1.1**-n, 0.04, 0.06) for n in range(8)],
    "pairs": [
        Point(f"Q{n}_K_{kind}", 90 * 1.2**n + at, 2 * 3.0**-n * (1 + at / 40), 1.6 * 3.0**-n, 2.6 * 3.0**-n, mark)
        for n in range(2, 7)
        for kind, at, mark in (("S", 0, ""), ("M", 3, "speed" if n == 4 else "quality" if n == 5 else ""))
    ],
    "at the bar": [Point(f"Q{n}_K_M", 100 + 20 * n, 0.1, 0.09, 0.11, "both" if n == 7 else "") for n in range(8)],
}
"""Levels that leave little room for their names, in a chart."""


def crowded_record() -> RunRecord:
    """A run of ten levels, many of nearly the same size, that were measured in two ways and kept all their answers."""
    kl = {
        "Q8_0": 0.0013, "Q6_K": 0.0044, "Q5_K_M": 0.0147, "Q5_K_S": 0.0172, "Q4_K_M": 0.051, "Q4_K_S": 0.068,
        "Q3_K_L": 0.156, "Q3_K_M": 0.195, "Q3_K_S": 0.46, "Q2_K": 1.05,
    }  # fmt: skip
    sizes = {
        "F16": 258, "Q8_0": 138, "Q6_K": 132, "Q5_K_M": 107, "Q5_K_S": 105, "Q4_K_M": 101, "Q4_K_S": 98,
        "Q3_K_L": 93, "Q3_K_M": 89, "Q3_K_S": 84, "Q2_K": 84.2,
    }  # fmt: skip
    base = run_record()
    rows = tuple(
        dataclasses.replace(
            base.plan.levels[0], level=level, file_bytes=round(size * MiB), total_bytes=round((size + 70) * MiB)
        )
        for level, size in sizes.items()
    )
    plan = dataclasses.replace(base.plan, levels=rows)
    measured = [fidelity(level, loss, width=0.2) for level, loss in kl.items()]
    found = [
        dataclasses.replace(result("Q4_K_M", inputs=3), level=level, lost=(), decode_tokens_per_s=30 + 4 * (n % 5))
        for n, level in enumerate(sizes)
    ]
    decision = decide(plan, measured, found, bar="kl < 0.1", reference="F16")
    given = [answers("F16", REFERENCE_TEXTS), *(answers(level, SPEED_TEXTS) for level in kl)]
    return dataclasses.replace(
        base,
        plan=plan,
        decision=decision,
        fidelities=tuple(measured),
        results=tuple(found),
        files=(),
        answers=tuple(given),
    )
