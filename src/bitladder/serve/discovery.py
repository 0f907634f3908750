"""Which replicas there are, and whether they answer: names are resolved again and again, addresses are probed.

A probe asks for the list of models, which every OpenAI-compatible server has. Any answer under 500 counts: a server
that wants another key for it, or does not know the path, is alive.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from bitladder.engines.network import proxy_for
from bitladder.serve.backends import UpstreamFailed
from bitladder.serve.connections import ConnectionPool, HttpBackend
from bitladder.serve.replicas import Replica, ReplicaSet, ReplicaState
from bitladder.serve.settings import ReplicaSpec, TierSpec, UpstreamTimeouts

log = logging.getLogger("bitladder.serve")

MOST_REPLICAS = 256
"""Addresses of one tier; what a name resolves to beyond them is left out."""
_MISSES = 2

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""``resolve(name, port)``: the IP addresses of a name. Raises OSError."""


async def resolve_name(name: str, port: int) -> list[str]:
    """The IP addresses that a name has, those of one family alone: a host that has both kinds is one host.

    Raises:
        OSError: it has none, or nobody answers for it.
    """
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    family = found[0][0]
    return sorted({str(place[0]) for kind, _, _, _, place in found if kind == family})


@dataclass(frozen=True)
class _Place:
    """An address to connect to."""

    spec: ReplicaSpec
    ip: str = ""
    """Where its name resolves to several."""

    @property
    def name(self) -> str:
        """Host and port."""
        parts = urlsplit(self.spec.url)
        if not self.ip:
            return parts.netloc
        return f"{f'[{self.ip}]' if ':' in self.ip else self.ip}:{parts.port or 80}"


class Discovery:
    """Keeps the replicas of one endpoint tier. `run` probes them, and resolves their names again."""

    def __init__(
        self, spec: TierSpec, pool: ConnectionPool, timeouts: UpstreamTimeouts, resolve: Resolve = resolve_name
    ) -> None:
        self._specs = spec.keyed
        self._pool = pool
        self._timeouts = timeouts
        self._resolve = resolve
        self._known: dict[str, list[str]] = {}
        self._had_several: set[str] = set()
        self._backends: dict[str, HttpBackend] = {}
        self._missed: dict[str, int] = {}
        self._probing: dict[str, asyncio.Task[None]] = {}
        self.replicas = ReplicaSet(())

    @property
    def needed(self) -> bool:
        """Whether there is anything to look after: several addresses, or a name that may come to have several."""
        return len(self._specs) > 1 or any(map(_may_have_several, self._specs))

    async def start(self) -> ReplicaSet:
        """Find the replicas."""
        places = await self._found()
        self.replicas = ReplicaSet([self._replica(place) for place in places.values()])
        return self.replicas

    async def run(self) -> None:
        """Probe and resolve until cancelled."""
        ticks, every = 0, self._timeouts.probe_every
        try:
            while True:
                await asyncio.sleep(every)
                ticks += 1
                if ticks * every >= self._timeouts.resolve_every:
                    ticks = 0
                    places = await self._found()
                    self.replicas.become({name: self._maker(place) for name, place in places.items()})
                for replica in self.replicas if self.replicas.several else ():
                    if replica.name not in self._probing and replica.state is not ReplicaState.LEAVING:
                        task = asyncio.create_task(self._probe(replica))
                        self._probing[replica.name] = task
                        task.add_done_callback(functools.partial(self._probed, replica.name))
        finally:
            for task in self._probing.values():
                task.cancel()

    def _probed(self, name: str, _: asyncio.Task[None]) -> None:
        self._probing.pop(name, None)

    def _maker(self, place: _Place) -> Callable[[], Replica]:
        return lambda: self._replica(place)

    def _replica(self, place: _Place) -> Replica:
        url = place.spec.url
        backend = HttpBackend(self._pool, lambda: url, place.spec.api_key, at=place.ip)
        self._backends[place.name] = backend
        return Replica(place.name, backend.complete, place.spec.api_key)

    async def _found(self) -> Mapping[str, _Place]:
        """Every address by its name. A name that does not resolve now stays what it was."""
        places: dict[str, _Place] = {}
        for spec in self._specs:
            ips = await self._resolved(spec) if _may_have_several(spec) else []
            if len(ips) > 1:
                self._had_several.add(spec.url)
            # The last one of several is the replica that it was; a name that never had more is left to the system.
            for place in [_Place(spec, ip) for ip in ips if spec.url in self._had_several] or [_Place(spec)]:
                places.setdefault(place.name, place)
        return dict(list(places.items())[:MOST_REPLICAS])

    async def _resolved(self, spec: ReplicaSpec) -> list[str]:
        parts = urlsplit(spec.url)
        try:
            async with asyncio.timeout(self._timeouts.connect):
                self._known[spec.url] = await self._resolve(parts.hostname or "", parts.port or 80)
        except (OSError, UnicodeError, TimeoutError) as error:
            log.warning("name not resolved", extra={"replica": parts.netloc, "error": str(error)})
        return self._known.get(spec.url, [])

    async def _probe(self, replica: Replica) -> None:
        try:
            status = await self._backends[replica.name].alive(self._timeouts.probe)
        except TimeoutError:
            missed = self._missed[replica.name] = self._missed.get(replica.name, 0) + 1
            if missed >= _MISSES:
                self.replicas.silent(replica, f"It did not answer {missed} probes of {self._timeouts.probe:g} s.")
            return
        except UpstreamFailed as failure:
            self.replicas.put_out(replica, failure.found)
            return
        self._missed[replica.name] = 0
        if status >= 500:
            self.replicas.put_out(replica, f"It answers probes with status {status}.")
        else:
            self.replicas.let_in(replica)


def _may_have_several(spec: ReplicaSpec) -> bool:
    """Whether the name of an address is resolved here: of plain HTTP alone. Behind HTTPS stand names whose certificates
    are for the name, mostly of services that balance themselves.
    """
    parts = urlsplit(spec.url)
    name = parts.hostname or ""
    if parts.scheme != "http" or name == "localhost" or proxy_for(spec.url) is not None:
        return False
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return True
    return False
