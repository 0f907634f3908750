"""How sure a decision is: how often the same pair is chosen when its evidence is drawn anew.

What varies from run to run: which documents were measured, which inputs were asked, what the machine did in a round of
timing. Another run scatters around the truth as this one does, so what it would find scatters around what was found by
both: documents and rates are drawn from predictive distributions, inputs as a resample of a resample (the bootstrap),
the same for all levels, as they were measured together. A decision that is said to be chosen in 95 of 100 cases is then
one that another run of this size would choose about that often (``benchmarks/decision_certainty.py``). Perplexity,
top-1 and the tail of KL stay as they were found: of a bar on these the certainty says too much.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from bitladder.records.decision import Certainty, TierGuesses
from bitladder.records.evaluation import Speed, WorkloadResult
from bitladder.records.fidelity import AtDepth, Fidelity
from bitladder.records.plan import LevelPlan
from bitladder.stats.bootstrap import F64, Interval, ratio_interval, resampled_counts
from bitladder.stats.paired import mcnemar

RESAMPLES = 100
SEED = 20260131
LEAST_SHARE = 0.02
"""Pairs chosen less often are not named."""
_WIDTH_95 = 2 * 1.96


@dataclass(frozen=True)
class LadderEvidence:
    """What a decision rests on, of all levels."""

    levels: Sequence[LevelPlan]
    fidelities: Sequence[Fidelity]
    results: Sequence[WorkloadResult]
    speeds: Mapping[str, Speed]
    """By level, where not those of the results."""
    tags: Mapping[str, tuple[str, ...]]
    """Input to its tags."""
    guesses: Mapping[str, TierGuesses] = field(default_factory=dict)
    """By level, what it would guess tokens ahead with; levels for which nothing is known to pay are left out."""


Pair = tuple[str | None, str | None]


def certainty(evidence: LadderEvidence, first: Pair, choose: Callable[[LadderEvidence], Pair]) -> tuple[Certainty, ...]:
    """The pair chosen from the evidence, ``first``, with the share of other runs that choose it too, then theirs.

    Empty where nothing was measured.
    """
    if not (evidence.fidelities or evidence.results):
        return ()
    rng = np.random.default_rng(SEED)
    counts = Counter(choose(_drawn(evidence, rng)) for _ in range(RESAMPLES))
    others = [pair for pair, count in counts.most_common() if pair != first and count >= LEAST_SHARE * RESAMPLES]
    return tuple(Certainty(*pair, counts[pair] / RESAMPLES) for pair in (first, *others))


def _drawn(evidence: LadderEvidence, rng: np.random.Generator) -> LadderEvidence:
    documents = _other_documents(evidence, rng)
    shift = rng.normal(0.0, math.sqrt(2))
    names = sorted({name for one in evidence.results for name in _changed(one)})
    most = max((one.inputs for one in evidence.results), default=0)
    inputs = _places(most, rng)
    numbers = {name: number for number, name in enumerate(names)}
    moved = _moved_rates(evidence, rng)
    item_shift = rng.normal(0.0, math.sqrt(2)) if any(one.items for one in evidence.results) else 0.0
    return replace(
        evidence,
        fidelities=[_fidelity(one, documents, shift) for one in evidence.fidelities],
        results=[_with_items(_at_rates(_result(one, inputs, numbers), moved), item_shift) for one in evidence.results],
        speeds={level: _speed_at_rates(one, moved.get(level)) for level, one in evidence.speeds.items()},
        guesses={level: _other_gain(one, rng.normal(0.0, math.sqrt(2))) for level, one in evidence.guesses.items()},
    )


def _other_gain(one: TierGuesses, shift: float) -> TierGuesses:
    """What guessing ahead gains on other inputs of the kind, its interval as wide."""
    if not 0 < one.low < one.high < math.inf:
        return one
    factor = math.exp(shift * math.log(one.high / one.low) / _WIDTH_95)
    return replace(one, ratio=one.ratio * factor, low=one.low * factor, high=one.high * factor)


def _changed(one: WorkloadResult) -> Iterator[str]:
    """Inputs that tell a level from the reference."""
    yield from (*one.lost, *one.gained, *(each.input_id for each in one.differences or ()))
    for fault in one.faults:
        yield from (*fault.appeared, *fault.vanished)


def _places(size: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """A resample of a resample of ``size`` things."""
    if not size:
        return np.zeros(0, np.intp)
    return rng.integers(0, size, size)[rng.integers(0, size, size)]


def _other_documents(evidence: LadderEvidence, rng: np.random.Generator) -> dict[str, F64]:
    """Level -> KL of each unit, f64[units], of units that another run might have.

    Their logarithms are taken as jointly normal over levels, since a unit that is hard for one level is hard for
    all, with mean and spread as well known as these units tell. A level that was measured on the first units alone
    shares them with the others. Resampling the units themselves would never find one worse than the worst here, and was
    too sure of itself.
    """
    known = {one.level: one.unit_kl for one in evidence.fidelities if one.has_units and min(one.unit_kl) > 0}
    most = max(map(len, known.values()), default=0)
    of_mean, of_units = rng.normal(0.0, 1.0, most), rng.normal(0.0, 1.0, (most, most))
    freedom = {size: rng.chisquare(size - 1) for size in sorted({len(own) for own in known.values()})}
    found: dict[str, F64] = {}
    for level, own in known.items():
        size, logs = len(own), np.log(np.asarray(own))
        spread = (logs - logs.mean()) / math.sqrt(freedom[size])
        mean = logs.mean() + spread @ of_mean[:size] / math.sqrt(size)
        found[level] = np.exp(mean + spread @ of_units[:size, :size])
    return found


def _fidelity(one: Fidelity, documents: Mapping[str, F64], shift: float) -> Fidelity:
    """Another mean KL with its interval, found as this one was."""
    if not one.kl_mean > 0 or not one.kl_low > 0 or not math.isfinite(one.kl_high):
        return one
    kl = documents.get(one.level)
    if kl is None:  # measured before units were kept, or on a single one
        factor = math.exp(shift * math.log(one.kl_high / one.kl_low) / _WIDTH_95)
        low, high = one.kl_low * factor, one.kl_high * factor
        return replace(one, kl_mean=one.kl_mean * factor, kl_low=low, kl_high=high, depths=_depths(one, factor))
    tokens = np.asarray(one.unit_tokens, dtype=np.float64)
    here, there = _interval_of(one.unit_kl, one.unit_tokens), _interval(kl, tokens)
    low, high = (
        there.value * (bound / there.value) ** _share(math.log(found / one.kl_mean), math.log(own / here.value))
        for bound, found, own in ((there.low, one.kl_low, here.low), (there.high, one.kl_high, here.high))
    )
    depths = _depths(one, there.value / one.kl_mean)
    return replace(one, kl_mean=there.value, kl_low=low, kl_high=high, unit_kl=tuple(kl.tolist()), depths=depths)


_DRAWS = 400
"""Of the bootstrap in each drawn run: quantiles as exact as a run's own are not needed."""


