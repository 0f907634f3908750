"""Claim: a budgeted recipe, weighed, written and proved, costs some four GPTQ 4-bit walks, at best effort seven.

    scripts/bench recipe_time --model reference-f16.gguf [--bpw 4.5] [--effort good] [--threads 1] [--keep DIR [--one]]
        [--json FILE]

From nothing: the walk rounds every linear layer to 4 bits in groups of 64 over all windows of the shorter text that
ships; the recipe, which with ``--effort best`` is fitted to all text that ships, five times as much, weighs every
tensor, measures four recipes to scale its predictions, chooses, writes the file with error feedback and measures it on
the windows held out. Processor seconds of one run, so that other work on the machine does not count; tokenizing, which
both need, is on neither's clock.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.plan.recipe import Limits, choose
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.stages.calibration import calibration_texts
from bitladder.stages.job import Build, Work, opened
from bitladder.stages.recipe import measured_on, write_recipe
from bitladder.stages.weighing import parts_of_text, weighed_tensors
from bitladder.walk.checkpoint_walk import Settings

LEVEL = "GPTQ-4bit-g64"


class Clock:
    """Processor seconds of each part, kept in a folder with what it made; parts that are there are not done again."""

    def __init__(self, folder: Path, *, one: bool) -> None:
        self._file, self._one = folder / "seconds.json", one
        self.parts: dict[str, float] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def __call__(self, part: str, work: Callable[[], Any]) -> Any:
        """Do the work, on the clock the first time."""
        known, started = part in self.parts, time.process_time()
        found = work()
        if not known:
            self.parts[part] = time.process_time() - started
            self._file.write_text(json.dumps(self.parts))
        print(f"{part:24} {self.parts[part]:6.0f} CPU s", flush=True)
        if self._one and not known:
            raise SystemExit(0)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--bpw", type=float, default=4.5)
    parser.add_argument("--effort", default="good", choices=("good", "best"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for what is made; a broken-off run goes on there")
    parser.add_argument("--one", action="store_true", help="end after one part")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.model.exists():
        print(f"{options.model} is absent; nothing was measured")
        return 1
    torch.set_num_threads(options.threads)
    work = Work(threads=options.threads)
    with tempfile.TemporaryDirectory() as scratch, opened(str(options.model), work) as job:
        source = job.source
        out = (options.keep or Path(scratch)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        os.environ["BITLADDER_CACHE"] = str(out)  # nothing that an earlier run has kept elsewhere
        clock, texts = Clock(out, one=options.one), calibration_texts(job)
        windows = job.windows(texts)
        tokens = sum(len(window.tokens) for window in windows)
        build = Build(out=out, effort=options.effort)
        parts = parts_of_text(job.windows(calibration_texts(job, build.calibration)))
        fitted = sum(len(window.tokens) for window in parts.fitting)
        print(f"{tokens} tokens for the walk, {fitted} to fit codes to, load {os.getloadavg()[0]:.1f}", flush=True)
        settings = Settings(threads=options.threads)
        if LEVEL not in clock.parts:
            level = parse_checkpoint(LEVEL)
            walk = Calibration(source, [level], Reading(windows), out_dir=out, name="walk", settings=settings)
            clock(LEVEL, walk.run)
        table, _ = clock("weighing and checking", lambda: weighed_tensors(job, parts, build.calibration))
        recipe = clock("choosing", lambda: choose(table, source.model, Limits(bpw=options.bpw)))
        made = clock(
            "writing",
            lambda: write_recipe(job, recipe, parts.fitting, build),
        )
        held = clock(
            "proving",
            lambda: measured_on(job, made.file.path, parts.held_out),
        )
    walked = clock.parts.pop(LEVEL)
    ratio = sum(clock.parts.values()) / walked
    print(
        f"{recipe.label}: mean KL {held.kl_mean:.4f}, {sum(clock.parts.values()):.0f} CPU s, {ratio:.2f} times {LEVEL}"
    )
    if options.json:
        found = {"benchmark": "recipe_time", "walk": walked, "parts": clock.parts, "ratio": ratio, "tokens": tokens}
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
