"""Claim: `auto` recovers at least 80% of the speed tier's loss for at most 20% more of its cost, or says
that it cannot.

``python gateway_auto.py RUN.json`` takes a finished run of `bitladder run` and, for every pair of levels of
which the larger one passed more inputs, makes the routes on one half of the workload and judges them on the
other (200 random halves). JSON is the last line.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import gateway_setup
import numpy as np

from bitladder.report.reading import read_run
from bitladder.serve.evidence import HeldOut, advise, routed_inputs


def told(found: HeldOut | None) -> dict[str, float | bool] | None:
    """A held-out result as data."""
    if found is None:
        return None
    numbers = {"recovered": round(found.recovered, 3), "extra_cost": round(found.extra_cost, 3)}
    return {**numbers, "pays": found.pays}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    run = read_run(options.run)
    rows = []
    for quality, speed in itertools.combinations(run.answers, 2):
        scores = {
            answer.input_id: min(token.logprob for token in answer.tokens) for answer in speed.answers if answer.tokens
        }
        inputs = routed_inputs(run.inputs, quality, speed, scores)
        net = sum(item.quality_passed - item.speed_passed for item in inputs)
        if net <= 0:
            continue
        advice = advise(inputs, np.random.default_rng(0))
        row = {"quality": quality.level, "speed": speed.level, "inputs": len(inputs), "net_loss": net}
        rows.append({**row, "by_tag": told(advice.by_tag), "by_escalation": told(advice.by_escalation)})
        print(f"{quality.level} and {speed.level}, {net} of {len(inputs)} lost: {advice.sentence}", flush=True)
    print(json.dumps({"setting": gateway_setup.setting(), "rows": rows}))


if __name__ == "__main__":
    main()
