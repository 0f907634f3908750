"""What the evidence says about one level and one clause of the bar: met, failed or unknown, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from bitladder.plan.bar import UPPER, Bar, Clause, spoken
from bitladder.records.decision import TierGuesses
from bitladder.records.evaluation import FaultCount, WorkloadResult
from bitladder.records.fidelity import AtDepth, Fidelity
from bitladder.records.plan import ELSEWHERE, Container, LevelPlan
from bitladder.stats.multiplicity import beyond
from bitladder.stats.noninferiority import inputs_needed, loss_interval, p_not_worse, repeated_counts
from bitladder.stats.paired import differs, more_often, product_interval, ratio_interval
from bitladder.units import human_bytes


class Finding(StrEnum):
    """What the evidence says of one level and the bar, or a clause of it."""

    MET = "met"
    FAILED = "failed"
    UNKNOWN = "unknown"


MET, FAILED, UNKNOWN = Finding.MET, Finding.FAILED, Finding.UNKNOWN
KNOWN_LOSS_P = 0.05
"""Largest Holm-adjusted p at which a loss on the workload counts as known."""


NEAR_LOSSLESS_KL = 0.02
"""Nats. A level whose mean KL is known to be under this counts as one whose loss cannot be told from zero: by
Pinsker's inequality the probability of any answer then shifts by at most 10 points on average."""
SAME_SPEED = 0.05
"""Speeds closer than this are one speed: nobody would deploy another level for it."""


@dataclass(frozen=True)
class LevelEvidence:
    """What was measured of one level; None where nothing was."""

    plan: LevelPlan
    fidelity: Fidelity | None = None
    result: WorkloadResult | None = None
    decode_tokens_per_s: float = math.nan
    decode_rounds: tuple[float, ...] = ()
    """Rates round by round, where levels were timed in turns."""
    p_adjusted: float = math.nan
    """McNemar's p of `result`, adjusted by Holm for the number of levels looked at."""
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Input to its tags."""
    known_faults: tuple[FaultCount, ...] = ()
    """Faults that the level's answers surely have more often than the reference's, corrected for the number of levels
    and faults looked at."""
    guesses: TierGuesses | None = None
    """What it would guess tokens ahead with; None where nothing is known to pay."""

    @property
    def measured(self) -> bool:
        """Anything was."""
        return self.fidelity is not None or self.result is not None

    @property
    def needs_engine(self) -> bool:
        """A checkpoint that nobody has answered the workload with: llama.cpp does not run it."""
        return self.plan.container is Container.FOLDER and self.result is None

    @property
    def in_question(self) -> bool:
        """It fits this machine, or was measured although its engine would need another."""
        return self.plan.fits or (self.plan.container is Container.FOLDER and self.measured)


@dataclass(frozen=True)
class Judgement:
    """One clause's outcome; ``need`` says what would settle an unknown one."""

    outcome: Finding
    reason: str
    need: str = ""
    p_value: float = 0.0
    """Of a clause that is met: chance of evidence this good if in truth it were not. 0 for facts about this file
    or these inputs, which no other text or input can turn."""


_ON_ANSWERS = ("no known loss", "no loss", "passes", "recall")
"""What clauses on answers are about."""
_NO_ENGINE = Judgement(
    UNKNOWN,
    "its answers need an engine that runs checkpoints",
    "serve it with vLLM and name the address: --also LEVEL=URL#MODEL",
)


