"""libgguf for the benchmarks, in a folder of its own: it is no dependency of the project."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

PLACE = Path(__file__).resolve().parent.parent / ".venv" / "libgguf"
VERSION = "0.2.2"


def libgguf_or_exit() -> Any:
    """The module, installed first if need be; without it the benchmark ends, with a word."""
    sys.path.append(str(PLACE))
    try:
        return importlib.import_module("libgguf")
    except ImportError:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(PLACE),
            f"libgguf=={VERSION}",
        ]
        if subprocess.run(install, check=False).returncode:
            sys.exit(f"skipped: libgguf {VERSION} (ggml's quantizers) cannot be installed here")
        importlib.invalidate_caches()
        return importlib.import_module("libgguf")
