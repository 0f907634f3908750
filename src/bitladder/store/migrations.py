"""The database's history: an append-only list of small functions. Never edit one that was released; add
another.

Each takes a connection inside a transaction. The table ``bitladder_schema`` holds the number of the last one
applied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

Migration = Callable[["Connection"], None]


def create_evidence(connection: Connection) -> None:
    """1: one row per measurement, addressed by kind and the hash of its key."""
    from sqlalchemy import text

    serial = "BIGSERIAL" if connection.dialect.name == "postgresql" else "INTEGER"
    connection.execute(
        text(f"""
        CREATE TABLE evidence (
            id {serial} PRIMARY KEY,
            kind VARCHAR(32) NOT NULL,
            key_hash CHAR(64) NOT NULL,
            key TEXT NOT NULL,
            value TEXT NOT NULL,
            created VARCHAR(32) NOT NULL,
            UNIQUE (kind, key_hash)
        )""")
    )


def add_provenance(connection: Connection) -> None:
    """2: which Bitladder measured it, and on what host; rows from before say that nothing is known."""
    from sqlalchemy import text

    connection.execute(text("ALTER TABLE evidence ADD COLUMN bitladder VARCHAR(32) NOT NULL DEFAULT ''"))
    connection.execute(text("ALTER TABLE evidence ADD COLUMN host TEXT NOT NULL DEFAULT '{}'"))


def index_by_time(connection: Connection) -> None:
    """3: the newest of a kind is what people ask for."""
    from sqlalchemy import text

    connection.execute(text("CREATE INDEX evidence_kind_created ON evidence (kind, created)"))


def create_claims(connection: Connection) -> None:
    """4: who works on what, until when (Unix seconds of the database's clock), so that nothing is done twice."""
    from sqlalchemy import text

    connection.execute(
        text("""
        CREATE TABLE claims (
            name CHAR(64) NOT NULL PRIMARY KEY,
            owner VARCHAR(64) NOT NULL,
            expires DOUBLE PRECISION NOT NULL,
            taken INTEGER NOT NULL
        )""")
    )


MIGRATIONS: tuple[Migration, ...] = (create_evidence, add_provenance, index_by_time, create_claims)


def migrate(connection: Connection, *, upto: int | None = None) -> int:
    """Apply what is missing, in order, in the caller's transaction; returns the schema number.

    Raises:
        ValueError: the database is newer than this program.
    """
    from sqlalchemy import text

    connection.execute(text("CREATE TABLE IF NOT EXISTS bitladder_schema (number INTEGER NOT NULL)"))
    rows = connection.execute(text("SELECT number FROM bitladder_schema")).scalars().all()
    number = max(rows, default=0)
    if number > len(MIGRATIONS):
        raise ValueError(f"schema {number} is newer than {len(MIGRATIONS)}")
    target = len(MIGRATIONS) if upto is None else upto
    for step in range(number, target):
        MIGRATIONS[step](connection)
        connection.execute(text("DELETE FROM bitladder_schema"))
        connection.execute(text("INSERT INTO bitladder_schema (number) VALUES (:number)"), {"number": step + 1})
    return max(number, target)
