"""Quantizing is 3 to 40 times as fast on one core as ggml's own code, format by format.

    scripts/bench kernel_speed [--repeats 5] [--rows 1024] [--formats Q4_K,Q6_K] [--efforts fast] [--into]

Both sides take turns in one process on the same array, in CPU seconds of the whole process, so that neither waiting
nor threads of their own flatter either. ggml's side is libgguf (its reference C code in a wheel), put into the cache
by this script. Prints weights per second, the ratio, its lowest and highest over the repeats, and how many pages the
system had to hand out to our call; a JSON line last. By default both sides return a new array, as people call them;
with --into both write into one that is there already.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from libgguf_here import libgguf_or_exit

from bitladder.kernels import quantize
from bitladder.kernels.rows import AFFINE, EFFORTS, SCALE


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def page_faults(work: Callable[[], Any]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def copy_rate(x: np.ndarray, repeats: int) -> float:
    """Weights per second, in millions, of copying them to an array at hand: what memory lets anybody do."""
    target = np.empty_like(x)
    return x.size / 1e6 / statistics.median(cpu_seconds(lambda: np.copyto(target, x)) for _ in range(repeats))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--rows", type=int, default=1024)
    options.add_argument("--formats", default=",".join([*SCALE, *AFFINE]))
    options.add_argument("--efforts", default=",".join(EFFORTS))
    options.add_argument("--into", action="store_true", help="Write into arrays at hand.")
    chosen = options.parse_args()
    libgguf = libgguf_or_exit()
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((chosen.rows, 2048)) * 0.02).astype(np.float32)
    importance = rng.lognormal(0, 1.5, 2048).astype(np.float32)
    found = []
    print(f"{x.size / 1e6:.1f} M weights, {chosen.repeats} repeats; M weights/s per core, ratio (lowest to highest)")
    print(f"copying them: {copy_rate(x, chosen.repeats):.0f} M weights/s")
    for qtype in chosen.formats.split(","):
        kind, at_hand = libgguf.GGMLQuantizationType[qtype], quantize(x, qtype, effort="fast")
        for given in (None, importance):
            for effort in chosen.efforts.split(","):

                def theirs(kind: Any = kind, given: Any = given, room: Any = at_hand) -> None:
                    if chosen.into:
                        libgguf.quantize_rows_into_raw(kind, x, room, *x.shape, given)
                    else:
                        libgguf.quantize_rows(x, kind, imatrix=given)

                def ours(qtype: str = qtype, given: Any = given, effort: Any = effort, room: Any = at_hand) -> None:
                    quantize(x, qtype, importance=given, effort=effort, out=room if chosen.into else None)

                ours()
                theirs()
                pairs = [(cpu_seconds(theirs), cpu_seconds(ours)) for _ in range(chosen.repeats)]
                ratios = sorted(a / b for a, b in pairs)
                ggml, mine = (x.size / 1e6 / statistics.median(side) for side in zip(*pairs, strict=True))
                row = {"qtype": qtype, "importance": given is not None, "effort": effort, "ggml": round(ggml, 1),
                       "bitladder": round(mine, 1), "ratio": round(statistics.median(ratios), 2),
                       "low": round(ratios[0], 2), "high": round(ratios[-1], 2),
                       "faults": page_faults(ours)}  # fmt: skip
                found.append(row)
                name = f"{qtype:7}{'importance' if row['importance'] else '':11}{effort:5}"
                print(
                    f"{name} ggml {ggml:7.1f}  ours {mine:7.1f}  {row['ratio']:6.2f}x ({row['low']} to {row['high']})  "
                    f"{row['faults']} pages",
                    flush=True,
                )
    print(
        json.dumps(
            {
                "benchmark": "kernel_speed",
                "into": chosen.into,
                "weights": x.size,
                "repeats": chosen.repeats,
                "rows": found,
            }
        )
    )


if __name__ == "__main__":
    main()