@dataclass(frozen=True)
class Judged:
    """A level with its evidence and what the bar says about it."""

    evidence: LevelEvidence
    judgements: tuple[Judgement, ...]

    @property
    def level(self) -> str:
        """Its name."""
        return self.evidence.plan.level

    @property
    def outcome(self) -> Finding:
        """All clauses together."""
        return overall(self.judgements)

    @property
    def can_be_chosen(self) -> bool:
        """It runs here."""
        return self.evidence.plan.fits and self.evidence.plan.placement != ELSEWHERE

    @property
    def kl(self) -> float:
        """Mean KL, nats; infinite where not measured, so that it never looks best."""
        found = self.evidence.fidelity
        return math.inf if found is None or math.isnan(found.kl_mean) else found.kl_mean

    @property
    def kl_is_known(self) -> bool:
        """It was measured."""
        return math.isfinite(self.kl)

    @property
    def speed(self) -> float:
        """Decoded tokens per second; NaN where not measured."""
        return self.evidence.decode_tokens_per_s

    def surely_faster_than(self, other: Judged) -> bool:
        """By more than `SAME_SPEED`, and not by chance: by the interval of the ratios over the rounds in which both
        were timed (a level that left the turns saw the first ones), and of what guessing ahead gains where it is known
        to. False where a speed is not known."""
        own, others = self.evidence.decode_rounds, other.evidence.decode_rounds
        plain = self.speed / other.speed if other.speed > 0 else math.nan
        shared = min(len(own), len(others))
        ratio = ratio_interval(own[:shared], others[:shared]) if shared > 1 else (plain, plain, plain)
        mine, theirs = self.evidence.guesses, other.evidence.guesses
        gains = [(mine.ratio, mine.low, mine.high)] if mine else []
        gains += [(1 / theirs.ratio, 1 / theirs.high, 1 / theirs.low)] if theirs else []
        return (product_interval(ratio, *gains) if gains else ratio)[1] > 1 + SAME_SPEED

    @property
    def pace(self) -> float:
        """Decoded tokens per second, as many times as many as guessing ahead gives where it is known to pay."""
        return self.speed * (self.evidence.guesses.ratio if self.evidence.guesses else 1.0)

    def kl_is_told_from(self, other: Judged) -> bool:
        """Whether the mean KL of both differs by more than chance on the units of text that both were measured on: the
        first ones of the longer measurement. True where only the means are known."""
        one, two = self.evidence.fidelity, other.evidence.fidelity
        if one is None or two is None or not (one.has_units and two.has_units):
            return True
        shared = min(len(one.unit_tokens), len(two.unit_tokens))
        if one.unit_tokens[:shared] != two.unit_tokens[:shared]:
            return True
        return differs(one.unit_kl[:shared], two.unit_kl[:shared], one.unit_tokens[:shared])

    @property
    def total(self) -> int:
        """Bytes in memory at the context."""
        return self.evidence.plan.total_bytes

    @property
    def near_lossless(self) -> bool:
        """KL known to be under `NEAR_LOSSLESS_KL`, and no loss proven by the workload."""
        fidelity = self.evidence.fidelity
        if fidelity is None:
            return False
        bounds = (fidelity.kl_high, *(at.kl_high for at in fidelity.depths))
        return all(high < NEAR_LOSSLESS_KL for high in bounds) and not loss_is_known(self.evidence)

    @property
    def net_losses(self) -> int:
        """Inputs of the workload lost beyond those gained; 0 where it gained as many, or nothing was run."""
        result = self.evidence.result
        return 0 if result is None else max(0, len(result.lost) - len(result.gained))

    @property
    def needs(self) -> str:
        """What would settle the unknown clauses."""
        return "; ".join(judgement.need for judgement in self.judgements if judgement.need)

    def say(self, outcome: Finding) -> str:
        """The reasons of the clauses with this outcome."""
        return "; ".join(judgement.reason for judgement in self.judgements if judgement.outcome == outcome)


def judge(bar: Bar, evidence: LevelEvidence) -> tuple[Judgement, ...]:
    """Every clause of the bar for one level; of a checkpoint without answers also that these are missing."""
    if not evidence.needs_engine:
        return tuple(_judge_clause(clause, evidence) for clause in bar.clauses)
    rest = (clause for clause in bar.clauses if clause.metric not in _ON_ANSWERS)
    return (*(_judge_clause(clause, evidence) for clause in rest), _NO_ENGINE)


def overall(judgements: Sequence[Judgement]) -> Finding:
    """``failed`` if any clause failed, else ``unknown`` if any is, else ``met``."""
    outcomes = {judgement.outcome for judgement in judgements}
    return FAILED if FAILED in outcomes else UNKNOWN if UNKNOWN in outcomes else MET


