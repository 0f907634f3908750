"""Units on a Ray cluster: tasks of Ray, values in its object store, retries by Ray.

A unit is a task without side effects, so Ray may run it again wherever it likes: when a worker dies, when a node does,
when a value is lost with the node that held it. What is finished is journalled by whoever waits for results, never by a
worker.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitladder import __version__
from bitladder.errors import BitladderError, ClusterError, OutputError, UsageError
from bitladder.executors.base import Executor, Handle, Lane, Task
from bitladder.executors.needs import Needs

_RETRIES = 5
"""Deaths of workers that a unit outlives; a unit that kills every worker must not go round for ever."""
_LOOK_EVERY = 10.0
_PATIENCE = 120.0
"""Seconds in which a cluster may come back to having a node that can take a unit: a node restarted, an autoscaler."""
_CONNECT = 5.0
_HEAD_TRIES, _HEAD_PAUSE = 3, 3.0
_PROBED = 120.0
_CLIENT = "ray://"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class _Failed:
    """What a unit raised, as a value: Ray would wrap it, and retry some."""

    error: Exception


@dataclass(frozen=True)
class Place:
    """What a node says of itself."""

    name: str
    versions: dict[str, str]
    lacks: str
    """The first of the files asked about that it cannot read as they are here."""


def connect(address: str | None, device: str, needs: Needs) -> Ray:
    """A cluster by its address, as Ray reads it; None: what ``RAY_ADDRESS`` names, a cluster that runs on this machine,
    or a new one here.

    Raises:
        UsageError: Ray is not installed, or the cluster has other versions than are here.
        ClusterError: nobody answers at the address, or no node can take a unit.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "Ray is not installed here.",
            means="--on ray needs it; it is an extra, because most work is done on one machine.",
            do="pip install 'bitladder[ray]'",
        ) from error
    own = not ray.is_initialized()
    _quieten()
    where = address or os.environ.get("RAY_ADDRESS") or ""
    if own:
        _require_listener(where)
        _initialised(where or None)
    head = where if where.startswith(_CLIENT) else ray.get_runtime_context().gcs_address
    cluster = Ray(device, needs, own=own, head=head)
    try:
        cluster.check()
    except BaseException:
        cluster.close()
        raise
    return cluster


def _require_listener(address: str) -> None:
    """Ray waits for minutes where nobody listens; raises ClusterError after seconds."""
    host, colon, port = address.removeprefix(_CLIENT).rpartition(":")
    if not colon or not port.isdigit():  # Ray's own words: local, auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"Nobody answers at {address}: {error}.",
            means="The cluster's head is not running, has another address, or a firewall is between.",
            do="On the head: ray start --head. Ray clients connect to port 10001 (ray://HOST:10001), drivers on a node "
            "of the cluster to port 6379 (HOST:6379).",
        ) from error


def _quieten() -> None:
    """Ray prints notices of workers that died to standard output, where our results belong; errors are ours to say."""
    from ray._private import worker

    logging.getLogger("ray").setLevel(logging.ERROR)
    if hasattr(worker, "print_to_stdstream"):  # there is no public switch
        worker.print_to_stdstream = lambda *_, **__: None


def _initialised(address: str | None) -> None:
    import ray

    options: dict[str, Any] = {} if (address or "").startswith(_CLIENT) else {"configure_logging": False}
    try:
        ray.init(address=address, log_to_driver=False, **options)
    except Exception as error:  # Ray raises a dozen kinds here, RuntimeError for most
        text = _first_words(error)
        if "ersion mismatch" in str(error) or "different version" in str(error):
            raise _other_versions(text) from error
        raise ClusterError(
            f"Ray does not connect to {address or 'a cluster'}: {text}",
            means="The cluster is not in order, has another version, asks for a token, or this is no address of Ray's.",
            do="Look whether `ray status` works here. Addresses are those of ray.init: auto, HOST:6379, "
            "ray://HOST:10001. A cluster that asks for a token needs RAY_AUTH_MODE=token here, and its token where Ray "
            "looks for it.",
        ) from error


def _other_versions(found: str) -> UsageError:
    return UsageError(
        found,
        means="Units are pickled here and unpickled there, and results must be the same bytes wherever they are made.",
        do="Install the same versions of Python (to the minor), Ray and Bitladder on every machine of the cluster.",
    )


