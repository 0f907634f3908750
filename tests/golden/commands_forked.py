"""Commands of Bitladder, each in a process of its own, forked off this one, which has imported what they need: to
import it anew takes longer than most of them.

A line of JSON on stdin for each, the arguments of ``become``; on stdout a line, its exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

NEEDED = (
    "torch", "transformers", "bitladder.cli", "bitladder.pipeline", "bitladder.stages.calibration",
    "bitladder.stages.measure", "bitladder.stages.quantize", "bitladder.stages.recipe",
)  # fmt: skip


def become(words: list[str], environment: dict[str, str], folder: str) -> None:
    """``bitladder WORDS`` in a folder, its output in the files ``out`` and ``err`` there."""
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in enumerate((os.devnull, "out", "err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    sys.argv = ["bitladder", *words]
    importlib.import_module("dying")
    importlib.import_module("bitladder.cli").main()


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    for name in NEEDED:
        importlib.import_module(name)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            become(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
