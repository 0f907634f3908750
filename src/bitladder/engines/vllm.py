"""vLLM, where it is installed: checkpoint folders, over its server."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from bitladder.engines.base import Identity, Launch
from bitladder.engines.served import ServedEngine
from bitladder.errors import EngineError, EngineReply

NAME = "vllm"
KEY_VARIABLE = "VLLM_API_KEY"
_VERSION = re.compile(r"(?:^|\s)v?(\d+\.\d+\S*)\s*$")
_ASK_S = 120.0
"""It imports torch and looks for devices before it says its version."""


@dataclass(frozen=True)
class Vllm:
    """The ``vllm`` on the search path, as an ``engines.base.EngineKind``."""

    name = NAME

    def missing(self) -> str:
        """What to do where there is none."""
        if shutil.which(NAME):
            return ""
        return "Install vLLM so that `vllm` is on the PATH, or start an engine elsewhere and give its address."

    def identity(self) -> Identity:
        """Its version, as the program itself prints it.

        Raises:
            EngineError: it cannot be asked.
        """
        return Identity(NAME, _version(shutil.which(NAME) or NAME))

    def prepare(self, launch: Launch) -> VllmServer:
        """The engine for a checkpoint folder, not yet started."""
        return VllmServer(launch, self.identity())


class VllmServer(ServedEngine):
    """``vllm serve`` of one folder, offline: no code of the folder runs, and no sampling defaults of it apply."""

    def command(self, port: int) -> Sequence[str]:
        """With the context and the slots that were planned."""
        given = self.launch
        return [
            shutil.which(NAME) or NAME, "serve", str(given.path), "--served-model-name", self.name,
            "--host", given.host, "--port", str(port), "--max-model-len", str(given.n_ctx),
            "--max-num-seqs", str(given.n_parallel), "--generation-config", "vllm",
        ]  # fmt: skip

    def environment(self) -> dict[str, str | None]:
        """Its key, its threads, and that it asks nobody."""
        return {
            KEY_VARIABLE: self.launch.api_key or None,
            "OMP_NUM_THREADS": str(self.launch.threads),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids (``engines.base.Running.tokenize``)."""
        body = {"model": self.name, "prompt": text, "add_special_tokens": add_special}
        tokens = self._post("/tokenize", body).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise EngineReply(f"The engine at {self.base_url}/tokenize answered without tokens.")
        return tokens


@functools.cache
def _version(program: str) -> str:
    try:
        done = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"The version of '{program}' cannot be read: {error}.") from None
    for line in reversed(done.stdout.decode(errors="replace").splitlines()):
        if found := _VERSION.search(line):
            return found[1]
    raise EngineError(
        f"'{program}' prints no version as vLLM does.", do="See what `vllm --version` prints, or install it anew."
    )