def _first_words(error: BaseException) -> str:
    return " ".join(_COLOUR.sub("", str(error)).split())[:400] or type(error).__name__


class Ray(Executor):
    """A cluster that is connected. ``close`` disconnects if this object connected; what it holds goes in any case."""

    def __init__(self, device: str, needs: Needs, *, own: bool, head: str) -> None:
        """``own``: whether it is this object's to disconnect. ``head``: where its head listens."""
        import ray

        self._ray, self.device, self._needs, self._own = ray, device, needs, own
        self._run = ray.remote(_run)
        self._tasks: dict[int, tuple[Task, Any]] = {}
        self._known: dict[int, dict[str, Any]] = {}
        self._at_once: dict[int, tuple[float, int]] = {}
        self._head, self._looked = head, time.monotonic()
        self.warnings: list[str] = []

    def check(self) -> None:
        """Refuse a cluster that has other versions, or no node for a unit; ``warnings`` say what may round sums
        differently."""
        if not self._fits(self._options(1)):
            raise self._infeasible(self._options(1))
        here = _versions()
        for place in self._places(()):
            for name in ("Python", "Ray", "Bitladder", "kernels"):
                if place.versions[name] != here[name]:
                    raise _other_versions(f"{name} is {place.versions[name]} on {place.name} and {here[name]} here.")
            others = [name for name, own in here.items() if place.versions[name] != own]
            if others:
                said = ", ".join(f"{name} {place.versions[name]} there and {here[name]} here" for name in others)
                self.warnings.append(f"{place.name}: {said}. Sums may be rounded differently there.")

    def start(self, task: Task, unit: Any, *held: Handle, place: int | None = None) -> _Started:  # noqa: ARG002
        """As ``Executor``: all nodes are taken for alike."""
        self._require_head()
        options = self._options(task.threads)
        with _translated():
            small, large = self._run.options(num_returns=2, max_retries=_RETRIES, **options).remote(
                self._sent(task), self.device, unit, *held
            )
        return _Started(self, options, small, large)

    def at_once(self, task: Task) -> int:
        """As ``Executor``: as many as the nodes could take if they were idle; asked of the head now and then."""
        known = self._at_once.get(task.threads)
        if known is not None and time.monotonic() - known[0] < _LOOK_EVERY:
            return known[1]
        wanted = {name: amount for name, amount in _wanted(self._options(task.threads)).items() if amount}
        taken = [
            min((node.get(name, 0) // amount for name, amount in wanted.items()), default=1) for node in self._nodes()
        ]
        self._at_once[task.threads] = time.monotonic(), max(1, int(sum(taken)))
        return self._at_once[task.threads][1]

    def put(self, value: Any) -> Handle:
        """As ``Executor``."""
        self._require_head()
        with _translated():
            return self._ray.put(value)

    def fetch(self, handle: Handle) -> Any:
        """As ``Executor``."""
        return self.value(handle, self._options(1))

    def value(self, reference: Any, options: dict[str, Any]) -> Any:
        """The value of a reference.

        Raises:
            ClusterError: it cannot be computed any more, or no node has been able to for minutes.
            OutputError: the object store is full.
        """
        self.wait(reference, options)
        with _translated():
            found = self._ray.get(reference)
        if isinstance(found, _Failed):
            raise found.error
        return found

    def wait(self, reference: Any, options: dict[str, Any]) -> None:
        """Wait until there is a value of a reference, or an error.

        Raises:
            ClusterError: no node has been able to compute it for minutes.
        """
        without = 0.0
        with _translated():
            while not self._ray.wait([reference], num_returns=1, timeout=_LOOK_EVERY, fetch_local=False)[0]:
                self._require_head()
                without = 0.0 if self._fits(options) else without + _LOOK_EVERY
                if without >= _PATIENCE:
                    raise self._infeasible(options)

    def lacking(self, paths: Sequence[Path]) -> str:
        """As ``Executor``."""
        looks = [(str(path.absolute()), *_look(path)) for path in paths]
        return next((f"{place.lacks} on {place.name}" for place in self._places(looks) if place.lacks), "")

    def close(self) -> None:
        """As ``Executor``."""
        self._tasks.clear()
        if self._own:
            self._ray.shutdown()

    def _require_head(self) -> None:
        """Where the head is gone most calls of Ray's wait for it, and a minute later Ray ends this very process.

        Raises:
            ClusterError: nobody listens there.
        """
        if time.monotonic() - self._looked < _HEAD_PAUSE:
            return
        for _ in range(_HEAD_TRIES):
            try:
                _require_listener(self._head)
            except ClusterError:
                time.sleep(_HEAD_PAUSE)
            else:
                self._looked = time.monotonic()
                return
        raise ClusterError(
            f"The cluster's head at {self._head} is gone.",
            means="It was stopped or restarted, or the network is down. What was finished is kept here.",
            do=_GO_ON,
        )

    def _sent(self, task: Task) -> Any:
        """A task travels once, however many units it has."""
        known = self._tasks.get(id(task))
        if known is None:
            if len(self._tasks) > 64:
                self._tasks.clear()
            known = self._tasks[id(task)] = task, self._ray.put(task)
        return known[1]

    def _options(self, threads: int) -> dict[str, Any]:
        known = self._known.get(threads)
        if known is None:
            known = self._known[threads] = self._options_now(threads)
        return known

    def _options_now(self, threads: int) -> dict[str, Any]:
        needs = self._needs
        cores = min(float(threads), max((node.get("CPU", 0.0) for node in self._nodes()), default=1.0))
        gpus = needs.gpus if needs.gpus is not None else float(self.device.startswith("cuda"))
        return {
            "num_cpus": cores if needs.cpus is None else needs.cpus,
            **({"num_gpus": gpus} if gpus else {}),
            **({"memory": needs.memory} if needs.memory else {}),
            **({"resources": dict(needs.custom)} if needs.custom else {}),
        }

    def _alive(self) -> list[dict[str, Any]]:
        self._require_head()
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._alive()]

    def _fits(self, options: dict[str, Any]) -> bool:
        """Whether some node, were it idle, could take a unit."""
        wanted = _wanted(options)
        return any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in self._nodes())

    def _infeasible(self, options: dict[str, Any]) -> ClusterError:
        told = ", ".join(f"{name.removeprefix('num_')} {amount}" for name, amount in options.items())
        have = "; ".join(
            ", ".join(f"{name} {amount:g}" for name, amount in sorted(node.items()) if not name.startswith("node:"))
            for node in self._nodes()
        )
        return ClusterError(
            f"No node of the cluster can take a unit, which needs {told}. There is: {have or 'no node'}.",
            means="The nodes that could were lost or never joined.",
            do="Start such a node (ray start --address=HEAD:6379) and give the command again, which goes on where it "
            "was; or ask for less with --unit-needs and --device.",
        )

    def _places(self, looks: Sequence[tuple[str, int, bytes]]) -> list[Place]:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        probe = self._ray.remote(_probe)
        nodes = self._alive()
        asked = [
            probe.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(node["NodeManagerHostname"], list(looks))
            for node in nodes
        ]
        found: list[Place] = []
        for node, reference in zip(nodes, asked, strict=True):
            with _translated(f"on {node['NodeManagerHostname']}"):
                found.append(self._ray.get(reference, timeout=_PROBED))
        return found


