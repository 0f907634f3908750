"""What an executor is: units in, results out, and values that stay where they were computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Handle = Any
"""A value that is held where units are computed; only its executor knows what is behind it."""


@dataclass(frozen=True)
class Lane:
    """Where a unit is computed: what a task keeps between units (open files, a layer) it keeps for each lane."""

    number: int
    device: str
    """As torch names it."""
    own_process: bool
    """Whether nothing else uses this process: settings of it (torch's threads) may be changed."""


class Task(Protocol):
    """Work on many units: a value that can be pickled. It opens what it needs where it is computed, once in a lane."""

    @property
    def threads(self) -> int:
        """Cores that a unit keeps busy. Products of matrices are rounded differently by other numbers of threads, so a
        unit has the same number everywhere."""

    def compute(self, lane: Lane, unit: Any, *held: Any) -> tuple[Any, Any]:
        """Compute a unit.

        Args:
            lane: where that is.
            unit: a value that can be pickled.
            held: values of handles. They may be shared with others and must not be changed.

        Returns:
            What goes to whoever waits for it, and what stays, for other units to use.
        """


class Started(Protocol):
    """A unit under way."""

    @property
    def held(self) -> Handle:
        """What will stay of it."""

    @property
    def answer(self) -> Handle:
        """What goes back, for other units to use."""

    def result(self) -> Any:
        """Wait for what goes back; raises what ``Task.compute`` raised, or ClusterError."""

    def wait(self) -> None:
        """As ``result``, but what goes back is left where it is, and so are errors of the unit: who uses its results
        meets them."""


def weights_travel(lacking: str) -> str:
    """What is said where ``Executor.lacking`` found a file that some place cannot read."""
    return (
        f"Workers cannot read {lacking}: weights are sent to them through the object store. A folder that all nodes "
        "have under the same path is faster."
    )


class Executor(ABC):
    """Computes units, several at a time. Its methods may be called from any thread. Use as a context manager."""

    device: str = "cpu"
    """Of a lane, and not a CPU if there is another: what arithmetic is chosen for."""
    warnings: Sequence[str] = ()
    """What its user should know of it."""
    here: tuple[str, ...] = ()
    """The devices that it computes on in this very process, whose memory units may then write to; none where units are
    computed in others."""

    @abstractmethod
    def start(self, task: Task, unit: Any, *held: Handle, place: int | None = None) -> Started:
        """Begin a unit.

        Args:
            task: what is done.
            unit: with what.
            held: what stayed of other units, finished or not, or of ``put``.
            place: units of the same number are computed on the same kind of device, whatever else is under way; None
                where results do not depend on the device.
        """

    @abstractmethod
    def at_once(self, task: Task) -> int:
        """How many units of a task are computed at a time, at least one."""

    @abstractmethod
    def put(self, value: Any) -> Handle:
        """Hold a value for units."""

    @abstractmethod
    def fetch(self, handle: Handle) -> Any:
        """The value of a handle. It may be shared and must not be changed."""

    def lacking(self, paths: Sequence[Path]) -> str:  # noqa: ARG002
        """Which of these files some place cannot read as they are here, and which place that is: ``/m/a.gguf on
        node1``. Empty where all can."""
        return ""

    @abstractmethod
    def close(self) -> None:
        """Let go of workers. What is under way is lost."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