def _interval(kl: F64, tokens: F64) -> Interval:
    """As a run finds it (``stages.fidelity``), at 95%."""
    counts = _counts(len(kl))
    return ratio_interval(kl * tokens, tokens, np.random.default_rng(0), scale="log", worse="more", counts=counts)


@functools.cache
def _interval_of(kl: tuple[float, ...], tokens: tuple[int, ...]) -> Interval:
    return _interval(np.asarray(kl), np.asarray(tokens, dtype=np.float64))


@functools.cache
def _counts(clusters: int) -> F64:
    """The same draws for all intervals, those of one cluster alone left out."""
    counts = resampled_counts(np.random.default_rng(SEED), clusters, _DRAWS)
    usable: F64 = counts[(counts > 0).sum(axis=1) > 1]
    return usable


def _share(found: float, own: float) -> float:
    """By how much a bound lies further out than that of ``_interval``: of a run that looked more than once."""
    return found / own if own else 1.0


def _depths(one: Fidelity, factor: float) -> tuple[AtDepth, ...]:
    """The figures by depth of context, which other documents move as they move the mean over all."""
    return tuple(
        replace(at, kl_mean=at.kl_mean * factor, kl_low=at.kl_low * factor, kl_high=at.kl_high * factor)
        for at in one.depths
    )


