"""Claim: beside a process that takes one of two cores, an engine with one thread answers the starter workload in 0.6
of the time of one with two, and decodes at four times its speed; on a quiet machine two are the better.

    scripts/bench engine_threads --model FILE.gguf [--rounds 2]

Both take their turn in each round, alone and beside a busy process. Prints seconds for the 25 inputs in four slots,
tokens a second decoded by one request, and for every round what one thread takes of the time of two.
"""

import argparse
import os
import time
from pathlib import Path

from engine_spin import WHERE, busy

from bitladder.engines.base import Launch
from bitladder.engines.registry import start
from bitladder.files.workloads import load_workload
from bitladder.stages.evaluate import answer_workload, decode_rates, warm_up
from bitladder.stages.run_facts import slots
from bitladder.system import spin_limit


def measured(model: Path, threads: int) -> tuple[float, float]:
    """Seconds of the workload, and tokens a second."""
    workload = load_workload()
    room, parallel = slots(workload, 4096)
    with start(Launch(model, n_ctx=room, n_parallel=parallel, threads=threads)) as engine:
        began = time.monotonic()
        answer_workload(engine, workload)
        seconds = time.monotonic() - began
    with start(Launch(model, n_ctx=1024, threads=threads)) as engine:
        warm_up(engine)
        return seconds, decode_rates(engine, 0)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    os.environ.update(spin_limit(os.environ))
    for _ in range(args.rounds):
        for beside, where in enumerate(WHERE):
            with busy(beside):
                (one_s, one), (two_s, two) = (measured(args.model, threads) for threads in (1, 2))
            print(
                f"{where}: one thread {one_s:.1f} s, {one:.0f} tokens/s; two {two_s:.1f} s, {two:.0f} tokens/s: "
                f"{one_s / two_s:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
