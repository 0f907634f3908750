"""Claim: predicted decode and prefill speed are near what the engine then does, on the machine that was measured.

Both sides in one run: the machine is measured before and after, and between the two every file runs in the engine, in
an order that changes each round, so that a busy or slow moment of the machine hits all alike. A file's speed is the
best of its rounds, as each rate of the machine is the best of its repeats: whatever else runs only slows down.
How far the best of its even rounds is from the best of its odd ones is printed beside the errors.
Predictions are the geometric mean of those from both measurements. Each file is predicted twice: from the machine's
rates alone, and anchored by the runs of the *other* files of its model, never its own.

    python benchmarks/speed_prediction.py [FILE.gguf ...] [--prompts 64,512] [--long 2048] [--seconds 170]

Without files it writes all levels of the demo model first. Wants a quiet machine: the engine's threads wait for one
another, so beside other programs they slow down far more than their share.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitladder.describe.machine import Machine
from bitladder.describe.rates import PoolRates
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile, read_header
from bitladder.files.probe import probe_machine
from bitladder.files.sources import resolve
from bitladder.formats.parts import parts_of
from bitladder.formats.recipes import LEVELS
from bitladder.plan.cost import LevelBytes
from bitladder.plan.placement import Usage, place
from bitladder.plan.search import MachineRates, shares_of
from bitladder.plan.speed import anchor_factor, predict
from bitladder.records import to_json
from bitladder.records.plan import Figure, PlanSpeed
from bitladder.stages.measure_machine import measure_machine
from bitladder.stages.write_levels import quantize_levels

DECODED = 20
LONG_EVERY = 5
TOKEN = 1000


@dataclass
class Run:
    """One file: seconds of a prompt, and per decoded token after it, of each round."""

    path: Path
    prompt_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    token_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))


def run_file(run: Run, prompts: Sequence[int], threads: int) -> None:
    with LlamaServer(Launch(run.path, n_ctx=max(prompts) + 2 * DECODED, threads=threads, n_gpu_layers=0)) as server:
        server.time_tokens([TOKEN] * 8, max_tokens=2)  # touches every page once, as a server that has answered before
        for prompt in prompts:
            timings = server.time_tokens([TOKEN + n % 500 for n in range(prompt)], max_tokens=DECODED)
            run.prompt_s[prompt].append(timings["prompt_ms"] / 1e3)
            run.token_s[prompt].append(timings["predicted_ms"] / 1e3 / (timings["predicted_n"] - 1))


def run_all(runs: Sequence[Run], prompts: Sequence[int], threads: int, until: float, long: int) -> None:
    """Whole rounds of all files, at least one, as many as there is time for; every fifth has a long prompt too."""
    order = random.Random(0)
    took = 0.0
    while not took or time.monotonic() + took < until:
        began = time.monotonic()
        for run in order.sample(runs, len(runs)):
            run_file(run, [*prompts, long] if long and runs.index(run) % LONG_EVERY == 0 else prompts, threads)
        took = time.monotonic() - began
        print(f"a round of {len(runs)} files took {took:.0f} s", flush=True)


def predicted(path: Path, rates: PoolRates, machine: Machine, prompt: int) -> PlanSpeed:
    model = read_header(path)
    level = LevelBytes(path.stem, parts_of(model.tensors))
    shares = shares_of(model, level, place(model, level, machine, Usage(4096)), MachineRates(rates))
    return predict(shares, model, n_prompt=prompt, n_past=prompt + DECODED / 2)


@dataclass(frozen=True)
class Row:
    """A measured figure (tokens per second, or seconds to the first token) and its prediction."""

    name: str
    prompt: int
    measured: float
    rounds: tuple[float, ...]
    value: float
    low: float
    high: float

    @property
    def group(self) -> str:
        """The model: files of one model correct each other."""
        return self.name.rpartition("-")[0]


def rows_of(what: str, runs: Sequence[Run], both: Sequence[PoolRates], machine: Machine) -> list[Row]:
    rows = []
    for run in runs:
        for prompt, seconds in run.prompt_s.items():
            rounds = {
                "decode": [1 / one for one in run.token_s[prompt]],
                "prefill": [prompt / one for one in seconds],
                "first_token": [a + b for a, b in zip(seconds, run.token_s[prompt], strict=True)],
            }[what]
            guesses: list[Figure] = [getattr(predicted(run.path, rates, machine, prompt), what) for rates in both]
            value, low, high = (
                math.exp(statistics.fmean(math.log(getattr(guess, name)) for guess in guesses))
                for name in ("value", "low", "high")
            )
            best = min if what == "first_token" else max
            rows.append(Row(run.path.stem, prompt, best(rounds), tuple(rounds), value, low, high))
    return rows


def report(what: str, rows: Sequence[Row]) -> None:
    print(f"\n{what}: file, prompt, measured, predicted, error, error when anchored by the model's other files")
    plain, anchored, covered = [], [], []
    best = min if what == "first_token" else max
    for row in rows:
        others = [other for other in rows if other.group == row.group and other.name != row.name]
        factor = anchor_factor([other.value for other in others], [other.measured for other in others]) or 1.0
        error, better = row.value / row.measured - 1, factor * row.value / row.measured - 1
        plain.append(abs(error))
        anchored.append(abs(better))
        covered += [row.low <= one <= row.high for one in row.rounds]
        figures = (
            f"{row.measured:9.3f} {row.value:9.3f}"
            if what == "first_token"
            else f"{row.measured:9.1f} {row.value:9.1f}"
        )
        print(f"{row.name[-28:]:28} {row.prompt:5} {figures} {error:+7.1%} {better:+7.1%}")
    for name, errors in (("from rates", plain), ("anchored", anchored)):
        print(f"{what} {name}: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    halves = [(best(row.rounds[::2]), best(row.rounds[1::2])) for row in rows if len(row.rounds) > 1]
    if halves:
        apart = [abs(first / second - 1) for first, second in halves]
        print(
            f"{what} from the file's own other rounds: median error {statistics.median(apart):.1%}, "
            f"worst {max(apart):.1%}"
        )  # what no prediction can beat by much
    strayed = [max(row.rounds) / min(row.rounds) for row in rows if len(row.rounds) > 1]
    between = f"; rounds of a file differed by x{statistics.median(strayed):.2f} (median)" if strayed else ""
    width = statistics.median(row.high / row.low for row in rows)
    print(f"{what}: {statistics.fmean(covered):.0%} of single runs lie in the range (x{width:.2f} wide){between}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--prompts", default="64,512")
    parser.add_argument("--long", type=int, default=0, help="a longer prompt, for every fifth file")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=170.0)
    parser.add_argument("--out", type=Path, help="keep timings and rates as JSON")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    prompts = [int(text) for text in options.prompts.split(",")]
    machine = probe_machine()
    threads = options.threads or machine.cores
    with tempfile.TemporaryDirectory() as work:
        files = options.files
        if not files:
            with GgufFile.open(resolve("smollm2-135m").path) as source:
                files = [
                    file.path for file in quantize_levels(source, LEVELS, Path(work), effort="fast", threads=threads)
                ]
        runs = [Run(path) for path in files]
        before = measure_machine(machine, threads=threads)
        print(
            f"machine measured in {before.seconds:.1f} s, {threads} threads, load {os.getloadavg()[0]:.1f}", flush=True
        )
        run_all(runs, prompts, threads, until - before.seconds, options.long)
        both = [before.rates, measure_machine(machine, threads=threads).rates]
        strayed = [new / old for new, old in zip(both[1].stream.values(), both[0].stream.values(), strict=True)]
        print(f"measured again: rates {min(strayed):.2f} to {max(strayed):.2f} of the first, noise {both[0].noise:.2f}")
        if options.out:
            kept = [{"path": run.path, "prompt_s": run.prompt_s, "token_s": run.token_s} for run in runs]
            options.out.write_text(json.dumps(to_json({"rates": both, "runs": kept}), indent=1))
        for what in ("decode", "prefill", "first_token"):
            report(what, rows_of(what, runs, both, machine))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
