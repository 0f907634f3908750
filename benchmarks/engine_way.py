"""Time and memory of measuring and of gathering importance: in the engine against the walk, on one model and text.

    scripts/bench engine_way [--model smollm2-135m] [--windows 3] [--rounds 3] [--threads 1]

Two levels are written first. Then each round measures them both ways and gathers an importance matrix both ways, each
in a process of its own and in turns, so that other work on the machine meets all alike. Processor seconds of the
process and its children, imports included; peak resident memory of the larger of the two, in which the engine's mapped
files count. The figures of both ways stand beside each other, as rows of the table in docs/measure.md: the engine's
contain its rounding of inputs. A round of the default takes some three minutes of one processor.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bitladder.describe.windows import Window
from bitladder.files.gguf import GgufFile
from bitladder.files.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from bitladder.files.sources import resolve
from bitladder.records.fidelity import Fidelity
from bitladder.stages.engine_way import engine_fidelities, engine_matrix
from bitladder.stages.job import Build, Job, Work, opened
from bitladder.stages.measure import documents

LEVELS = ("Q8_0", "Q4_K_M")


def one_pass(name: str, source: Path, files: list[Path], windows: int, threads: int) -> dict[str, object]:
    """Do one of the four, and say what it took. An importance matrix is left beside the levels."""
    with opened(str(source), Work(threads=threads)) as job:
        text = job.windows(documents(()))[:windows]
        done = _done(name, job, files, text)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in used)
    tokens = sum(len(window.tokens) for window in text)
    if isinstance(done, ImportanceMatrix):
        write_imatrix(_kept(name, files), done)
        done = []
    kl = {level: one.kl_mean for level, one in zip(LEVELS, done, strict=False)}
    return {"cpu": cpu, "peak": max(one.ru_maxrss for one in used) / 1024, "kl": kl, "tokens": tokens}


def _done(name: str, job: Job, files: list[Path], text: list[Window]) -> list[Fidelity] | ImportanceMatrix:
    model, threads = job.source, job.threads
    levels = list(zip(LEVELS, files, strict=True))
    if name == "fidelity, engine":
        return list(engine_fidelities(job, model.path, levels, text))
    if name == "importance, engine":
        return engine_matrix(job, text, "")
    import torch

    from bitladder.stages.fidelity import file_candidate, walk
    from bitladder.stages.imatrix import importance_matrix

    torch.set_num_threads(threads)
    if name == "importance, walk":
        return importance_matrix(model, text, threads=threads)
    opened = [file_candidate(model, GgufFile.open(path), level=level) for level, path in levels]
    return walk(model, opened, text, threads=threads)


def _kept(name: str, files: list[Path]) -> Path:
    return files[0].parent / f"{name.replace(', ', '-')}.gguf"


def _differences(files: list[Path]) -> str:
    """How far the two importance matrices are apart, channel by channel."""
    engine, walk = (read_imatrix(_kept(f"importance, {way}", files)) for way in ("engine", "walk"))
    counts = all(np.array_equal(engine.counts[name], own) for name, own in walk.counts.items())
    apart = []
    for name, own in walk.mean_squares.items():
        seen = own > 0.01 * own.mean()
        apart.append(np.abs(engine.mean_squares[name][seen] / own[seen] - 1))
    every = np.concatenate(apart)
    return (
        f"importance of {len(apart)} tensors, {every.size} channels: apart by {np.median(every):.2%} at the median, "
        f"{np.quantile(every, 0.99):.2%} at the 99th percentile, {every.max():.2%} at most; counts "
        f"{'equal' if counts else 'differ'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, source, *files = options.one
        print(json.dumps(one_pass(name, Path(source), list(map(Path, files)), options.windows, options.threads)))
        return 0
    from bitladder.levels import parse_levels
    from bitladder.stages.quantize import build_levels

    source = resolve(options.model).path
    with tempfile.TemporaryDirectory() as folder:
        build = Build(out=Path(folder), imatrix="none")
        built = build_levels(str(source), parse_levels(LEVELS), build, Work(threads=options.threads))
        files = [str(file.path) for file in built.files]
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(options.rounds):
            for name in ("fidelity, walk", "fidelity, engine", "importance, walk", "importance, engine"):
                command = [sys.executable, __file__, "--windows", str(options.windows)]
                command += ["--threads", str(options.threads), "--one", name, str(source), *files]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
        apart = _differences(list(map(Path, files)))
    print(f"{source.name}, {found['fidelity, walk'][0]['tokens']} tokens, {options.rounds} rounds in turns\n")
    print("| | processor seconds | peak memory | KL |\n|---|---|---|---|")
    for name, rounds in found.items():
        cpu = [float(one["cpu"]) for one in rounds]
        kl = ", ".join(f"{level} {value:.5f}" for level, value in dict(rounds[0]["kl"]).items())
        peak = max(float(one["peak"]) for one in rounds)
        print(f"| {name} | {statistics.median(cpu):.1f} ({min(cpu):.1f} to {max(cpu):.1f}) | {peak:.0f} MiB | {kl} |")
    print(f"\n{apart}")
    for what in ("fidelity", "importance"):
        pairs = zip(found[f"{what}, engine"], found[f"{what}, walk"], strict=True)
        ratios = [float(one["cpu"]) / float(other["cpu"]) for one, other in pairs]
        print(
            f"{what}: the engine takes {statistics.median(ratios):.2f} times the walk's processor time "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
