"""Two checkouts in turns: processor time of `quantize`, of a walk, of GPTQ and of `run`, the other's beside this one's.

    scripts/bench checkout_speed --before PATH_OF_OTHER_CHECKOUT [--model FILE.gguf] [--rounds 5] [--only NAME ...]

Every command is a process of its own with one thread, after one round that is not counted (it compiles kernels and
fills caches). Printed is the median of each side's user and system seconds, and of the ratios within the rounds with
their smallest and largest: what the machine does besides changes both sides of a round alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "quantize Q4_K_M, Q8_0": ["quantize", "MODEL", "--to", "Q4_K_M,Q8_0", "--imatrix", "none", "--out", "OUT"],
    "importance matrix": ["imatrix", "MODEL", "--text", "TEXT", "--out", "OUT/x.gguf"],
    "measure Q8_0, Q4_0": ["measure", "MODEL", "--levels", "Q8_0,Q4_0", "--text", "TEXT", "--imatrix", "none"],
    "GPTQ-4bit-g64": ["quantize", "MODEL", "--to", "GPTQ-4bit-g64", "--text", "TEXT", "--out", "OUT"],
    "recipe of Q4_0 with feedback": ["quantize", "MODEL", "--to", "GPTQ-Q4_0", "--text", "TEXT", "--out", "OUT"],
    "run with a workload": [
        "run", "MODEL", "--levels", "Q8_0,Q4_K_M", "--workload", "WORK", "--text", "TEXT", "--imatrix", "none",
        "--ctx", "512", "--bar", "kl < 5", "--out", "OUT",
    ],
}  # fmt: skip
QUESTIONS = 12


def seconds(checkout: Path, words: list[str], model: Path, room: Path) -> float:
    """User and system time of one command, and of the engines that it starts."""
    with tempfile.TemporaryDirectory(dir=room) as out:
        places = {"OUT": out, "MODEL": str(model), "TEXT": str(room / "text.txt"), "WORK": str(room / "work.yaml")}
        arguments = [word.replace("OUT", out) if word.startswith("OUT/") else places.get(word, word) for word in words]
        environment = {
            **os.environ, "PYTHONPATH": str(checkout / "src"), "BITLADDER_DATA": f"{out}/data",
            "BITLADDER_CACHE": str(room / "cache" / checkout.resolve().as_posix().replace("/", "-")),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        for kept in ("walks", "importance", "vectors", "sensitivity"):  # made anew each time
            subprocess.run(["rm", "-rf", f"{environment['BITLADDER_CACHE']}/{kept}"], check=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "bitladder", *arguments, "--threads", "1", "--json"],
            env=environment, cwd=out, check=True, capture_output=True,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as room:
        words = [f"{number} {number * number % 97}" for number in range(700)]
        Path(room, "text.txt").write_text("The numbers that follow were not chosen by anybody. " + ", ".join(words))
        asked = [f"  - {{id: q{n}, prompt: Say {n} things., expect: {{contains_any: [a]}}}}" for n in range(QUESTIONS)]
        Path(room, "work.yaml").write_text("\n".join(["name: plain", "max_tokens: 48", "inputs:", *asked]))
        for name, command in COMMANDS.items():
            if options.only and not any(part in name for part in options.only):
                continue
            rounds = []
            for number in range(options.rounds + 1):
                sides = [options.before, ROOT] if number % 2 else [ROOT, options.before]
                took = {side: seconds(side, command, options.model.resolve(), Path(room)) for side in sides}
                rounds.append((took[options.before], took[ROOT]))
            del rounds[0]
            ratios = [after / before for before, after in rounds]
            found[name] = {"before": [b for b, _ in rounds], "after": [a for _, a in rounds]}
            before, after = (statistics.median(side) for side in zip(*rounds, strict=True))
            spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
            print(f"{name:30} {before:7.2f} {after:7.2f} CPU s, ratio {spread}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "checkout_speed", "model": options.model.name, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
