"""Run golden commands, all in this process, through ``python -m bitladder``; write what came of them as JSON.

PYTHONPATH=CHECKOUT/src python runner.py SOURCES WORK RESULTS.json [--tested] [NAME ...]
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import runpy
import shlex
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import commands as golden
import digest


def call(words: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``bitladder WORDS``."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["bitladder", *words]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("bitladder", run_name="__main__")
    except SystemExit as left:
        code = left.code
    except Exception:
        code, _ = 70, err.write(traceback.format_exc())
    finally:
        sys.argv = before
    return int(code or 0), out.getvalue(), err.getvalue()


def words_of(command: golden.Command, sources: Path, work: Path, own: Path) -> list[str]:
    """The words of a call, in JSON, on one thread."""
    places = {"$S": str(sources), "$R": str(work), "$O": str(own)}
    found = shlex.split(command.words)
    for short, path in places.items():
        found = [word.replace(short, path) for word in found]
    threads = [] if found[0] in ("inspect", "plan") else ["--threads", "1"]
    return [*found, *threads, "--json"]


def _alike_everywhere() -> None:
    """Passes in f32 by torch's own products on every processor: which ones multiply otherwise is theirs, and moves what
    they gather. Speeds, which nothing here depends on, are timed for a moment."""
    from bitladder.stages import evaluate, speeds
    from bitladder.walk import products

    products.half_products_pay = products.one_dnn_pays = lambda: False  # type: ignore[assignment]
    speeds.LONG_S = 0.0
    evaluate.PREFILL_TOKENS, evaluate.DECODE_TOKENS = 64, 8


def product(command: golden.Command, sources: Path, work: Path) -> dict[str, Any]:
    """What a command writes and prints, its clock apart."""
    own = work / command.folder
    own.mkdir(parents=True)
    started, computed = time.monotonic(), time.process_time()
    code, out, err = call(words_of(command, sources, work, own))
    seconds, cpu = time.monotonic() - started, time.process_time() - computed
    if code == 70:
        print(err, file=sys.stderr)
    record = json.loads(out) if out.strip() else {"stderr": err}
    places = {str(own): "$O", str(work): "$R", str(sources): "$S"}
    kept = own / "run" / "run.json"
    return {
        "seconds": round(seconds, 2),
        "cpu": round(cpu, 2),
        "code": code,
        "record": digest.steady(record, places),
        "written": digest.steady(json.loads(kept.read_text()), places) if kept.exists() else None,
        "files": digest.of_folder(own, sketched=command.calibrated),
    }


def host() -> str:
    """What decides how sums are rounded: the processor, and the libraries that add."""
    import numpy
    import torch

    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(set(line.split()) for line in lines if line.startswith("flags"))
        model += "".join(f" {flag}" for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    return f"{model}, torch {torch.__version__}, numpy {numpy.__version__}"


def main() -> None:
    sources, work, results, *names = sys.argv[1:]
    tested = "--tested" in names
    names = [name for name in names if name != "--tested"]
    root = Path(work).absolute()
    shutil.rmtree(root, ignore_errors=True)
    os.environ["BITLADDER_DATA"], os.environ["BITLADDER_CACHE"] = str(root / "data"), str(root / "cache")
    os.environ.setdefault("BITLADDER_STORE", f"{root / 'evidence.sqlite'}")
    chosen = [
        one
        for one in golden.commands()
        if (not tested or one.tested) and (not names or any(name in one.name for name in names))
    ]
    _alike_everywhere()
    found: dict[str, Any] = {}
    for one in chosen:
        found[one.name] = product(one, Path(sources).absolute(), root)
        if one.name != "plain llama":  # others read it
            for path in (root / one.folder).rglob("*.gguf"):
                path.unlink()
        print(
            "{}: {seconds} s, {cpu} of CPU, exit {code}".format(one.name, **found[one.name]),
            file=sys.stderr,
            flush=True,
        )
    import bitladder

    Path(results).write_text(json.dumps({"host": host(), "of": bitladder.__file__, "commands": found}, indent=1))


if __name__ == "__main__":
    main()
