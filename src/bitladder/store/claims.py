"""Claims on work that several processes and machines share, each with a lease.

Whoever takes a claim holds it until it is released, or until its lease ends because nobody renewed it: its holder
died, or lost the store. A claim is taken by one statement, so that of two who want it one gets it. The database's clock
counts where it is a server's, so that clocks of machines may differ.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bitladder.errors import BitladderError

if TYPE_CHECKING:
    from sqlalchemy import Connection

LEASE_S = 60.0
_RENEWALS = 3
"""In the time of one lease."""

_TAKE = """
    INSERT INTO claims (name, owner, expires, taken) VALUES (:name, :owner, :expires, 1)
    ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, expires = excluded.expires, taken = claims.taken + 1
    WHERE claims.expires < :now
"""


@dataclass
class Lease:
    """A claim that is held."""

    name: str
    owner: str
    lost: threading.Event = field(default_factory=threading.Event)
    """Set when it ended and somebody else may hold it."""


class Claims:
    """The table of claims.

    Args:
        transaction: opens a transaction for writing, with ``write=False`` for reading.
        lease_s: how long a claim is held without being renewed.
    """

    def __init__(self, transaction: Callable[..., AbstractContextManager[Connection]], lease_s: float) -> None:
        self._transaction = transaction
        self._lease_s = lease_s

    def take(self, name: str) -> Lease | None:
        """Take a claim if nobody holds it (``name``: at most 64 characters). Raises as the store's other methods."""
        from sqlalchemy import text

        owner = uuid.uuid4().hex
        with self._transaction() as connection:
            now = _now(connection)
            values = {"name": name, "owner": owner, "expires": now + self._lease_s, "now": now}
            taken = connection.execute(text(_TAKE), values).rowcount
        return Lease(name, owner) if taken else None

    def renew(self, lease: Lease) -> bool:
        """Hold it for another while; False where it had ended and somebody else took it."""
        from sqlalchemy import text

        with self._transaction() as connection:
            statement = text("UPDATE claims SET expires = :expires WHERE name = :name AND owner = :owner")
            values = {"expires": _now(connection) + self._lease_s, "name": lease.name, "owner": lease.owner}
            return bool(connection.execute(statement, values).rowcount)

    def release(self, lease: Lease) -> None:
        """Give it back, if it is still held."""
        from sqlalchemy import text

        statement = text("DELETE FROM claims WHERE name = :name AND owner = :owner")
        with self._transaction() as connection:
            connection.execute(statement, {"name": lease.name, "owner": lease.owner})

    def held(self, names: Iterable[str]) -> set[str]:
        """Which of these somebody holds."""
        from sqlalchemy import text

        with self._transaction(write=False) as connection:
            rows = connection.execute(
                text("SELECT name FROM claims WHERE expires >= :now"), {"now": _now(connection)}
            ).scalars()
            return {str(name).strip() for name in rows} & set(names)

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[Lease | None]:
        """Hold a claim for as long as the block takes, renewed from a thread; None where somebody else holds it."""
        lease = self.take(name)
        if lease is None:
            yield None
            return
        done = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(lease, done), daemon=True, name="lease")
        keeper.start()
        try:
            yield lease
        finally:
            done.set()
            keeper.join()
            self.release(lease)

    def _keep(self, lease: Lease, done: threading.Event) -> None:
        """Renew until done. A store that does not answer for a moment is asked again until the lease has ended."""
        renewed = time.monotonic()
        while not done.wait(self._lease_s / _RENEWALS):
            try:
                if not self.renew(lease):
                    lease.lost.set()
                    return
                renewed = time.monotonic()
            except BitladderError:
                if time.monotonic() - renewed > self._lease_s:
                    lease.lost.set()
                    return


def _now(connection: Connection) -> float:
    """Unix time: the server's; SQLite has none but this machine's, which all who share the file have."""
    from sqlalchemy import text

    if connection.dialect.name == "postgresql":
        return float(connection.execute(text("SELECT EXTRACT(EPOCH FROM clock_timestamp())")).scalar_one())
    return time.time()
