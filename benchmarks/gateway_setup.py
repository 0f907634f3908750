"""Start what the gateway's benchmarks compare: the fake engine, our gateway, LiteLLM's proxy when there is
one.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
LITELLM = os.environ.get("BITLADDER_LITELLM", "")
"""The `litellm` command of an environment of its own (`pip install 'litellm[proxy]'`); empty: leave it out.
"""


@contextlib.contextmanager
def running(command: Sequence[str], log_file: str = "") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A child process that prints a line of JSON with its address; ended at the end. Its log goes to ``log_file``."""
    with Path(log_file).open("w+") if log_file else tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                raise RuntimeError(f"{command[:3]} did not start:\n{log.read()[-2000:]}")
            yield json.loads(line)["address"], process
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def fake_engine(
    model: str = "fake", *, first_ms: float = 0.0, interval_ms: float = 50.0, port: int = 0, mischief: float = 0.0
) -> contextlib.AbstractContextManager[tuple[str, subprocess.Popen[str]]]:
    """The engine that computes nothing."""
    script = str(HERE / "fake_engine.py")
    options = ["--first-ms", str(first_ms), "--interval-ms", str(interval_ms), "--port", str(port)]
    options += ["--mischief", str(mischief)]
    return running([sys.executable, script, "--model", model, *options])


def our_gateway(
    *urls: str, slots: int = 4096, log: str = ""
) -> contextlib.AbstractContextManager[tuple[str, subprocess.Popen[str]]]:
    """`bitladder.serve` before one engine, or two: quality, speed."""
    return running([sys.executable, str(HERE / "gateway_process.py"), str(slots), *urls], log)


def our_replicas(
    *urls: str, processes: int = 1
) -> contextlib.AbstractContextManager[tuple[str, subprocess.Popen[str]]]:
    """`bitladder.serve` before engines that are replicas of one tier."""
    script = str(HERE / "gateway_process.py")
    return running([sys.executable, script, "4096", *urls, "--replicas", f"--processes={processes}", "--quiet"])


@contextlib.contextmanager
def litellm_proxy(url: str, port: int = 4077) -> Iterator[str]:
    """LiteLLM's proxy before the same engine, with its logging off."""
    entry = {
        "model_name": "quality",
        "litellm_params": {"model": "openai/fake", "api_base": f"{url}/v1", "api_key": "x"},
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(json.dumps({"model_list": [entry], "litellm_settings": {"telemetry": False}}))
        command = [
            LITELLM,
            "--config",
            str(config),
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
            "--num_workers",
            "1",
        ]
        environment = {
            **os.environ,
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # neither side checks keys
        }
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                wait_for(f"http://127.0.0.1:{port}/health/liveliness", 180)
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()
                process.wait(timeout=20)


def wait_for(url: str, seconds: float) -> None:
    """Until ``url`` answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def resident_bytes(process: subprocess.Popen[str]) -> int:
    """Memory of a process now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def setting() -> dict[str, object]:
    """What a number depends on: the machine and how busy it was."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 1),
    }
