"""Claim: on a processor a prompt is read several times more slowly with a KV cache of fewer bits, though it takes less
memory: llama.cpp's fast attention there is for 16 and 32 bits.

    scripts/bench kv_prompt [MODEL] [--kv q8_0,q8_0/q4_0,q5_1,q4_0] [--before 1024] [--rounds 4] [--threads 1]

For each cache the seconds to read 256 more tokens behind so many, in turns, over those with 16 bits in the same round,
with Student's 95% interval over rounds.
"""

import argparse
import sys
import time

from bitladder.describe.cache_types import F16_CACHE, parse_caches
from bitladder.engines.llama_library import Library, OpenModel
from bitladder.files.gguf import read_header
from bitladder.files.sources import resolve
from bitladder.formats.blocks import QTYPES
from bitladder.progress import silent
from bitladder.stats.paired import ratio_interval

READ = 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--kv", default="q8_0,q8_0/q4_0,q5_1,q4_0")
    parser.add_argument("--before", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    path = resolve(options.model, silent).path
    vocabulary = read_header(path).dims.n_vocab
    tokens = [(7919 * at) % (vocabulary // 2) for at in range(options.before + READ)]
    library, caches = Library(), (F16_CACHE, *parse_caches(options.kv))
    models = []
    for cache in caches:
        kinds = QTYPES[cache.k.upper()].ggml_type, QTYPES[cache.v.upper()].ggml_type
        models.append(
            OpenModel(library, path, n_ctx=len(tokens), n_vocab=vocabulary, threads=options.threads, cache=kinds)
        )
        for start in range(0, options.before, READ):
            models[-1].decode(tokens[start : start + READ], start, [False] * READ)
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(options.rounds):
        for model, own in zip(models, seconds, strict=True):
            model.clear(options.before)
            began = time.perf_counter()
            model.decode(tokens[options.before :], options.before, [False] * READ)
            own.append(time.perf_counter() - began)
    print("| cache | tokens/s | times 16 bits | 95% |\n|---|---|---|---|")
    for cache, own in zip(caches, seconds, strict=True):
        ratio, low, high = ratio_interval(own, seconds[0])
        bounds = "" if cache == F16_CACHE else f"{ratio:.2f} | {low:.2f} to {high:.2f}"
        print(f"| {cache} | {READ / min(own):.0f} | {bounds or ' | '} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
