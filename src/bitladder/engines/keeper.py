"""The process between us and an installed server (``llama-server``, ``vllm``), which does not notice when we are gone.

Run as ``python -m bitladder.engines.keeper COMMAND...``. It ends the server when its stdin closes or
its parent changes, and ends the way the server ended, so that whoever started it sees how. When it is itself
killed, Linux's parent-death signal ends the server; elsewhere the server would stay.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import psutil

from bitladder import system


def _follow_parent(parent: int, server: subprocess.Popen[bytes]) -> None:
    system.wait_for_parent(parent)
    end_tree(server.pid)
    os._exit(0)


def end_tree(pid: int) -> None:
    """End a process and what it started: engines that compute in processes of their own leave them behind else."""
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(pid)
        started = first.children(recursive=True)
        for process in (*started, first):  # the last is who we wait for, and then end ourselves
            with contextlib.suppress(psutil.Error):
                process.kill()


def main() -> None:
    """Start the server, and stay as long as it does."""
    parent = os.getppid()
    # The main thread starts it and lives as long as we do, which is what the parent-death signal goes by.
    server = subprocess.Popen(
        sys.argv[1:],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        preexec_fn=system.die_with_parent if system.LINUX else None,  # noqa: PLW1509 - there is one thread yet
    )
    threading.Thread(target=_follow_parent, args=(parent, server), daemon=True).start()
    code = server.wait()
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler to restore
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
