"""The words of a decision: status and reason of each level, and the whole in a sentence or two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitladder.plan.bar import Bar
from bitladder.plan.judge import (
    FAILED,
    MET,
    NEAR_LOSSLESS_KL,
    UNKNOWN,
    Judged,
    loss_is_known,
)
from bitladder.records.decision import Certainty, Loss, Outcome, Pairing, Status, Verdict
from bitladder.records.plan import ELSEWHERE, Plan
from bitladder.units import human_bytes, human_rate


@dataclass(frozen=True)
class Tiers:
    """The two chosen levels and how they live in memory; both None when nothing qualifies."""

    quality: Judged | None
    speed: Judged | None
    pair: Pairing
    smaller_as_good: bool = False
    """Whether a smaller level shows no loss either, and the quality tier is faster than it."""


def verdict(one: Judged, tiers: Tiers, reference: str | None, not_done: str = "") -> Verdict:
    """Status and reason of one level; ``not_done`` says what was not measured of it."""
    status, reason = _status(one, tiers, reference)
    reason = f"{reason}; {not_done}" if not_done else reason
    return Verdict(one.level, status, reason, Loss.NONE if one.level == reference else _loss(one))


def not_done(one: Judged, everyone: Sequence[Judged]) -> str:
    """What was measured of other levels and not of this one, or on fewer units of text; empty where nothing is missing.

    A run looks no further at what cannot be chosen (``schedule.open_levels``, ``schedule.contending``).
    """
    own = one.evidence
    if not own.in_question or own.needs_engine or own.plan.placement == ELSEWHERE:
        return ""
    found = []
    units = own.fidelity.units if own.fidelity is not None else 0
    most = max((other.evidence.fidelity.units for other in everyone if other.evidence.fidelity is not None), default=0)
    if own.fidelity is not None and 0 < units < most:
        found.append(f"KL on {units} of {most} {own.fidelity.unit}s")
    asked = own.result is not None or all(other.evidence.result is None for other in everyone)
    timed = not math.isnan(one.speed) or all(math.isnan(other.speed) for other in everyone)
    if not asked:
        found.append("not asked" if timed else "neither asked nor timed")
    elif not timed:
        found.append("not timed")
    return ", ".join(found)


def _status(one: Judged, tiers: Tiers, reference: str | None) -> tuple[Status, str]:
    if one.level == reference:
        return Status.REFERENCE, "what the others are compared with"
    if not one.evidence.in_question:
        return Status.DOES_NOT_FIT, one.evidence.plan.reason
    if one.outcome == FAILED:
        return Status.FAILS, one.say(FAILED)
    if one.outcome == UNKNOWN:
        return Status.UNKNOWN, ": ".join(part for part in (one.say(UNKNOWN), one.needs) if part)
    if not one.can_be_chosen:
        elsewhere = one.evidence.plan.placement == ELSEWHERE
        why = "it runs elsewhere" if elsewhere else f"it does not fit here ({one.evidence.plan.reason})"
        return Status.MEETS, f"{one.say(MET)}; {why}, so it is compared and not chosen"
    return _placed(one, tiers)


def _placed(one: Judged, tiers: Tiers) -> tuple[Status, str]:
    """A level that meets the bar: in a tier, or passed over."""
    quality, speed = tiers.quality, tiers.speed
    assert quality is not None
    assert speed is not None  # a level met the bar, so both tiers are chosen
    if one is quality and one is speed:
        rest = "no level that meets the bar is measurably faster"
        if math.isnan(one.speed):
            rest = "no level that meets the bar is smaller"
        return Status.BOTH, f"{_why_quality(one, tiers)}, and {rest}; {one.say(MET)}"
    if one is quality:
        return Status.QUALITY, f"{_why_quality(one, tiers)}; {one.say(MET)}"
    if one is speed:
        how = "the smallest that meets the bar"
        if not math.isnan(one.speed):
            how = f"the smallest of the fastest that meet the bar, {_times(one, quality)} {quality.level}"
        return Status.SPEED, f"{how}; {one.say(MET)}"
    return Status.MEETS, _passed_over(one, quality, speed)


def _times(one: Judged, other: Judged) -> str:
    """How many times as fast one level is as another, and whether guesses are part of it."""
    guessing = [each.level for each in (one, other) if each.evidence.guesses]
    ahead = f" ({' and '.join(guessing)} guessing ahead)" if guessing else ""
    return f"{one.pace / other.pace:.2f} times{ahead}"


def _why_quality(one: Judged, tiers: Tiers) -> str:
    if one.near_lossless:
        return as_good(one) if tiers.smaller_as_good else f"the smallest that is {as_good(one)}"
    if one.kl_is_known:
        return "the closest to the reference that meets the bar, or as close and smaller"
    return "the largest that meets the bar (its KL was not measured)"


def as_good(one: Judged) -> str:
    """Of a level that shows no loss: what was looked at, so that nobody takes it for more."""
    fidelity, result = one.evidence.fidelity, one.evidence.result
    counts = [(result.inputs, "input")] if result is not None else []
    counts += [(fidelity.tokens, "token")] if fidelity is not None else []
    seen = [f"{count:,} {what}{'s' * (count != 1)}" for count, what in counts]
    return f"as good as the original, as far as {' and '.join(seen)} can tell"


def _passed_over(one: Judged, quality: Judged, speed: Judged) -> str:
    """Why a level that meets the bar is in neither tier."""
    if one.near_lossless and quality.near_lossless and one.total >= quality.total:
        more = human_bytes(one.total - quality.total)
        return f"{more} larger than {quality.level}, which shows no loss either"
    size = one.total - speed.total
    against = f"{human_bytes(abs(size))} {'larger' if size >= 0 else 'smaller'} than {speed.level}"
    if speed.surely_faster_than(one):
        ahead = ", guessing ahead where it pays" if one.evidence.guesses or speed.evidence.guesses else ""
        against += f" and slower ({human_rate(one.pace)} against {human_rate(speed.pace)} tokens/s{ahead})"
    elif not math.isnan(one.speed) and not one.surely_faster_than(speed):
        against += " and not measurably faster"
    if not one.kl_is_known:
        return f"{against}; its KL was not measured"
    if one.kl < quality.kl:
        return f"{against}; closer to the reference than {quality.level} needs to be"
    return f"{against}; further from the reference than {quality.level}"


def _loss(one: Judged) -> Loss:
    """What is known of the loss."""
    fidelity = one.evidence.fidelity
    if fidelity is None and one.evidence.result is None:
        return Loss.UNKNOWN
    if loss_is_known(one.evidence):
        return Loss.BAD
    if one.outcome == FAILED and fidelity is not None and fidelity.kl_low > NEAR_LOSSLESS_KL:
        return Loss.BAD
    return Loss.NOT_SEEN if one.near_lossless else Loss.MEASURABLE


def summary(tiers: Tiers, bar: Bar, plan: Plan, outcome: Outcome, rivals: Sequence[Judged]) -> str:
    """The decision in a sentence or two."""
    quality, speed = tiers.quality, tiers.speed
    if quality is None or speed is None:
        return _nothing_chosen(bar, plan, outcome, rivals)
    closeness = as_good(quality) if quality.near_lossless else _kl(quality)
    if quality is speed:
        closest = quality.kl_is_known and not quality.near_lossless
        also = "; no other candidate is closer to the reference" if closest else ""
        return f"Deploy {quality.level} alone: it holds the bar '{bar.text}' ({closeness}{also})."
    faster = f", {_times(speed, quality)} as fast" if speed.surely_faster_than(quality) else ""
    saved = f"{100 * (1 - speed.total / quality.total):.0f}% less memory"
    how = "They do not fit in memory together and are swapped."
    if tiers.pair == Pairing.TOGETHER:
        how = "Both fit in memory together."
    return (
        f"Deploy {quality.level} for quality ({closeness}) and {speed.level} for speed "
        f"({_kl(speed)}, {saved}{faster}). {how}"
    )


def how_sure(found: Sequence[Certainty]) -> tuple[str, ...]:
    """How often resamples of the evidence choose the same pair, and what the others choose; empty without any."""
    if not found or found[0].quality is None:
        return ()
    first, *others = found
    same = f"Another run like this one would choose the same in {100 * first.share:.0f} of 100 cases"
    rest = ", ".join(f"{_pair_name(one)} in {100 * one.share:.0f}" for one in others[:2])
    return (f"{same}{f', {rest}' if rest else ''}.",)


def _pair_name(one: Certainty) -> str:
    if one.quality is None or one.speed is None:
        return "no level"
    return f"{one.quality} alone" if one.quality == one.speed else f"{one.quality} with {one.speed}"


def _kl(one: Judged) -> str:
    """A level's KL in words."""
    return f"KL {one.kl:.3g}" if one.kl_is_known else "its KL was not measured"


def _nothing_chosen(bar: Bar, plan: Plan, outcome: Outcome, rivals: Sequence[Judged]) -> str:
    here = [one for one in rivals if one.can_be_chosen or one.outcome != MET]
    here = [one for one in here if one.evidence.plan.placement != ELSEWHERE]
    if rivals and not here:
        holding = ", ".join(one.level for one in rivals if one.outcome == MET)
        return f"No level was tested here. Of the models elsewhere, {holding or 'none'} holds the bar '{bar.text}'."
    rivals = here
    if not rivals and len(plan.levels) < 2:
        return "No level besides the reference was asked for."
    if not rivals:
        room = human_bytes(plan.budget_bytes)
        return f"No level besides the reference fits in {room} at a context of {plan.n_ctx} tokens."
    if outcome == Outcome.NOT_MET:
        best = min(rivals, key=lambda one: (one.kl, -one.total))
        how = "closest" if best.kl_is_known else "largest"
        return f"No level that fits holds the bar '{bar.text}'. The {how} is {best.level}: {best.say(FAILED)}."
    return f"The measurements are not enough to say whether a level holds the bar '{bar.text}'."
