"""Claim: stopping as soon as the decision is clear needs at most a third of the inputs of a fixed-size design.

Ladders of eight levels, equal error rates, all ladders together.

Simulated ladders: every level answers every input; an input is lost, gained or unchanged with the level's own shares
(noise of the same size in both directions for the larger levels, real losses further down). The fixed design asks
every level the same number of inputs: the least that gives the noisiest level that holds the bar with room 90% power
against a loss of the margin, at 5% shared among the levels (normal approximation, the usual calculation). It chooses
the smallest level whose one-sided interval is above the margin. Both may choose a bad level in 5 of 100 ladders and set
a good one aside in 10.

    python benchmarks/sequential_stopping.py [ladders]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from bitladder.describe.workload import Input
from bitladder.plan.halving import measure_ladder
from bitladder.stats.sequential import Standing

LEVELS = ["Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K"]
# Shares of inputs (lost, gained) by level: what a mid-sized and a small model lose on mixed work.
LADDERS = {
    "sturdy": "0.2/0.2 0.5/0.5 1/1 1/1 2/1.5 2/1.5 13/3 25/3",
    "fragile": "0.5/0.5 1/1 2/1 2/1 12/2 16/2 28/2 55/1",
    "noisy": "2/2 3/3 4/4 4/4 6/5 6/5 15/5 30/5",
    "steep": "0/0 0.2/0.2 0.5/0.5 0.5/0.5 1/1 1/1 20/2 60/1",
}
"""Per cent of inputs lost/gained, level by level."""
MARGIN, ALPHA, POWER = 0.05, 0.05, 0.9


def fixed_size(shares: list[tuple[float, float]]) -> int:
    """Inputs for 90% power at the levels that truly hold the bar with room (no loss beyond half the margin)."""
    z = stats.norm.ppf(1 - ALPHA / len(shares)) + stats.norm.ppf(POWER)
    needs = [
        z**2 * (lost + gained - (lost - gained) ** 2) / (MARGIN - (lost - gained)) ** 2
        for lost, gained in shares
        if lost - gained <= MARGIN / 2
    ]
    return math.ceil(max(needs))


def draw(rng: np.random.Generator, shares: list[tuple[float, float]], n: int) -> np.ndarray:
    """Differences i8[levels, n]: -1 lost, +1 gained."""
    return np.stack([rng.choice([-1, 1, 0], p=[a, b, 1 - a - b], size=n) for a, b in shares])


def fixed_choice(differences: np.ndarray) -> int:
    """The smallest level whose one-sided interval at the shared error rate is above the margin; -1 for none."""
    n = differences.shape[1]
    mean = differences.mean(axis=1)
    error = np.sqrt(np.maximum(differences.var(axis=1), 0.5 / n) / n)
    meets = mean - stats.norm.ppf(1 - ALPHA / len(mean)) * error > -MARGIN
    return int(np.flatnonzero(meets)[-1]) if meets.any() else -1


def main() -> None:
    ladders = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    rng = np.random.default_rng(20261123)
    rows: list[dict[str, Any]] = []
    for name, text in LADDERS.items():
        pairs = (level.split("/") for level in text.split())
        shares = [(float(lost) / 100, float(gained) / 100) for lost, gained in pairs]
        n = fixed_size(shares)
        pool = 3 * n
        inputs = [Input(str(place), (), ()) for place in range(pool)]
        true_loss = np.array([lost - gained for lost, gained in shares])
        used, wrong, decided, chosen, fixed_wrong, fixed_chosen = [], 0, 0, [], 0, []
        for seed in range(ladders):
            table = draw(rng, shares, pool)

            def ask(level: str, wanted: Sequence[Input], table: np.ndarray = table) -> list[float]:
                row = table[LEVELS.index(level)]
                return [float(row[int(one.id)]) for one in wanted]

            outcome = measure_ladder(LEVELS, inputs, ask, margin=MARGIN, alpha=ALPHA, batch=8, seed=seed)
            used.append(sum(outcome.inputs_used))
            decided += outcome.decided
            chosen.append(outcome.chosen)
            wrong += any(
                known is Standing.MEETS and true_loss[place] > MARGIN for place, known in enumerate(outcome.standings)
            )
            pick = fixed_choice(table[:, :n])
            fixed_chosen.append(pick)
            fixed_wrong += pick >= 0 and true_loss[pick] > MARGIN
        right = max(place for place in range(8) if true_loss[place] <= MARGIN)
        rows.append(
            {
                "ladder": name,
                "fixed_inputs": 8 * n,
                "sequential_inputs_mean": round(float(np.mean(used))),
                "share": round(float(np.mean(used)) / (8 * n), 3),
                "wrong": wrong / ladders,
                "decided": decided / ladders,
                "right_choice": sum(pick == LEVELS[right] for pick in chosen) / ladders,
                "fixed_wrong": fixed_wrong / ladders,
                "fixed_right_choice": sum(pick == right for pick in fixed_chosen) / ladders,
            }
        )
        print(
            f"{name:24s} fixed {8 * n:6d} inputs, sequential {np.mean(used):7.0f} "
            f"({np.mean(used) / (8 * n):.2f}), bad choice {wrong / ladders:.3f} (allowed {ALPHA}), "
            f"right choice {rows[-1]['right_choice']:.2f} (fixed {rows[-1]['fixed_right_choice']:.2f})"
        )
    share = sum(row["sequential_inputs_mean"] for row in rows) / sum(row["fixed_inputs"] for row in rows)
    print(f"all ladders together: {share:.2f} of the inputs")
    print(
        json.dumps(
            {
                "share": round(share, 3),
                "margin": MARGIN,
                "alpha": ALPHA,
                "power": POWER,
                "ladders": ladders,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
