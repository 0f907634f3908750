"""The choice of two levels from what was measured, and a reason for every other one. Pure: same evidence,
same decision.

The rule, in order:

1. A level is a *candidate* when it fits the machine and meets every clause of the bar. A clause is met when
   the whole 95% interval lies on its right side, and still so when all levels are corrected for. The reference
   itself is never a candidate: it is what the others are compared with. Nor is a model behind an address: it is
   judged like the levels, but its size is unknown and its machine another. A checkpoint, which llama.cpp does not
   run, stays open until an engine for it has answered the workload; where it would not fit it is judged and not chosen.
2. The *quality tier* comes from the candidates whose loss cannot be told from zero: the upper bound of their
   mean KL is under 0.02 nats and the workload proves no loss. Of these it is the smallest: one input more or
   less is no evidence. When no candidate is that close, it is the candidate with the lowest KL, or the smallest
   of those whose KL cannot be told from the lowest on the same text.
3. The *speed tier* is the smallest of the candidates that no other is surely faster than: by more than five
   percent, and by the whole interval of the ratio over rounds in which both were timed; where guessing tokens ahead
   was tried and surely pays, with those guesses (the interval then holds what they gain, too). It must surely be faster
   than the quality tier; without speeds, decode is taken to be bound by bytes, and it must be smaller. Else one level
   serves both: the quality tier, or the speed tier where its KL is no higher. Levels that were not timed, since they
   could not be chosen (`schedule.contending`), are not looked at for speed.
   Of levels that are run with several types of KV cache each pair is a candidate, by its bytes in memory at the
   context: a smaller level with a 16-bit cache may be taken before a larger one with four. Where losses were measured
   by depth of context, a clause on them holds when it holds at every depth.
4. The two stand in memory *together* when their sum fits the budget; otherwise the gateway *swaps* them.

Several levels give chance several tries. So the chance that any level is said to meet the bar which does not
is held at 5% for the whole ladder (``_corrected``), and the chance that any is said to have lost on the
workload too (Holm's method for both).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bitladder.describe.cache_types import split_name
from bitladder.plan.bar import DEFAULT_BAR, DEFAULT_BAR_WITHOUT_KL, Bar, parse_bar
from bitladder.plan.certainty import LadderEvidence, certainty
from bitladder.plan.front import Standpoint, pareto
from bitladder.plan.judge import KNOWN_LOSS_P, MET, UNKNOWN, Judged, Judgement, LevelEvidence, judge, pairs_of
from bitladder.plan.reasons import Tiers, how_sure, not_done, summary, verdict
from bitladder.records.decision import Decision, Outcome, Pairing, TagStatus, TagVerdict, TierGuesses
from bitladder.records.evaluation import FaultCount, Speed, WorkloadResult
from bitladder.records.fidelity import Fidelity
from bitladder.records.plan import ELSEWHERE, Plan, runs_elsewhere
from bitladder.stats.multiplicity import holm, tarone
from bitladder.stats.paired import more_often

FALSE_MEETS = 0.05
"""Chance that any level at all is said to meet the bar which in truth does not."""


def decide(
    plan: Plan,
    fidelities: Sequence[Fidelity],
    results: Sequence[WorkloadResult] = (),
    *,
    bar: Bar | str | None = None,
    reference: str | None = None,
    elsewhere: Sequence[str] = (),
    speeds: Mapping[str, Speed] | None = None,
    tags: Mapping[str, tuple[str, ...]] | None = None,
    guesses: Mapping[str, TierGuesses] | None = None,
) -> Decision:
    """Choose a quality tier and a speed tier.

    Args:
        plan: the levels on this machine, with what fits.
        fidelities: token-level losses, by level.
        results: workload passes paired with the reference's, by level.
        bar: what a level must hold; `bar.DEFAULT_BAR` by default, or `bar.DEFAULT_BAR_WITHOUT_KL` when no KL was
            measured at all.
        reference: what the others are compared with, if it stands in the plan.
        elsewhere: models behind addresses that are judged beside the levels.
        speeds: measured speeds by level; otherwise those of ``results``.
        tags: input of the workload to its tags.
        guesses: what levels would guess tokens ahead with, by level, where it surely pays.

    Raises:
        UsageError: the bar cannot be read.
    """
    if bar is None:
        bar = DEFAULT_BAR if fidelities else DEFAULT_BAR_WITHOUT_KL
    parsed = parse_bar(bar) if isinstance(bar, str) else bar
    evidence = LadderEvidence(
        (*plan.levels, *(runs_elsewhere(name) for name in elsewhere)),
        fidelities, results, speeds or {}, tags or {}, guesses or {},
    )  # fmt: skip
    judged = judged_levels(evidence, parsed, reference)
    everyone = [one for one in judged if one.level != reference and one.evidence.in_question]
    rivals = [one for one in everyone if one.can_be_chosen]
    quality, speed = chosen(judged, reference)
    smaller = [one for one in rivals if quality and one.outcome == MET and one.total < quality.total]
    as_good = any(one.near_lossless for one in smaller)
    tiers = Tiers(quality, speed, _pair(quality, speed, plan.budget_bytes), as_good)
    outcomes = {one.outcome for one in rivals or everyone}
    outcome = Outcome.MET if MET in outcomes else Outcome.UNKNOWN if UNKNOWN in outcomes else Outcome.NOT_MET
    with_cache = any(split_name(level.level)[1] for level in plan.levels)
    sure = certainty(
        evidence,
        _names((quality, speed)),
        lambda drawn: _names(chosen(judged_levels(drawn, parsed, reference), reference)),
    )
    return Decision(
        bar=parsed.text,
        quality=quality.level if quality else None,
        speed=speed.level if speed else None,
        verdicts=tuple(
            verdict(one, tiers, reference, not_done(one, everyone) if one.level != reference else "") for one in judged
        ),
        summary=" ".join((summary(tiers, parsed, plan, outcome, everyone), *how_sure(sure))),
        outcome=outcome,
        pair=tiers.pair,
        front=pareto(
            Standpoint(one.level, one.total if with_cache else one.evidence.plan.file_bytes, one.speed, one.kl)
            for one in judged
            if one.evidence.plan.placement != ELSEWHERE
        ),
        tags=tuple(found for one in everyone for found in tag_verdicts(one.evidence)),
        next=_next([one for one in everyone if one.evidence.plan.placement != ELSEWHERE], quality),
        certainty=sure,
    )


def judged_levels(evidence: LadderEvidence, bar: Bar, reference: str | None) -> list[Judged]:
    """Every level with what the bar says about it, corrected for their number."""
    return _corrected([Judged(one, judge(bar, one)) for one in _join(evidence, reference)], reference)


def chosen(judged: Sequence[Judged], reference: str | None) -> tuple[Judged | None, Judged | None]:
    """Quality and speed tier of the levels that can be chosen and meet the bar."""
    here = (one for one in judged if one.level != reference and one.evidence.in_question and one.can_be_chosen)
    return choose([one for one in here if one.outcome == MET])


def _names(tiers: tuple[Judged | None, Judged | None]) -> tuple[str | None, str | None]:
    quality, speed = tiers
    return quality.level if quality else None, speed.level if speed else None


def _corrected(judged: Sequence[Judged], reference: str | None) -> list[Judged]:
    """Levels that meet the bar only because there are so many of them are open.

    A level meets the bar when all its clauses do, so its p value is the largest of theirs (an intersection-union
    test, which needs no correction for the number of clauses). Across levels Holm's method keeps the chance of
    any false "meets" under ``FALSE_MEETS``. The level that is nearest to the limit pays nothing for those that
    are clearly under it, and a little for each that is not.
    """
    rivals = [one for one in judged if one.level != reference and one.evidence.in_question and one.evidence.measured]
    p_values = [max(each.p_value for each in one.judgements) if one.outcome == MET else 1.0 for one in rivals]
    adjusted = dict(zip((one.level for one in rivals), holm(p_values), strict=True))

    def doubt(one: Judged) -> Judged:
        if one.outcome != MET or adjusted.get(one.level, 0.0) <= FALSE_MEETS:
            return one
        worst = max(one.judgements, key=lambda each: each.p_value)
        crowd = len(rivals) > 1
        which = f", alone; among {len(rivals)} levels one" if crowd else "; it"
        corrected = "corrected p" if crowd else "p"
        said = Judgement(
            UNKNOWN,
            f"{worst.reason}{which} comes this close by chance too often ({corrected} = {adjusted[one.level]:.2g})",
            f"more of what was measured{f', or name fewer levels ({len(rivals)} so far)' if crowd else ''}",
        )
        return replace(one, judgements=tuple(said if each is worst else each for each in one.judgements))

    return [doubt(one) for one in judged]


def _join(evidence: LadderEvidence, reference: str | None) -> list[LevelEvidence]:
    """Bring the measurements together by level, in the plan's order."""
    fidelity_of = {fidelity.level: fidelity for fidelity in evidence.fidelities}
    result_of = {result.level: result for result in evidence.results if result.inputs}  # others were timed alone
    decode = {result.level: result.decode_tokens_per_s for result in evidence.results}
    decode |= {level: speed.decode_tokens_per_s for level, speed in evidence.speeds.items()}
    rounds = {result.level: result.decode_rounds for result in evidence.results}
    rounds |= {level: speed.rounds for level, speed in evidence.speeds.items()}
    rivals = [result for result in result_of.values() if result.level != reference]
    names = [result.level for result in rivals]
    adjusted = dict(zip(names, holm([result.p_value for result in rivals]), strict=True))
    faults = _known_faults(rivals)
    return [
        LevelEvidence(
            plan=level,
            fidelity=fidelity_of.get(level.level),
            result=result_of.get(level.level),
            decode_tokens_per_s=decode.get(level.level, math.nan),
            decode_rounds=rounds.get(level.level, ()),
            p_adjusted=adjusted.get(level.level, math.nan),
            tags=evidence.tags,
            known_faults=faults.get(level.level, ()),
            guesses=evidence.guesses.get(level.level),
        )
        for level in evidence.levels
    ]