@dataclass(frozen=True)
class Pairs:
    """Inputs of one level against the reference's: all of them, or those with a tag."""

    inputs: int
    lost: int
    gained: int
    differences: tuple[float, ...] | None = None
    """The reference's pass share minus the level's, of inputs where they differ; None where each was answered once."""

    @property
    def counts(self) -> tuple[float, float, float]:
        """Lost, gained and inputs as the statistics count them."""
        if self.differences is None:
            return self.lost, self.gained, self.inputs
        return repeated_counts(self.differences, self.inputs)

    @property
    def loss(self) -> float:
        """In pass rate."""
        lost, gained, inputs = self.counts
        return (lost - gained) / inputs

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the loss in pass rate."""
        return loss_interval(*self.counts)


def pairs_of(result: WorkloadResult, tags: Mapping[str, tuple[str, ...]], tag: str = "") -> Pairs:
    """Counts over the whole workload, or over the inputs that carry ``tag``."""
    found = result.differences
    if not tag:
        differences = None if found is None else tuple(-one.share for one in found)
        return Pairs(result.inputs, len(result.lost), len(result.gained), differences)
    chosen = {name for name, own in tags.items() if tag in own}
    differences = None if found is None else tuple(-one.share for one in found if one.input_id in chosen)
    lost, gained = (len(chosen.intersection(side)) for side in (result.lost, result.gained))
    return Pairs(len(chosen), lost, gained, differences)


def _judge_clause(clause: Clause, evidence: LevelEvidence) -> Judgement:
    """Dispatch on what the clause is about."""
    passes = _not_worse if clause.relative else _pass_rate
    on_answers = dict(zip(_ON_ANSWERS, (_no_known_loss, _no_loss, passes, _recall), strict=True))
    if clause.metric in on_answers:
        return on_answers[clause.metric](clause, evidence)
    if evidence.plan.placement == ELSEWHERE and clause.metric in ("memory", "size"):
        return Judgement(UNKNOWN, f"its {clause.metric} is not known, since it runs elsewhere")
    if clause.metric in ("memory", "size"):
        have = evidence.plan.total_bytes if clause.metric == "memory" else evidence.plan.file_bytes
        return _compare(clause, have, have, have, human_bytes)
    if clause.metric == "speed":
        speed = evidence.decode_tokens_per_s
        return _compare(clause, speed, speed, speed, lambda value: f"{value:.1f} tokens/s")
    return _fidelity(clause, evidence)


def _fidelity(clause: Clause, evidence: LevelEvidence) -> Judgement:
    """A clause on KL, perplexity or top-1, from intervals over documents."""
    found = evidence.fidelity
    if found is None and evidence.plan.placement == ELSEWHERE:
        return Judgement(UNKNOWN, f"{spoken(clause.metric)} cannot be measured through an address")
    if found is None:
        return Judgement(UNKNOWN, f"{spoken(clause.metric)} was not measured", f"measure {spoken(clause.metric)}")
    if not found.depths:
        return _at(clause, found, found.units, found.unit)
    judged = [(at, _at(clause, at, found.units, found.unit)) for at in found.depths]
    return _over_depths(clause, judged)


def _over_depths(clause: Clause, judged: Sequence[tuple[AtDepth, Judgement]]) -> Judgement:
    """A clause holds when it holds at every depth of context, which needs no correction for their number; the depth
    that is nearest to failing speaks for all."""
    outcome = overall([one for _, one in judged])
    of_outcome = [(at, one) for at, one in judged if one.outcome == outcome]
    at, worst = max(of_outcome, key=lambda pair: pair[1].p_value) if outcome == MET else of_outcome[-1]
    rise = ""
    if clause.metric == "kl" and at.rises:
        rise = (
            f", {_short(at.rise)} times ({_short(at.rise_low)} to {_short(at.rise_high)}) as much as at "
            f"{judged[0][0].depth:,}"
        )
    return replace(worst, reason=f"{worst.reason} at {at.depth:,} tokens of context{rise}")


def _at(clause: Clause, found: Fidelity | AtDepth, units: int, unit: str) -> Judgement:
    """The clause on these figures, whose intervals resample so many units."""
    value, low, high = {
        "kl": (found.kl_mean, found.kl_low, found.kl_high),
        "kl p99": (found.kl_p99, found.kl_p99, found.kl_p99),
        "ppl ratio": (found.ppl_ratio, found.ppl_ratio_low, found.ppl_ratio_high),
        "top1": (found.top1, found.top1_low, found.top1_high),
    }[clause.metric]
    show = _percent if clause.metric == "top1" else _short
    judged = _compare(clause, value, low, high, show)
    if judged.outcome == MET:
        return replace(judged, p_value=_chance(clause, value, low, high, units))
    if judged.outcome != UNKNOWN or math.isnan(value):
        return judged
    return Judgement(UNKNOWN, judged.reason, _more_text(clause, value, low, high, units, unit))


def _chance(clause: Clause, value: float, low: float, high: float, units: int) -> float:
    """One-sided p value of a met clause, read off its interval with Student's distribution over the units.

    KL and the perplexity ratio have intervals that are even on a logarithmic scale.
    """
    if low == high:
        return 0.0
    if clause.metric == "top1":
        return beyond(value - clause.value, value - low, units - 1)
    if value <= 0:
        return 0.0
    return beyond(math.log(clause.value / value), math.log(high / value), units - 1)


def _more_text(clause: Clause, value: float, low: float, high: float, count: int, unit: str) -> str:
    """How much more text would move the interval off the limit: its width shrinks with the root of the
    units."""
    if math.isnan(low) or math.isnan(high):
        return f"measure {spoken(clause.metric)} on more text: {count} {unit}(s) give no interval"
    upper = clause.metric in UPPER
    distance = abs(clause.value - value)
    holding = value < clause.value if upper else value > clause.value
    width = (high - value if upper else value - low) if holding else (value - low if upper else high - value)
    if distance <= 0.02 * max(width, 1e-12):
        return f"{spoken(clause.metric)} lies at the limit itself: more text will not decide it"
    factor = (width / distance) ** 2
    units = math.ceil(count * max(factor, 1.1))
    more = f"{units - count} more {unit}s ({count} so far)"
    return f"measure {spoken(clause.metric)} on about {more}"


def _pass_rate(clause: Clause, evidence: LevelEvidence) -> Judgement:
    """A clause on the share of inputs passed, whatever the reference does."""
    found = evidence.result
    if found is None or clause.tag:
        what = (
            "a tag's pass rate has no limit of its own; use 'no loss' or the reference"
            if clause.tag
            else "no workload was run"
        )
        return Judgement(UNKNOWN, what, "run a workload")
    share = found.passes / found.inputs if math.isnan(found.pass_rate) else found.pass_rate
    judged = _compare(clause, share, found.pass_low, found.pass_high, _percent)
    need = f"add inputs to the workload ({found.inputs} so far)" if judged.outcome == UNKNOWN else ""
    # Wilson's bound lies z errors from the limit's own error: the nearest normal statement is through its width.
    chance = beyond(share - clause.value, share - found.pass_low) if judged.outcome == MET else 0.0
    return Judgement(judged.outcome, judged.reason, need, chance)


def _recall(clause: Clause, evidence: LevelEvidence) -> Judgement:
    """A clause on the items that the reference catches."""
    found = evidence.result
    if found is None:
        return Judgement(UNKNOWN, "no workload was run", "run a workload")
    if not found.items:
        what = "the reference catches no item of a 'set_recall' criterion"
        return Judgement(UNKNOWN, what, "add inputs with items to the workload")
    judged = _compare(clause, found.recall, found.recall_low, found.recall_high, _percent)
    reason = f"{judged.reason}, {found.items_kept} of {found.items} items"
    if judged.outcome == UNKNOWN:
        return Judgement(UNKNOWN, reason, f"add inputs with items to the workload ({found.items} items so far)")
    chance = beyond(found.recall - clause.value, found.recall - found.recall_low) if judged.outcome == MET else 0.0
    return Judgement(judged.outcome, reason, p_value=chance)


def _not_worse(clause: Clause, evidence: LevelEvidence) -> Judgement:
    """Non-inferiority: the upper bound of the paired loss lies under the margin."""
    if evidence.result is None:
        return Judgement(UNKNOWN, "no workload was run", "run a workload")
    pairs = pairs_of(evidence.result, evidence.tags, clause.tag)
    if pairs.inputs == 0:
        return Judgement(UNKNOWN, f"no input carries the tag '{clause.tag}'", f"add inputs tagged '{clause.tag}'")
    low, high = pairs.interval
    loss, margin = pairs.loss, clause.value
    where = f"{clause.tag}: " if clause.tag else ""
    seen = (
        f"{where}{pairs.lost} lost and {pairs.gained} gained of {pairs.inputs}; "
        f"loss {_points(loss)} ({100 * low:.1f} to {100 * high:.1f})"
    )
    if high < margin or (high == margin and clause.op == ">="):
        chance = p_not_worse(*pairs.counts, margin)
        return Judgement(MET, f"{seen}, within {_points(margin)}", p_value=chance)
    if low > margin:
        return Judgement(FAILED, f"{seen}, more than {_points(margin)}")
    changed = (pairs.lost + pairs.gained) / pairs.inputs
    needed = inputs_needed(margin, loss, changed)
    reason = f"{seen}, which may be on either side of {_points(margin)}"
    if needed is None:
        return Judgement(
            UNKNOWN,
            reason,
            f"{where}the loss seen is not under {_points(margin)}: more inputs may only confirm it",
        )
    return Judgement(
        UNKNOWN, reason, f"{where}about {max(1, needed - pairs.inputs)} more inputs ({pairs.inputs} so far)"
    )


def _no_loss(clause: Clause, evidence: LevelEvidence) -> Judgement:
    """On these very inputs, nothing that the reference passed may be failed."""
    if evidence.result is None:
        return Judgement(UNKNOWN, "no workload was run", "run a workload")
    pairs = pairs_of(evidence.result, evidence.tags, clause.tag)
    where = f"{clause.tag}: " if clause.tag else ""
    if pairs.inputs == 0:
        return Judgement(UNKNOWN, f"no input carries the tag '{clause.tag}'", f"add inputs tagged '{clause.tag}'")
    faults = faults_with_tag(evidence, clause.tag) if clause.tag else evidence.known_faults
    if faults:
        return Judgement(FAILED, where + "; ".join(map(spoken_fault, faults)))
    low, high = pairs.interval
    if pairs.lost == 0:
        return Judgement(
            MET, f"{where}nothing lost on {pairs.inputs} inputs (a loss under {_points(high)} would not show)"
        )
    seen = f"{where}{pairs.lost} lost and {pairs.gained} gained of {pairs.inputs}"
    if low > 0 or pairs.gained == 0:
        return Judgement(FAILED, seen)
    return Judgement(UNKNOWN, f"{seen}, which may be chance", f"{where}more inputs: losses and gains are mixed")


def _no_known_loss(clause: Clause, evidence: LevelEvidence) -> Judgement:
    """A veto: only a loss that the workload proves counts."""
    if evidence.result is None:
        return Judgement(MET, "no workload was run")
    pairs = pairs_of(evidence.result, evidence.tags, clause.tag)
    if pairs.inputs == 0:
        return Judgement(MET, f"no input carries the tag '{clause.tag}'")
    seen = f"{pairs.lost} lost and {pairs.gained} gained of {pairs.inputs} inputs"
    known = pairs.interval[0] > 0 if clause.tag else passes_are_lost(evidence)
    where = f"{clause.tag}: " if clause.tag else ""
    faults = faults_with_tag(evidence, clause.tag) if clause.tag else evidence.known_faults
    if faults:
        return Judgement(FAILED, where + "; ".join(map(spoken_fault, faults)))
    if known:
        return Judgement(FAILED, f"{where}{seen}, more than chance explains")
    return Judgement(MET, f"{where}{seen}{', which may be chance' if pairs.lost else ''}")


def faults_with_tag(evidence: LevelEvidence, tag: str) -> tuple[FaultCount, ...]:
    """Faults that a level has more often than the reference on the inputs with a tag, by the sign test on these alone,
    as a tag's losses are judged."""
    chosen = {name for name, own in evidence.tags.items() if tag in own}
    found = []
    for fault in evidence.result.faults if evidence.result is not None else ():
        appeared = tuple(name for name in fault.appeared if name in chosen)
        vanished = tuple(name for name in fault.vanished if name in chosen)
        p_value = more_often(len(appeared), len(vanished))
        if p_value <= KNOWN_LOSS_P / 2:
            found.append(replace(fault, appeared=appeared, vanished=vanished, p_value=p_value))
    return tuple(found)


