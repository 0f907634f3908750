"""Measurements, stored under everything that could change them.

A row is addressed by its kind and the SHA-256 of its key, written as canonical JSON (sorted, no spaces): the
same source hash, level, recipe, method, text and engine version always find the same row, and any difference
is another row. ``put`` is one statement that inserts or replaces, so that two processes writing at once lose
nothing.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder import __version__, json_text, unicode
from bitladder.errors import BadInput, BitladderError, OutputError
from bitladder.files.atomic import written_aside
from bitladder.files.probe import available_cores
from bitladder.records import to_json
from bitladder.store.claims import LEASE_S, Claims
from bitladder.store.connect import explain, make_engine, one_at_a_time, shown
from bitladder.store.location import store_url

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

KINDS = ("fidelity", "answer", "speed", "file", "machine", "decision", "endpoint", "sweep", "speculation")
EXPORT_FORMAT = "bitladder-evidence"

_UPSERT = """
    INSERT INTO evidence (kind, key_hash, key, value, created, bitladder, host)
    VALUES (:kind, :key_hash, :key, :value, :created, :bitladder, :host)
    ON CONFLICT (kind, key_hash) DO UPDATE SET value = excluded.value, created = excluded.created,
        bitladder = excluded.bitladder, host = excluded.host
"""
_UPSERT_NEWER = _UPSERT + " WHERE excluded.created > evidence.created"
_AT_ONCE = 500
"""Rows asked for by number in one statement; databases limit how many values one may hold."""
_COLUMNS = "kind, key, value, created, bitladder, host"


@dataclass(frozen=True)
class EvidenceRow:
    """One measurement: what it is of (``key``), what was found (``value``), when, by which Bitladder, on what
    host."""

    kind: str
    key: dict[str, Any]
    value: Any
    created: str
    bitladder: str
    host: dict[str, Any]


def canonical(value: Any) -> str:
    """JSON that is the same for the same data: keys sorted, no spaces, NaN refused.

    Raises:
        ValueError: it holds NaN, infinity or half of a surrogate pair, or is nested too deeply.
    """
    try:
        plain = to_json(value)
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if unicode.half_character(text) is not None:
        raise ValueError("a text holds half of a surrogate pair, which is no character")
    return text


def host_facts() -> dict[str, Any]:
    """What a reader needs to repeat a number on a like machine; no names of people or hosts."""
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": available_cores(),
    }


class Evidence:
    """An open store. Use as a context manager, or call `close`."""

    def __init__(self, engine: Engine, url: str) -> None:
        self._engine = engine
        self.url = url

    @classmethod
    def open(cls, url: str | None = None) -> Evidence:
        """Open the store and bring its schema up to date.

        Args:
            url: a SQLAlchemy URL or the path of a SQLite file; ``BITLADDER_STORE`` or the user's data folder
                by default.

        Raises:
            BadInput: the URL cannot be read, the file is no database of ours, or the server does not answer.
            OutputError: the folder or the database cannot be written, or another process keeps it locked.
        """
        from bitladder.store.migrations import migrate

        full = store_url(url)
        engine = make_engine(full)
        store = cls(engine, full)
        try:
            with store._transaction() as connection:
                one_at_a_time(connection)
                migrate(connection)
        except ValueError as error:
            engine.dispose()
            raise BadInput(
                f"The evidence store {shown(full)} has {error}.",
                means="It was written by a later Bitladder.",
                do="Upgrade Bitladder, or name another store with BITLADDER_STORE.",
            ) from None
        except BitladderError:
            engine.dispose()
            raise
        return store

    def __enter__(self) -> Evidence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back connections and files."""
        self._engine.dispose()

    def claims(self, lease_s: float = LEASE_S) -> Claims:
        """Claims on work that is shared between processes and machines."""
        return Claims(self._transaction, lease_s)

    def get(self, kind: str, key: Mapping[str, Any]) -> Any | None:
        """The value under this very key, or None."""
        from sqlalchemy import text

        query = text("SELECT value FROM evidence WHERE kind = :kind AND key_hash = :key_hash")
        with self._transaction(write=False) as connection:
            found = connection.execute(query, {"kind": _kind(kind), "key_hash": _hash(canonical(key))}).scalar()
            return None if found is None else self._json(found)

    def put(self, kind: str, key: Mapping[str, Any], value: Any) -> None:
        """Store a value under a key; a second time replaces it. Records are stored as their JSON; NaN as
        null."""
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        row = EvidenceRow(_kind(kind), to_json(dict(key)), value, now, __version__, host_facts())
        self._write([_parameters(row)], _UPSERT)

    def find(self, kind: str, **partial: Any) -> list[EvidenceRow]:
        """Rows of a kind whose key holds these values, newest first."""
        from sqlalchemy import bindparam, text

        rows = text(f"SELECT id, {_COLUMNS} FROM evidence WHERE id IN :ids").bindparams(
            bindparam("ids", expanding=True)
        )
        with self._transaction(write=False) as connection:
            # Keys are small and values may be large: only those of matching keys are read.
            ids = [number for number, _ in self._matching(connection, kind, partial)]
            by_id: dict[int, EvidenceRow] = {}
            for start in range(0, len(ids), _AT_ONCE):
                for number, *row in connection.execute(rows, {"ids": ids[start : start + _AT_ONCE]}):
                    by_id[number] = self._row(row)
        return [by_id[number] for number in ids]

    def keys(self, kind: str, **partial: Any) -> list[dict[str, Any]]:
        """The keys of a kind that hold these values, newest first, without what was measured."""
        with self._transaction(write=False) as connection:
            return [key for _, key in self._matching(connection, kind, partial)]

    def count(self) -> dict[str, int]:
        """How many rows there are of each kind."""
        from sqlalchemy import text

        with self._transaction(write=False) as connection:
            rows = connection.execute(text("SELECT kind, COUNT(*) AS number FROM evidence GROUP BY kind"))
            found = {str(row.kind): int(row.number) for row in rows}
        return {kind: found.get(kind, 0) for kind in KINDS}

    def export(self, path: Path) -> int:
        """Write everything as JSON lines, oldest first, whole or not at all; returns the number of rows.

        Raises:
            OutputError: the file cannot be written.
        """
        count = -1  # the first line is no row
        try:
            with written_aside(path) as out:
                for line in self.lines():
                    out.write(f"{line}\n".encode())
                    count += 1
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}.", do="Name another file.") from error
        return count

    def lines(self) -> Iterator[str]:
        """An export: a line that says what it is, then a line of JSON for each row, oldest first."""
        from sqlalchemy import text

        yield json.dumps({"format": EXPORT_FORMAT, "version": 1, "bitladder": __version__})
        with self._transaction(write=False) as connection:
            for row in connection.execute(text(f"SELECT {_COLUMNS} FROM evidence ORDER BY created, id")):
                yield json.dumps(to_json(self._row(row)), sort_keys=True, ensure_ascii=False)

    def holds(self, path: Path) -> bool:
        """Whether a file is an export of which nothing would be lost with it: this store has every row's key."""
        from sqlalchemy import text

        try:
            rows = {(row.kind, _hash(canonical(row.key))) for row in _read_export(path)}
        except BadInput:
            return False
        with self._transaction(write=False) as connection:
            known = connection.execute(text("SELECT kind, key_hash FROM evidence"))
            return rows <= {(str(kind), str(key)) for kind, key in known}

    def files(self) -> list[Path]:
        """The database's own file, if it is one."""
        from sqlalchemy import make_url

        url = make_url(self.url)
        return [Path(url.database)] if url.get_backend_name() == "sqlite" and url.database else []

    def import_(self, path: Path) -> int:
        """Take in an export; of two rows under one key the newer stays. Returns the number of rows read.

        Raises:
            BadInput: the file is missing, or no export of ours (with the line at fault); nothing is taken in
            then.
        """
        rows = list(_read_export(path))
        self._write([_parameters(row) for row in rows], _UPSERT_NEWER)
        return len(rows)

    def _matching(
        self, connection: Connection, kind: str, partial: Mapping[str, Any]
    ) -> list[tuple[int, dict[str, Any]]]:
        """Number and key of the rows of a kind whose key holds these values, newest first."""
        from sqlalchemy import text

        query = text("SELECT id, key FROM evidence WHERE kind = :kind ORDER BY created DESC, id DESC")
        wanted = to_json(dict(partial)).items()
        found = [(row.id, self._object(row.key)) for row in connection.execute(query, {"kind": _kind(kind)})]
        return [(number, key) for number, key in found if all(name in key and key[name] == one for name, one in wanted)]

    def _row(self, row: Any) -> EvidenceRow:
        kind, key, value, created, version, host = row
        return EvidenceRow(kind, self._object(key), self._json(value), created, version, self._object(host))

    def _json(self, text: str) -> Any:
        """What a column holds.

        Raises:
            BadInput: it is no JSON.
        """
        try:
            return json_text.read(text)
        except (ValueError, TypeError) as error:
            raise BadInput(
                f"{shown(self.url)} holds a measurement that is no JSON: {error}.",
                means="The store is damaged, or another program wrote into it.",
                do="Move it away; a new one is made, and measurements are repeated when they are needed.",
            ) from error

    def _object(self, text: str) -> dict[str, Any]:
        found = self._json(text)
        return found if isinstance(found, dict) else {}

    def _write(self, rows: list[dict[str, str]], statement: str) -> None:
        from sqlalchemy import text

        if rows:
            with self._transaction() as connection:
                connection.execute(text(statement), rows)

    @contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[Connection]:
        """A transaction whose database errors are told in the user's terms."""
        from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError

        try:
            with self._engine.connect() as connection, connection.begin():
                if write and connection.dialect.name == "sqlite":
                    # Take the write lock now: a reader that turns writer late cannot wait its turn, it fails.
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                elif connection.dialect.name == "sqlite":
                    connection.exec_driver_sql("BEGIN")
                yield connection
        except (OperationalError, DatabaseError, InterfaceError) as error:
            raise explain(error, self.url) from error


