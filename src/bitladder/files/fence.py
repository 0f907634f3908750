"""Start a process behind the fence of ``files/converter_child.py``: what reads a stranger's files with a library that
can load code.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bitladder.errors import BadInput
from bitladder.files import converter_child
from bitladder.files.probe import memory
from bitladder.system import HAS_PROCESS_LIMITS

_PACKAGES = (
    "torch", "transformers", "numpy", "safetensors", "sentencepiece", "google.protobuf", "yaml", "tqdm", "jinja2",
    "markupsafe",
)  # fmt: skip
"""What the children import; the folders they lie in are their search path."""
_INHERITED = ("LD_LIBRARY_PATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""The only variables of our environment that a child gets: how libraries are found, and how many threads to use."""


def memory_bound(wanted: int) -> int:
    """The bytes a child may take: what it can need, at most nine tenths of the machine or container."""
    return min(int(0.9 * memory()[0]), wanted)


def environment(work: Path) -> dict[str, str]:
    """A child's whole environment: no token, no proxy, no cache of the user, nobody's home."""
    made = {}
    for name in ("HOME", "TMPDIR", "HF_HOME", "HF_MODULES_CACHE", "XDG_CACHE_HOME"):
        path = work / name.lower()
        path.mkdir()
        made[name] = str(path)
    return {
        **{name: os.environ[name] for name in _INHERITED if name in os.environ},
        **made,
        "PATH": "/usr/bin:/bin",
        "LC_ALL": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
    }


def package_folders() -> list[str]:
    """The folders that the children's packages lie in, once each."""
    folders: dict[str, None] = {}
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations if spec else None) or ():
            folders[str(Path(place).parents[name.count(".")])] = None
    return list(folders)


@contextmanager
def fenced(job: converter_child.ChildJob, env: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The process with its output in one stream; ended when the caller is interrupted.

    Raises:
        BadInput: this system has no limits to put it under (Windows).
    """
    if not HAS_PROCESS_LIMITS:
        raise BadInput(
            "A checkpoint is converted, and its tokenizer read, by a process under limits; this system has none.",
            means="Its files are a stranger's: without bounds on memory, time and files they are not given to it.",
            do="Give a GGUF file, or run this command in Linux (on Windows in WSL) or macOS.",
        )
    with subprocess.Popen(
        [sys.executable, "-I", "-B", "-X", "utf8", converter_child.__file__],
        env=env,
        cwd=folder,
        text=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        try:
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it died at once: its output says why
                child.stdin.write(json.dumps(job) + "\n")
                child.stdin.close()
            yield child
        finally:
            if child.poll() is None and sys.exc_info()[0] is not None:
                child.kill()


@contextmanager
def ended_after(child: subprocess.Popen[str], seconds: float) -> Iterator[threading.Timer]:
    """Kill the process when it takes longer; the timer lives as long as it was in time."""
    late = threading.Timer(seconds, child.kill)
    late.start()
    try:
        yield late
    finally:
        late.cancel()
