"""mlx-lm, where it is installed, in our environment or in one of its own: MLX's folders, over its server."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitladder.engines import mlx_child
from bitladder.engines.base import Identity, Launch
from bitladder.engines.served import ServedEngine
from bitladder.errors import EngineError

NAME = "mlx-lm"
_PROGRAM = "mlx_lm.server"
_LONGEST_LINE = 512
_VERSION = "from importlib.metadata import version; print(version('mlx-lm'))"
_ASK_S = 60.0


@dataclass(frozen=True)
class MlxLm:
    """mlx-lm as an ``engines.base.EngineKind``."""

    name = NAME

    def missing(self) -> str:
        """What to do where there is none."""
        if _interpreter():
            return ""
        return (
            "Install mlx-lm (pip install 'bitladder[mlx]', or so that `mlx_lm.server` is on the PATH), or start an "
            "engine elsewhere and give its address."
        )

    def identity(self) -> Identity:
        """Its version, as its own environment knows it.

        Raises:
            EngineError: it cannot be asked.
        """
        return Identity(NAME, _version(_interpreter() or sys.executable))

    def prepare(self, launch: Launch) -> MlxServer:
        """The engine for a folder, not yet started."""
        return MlxServer(launch, self.identity())


class MlxServer(ServedEngine):
    """mlx-lm's server with one folder (``mlx_child.py``), offline. Its context grows with what it is asked."""

    def command(self, port: int) -> Sequence[str]:
        """With the slots that were planned."""
        given = self.launch
        script = str(Path(mlx_child.__file__).resolve())
        words = [str(Path(given.path).absolute()), self.name, given.host, str(port), str(given.n_parallel)]
        return [_interpreter() or sys.executable, script, *words]

    def environment(self) -> dict[str, str | None]:
        """Its key, its threads, and that it asks nobody; modules that we are told to look for are not its own."""
        return {
            mlx_child.KEY_VARIABLE: self.launch.api_key or None,
            "OMP_NUM_THREADS": str(self.launch.threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": None,
        }


def _interpreter() -> str | None:
    """The Python that mlx-lm is installed for: ours, or the one whose program is on the path."""
    if importlib.util.find_spec("mlx_lm") is not None:
        return sys.executable
    program = shutil.which(_PROGRAM)
    if program is None:
        return None
    try:
        with Path(program).open("rb") as file:
            line = file.readline(_LONGEST_LINE).decode(errors="replace")
    except OSError:
        return None
    named = line.removeprefix("#!").strip()
    return shutil.which(named) if line.startswith("#!") and Path(named).is_absolute() else None


@functools.cache
def _version(python: str) -> str:
    try:
        done = subprocess.run(
            [python, "-c", _VERSION], stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_S, check=True, cwd="/"
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(f"The version of mlx-lm cannot be read with '{python}': {error}.") from None
    return done.stdout.decode(errors="replace").strip()[:40]
