"""Claim: thoughts are taken apart from answers by the engine's own parser and counted for every level: how long they
are, which never end, which loop.

A model of any size is made to think by a template that opens a thought for it (--template writes such a file). Every
file is asked the same sums; the first is the reference.

    scripts/bench thoughts --template MODEL.gguf OUT.gguf
    scripts/bench thoughts REFERENCE.gguf LEVEL.gguf ... [--questions 12] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tool_calls import answered, with_template

from bitladder.describe.workload import Workload
from bitladder.describe.workload_file import parse_workload
from bitladder.stages.evaluate import compare

TEMPLATE = Path(__file__).parents[1] / "scripts" / "thinks.jinja"
MOST_TOKENS, MOST_THOUGHT = 160, 120


def sums(number: int) -> Workload:
    """Additions; a thought may take `MOST_THOUGHT` of the answer's `MOST_TOKENS`."""
    inputs = [
        {
            "id": f"{3 + at}+{8 + 2 * at}",
            "prompt": f"Ann has {3 + at} pens and buys {8 + 2 * at} more. How many has she now? Think, then answer.",
            "max_tokens": MOST_TOKENS,
            "expect": {"number": 11 + 3 * at},
        }
        for at in range(number)
    ]
    text = json.dumps({"max_thought_tokens": MOST_THOUGHT, "inputs": inputs})
    return parse_workload(text, source="sums.json", read_file=str, json=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--template", action="store_true", help="write the first file with a template that thinks")
    options = parser.parse_args()
    if options.template:
        source, out = options.files
        raise SystemExit(with_template(source, out, TEMPLATE))
    workload = sums(options.questions)
    reference = answered(options.files[0], workload, options.threads)
    print("| level | right | thoughts | tokens each | without an end | in a loop |\n|---|---|---|---|---|---|")
    for path in options.files:
        level = reference if path == options.files[0] else answered(path, workload, options.threads)
        result = compare(reference, level, workload)
        found = result.thinking
        told = (found.thoughts, f"{found.tokens:.0f}", found.unfinished, found.looping) if found else (0, "", 0, 0)
        print(
            f"| {level.level} | {result.passes} of {result.inputs} | " + " | ".join(map(str, told)) + " |", flush=True
        )


if __name__ == "__main__":
    main()
