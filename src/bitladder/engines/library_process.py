"""A computation in llama.cpp's library, in a process of its own: its crash is an error and not our end."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bitladder.engines.messages import BadMessage, Message, receive
from bitladder.engines.process import KILLED, ending, with_engine_variables
from bitladder.errors import EngineError, EngineGone, UnknownArchitecture
from bitladder.system import WINDOWS, ended_by

_LOG_LINES, _LOG_WIDTH, _LONGEST_LINE = 200, 500, 1 << 16
_CHATTER = (
    "llama_model_loader:", "load_tensors:", "print_info:", "llama_kv_cache:", "llama_memory_recurrent:",
    "llama_context:", "~llama_context:", "llama_graph_n_input_tensors:", "sched_reserve:", "create_tensor: loading",
)  # fmt: skip
"""Beginnings of lines that say how a model was loaded, and nothing of why it was not."""


def answers(request: Mapping[str, Any], what: Path, *, most: int) -> Iterator[Message]:
    """Run ``engines.library_child`` and give its messages as they come, from "opened" to the last before "end".

    Closing the iterator ends the process.

    Args:
        request: as ``library_child`` takes it.
        what: the model, for messages.
        most: numbers that one message may hold.

    Raises:
        UnknownArchitecture: the model is of a kind that predicts no next token.
        EngineError: the library refused, or the process died or sent nonsense; its last words are in the message.
    """
    with _running(request) as (process, results, log):
        while True:
            try:
                message = receive(results, most)
            except BadMessage as error:
                raise _nonsense(what, str(error), _last_words(log)) from error
            if message is None:
                raise _death(process, what, log)
            if message.kind == "end":
                return
            if message.kind == "unfit":
                raise UnknownArchitecture(
                    f"The engine cannot measure {what}: {str(message.note.get('what', ''))[:_LOG_WIDTH]}.",
                    means="Fidelity and importance compare predictions of the next token.",
                    do="Quantize with --imatrix none.",
                )
            if message.kind == "refused":
                raise EngineError(
                    f"{_capital(str(message.note.get('what', '')))[:_LOG_WIDTH]}.", means=_last_words(log),
                    do="Its last words say why; see with `bitladder inspect` whether the model is sound.",
                )  # fmt: skip
            yield message


def numbers_of(message: Message, count: int, what: Path) -> NDArray[np.float64]:
    """A message's numbers, f64[count]; raises EngineError where they are more or fewer."""
    if message.numbers.size != count:
        raise _nonsense(what, f"{message.numbers.size} numbers, not {count}")
    return message.numbers


def _nonsense(what: Path, found: str, means: str = "") -> EngineError:
    return EngineError(
        f"llama.cpp's process for {what} sent {found}.",
        means=means,
        do="Look with `bitladder inspect` whether the model is sound.",
    )


@contextlib.contextmanager
def _running(request: Mapping[str, Any]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes], _Log]]:
    if WINDOWS:
        raise EngineError(
            "On Windows llama.cpp's library cannot be asked for a model's numbers.",
            means="They come through a pipe that its process is given, which Windows does not do.",
            do="Leave out --through engine, or run this command in WSL.",
        )
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb") as results:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "bitladder.engines.library_child", str(theirs)],
                env=with_engine_variables(os.environ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs],
            )
        finally:
            os.close(theirs)
        assert process.stdin is not None and process.stdout is not None
        log = _Log(process.stdout)
        try:
            with contextlib.suppress(BrokenPipeError):  # it died already; what it left says why
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            yield process, results, log
        finally:
            process.kill()
            process.wait()
            log.wait(1.0)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()


class _Log:
    """The last lines that a process prints, read by a thread of their own."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._lines: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        while line := stream.readline(_LONGEST_LINE):
            text = line.decode(errors="replace").rstrip()[:_LOG_WIDTH]
            if text.strip(" .") and not text.startswith(_CHATTER):
                self._lines.append(text)

    def wait(self, seconds: float) -> None:
        """Until all is read that a process that ended has printed, or so long."""
        self._reader.join(timeout=seconds)

    def last(self, count: int) -> list[str]:
        """The last lines."""
        return list(self._lines)[-count:]


def _death(process: subprocess.Popen[bytes], what: Path, log: _Log) -> EngineGone:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5.0)
        log.wait(30.0)  # its last words may still be in the pipe, and this machine be busy
    code = process.returncode
    how = "closed its results before the end" if code is None else ending(code)
    killed = ended_by(code, "SIGKILL")
    return EngineGone(
        f"llama.cpp's process for {what} {how}.",
        means=KILLED if killed else _last_words(log),
        do="Close other programs, or name fewer levels."
        if killed
        else "Its last words say why; see with `bitladder inspect` whether the model is sound.",
    )


def _last_words(log: _Log) -> str:
    return "Its last words:\n" + "\n".join(log.last(6))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
