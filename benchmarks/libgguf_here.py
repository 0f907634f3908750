"""libgguf for the benchmarks, in a folder of its own in the cache: it is no dependency of the project."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

from bitladder.files.folders import cache_folder

VERSION = "0.2.2"


def libgguf_or_exit() -> Any:
    """The module, installed first if need be; without it the benchmark ends, with a word."""
    place = cache_folder("benchmarks", f"libgguf-{VERSION}-{sys.implementation.cache_tag}")
    sys.path.append(str(place))
    try:
        return importlib.import_module("libgguf")
    except ImportError:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-deps", "--upgrade", "--target", str(place), f"libgguf=={VERSION}"]
        if subprocess.run(pip, check=False).returncode:
            sys.exit(f"skipped: libgguf {VERSION} (ggml's quantizers) cannot be installed here")
        importlib.invalidate_caches()
        return importlib.import_module("libgguf")
