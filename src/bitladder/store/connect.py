"""Connecting: engines for SQLite and PostgreSQL, and their errors in the user's terms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder.errors import BadInput, BitladderError, OutputError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

BUSY_SECONDS = 30
"""How long to wait while another process writes."""


def make_engine(url: str) -> Engine:
    """An engine; SQLite in WAL mode, its transactions begun by us."""
    from sqlalchemy import create_engine, event
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise ArgumentError(f"{parsed.get_backend_name()} is not supported")
        if parsed.get_backend_name() == "postgresql":
            return create_engine(parsed, connect_args={"connect_timeout": BUSY_SECONDS}, pool_pre_ping=True)
        _make_folder(parsed.database)
        engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
    except (ArgumentError, NoSuchModuleError) as error:
        raise BadInput(
            f"'{shown(url)}' is no place for evidence: {error}.",
            do="Name a SQLite file, or a server like postgresql://user@host/database.",
        ) from None
    except ImportError as error:
        raise BadInput(
            f"PostgreSQL needs a driver that is not installed ({error.name}).",
            do="pip install 'bitladder[postgres]'",
        ) from error

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.close()

    return engine


def _make_folder(database: str | None) -> None:
    """The folder of a SQLite file."""
    if not database or database.startswith((":memory:", "file:")):
        return
    folder = Path(database).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The folder {folder} for the evidence cannot be made: {error.strerror}.",
            do="Set BITLADDER_DATA to a folder that you can write.",
        ) from error


def one_at_a_time(connection: Connection) -> None:
    """Two first runs must not both create the tables; SQLite's write lock already sees to it."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('bitladder_schema'))")


def explain(error: Exception, url: str) -> BitladderError:
    """A driver's error in the user's terms."""
    where, said = shown(url), str(getattr(error, "orig", error)).strip().splitlines()[0]
    low = said.lower()
    if "locked" in low or "busy" in low:
        return OutputError(
            f"The evidence store {where} stayed locked for {BUSY_SECONDS} seconds.",
            means="Another process is writing to it, or died while it did.",
            do="Wait for it to end, or name another store with BITLADDER_STORE.",
        )
    if "readonly" in low or "read-only" in low or "permission" in low or "unable to open" in low:
        return OutputError(
            f"The evidence store {where} cannot be written: {said}.",
            means="The file or its folder is read-only or belongs to someone else.",
            do="Set BITLADDER_DATA to a folder that you can write.",
        )
    if "full" in low or "disk i/o" in low:
        return OutputError(
            f"The evidence store {where} cannot grow: {said}.",
            means="The disk is full.",
            do="Free some space.",
        )
    if "not a database" in low or "malformed" in low or "corrupt" in low:
        return BadInput(
            f"{where} is not an evidence store: {said}.",
            means="The file is damaged, or is something else.",
            do="Move it away; a new one is made, and measurements are repeated when they are needed.",
        )
    return BadInput(
        f"The evidence store {where} does not answer: {said}.",
        do="Check the address and that the server runs.",
    )


def shown(url: str) -> str:
    """A URL without its password; a SQLite URL as its path."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except ArgumentError:
        return url.partition("://")[0] + "://..."
    if parsed.get_backend_name() == "sqlite":
        return parsed.database or "in memory"
    return parsed.render_as_string(hide_password=True)
