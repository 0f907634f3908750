"""Is a decision that is called 95% sure repeated by 95% of other runs?

    scripts/bench decision_certainty [--ladders 300] [--repeats 12] [--seeds 11,12] [--documents 30] [--outliers 0]

Simulated ladders of seven levels: true losses drawn around the bar and around 0.02 nats, documents that differ,
inputs passed or failed, speeds whose levels lie close, on a machine that drifts from round to round. Every ladder is
run many times, each run with documents, inputs and rounds of its own; printed is, by how sure the first run's decision
says it is, the share of the other runs that choose the same pair, with its interval over ladders.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bitladder.plan.decide import decide
from bitladder.records.decision import Decision
from bitladder.records.evaluation import WorkloadResult
from bitladder.stats.bootstrap import ratio_interval
from bitladder.stats.paired import mcnemar
from ladder_examples import KL, SIZES, fidelity, plan, result

DOCUMENTS, TOKENS, INPUTS, ROUNDS = 30, 300, 25, 5
NAMES = list(KL)
TIMES_WORSE = 5.0
"""Of outliers beside other documents."""


@dataclasses.dataclass(frozen=True)
class Ladder:
    """What is true of the levels of one model."""

    kl: np.ndarray
    """f64[levels], nats."""
    spread: float
    """Standard deviation of the logarithm of a document's KL."""
    loses: np.ndarray
    """f64[levels], chance to lose an input that the reference passes."""
    speed: np.ndarray
    """f64[levels], tokens per second."""
    noise: float
    """Standard deviation of the logarithm of a rate, beside the round's."""


def drawn_ladder(rng: np.random.Generator) -> Ladder:
    """A ladder whose decision may be close or clear."""
    first = 0.001 * math.exp(rng.uniform(0, 2))
    steps = np.exp(rng.uniform(0.5, 1.6, len(NAMES)))
    kl = first * np.cumprod(steps)
    speed = 50 * np.cumprod(np.exp(rng.uniform(-0.02, 0.2, len(NAMES))))
    return Ladder(kl, rng.uniform(0.3, 0.9), np.minimum(0.5, 0.15 * kl), speed, rng.uniform(0.003, 0.04))


def one_run(ladder: Ladder, rng: np.random.Generator, documents: int = DOCUMENTS, outliers: float = 0.0) -> Decision:
    """The decision of one run: its own documents, inputs and rounds."""
    hard = rng.normal(0, ladder.spread, documents)
    if outliers:
        hard += math.log(TIMES_WORSE) * (rng.uniform(size=documents) < outliers)
    fidelities, results = [], []
    drift = rng.normal(0, 0.1, ROUNDS)
    passed = rng.uniform(size=INPUTS) < 0.8
    tokens = np.full(documents, float(TOKENS))
    for at, level in enumerate(NAMES):
        own = ladder.kl[at] * np.exp(hard + rng.normal(0, 0.2, documents) - (ladder.spread**2 + 0.04) / 2)
        kl = ratio_interval(own * tokens, tokens, np.random.default_rng(0), scale="log", worse="more")
        fidelities.append(
            dataclasses.replace(
                fidelity(level, kl.value),
                tokens=documents * TOKENS,
                units=documents,
                kl_low=kl.low,
                kl_high=kl.high,
                unit_kl=tuple(own.tolist()),
                unit_tokens=(TOKENS,) * documents,
            )
        )
        rates = ladder.speed[at] * np.exp(drift + rng.normal(0, ladder.noise, ROUNDS))
        failed = rng.uniform(size=INPUTS) < ladder.loses[at]
        gained = ~passed & (rng.uniform(size=INPUTS) < 0.05)
        results.append(_result(level, passed & failed, gained, int(passed.sum()), rates))
    return decide(plan(), fidelities, results, bar="kl < 0.1 and no known loss", reference="F16")


def _result(level: str, lost: np.ndarray, gained: np.ndarray, before: int, rates: np.ndarray) -> WorkloadResult:
    names = [f"in{number}" for number in range(INPUTS)]
    return dataclasses.replace(
        result(level),
        lost=tuple(name for name, is_so in zip(names, lost, strict=True) if is_so),
        gained=tuple(name for name, is_so in zip(names, gained, strict=True) if is_so),
        passes=before - int(lost.sum()) + int(gained.sum()),
        p_value=mcnemar(int(lost.sum()), int(gained.sum())),
        decode_tokens_per_s=float(np.median(rates)),
        decode_rounds=tuple(rates.tolist()),
    )


def repeated_by(seed: int, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Of each ladder how sure the first run's decision is, and the share of other runs that choose the same pair."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(options.ladders // len(options.seeds.split(","))):
        ladder = drawn_ladder(rng)
        first = one_run(ladder, rng, options.documents, options.outliers)
        with mock.patch("bitladder.plan.decide.certainty", return_value=()):  # of the others only the choice counts
            others = [one_run(ladder, rng, options.documents, options.outliers) for _ in range(options.repeats)]
        same = np.mean([(one.quality, one.speed) == (first.quality, first.speed) for one in others])
        found.append((first.certainty[0].share, float(same)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladders", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--outliers", type=float, default=0.0, help="share of documents that are five times worse")
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--seeds", default="11,12", help="each for an equal part of the ladders")
    options = parser.parse_args()
    assert set(NAMES) < set(SIZES)
    pairs = [pair for seed in options.seeds.split(",") for pair in repeated_by(int(seed), options)]
    told, same = np.array(pairs).T
    print(f"{len(pairs)} ladders, {options.repeats} other runs each")
    print("  said to repeat    ladders   said (mean)   repeated (95% interval over ladders)")
    for low, high in ((0.0, 0.5), (0.5, 0.7), (0.7, 0.85), (0.85, 0.93), (0.93, 0.975), (0.975, 1.01)):
        here = (told >= low) & (told < high)
        if here.sum() < 2:
            continue
        half = 1.96 * same[here].std(ddof=1) / math.sqrt(here.sum())
        mean = same[here].mean()
        bounds = f"{100 * low:.0f} to {100 * min(high, 1):.0f}%"
        own = f"{100 * told[here].mean():>11.1f}%   {100 * mean:.1f}% +- {100 * half:.1f}"
        print(f"  {bounds:<16} {here.sum():>8} {own}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
