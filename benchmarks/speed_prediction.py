"""Claim: predicted decode and prefill speed are near what the engine then does, on the machine that was measured.

Measures the machine, then writes the levels of a model, runs each in the engine (prompts of several lengths, best of
some
repeats, levels in turn so that a busy moment hits all alike), and compares. Each level is predicted twice: from the
machine's
rates alone, and anchored by the runs of the *other* levels, never its own.

With ``--clock processor`` both sides count the engine's processor time instead of the wall's, with one thread: that is
what a
machine that is busy with other work can still say about the model of speed.

    python benchmarks/speed_prediction.py [--model smollm2-135m] [--levels F16,Q8_0,Q4_K_M] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile, read_header
from bitladder.files.probe import probe_machine
from bitladder.files.sources import resolve
from bitladder.formats.parts import parts_of
from bitladder.formats.recipes import LEVELS
from bitladder.plan.cost import LevelBytes
from bitladder.plan.placement import Wish, place
from bitladder.plan.search import MachineRates, shares_of
from bitladder.plan.speed import anchor_factor, predict
from bitladder.stages.measure_machine import measure_machine
from bitladder.stages.quantize import quantize_levels

PROMPTS = [64, 512, 2048]
DECODED = 32
TOKEN = 1000


@dataclass
class Run:
    """A level's measured and predicted tokens per second, by prompt length."""

    level: str
    path: Path
    decode: dict[int, float]
    prefill: dict[int, float]


class ProcessorClock(LlamaServer):
    """The engine, timed by the processor time of its process."""

    def time_tokens(self, tokens: Sequence[int], *, max_tokens: int) -> Mapping[str, float]:
        """As the engine's own timings, from two runs."""
        prompt = self._spent(tokens, 1)
        decoded = self._spent(tokens, max_tokens) - prompt
        return {
            "prompt_ms": 1e3 * prompt,
            "prompt_n": len(tokens),
            "predicted_ms": max(1e-3, 1e3 * decoded),
            "predicted_n": max_tokens,
        }

    def _spent(self, tokens: Sequence[int], max_tokens: int) -> float:
        process = psutil.Process(self.process.pid)
        before = process.cpu_times()
        super().time_tokens(tokens, max_tokens=max_tokens)
        after = process.cpu_times()
        return after.user + after.system - before.user - before.system


def measure(runs: list[Run], threads: int, repeats: int, engine: type[LlamaServer]) -> None:
    for _ in range(repeats):
        for run in runs:
            with engine(run.path, n_ctx=4096, threads=threads, n_gpu_layers=0) as server:
                for prompt in PROMPTS:
                    timings = server.time_tokens([TOKEN + n % 500 for n in range(prompt)], max_tokens=DECODED)
                    decode = 1e3 * (timings["predicted_n"] - 1) / timings["predicted_ms"]
                    prefill = 1e3 * timings["prompt_n"] / timings["prompt_ms"]
                    print(f"{run.level} after {prompt}: {decode:.1f} {prefill:.1f}", flush=True)
                    run.decode[prompt] = max(run.decode.get(prompt, 0), decode)
                    run.prefill[prompt] = max(run.prefill.get(prompt, 0), prefill)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", default=",".join(map(str, PROMPTS)))
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    options = parser.parse_args()
    engine = ProcessorClock if options.clock == "processor" else LlamaServer
    PROMPTS[:] = [int(text) for text in options.prompts.split(",")]
    machine = probe_machine()
    threads = 1 if options.clock == "processor" else options.threads or machine.cores
    measured = measure_machine(machine, threads=threads, engine=engine)
    print(f"machine measured in {measured.seconds:.1f} s, {threads} threads, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as work, GgufFile.open(resolve(options.model).path) as source:
        files = quantize_levels(source, options.levels.split(","), Path(work), effort="fast", threads=threads)
        runs = [Run(file.level, file.path, {}, {}) for file in files]
        measure(runs, threads, options.repeats, engine)
        rows = [(run, *predicted(run, measured.rates, machine)) for run in runs]
    report(rows)
    return 0


def predicted(run: Run, rates, machine) -> tuple[dict[int, float], dict[int, float]]:
    model = read_header(run.path)
    level = LevelBytes(run.level, parts_of(model.tensors))
    placement = place(model, level, machine, Wish(4096))
    decode, prefill = {}, {}
    for prompt in PROMPTS:
        shares = shares_of(model, level, placement, MachineRates(rates))
        speed = predict(shares, model, n_prompt=prompt, n_past=prompt + DECODED / 2)
        decode[prompt], prefill[prompt] = speed.decode.value, speed.prefill.value
    return decode, prefill


def report(rows) -> None:
    for what, position in (("decode", 1), ("prefill", 2)):
        print(f"\n{what}: level, prompt, measured, predicted, error, error when anchored by the other levels")
        plain, anchored = [], []
        for row in rows:
            real = getattr(row[0], what)
            others = [other for other in rows if other is not row]
            for prompt in PROMPTS:
                factor = anchor_factor(
                    [other[position][prompt] for other in others], [getattr(other[0], what)[prompt] for other in others]
                )
                guess = row[position][prompt]
                error = guess / real[prompt] - 1
                better = guess * (factor or 1) / real[prompt] - 1
                plain.append(abs(error))
                anchored.append(abs(better))
                print(f"{row[0].level:8} {prompt:5} {real[prompt]:8.1f} {guess:8.1f} {error:+7.1%} {better:+7.1%}")
        for name, errors in (("from rates", plain), ("anchored", anchored)):
            print(f"{what} {name}: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    raise SystemExit(main())