def _known_faults(rivals: Sequence[WorkloadResult]) -> dict[str, tuple[FaultCount, ...]]:
    """Faults that levels surely have more often than the reference. The chance of any false one among all levels and
    faults is `KNOWN_LOSS_P`; those that too few inputs differ in to be found take no part in it (Tarone)."""
    tests = [(result.level, fault) for result in rivals for fault in result.faults]
    p_values = [more_often(len(fault.appeared), len(fault.vanished)) for _, fault in tests]
    least = [0.5 ** (len(fault.appeared) + len(fault.vanished)) for _, fault in tests]
    found: dict[str, tuple[FaultCount, ...]] = {}
    for (level, fault), p_value in zip(tests, tarone(p_values, least, level=KNOWN_LOSS_P), strict=True):
        if p_value <= KNOWN_LOSS_P:
            found[level] = (*found.get(level, ()), fault)
    return found


def choose(candidates: Sequence[Judged]) -> tuple[Judged | None, Judged | None]:
    """Quality and speed tier; both None without candidates."""
    if not candidates:
        return None, None
    quality = _quality_tier(candidates)
    speed = _speed_tier(candidates, quality)
    return (speed if speed.kl <= quality.kl and speed.kl_is_known else quality), speed


def _quality_tier(candidates: Sequence[Judged]) -> Judged:
    """The smallest near-lossless candidate; else the closest."""
    near = [one for one in candidates if one.near_lossless]
    if near:
        return min(near, key=lambda one: (one.total, one.kl))
    # Without any KL the larger level is presumed to be the closer one.
    closest = min(candidates, key=lambda one: (one.kl, one.total if math.isfinite(one.kl) else -one.total))
    equals = [one for one in candidates if one.kl_is_known and not one.kl_is_told_from(closest)]
    return min(equals, key=lambda one: (one.total, one.kl), default=closest)