def _kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r} instead")
    return kind


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _parameters(row: EvidenceRow) -> dict[str, str]:
    """A row as the statement's parameters."""
    key = canonical(row.key)
    return {
        "kind": row.kind,
        "key_hash": _hash(key),
        "key": key,
        "value": canonical(row.value),
        "created": row.created,
        "bitladder": row.bitladder,
        "host": canonical(row.host),
    }


def _read_export(path: Path) -> Iterator[EvidenceRow]:
    """Rows of an export, checked line by line."""
    try:
        lines = unicode.lines(unicode.decoded(path.read_bytes()))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{path} cannot be read as an export: {getattr(error, 'strerror', None) or error}.",
            do="Use a file that `bitladder evidence export` wrote.",
        ) from error
    for number, line in enumerate(lines, start=1):
        try:
            data = json_text.read(line)
            if not isinstance(data, dict):
                raise ValueError("it is no object")
            if number == 1:
                if data.get("format") != EXPORT_FORMAT:
                    raise ValueError(f"its format is not {EXPORT_FORMAT}")
                continue
            canonical(data)
            yield EvidenceRow(
                _kind(data["kind"]),
                dict(data["key"]),
                data["value"],
                str(data["created"]),
                str(data["bitladder"]),
                dict(data["host"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else error
            raise BadInput(
                f"Line {number} of {path} is not evidence: {why}.",
                do="Use a file that `bitladder evidence export` wrote.",
            ) from error
    if not lines:
        raise BadInput(f"{path} is empty.", do="Use a file that `bitladder evidence export` wrote.")
