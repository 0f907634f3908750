"""Tokens per second of the built-in engine by how long its threads spin: alone, and beside a busy process.

    scripts/bench engine_spin --model FILE.gguf [--threads 2] [--rounds 3] [--tokens 48] [--bounds none 10000 2000]

Every bound takes its turn in each round, in a process of its own: one time alone, one time beside a process that takes
a whole core. Printed are the medians and, of ratios within the rounds, their smallest and largest. ``none``: libgomp's
own bound, 300 thousand; ``passive``: OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitladder.engines.llama import LlamaServer, LlamaSettings

BUSY = "while True: pass"
WHERE = ("alone", "beside a busy process")


@contextmanager
def busy(processes: int) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def rate(model: Path, bound: str, threads: int, tokens: int, beside: int) -> float:
    """Tokens per second of decoding after a prompt of 16 tokens."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    before = {name: os.environ.pop(name, None) for name in names}
    names_of = {"none": {"GOMP_SPINCOUNT": "300000"}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
    os.environ.update(names_of.get(bound, {"GOMP_SPINCOUNT": bound}))
    try:
        with LlamaServer(LlamaSettings(model, n_ctx=256, threads=threads)) as engine:
            engine.time_tokens(list(range(100, 116)), max_tokens=4)
            with busy(beside):
                found = engine.time_tokens(list(range(100, 116)), max_tokens=tokens)
        return 1000 * found["predicted_n"] / found["predicted_ms"]
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--bounds", nargs="+", default=["none", "10000", "2000", "1000", "passive"])
    options = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for bound in options.bounds:
            for beside in (0, 1):
                one = rate(options.model, bound, options.threads, options.tokens, beside)
                found.setdefault((bound, beside), []).append(one)
    print(f"{options.model.name}, {options.threads} threads, {options.rounds} rounds, tokens per second")
    first = options.bounds[0]
    for bound in options.bounds:
        words = []
        for beside, where in enumerate(WHERE):
            ratios = [one / other for one, other in zip(found[bound, beside], found[first, beside], strict=True)]
            words.append(
                f"{where} {statistics.median(found[bound, beside]):.1f}, {statistics.median(ratios):.2f} of {first} "
                f"[{min(ratios):.2f}, {max(ratios):.2f}]"
            )
        print(f"  {bound}: {'; '.join(words)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