def _speed_tier(candidates: Sequence[Judged], quality: Judged) -> Judged:
    """The smallest of the fastest where that is faster than the quality tier, else that tier."""
    timed = [one for one in candidates if not math.isnan(one.speed)]
    if math.isnan(quality.speed):
        return min(candidates, key=lambda one: (one.total, one.kl))
    fastest = [one for one in timed if not any(other.surely_faster_than(one) for other in timed)]
    faster = [one for one in fastest if one.surely_faster_than(quality)]
    return min(faster, key=lambda one: (one.total, one.kl), default=quality)


def _pair(quality: Judged | None, speed: Judged | None, budget: int) -> Pairing:
    if quality is None or speed is None:
        return Pairing.NO_CHOICE
    if quality is speed:
        return Pairing.ONE_LEVEL
    return Pairing.TOGETHER if quality.total + speed.total <= budget else Pairing.SWAP


def tag_verdicts(evidence: LevelEvidence) -> list[TagVerdict]:
    """Loss per tag of one level."""
    if evidence.result is None:
        return []
    verdicts = []
    for tag in sorted({tag for own in evidence.tags.values() for tag in own}):
        pairs = pairs_of(evidence.result, evidence.tags, tag)
        low, high = pairs.interval
        seen = TagStatus.SEEN if pairs.lost > pairs.gained else TagStatus.NONE_SEEN
        status = TagStatus.KNOWN if low > 0 else seen
        verdicts.append(TagVerdict(evidence.plan.level, tag, pairs.inputs, pairs.lost, pairs.gained, low, high, status))
    return verdicts


def _next(rivals: Sequence[Judged], quality: Judged | None) -> tuple[str, ...]:
    """What would settle the open levels: only those smaller than the choice matter once there is one."""
    open_ones = [one for one in rivals if one.outcome == UNKNOWN and (quality is None or one.total < quality.total)]
    levels_of: dict[str, list[str]] = {}
    for one in open_ones:
        for judgement in one.judgements:
            if judgement.need:
                levels_of.setdefault(judgement.need, []).append(one.level)
    return tuple(f"{', '.join(levels)}: {need}" for need, levels in levels_of.items())
