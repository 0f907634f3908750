"""Where units of work are computed: here, on several devices of this machine, or on a Ray cluster.

A unit's result is a function of the unit alone, and results are put together in the order of units, so that bytes do
not depend on who computed what. Names of places (``local``, ``ray``, an address) become executors in ``places.py``.
"""

from bitladder.executors.base import Executor, Handle, Started, Task

__all__ = ["Executor", "Handle", "Started", "Task"]
