"""A server as a process: start it, know where it listens, notice its death, keep its last words, stop it.

Nothing here knows an engine; ``engines.served`` speaks to what runs here.
"""

from __future__ import annotations

import collections
import json
import math
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

import httpx

from bitladder.engines.base import Launch
from bitladder.engines.keeper import end_tree
from bitladder.errors import EngineError, EngineGone, EngineTimeout, ModelRefused
from bitladder.system import ended_by, own_group, spin_limit


def with_engine_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process with llama.cpp in it; what a user set stays.

    A crash starts a debugger, if there is one, whose pages of stack frames push the words that say why out of the log:
    not here. Its threads do not spin for long (``system.spin_limit``).
    """
    return {**environment, "GGML_NO_BACKTRACE": "1", **spin_limit(environment)}


KILLED = "It was probably ended for using too much memory."
_LOG_LINES = 200
_LOG_WIDTH = 500
_LONGEST_LINE = 1 << 16
_OUT_OF_MEMORY = re.compile(
    r"out of memory|outofmemory|not enough (?:\w+ )?memory|insufficient memory|no available memory|bad_alloc"
    r"|MemoryError|(?:failed|unable|cannot|can't|could not) (?:to )?alloc",
    re.IGNORECASE,
)
"""How engines and their libraries say that memory did not suffice."""


_REASONS = (
    re.compile(r"error loading model: (.+)"),
    re.compile(r"(GGML_ASSERT\(.+)"),
    re.compile(r"(chat template parsing error)"),
    re.compile(r"(?:error|failed)\w*: (.+)", re.IGNORECASE),
)
"""Lines that say why a model was not loaded, the most telling first."""


def ending(code: int) -> str:
    """How a process ended, by its exit code (negative: the signal that ended it)."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class EngineProcess:
    """One server in a process of its own. It dies with us; its crash is an EngineError and not our end. A terminal's
    Ctrl-C does not reach it: what it was asked may still be answered.

    It runs a Python module that ends when its stdin closes: one that is the server, and prints a line of JSON with its
    ``address`` and ``version`` when it listens, or ``engines.keeper``, which keeps any other program.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self.base_url = ""
        """``http://host:port`` once started."""
        self.load_seconds = float("nan")
        self._process: subprocess.Popen[str] | None = None
        self._log: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        self._readers: list[threading.Thread] = []
        self._hello: queue.Queue[dict[str, str] | None] = queue.Queue()

    def start(
        self, command: Sequence[str], environment: Mapping[str, str | None], *, base_url: str = "", timeout_s: float
    ) -> str:
        """Start, and wait until the model is loaded and /health says so.

        Args:
            command: a Python module and its arguments.
            environment: variables to set beside our own; None takes one away.
            base_url: where it will listen; empty: it prints that.
            timeout_s: seconds allowed to all of it.

        Returns:
            The version that it printed; empty with a ``base_url``.

        Raises:
            ModelRefused: the engine ended instead; the message carries its last words.
            EngineGone: it did, for want of memory.
            EngineTimeout: the model was not loaded in time.
        """
        began = time.monotonic()
        wanted = {**with_engine_variables(os.environ), **environment}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={name: value for name, value in wanted.items() if value is not None},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            **own_group(),
        )
        assert self._process.stderr is not None and self._process.stdout is not None
        self._readers = [
            threading.Thread(target=self._keep_log, args=(self._process.stderr,), daemon=True),
            threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        version = ""
        try:
            if base_url:
                self.base_url = base_url
            else:
                self.base_url, version = self._address(began + timeout_s)
            self._wait_for_health(began + timeout_s)
        except BaseException:
            self.stop(grace_s=0.0)  # while loading it cannot hear that its stdin closed
            raise
        self.load_seconds = time.monotonic() - began
        return version

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
        self._join_readers(30.0)  # its last words may still be in the pipe, and this machine be busy
        means = KILLED if ended_by(code, "SIGKILL") else ""
        memory = bool(means) or any(_OUT_OF_MEMORY.search(line) for line in self._log)
        found = f"The engine for '{self._launch.model_name}' {ending(code)}."
        means = "\n".join(part for part in (means, "Its last words:", self.last_log()) if part)
        if memory:
            return EngineGone(found, means=means, do="Try a smaller context or level.")
        do = "Its last words say why; see with `bitladder inspect` whether the model is sound."
        if math.isnan(self.load_seconds):
            return ModelRefused(found, means=means, do=do, reason=_reason(self._log) or ending(code))
        return EngineGone(found, means=means, do=do)

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
            end_tree(process.pid)
            process.wait()
        self._join_readers()
        for reader, stream in zip(self._readers, (process.stderr, process.stdout), strict=False):
            if not reader.is_alive():  # else something it started still holds the pipe, and closing would wait for that
                stream.close()

    def _join_readers(self, timeout_s: float = 1.0) -> None:
        for reader in self._readers:
            reader.join(timeout=timeout_s)

    def _keep_log(self, stream: IO[str]) -> None:
        while line := stream.readline(_LONGEST_LINE):
            self._log.append(line.rstrip()[:_LOG_WIDTH])

    def _listen(self, stream: IO[str]) -> None:
        """Wait for the line that says where it listens. Whatever else comes is kept with the log: debuggers that print
        a crash's backtrace write there, and would wait for ever were nobody reading.
        """
        while line := stream.readline(_LONGEST_LINE):
            hello = _hello(line)
            if hello is not None:
                self._hello.put(hello)
            elif line.strip():
                self._log.append(line.rstrip()[:_LOG_WIDTH])
        self._hello.put(None)

    def _address(self, deadline: float) -> tuple[str, str]:
        try:
            hello = self._hello.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise self._late() from None
        if hello is None:
            raise self.death(wait_s=5.0) or EngineError(
                "The engine closed its output before it was ready.", means="Its last words:\n" + self.last_log()
            )
        return hello["address"], hello["version"]

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
            f"The engine did not load '{self._launch.path}' in time.",
            means="Its last words:\n" + self.last_log(),
            do="Allow it longer, or look whether the disk or the memory is the bottleneck.",
        )


def _reason(log: Iterable[str]) -> str:
    """Why the model was not loaded, in the engine's words; empty where none of its lines says so."""
    lines = list(log)
    found = (match for pattern in _REASONS for line in lines if (match := pattern.search(line)))
    return next((match[1].strip()[:200] for match in found), "")


def _hello(line: str) -> dict[str, str] | None:
    """The address and version in a line, if it is the one with them."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    names = ("address", "version")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in names):
        return None
    return {name: found[name] for name in names}


def free_port(host: str) -> int:
    """A port nobody listens on. Not every build takes 0 and tells what it got; should another program be faster to
    this one, the server ends at once, and is started again with the next.
    """
    with socket.socket() as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])