def _wanted(options: dict[str, Any]) -> dict[str, float]:
    """What a unit takes, as nodes count it."""
    own: dict[str, float] = {"CPU": options["num_cpus"], **options.get("resources", {})}
    return own | {"GPU": options.get("num_gpus", 0), "memory": options.get("memory", 0)}


@dataclass(frozen=True)
class _Started:
    cluster: Ray
    options: dict[str, Any]
    small: Any
    held: Handle

    def result(self) -> Any:
        """As ``Started``."""
        return self.cluster.value(self.small, self.options)

    @property
    def answer(self) -> Handle:
        """As ``Started``."""
        return self.small

    def wait(self) -> None:
        """As ``Started``."""
        self.cluster.wait(self.small, self.options)


def _run(task: Task, device: str, unit: Any, *held: Any) -> tuple[Any, Any]:
    """A unit, in a worker. What a lost value raised goes on to whoever waits."""
    try:
        for one in held:
            if isinstance(one, _Failed):
                raise one.error
        return task.compute(Lane(0, device, own_process=True), unit, *held)
    except Exception as error:
        failed = _too_little_memory(error) if _lacks_memory(error) else error
    return _Failed(_bare(failed)), _Failed(_bare(failed))


def _lacks_memory(error: Exception) -> bool:
    """Also torch's words for it, which has a type of error for devices alone."""
    of_a_device = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or of_a_device or "can't allocate memory" in str(error)


