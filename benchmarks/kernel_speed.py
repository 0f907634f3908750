"""Quantizing is 3 to 40 times as fast on one core as ggml's own code, format by format.

    scripts/bench kernel_speed [--repeats 5] [--rows 1024]

Both sides take turns in one process on the same array, in CPU seconds of the whole process, so that neither waiting
nor threads of their own flatter either. ggml's side is libgguf (its reference C code in a wheel), put beside the
project by this script. Prints weights per second, the ratio, its lowest and highest over the repeats; a JSON line last.
"""

from __future__ import annotations

import argparse
import json
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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--rows", type=int, default=1024)
    options.add_argument("--formats", default=",".join([*SCALE, *AFFINE]))
    chosen = options.parse_args()
    libgguf = libgguf_or_exit()
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((chosen.rows, 2048)) * 0.02).astype(np.float32)
    importance = rng.lognormal(0, 1.5, 2048).astype(np.float32)
    found = []
    print(f"{x.size / 1e6:.1f} M weights, {chosen.repeats} repeats; M weights/s per core, ratio (lowest to highest)")
    for qtype in chosen.formats.split(","):
        for given in (None, importance):
            for effort in EFFORTS:

                def theirs(qtype: str = qtype, given: Any = given) -> None:
                    libgguf.quantize_rows(x, libgguf.GGMLQuantizationType[qtype], imatrix=given)

                def ours(qtype: str = qtype, given: Any = given, effort: Any = effort) -> None:
                    quantize(x, qtype, importance=given, effort=effort)

                ours()
                theirs()
                pairs = [(cpu_seconds(theirs), cpu_seconds(ours)) for _ in range(chosen.repeats)]
                ratios = sorted(a / b for a, b in pairs)
                ggml, mine = (x.size / 1e6 / statistics.median(side) for side in zip(*pairs, strict=True))
                row = {"qtype": qtype, "importance": given is not None, "effort": effort, "ggml": round(ggml, 1),
                       "bitladder": round(mine, 1), "ratio": round(statistics.median(ratios), 2),
                       "low": round(ratios[0], 2), "high": round(ratios[-1], 2)}  # fmt: skip
                found.append(row)
                name = f"{qtype:7}{'importance' if row['importance'] else '':11}{effort:5}"
                print(
                    f"{name} ggml {ggml:7.1f}  ours {mine:7.1f}  {row['ratio']:6.2f}x ({row['low']} to {row['high']})",
                    flush=True,
                )
    print(json.dumps({"benchmark": "kernel_speed", "weights": x.size, "repeats": chosen.repeats, "rows": found}))


if __name__ == "__main__":
    main()
