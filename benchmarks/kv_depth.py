"""Claim: what a KV cache of fewer bits loses, and whether it loses more behind a long context, is measured with the
real engine on the same tokens at every depth.

    scripts/bench kv_depth [MODEL] [--kv q8_0,q5_1,q4_0,q8_0/q4_0] [--depth 512,2048,4096] [--documents 6]
        [--characters 1000] [--threads 1]

Prints the table of docs/measure.md: the source itself with each cache against the source with 16 bits. Computes a
context of the deepest depth for each cache and once more for the 16 bits beside it, and each document behind it. One
cache after the other: each is stored when it is done, and one that was killed goes on with the windows it has.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from bitladder.describe.cache_types import parse_caches
from bitladder.files.texts import shipped_texts
from bitladder.stages.job import Work
from bitladder.stages.measure import Measuring, measure_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--kv", default="q8_0,q5_1,q4_0,q8_0/q4_0")
    parser.add_argument("--depth", default="512,2048,4096")
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--characters", type=int, help="of each document; all where nothing is said")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    depths = tuple(map(int, options.depth.split(",")))
    print("| cache | depth | KL | 95% | times the shallowest | 95% | top-1 |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for document in shipped_texts()[: options.documents]:
            (Path(folder) / f"{document.name}.txt").write_text(document.text[: options.characters])
        for cache in parse_caches(options.kv):
            wanted = Measuring(caches=(cache,), depths=depths, texts=[Path(folder)])
            (one,) = measure_model(options.model, wanted, Work(threads=options.threads))
            for at in one.depths:
                rise = f"{at.rise:.2f} | {at.rise_low:.2f} to {at.rise_high:.2f}" if at.rise == at.rise else " | "
                bounds = f"{at.kl_low:.3g} to {at.kl_high:.3g}"
                row = f"| {one.level} | {at.depth:,} | {at.kl_mean:.3g} | {bounds} | {rise} | {at.top1:.1%} |"
                print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