def _too_little_memory(error: Exception) -> ClusterError:
    return ClusterError(
        f"A worker on {socket.gethostname()} has too little memory for a unit: {_first_words(error)}",
        do="Give units more with --unit-needs memory=SIZE, which lets fewer of them run on a node.",
    )


def _bare(error: Exception) -> Exception:
    """Ours as they are; others as one of ours, for they may not survive pickling."""
    if isinstance(error, BitladderError):
        return error
    return ClusterError(
        f"A unit failed on {socket.gethostname()}: {type(error).__name__}: {_first_words(error)}",
        means="It failed in computing, not for want of a worker, so it was not tried again.",
        do="Try it without --on; if it works there, the nodes differ from this machine.",
    )


def _probe(name: str, looks: Sequence[tuple[str, int, bytes]]) -> Place:
    """What a node says of itself and of files."""
    lacks = next((path for path, size, ends in looks if _look(Path(path)) != (size, ends)), "")
    return Place(name, _versions(), lacks)


def _look(path: Path) -> tuple[int, bytes]:
    """A file's size, and both its ends: what tells it from another of its name. Nothing where there is none."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(1 << 16)
            file.seek(max(0, size - (1 << 16)))
            return size, begin + file.read(1 << 16)
    except OSError:
        return -1, b""


def _versions() -> dict[str, str]:
    """What results depend on, by its name."""
    import numpy as np
    import ray
    import torch

    from bitladder.kernels import REVISION

    return {
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "Ray": ray.__version__,
        "Bitladder": __version__,
        "kernels": str(REVISION),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


@contextmanager
def _translated(where: str = "") -> Iterator[None]:
    """Ray's errors in the user's terms."""
    try:
        yield
    except BitladderError:
        raise
    except Exception as error:
        raise _in_our_words(error, where) from error


def _in_our_words(error: Exception, where: str) -> BitladderError:
    from ray import exceptions as theirs

    words = _first_words(error)
    missing = re.search(r"No module named '?([\w.]+)", str(error))
    if missing is not None:
        return UsageError(
            f"There is no Python package '{missing[1]}' {where or 'on a node of the cluster'}.",
            means="Workers import what they compute with.",
            do=f"pip install 'bitladder[ray]=={__version__}' on every node, into the Python that Ray runs with.",
        )
    if isinstance(error, theirs.ObjectStoreFullError | theirs.OutOfDiskError):
        return OutputError(
            f"Ray's object store is full: {words}",
            means="It holds the states and sums of all units under way, and spills to a node's disk when it is full.",
            do="Free disk there, start nodes with --object-store-memory=BYTES, or give fewer tokens.",
        )
    for kind, means, do in _KINDS:
        if isinstance(error, getattr(theirs, kind)):
            return ClusterError(f"Ray: {words}", means=means, do=do)
    return ClusterError(f"Ray: {type(error).__name__}: {words}", do="`ray status` on the head says what it has.")


_GO_ON = "Give the command again when the cluster is whole: it goes on where it was."
_KINDS: tuple[tuple[str, str, str], ...] = (
    ("OutOfMemoryError", "Workers were ended because a node had no memory left.",
     "Let fewer units run on a node: --unit-needs memory=SIZE."),
    ("WorkerCrashedError", f"A unit ended its worker {_RETRIES + 1} times: too little memory there, or a fault.",
     "Look at the node's log (/tmp/ray/session_latest/logs), or try it without --on."),
    ("NodeDiedError", "The node that computed it is gone, and so were those that tried again.", _GO_ON),
    ("ObjectLostError", "The node that held it is gone, and it could not be computed again.", _GO_ON),
    ("GetTimeoutError", "A node does not answer.", _GO_ON),
    ("RaySystemError", "The cluster's head is gone, or was restarted.", _GO_ON),
)  # fmt: skip