def spoken_fault(fault: FaultCount) -> str:
    """A fault that is surely there, in a phrase."""
    after = f", after about {fault.begins} words" if fault.begins is not None else ""
    where = f"{len(fault.appeared)} inputs" + (f" ({len(fault.vanished)} the other way)" if fault.vanished else "")
    seen = f"{fault.fault} in {fault.level} of {fault.answers} answers, {fault.reference} of the reference's{after}"
    return f"{seen}: more often on {where}, which is no chance"


def loss_is_known(evidence: LevelEvidence) -> bool:
    """The workload proves that this level passes fewer inputs than the reference, or has a fault more often."""
    return bool(evidence.known_faults) or passes_are_lost(evidence)


def passes_are_lost(evidence: LevelEvidence) -> bool:
    """The workload proves that this level passes fewer inputs than the reference."""
    found = evidence.result
    return found is not None and len(found.lost) > len(found.gained) and evidence.p_adjusted <= KNOWN_LOSS_P


def _compare(clause: Clause, value: float, low: float, high: float, show: Callable[[float], str]) -> Judgement:
    """An interval against a limit."""
    if math.isnan(value) or math.isnan(low) or math.isnan(high):
        return Judgement(UNKNOWN, f"{spoken(clause.metric)} could not be estimated", f"measure {spoken(clause.metric)}")
    seen = f"{spoken(clause.metric)} {show(value)}" + (f" ({show(low)} to {show(high)})" if low != high else "")
    limit, inclusive, upper = clause.value, "=" in clause.op, clause.metric in UPPER
    worst, best = (high, low) if upper else (-low, -high)
    edge = limit if upper else -limit
    if worst < edge or (inclusive and worst == edge):
        return Judgement(MET, seen)
    if best > edge or (not inclusive and best == edge):
        return Judgement(FAILED, f"{seen}, limit {show(limit)}")
    return Judgement(
        UNKNOWN, f"{seen}; the limit {show(limit)} lies within that range", f"measure {spoken(clause.metric)} longer"
    )


def _short(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
