"""llama.cpp's server as a process: start it, know where it listens, notice its death, keep its last words, stop it.

Nothing here speaks the chat API; ``engines.llama`` does for measuring, and the gateway does for serving.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from bitladder.engines.llama_program import LlamaProgram
from bitladder.errors import BadInput, EngineError, EngineGone, EngineTimeout

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
KEY_VARIABLE = "LLAMA_API_KEY"
"""Where llama.cpp's server looks for its key; empty: none."""
_LOG_LINES = 200
_LOG_WIDTH = 500


@dataclass(frozen=True)
class LlamaSettings:
    """How to run one model file; part of the evidence of everything measured with it."""

    path: str
    n_ctx: int = 4096
    """Tokens of context *of one request*; the engine is given ``n_ctx * n_parallel`` in all."""
    n_parallel: int = 1
    """Slots: requests computed together."""
    threads: int = 2
    n_gpu_layers: int = -1
    """Layers kept on the GPU: -1 as many as fit, 0 none. Without a GPU it has no effect."""
    n_batch: int = 512
    """Tokens of a prompt computed in one go."""
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    prompt_cache_mib: int = 0
    """Memory for prompts that left their slot. llama.cpp's own default is 8 GiB, which no plan has counted."""
    alias: str = ""
    """The name it answers to; empty: the file's name without ``.gguf``."""
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one."""

    def __post_init__(self) -> None:
        for name, least in (("n_ctx", 16), ("n_parallel", 1), ("threads", 1), ("n_batch", 1)):
            if getattr(self, name) < least:
                raise BadInput(f"The {name} of an engine must be at least {least}. Got {getattr(self, name)} instead.")
        for name in ("cache_type_k", "cache_type_v"):
            if getattr(self, name) not in CACHE_TYPES:
                allowed = ", ".join(CACHE_TYPES)
                raise BadInput(
                    f"The {name} of an engine must be one of {allowed}. Got '{getattr(self, name)}' instead."
                )

    @property
    def model_name(self) -> str:
        """The name the engine answers to."""
        return self.alias or Path(self.path).name.removesuffix(".gguf")


class LlamaProcess:
    """One llama.cpp server in a process of its own. It dies with us; its crash is an EngineError and not our end.

    ``program``: an installed ``llama-server`` to run instead of the built-in engine. ``api_key``: what requests must
    carry; the engine answers any web page in a browser on this machine otherwise.
    """

    def __init__(self, settings: LlamaSettings, program: LlamaProgram | None = None, api_key: str = "") -> None:
        self.settings = settings
        self._program = program
        self._api_key = api_key
        self.base_url = ""
        """``http://host:port`` once started."""
        self.engine = ""
        """Engine and version, once started."""
        self.load_seconds = float("nan")
        self._process: subprocess.Popen[str] | None = None
        self._log: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        self._log_thread: threading.Thread | None = None

    def start(self, timeout_s: float = 600.0) -> None:
        """Start, and wait until the model is loaded and /health says so.

        Raises:
            BadInput: there is no such file.
            EngineGone: the engine ended instead; the message carries its last words.
            EngineTimeout: the model was not loaded in time.
        """
        if not Path(self.settings.path).is_file():
            raise BadInput(f"There is no file '{self.settings.path}'.", do="Give the path of a GGUF file.")
        began = time.monotonic()
        port = self.settings.port
        if self._program is None:
            arguments = json.dumps({**dataclasses.asdict(self.settings), "alias": self.settings.model_name})
            command = ["bitladder.engines.llama_child", arguments]
        else:
            port = port or _free_port(self.settings.host)
            command = ["bitladder.engines.llama_keeper", *self._program.command(self.settings, port)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, KEY_VARIABLE: self._api_key},  # not on the command line, where others can read it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert self._process.stderr is not None and self._process.stdout is not None
        self._log_thread = threading.Thread(target=self._keep_log, args=(self._process.stderr,), daemon=True)
        self._log_thread.start()
        try:
            if self._program is None:
                hello = self._first_line(self._process.stdout, began + timeout_s)
                self.base_url, self.engine = hello["address"], hello["engine"]
            else:
                self.base_url, self.engine = f"http://{self.settings.host}:{port}", self._program.name
            self._wait_for_health(began + timeout_s)
        except BaseException:
            self.stop(grace_s=0.0)  # while loading it cannot hear that its stdin closed
            raise
        self.load_seconds = time.monotonic() - began

    def poll(self) -> int | None:
        """None while it runs, otherwise its exit code (negative: the signal that ended it)."""
        return None if self._process is None else self._process.poll()

    @property
    def pid(self) -> int | None:
        """Process id while there is one."""
        return None if self._process is None else self._process.pid

    def last_log(self, lines: int = 8) -> str:
        """The engine's last words."""
        return "\n".join(list(self._log)[-lines:])

    def death(self, wait_s: float = 0.0) -> EngineGone | None:
        """An error that tells how it ended, or None when it still runs after waiting ``wait_s`` for the end."""
        if self._process is None:
            return EngineGone("The engine is not running.", do="Start it first.")
        try:
            code = self._process.wait(timeout=wait_s) if wait_s else self._process.poll()
        except subprocess.TimeoutExpired:
            return None
        if code is None:
            return None
        if self._log_thread is not None:
            self._log_thread.join(timeout=1.0)  # its last words may still be in the pipe
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        means = "It was probably ended for using too much memory." if code == -signal.SIGKILL else ""
        return EngineGone(
            f"The engine for '{self.settings.model_name}' {how}.",
            means="\n".join(part for part in (means, "Its last words:", self.last_log()) if part),
            do="Try a smaller context or level, or see with `bitladder inspect` whether the file is sound.",
        )

    def stop(self, grace_s: float = 5.0) -> None:
        """End it: first by closing its stdin, then by force. Calling it twice does no harm."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.close()
        try:
            process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._log_thread is not None:
            self._log_thread.join(timeout=1.0)
        process.stdout.close()
        process.stderr.close()

    def _keep_log(self, stream: IO[str]) -> None:
        for line in stream:
            self._log.append(line.rstrip()[:_LOG_WIDTH])

    def _first_line(self, stream: IO[str], deadline: float) -> dict[str, str]:
        """The child's line of JSON with its address; reading happens in a thread because a pipe has no timeout."""
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: lines.put(stream.readline()), daemon=True).start()
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise self._late() from None
        if not line:
            raise self.death(wait_s=5.0) or EngineError("The engine closed its output before it was ready.")
        hello: dict[str, str] = json.loads(line)
        return hello

    def _wait_for_health(self, deadline: float) -> None:
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while time.monotonic() < deadline:
                try:
                    if client.get(f"{self.base_url}/health").status_code == httpx.codes.OK:
                        return
                except httpx.TransportError:
                    dead = self.death()
                    if dead is not None:
                        raise dead from None
                time.sleep(0.05)
        raise self._late()

    def _late(self) -> EngineTimeout:
        return EngineTimeout(
            f"The engine did not load '{self.settings.path}' in time.",
            means="Its last words:\n" + self.last_log(),
            do="Allow it longer, or look whether the disk or the memory is the bottleneck.",
        )


def _free_port(host: str) -> int:
    """A port nobody listens on. Not every build takes 0 and tells what it got; should another program be faster to
    this one, the server ends at once, and is started again with the next.
    """
    with socket.socket() as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])
