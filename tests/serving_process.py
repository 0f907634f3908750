"""The `bitladder` command as a process of its own, in a folder and an environment that hold nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

import bitladder

READY_S = 120.0
CHAT = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """What a service is given: a home, a search path without our programs, and where this package lies."""
    home.mkdir(parents=True, exist_ok=True)
    kept = {"PATH": "/usr/bin:/bin", "HOME": str(home), "OMP_NUM_THREADS": "1"}
    return {**kept, "PYTHONPATH": str(Path(bitladder.__file__).parents[1]), **more}


def program_in(folder: Path) -> Path:
    """A program `bitladder` in a folder, as pip makes one."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "bitladder"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m bitladder "$@"\n')
    program.chmod(0o755)
    return program


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def started(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    *,
    secret: str = "",
    end: signal.Signals = signal.SIGTERM,
    own_group: bool = False,
) -> Iterator[str]:
    """A gateway that is ready; gives its URL. At the end it is asked to stop, and must do so in good order."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdout=errors,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            process_group=0 if own_group else None,
        )
    try:
        yield _ready(process, log, secret)
        process.send_signal(end)
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _ready(process: subprocess.Popen[bytes], log: Path, secret: str) -> str:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        found = re.search(r"^Serving .* at http://[^ /]*:(\d+)/v1", log.read_text(), re.MULTILINE)
        if found is not None:
            url = f"http://127.0.0.1:{found[1]}"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                    return url
        assert process.poll() is None, f"exit {process.returncode}: {log.read_text()}"
        time.sleep(0.1)
    raise AssertionError(f"not ready in {READY_S:g} s: {log.read_text()}")


def ask(url: str, model: str = "auto", *, key: str = "") -> httpx.Response:
    """One answer from a gateway."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body: dict[str, Any] = {**CHAT, "model": model}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120, trust_env=False)


def run_cli(*arguments: object, folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """A verb to its end."""
    command = [sys.executable, "-m", "bitladder", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=dict(environment), capture_output=True, text=True, timeout=300, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def own_environment(data: Path, **more: str) -> dict[str, str]:
    """This process' environment with evidence of its own."""
    path = str(Path(bitladder.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": path, "BITLADDER_DATA": str(data), "OMP_NUM_THREADS": "1", **more}
