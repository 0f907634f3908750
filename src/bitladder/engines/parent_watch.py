"""A child process that does not outlive whoever started it, however that one ended."""

from __future__ import annotations

import os
import threading

from bitladder import system


def follow_parent() -> None:
    """From now on, in a thread: exit at once when stdin closes or the parent is gone. ``os._exit``, since an engine's
    threads must not delay it.
    """
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _follow(parent: int) -> None:
    system.wait_for_parent(parent)
    os._exit(0)


def die_with_starting_thread(on: bool) -> None:
    """Linux's parent-death signal, for while llama.cpp holds the interpreter and the watch cannot run.

    It fires when the *thread* that started us ends: on only while that thread waits for us.
    """
    system.die_with_parent(on)
