"""Claim: writing Q4_K_M takes a fifth of the time of llama.cpp's own quantizer, on the same file and threads.

    scripts/bench quantize_command SOURCE.gguf --llama PYTHON [--level Q4_K_M] [--threads 2] [--rounds 5]
    scripts/bench quantize_command --gigabytes 2.7 --llama PYTHON        (a synthetic F16 model of that size)

PYTHON is the interpreter of an environment with ``llama-cpp-python`` (``pip install llama-cpp-python``
compiles llama.cpp for this machine; ours does not need it). Both sides take turns on a warm page cache. Ours
is the whole command, interpreter and imports included, with the source's hash not known beforehand; theirs is
the call of ``llama_model_quantize`` alone.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from big_file import make_model

from bitladder.formats.recipes import FILE_TYPES, level_named

THEIRS = """
import ctypes, json, resource, sys, time
import llama_cpp
source, out, file_type, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
silent = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C holds no reference
llama_cpp.llama_log_set(silent, None)
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = file_type, threads
before = resource.getrusage(resource.RUSAGE_SELF)
started = time.perf_counter()
code = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
wall = time.perf_counter() - started
after = resource.getrusage(resource.RUSAGE_SELF)
assert code == 0, code
print(json.dumps({"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}))
"""


def theirs(python: str, source: Path, out: Path, level: str, threads: int) -> dict[str, float]:
    command = [
        python,
        "-c",
        THEIRS,
        str(source),
        str(out / "theirs.gguf"),
        str(FILE_TYPES[level]),
        str(threads),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def ours(source: Path, out: Path, level: str, threads: int, effort: str) -> dict[str, float]:
    cache = out / "cache"
    shutil.rmtree(cache / "hashes", ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "bitladder",
        "quantize",
        str(source),
        "--to",
        level,
        "--out",
        str(out / "ours"),
    ]
    command += ["--threads", str(threads), "--effort", effort, "--imatrix", "none", "--json"]
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "BITLADDER_CACHE": str(cache)})
    wall, after = time.perf_counter() - started, os.times()
    shutil.rmtree(out / "ours")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": wall, "cpu": cpu}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--gigabytes", type=float, default=1, help="Size of the model that is made when none is given.")
    parser.add_argument("--llama", required=True, metavar="PYTHON")
    parser.add_argument("--level", type=level_named, default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="Folder for the files; a temporary one by default.")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"llama.cpp": [], "bitladder fast": [], "bitladder good": []}
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        out = Path(folder)
        if options.source is None:
            options.source = out / "synthetic-F16.gguf"
            make_model(options.source, int(options.gigabytes * 1e9))
        options.source.read_bytes()  # warm the page cache
        ours(options.source, out, options.level, options.threads, "fast")  # compile once
        ours(options.source, out, options.level, options.threads, "good")
        for _ in range(options.rounds):
            common = (options.source, out, options.level, options.threads)
            rows["llama.cpp"].append(theirs(options.llama, *common))
            rows["bitladder fast"].append(ours(*common, "fast"))
            rows["bitladder good"].append(ours(*common, "good"))
    print(f"{options.source.name} to {options.level}, {options.threads} threads, {options.rounds} rounds in turn")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print("seconds: median (fastest to slowest)")
    base = {key: statistics.median(row[key] for row in rows["llama.cpp"]) for key in ("wall", "cpu")}
    for name, measured in rows.items():
        wall, cpu = ([row[key] for row in measured] for key in ("wall", "cpu"))
        ratio = f"{base['wall'] / statistics.median(wall):.1f}x wall, {base['cpu'] / statistics.median(cpu):.1f}x CPU"
        print(f"{name:15} wall {spread(wall):24} CPU {spread(cpu):24} {ratio}")


if __name__ == "__main__":
    main()