def _result(one: WorkloadResult, inputs: NDArray[np.intp], numbers: Mapping[str, int]) -> WorkloadResult:
    """Other inputs. Those that no level lost or gained are alike, and passed as often as they were."""
    taken = inputs[inputs < one.inputs]
    times = Counter(taken.tolist())

    def drawn_of(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(chain.from_iterable([name] * times[numbers[name]] for name in names))

    lost, gained = drawn_of(one.lost), drawn_of(one.gained)
    before = (one.passes + len(one.lost) - len(one.gained)) / one.inputs if one.inputs else 0.0
    passes = min(len(taken), max(0, round(before * len(taken)) - len(lost) + len(gained)))
    faults = tuple(
        replace(fault, appeared=drawn_of(fault.appeared), vanished=drawn_of(fault.vanished)) for fault in one.faults
    )
    differences = one.differences
    if differences is not None:
        differences = tuple(each for each in differences for _ in range(times[numbers[each.input_id]]))
    drawn = replace(
        one,
        inputs=len(taken),
        passes=passes,
        lost=lost,
        gained=gained,
        p_value=mcnemar(len(lost), len(gained)),
        faults=faults,
        differences=differences,
    )
    if one.inputs and taken.size:
        moved = passes / len(taken) - one.passes / one.inputs
        drawn = replace(drawn, pass_low=one.pass_low + moved, pass_high=one.pass_high + moved)
        if not math.isnan(one.pass_rate):
            drawn = replace(drawn, pass_rate=one.pass_rate + moved)
    return drawn


def _with_items(one: WorkloadResult, shift: float) -> WorkloadResult:
    """Another share of items caught, ``shift`` errors away, with its interval as wide as it was."""
    if not one.items or math.isnan(one.recall_low):
        return one
    moved = shift * (one.recall_high - one.recall_low) / _WIDTH_95
    low, high, share = (min(1.0, max(0.0, value + moved)) for value in (one.recall_low, one.recall_high, one.recall))
    return replace(one, items_kept=round(share * one.items), recall_low=low, recall_high=high)


def _moved_rates(evidence: LadderEvidence, rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    """Level -> rates of its rounds as another run might find them.

    Rounds are too few to be resampled: a draw of one round alone would have no spread. So the logarithms of a level's
    rates beside the others in the same rounds are taken as normal, with a mean and a variance that are known as well as
    so few rounds tell (the predictive distribution under the usual prior).
    """
    rounds = {one.level: one.decode_rounds for one in evidence.results}
    rounds |= {level: one.rounds for level, one in evidence.speeds.items()}
    logs = {level: np.log(own) for level, own in rounds.items() if len(own) > 1 and _are_rates(own)}
    if not logs:
        return {}
    shared = min(map(len, logs.values()))
    base = {level: own[:shared].mean() for level, own in logs.items()}
    there = [[level for level, own in logs.items() if len(own) > at] for at in range(max(map(len, logs.values())))]
    # Where a level was timed alone nothing tells the machine's drift from its own.
    drift = np.array([np.mean([logs[one][at] - base[one] for one in here]) for at, here in enumerate(there)])
    drift = drift if len(logs) > 1 else np.zeros(len(drift))
    kept = np.sqrt([len(here) / max(1, len(here) - 1) for here in there])  # of a spread, what the drift took of it
    found = {}
    for level, own in logs.items():
        size = len(own)
        beside = own - drift[:size]
        rest = (beside - beside.mean()) * kept[:size]
        error = math.sqrt(float(rest @ rest) / rng.chisquare(size - 1))
        mean = beside.mean() + error * rng.normal() / math.sqrt(size)
        found[level] = np.exp(drift[:size] + mean + error * rng.normal(0.0, 1.0, size))
    return found


def _are_rates(rounds: Sequence[float]) -> bool:
    return all(0 < rate < math.inf for rate in rounds)


def _at_rates(one: WorkloadResult, moved: Mapping[str, NDArray[np.float64]]) -> WorkloadResult:
    rates = moved.get(one.level)
    if rates is None:
        return one
    return replace(one, decode_rounds=tuple(rates.tolist()), decode_tokens_per_s=float(np.median(rates)))


def _speed_at_rates(one: Speed, rates: NDArray[np.float64] | None) -> Speed:
    if rates is None:
        return one
    return replace(one, rounds=tuple(rates.tolist()), decode_tokens_per_s=float(np.median(rates)))
