"""A PostgreSQL server of the test's own, from the system's binaries (Debian: apt-get install postgresql)."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SETTINGS = {"listen_addresses": "", "fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}


def binaries() -> Path | None:
    """The folder with initdb and postgres, the newest version first; None when there is none."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    on_path = shutil.which("initdb")
    places = [*debian, *([Path(on_path).parent] if on_path else [])]
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


def unprivileged() -> str | None:
    """Who runs the server: PostgreSQL refuses root. None: whoever runs the tests."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in known)


class Server:
    """A server with an empty database that can be stopped and started again."""

    def __init__(self, folder_of_binaries: Path) -> None:
        self._binaries = folder_of_binaries
        user = unprivileged()
        self._folder = Path(tempfile.mkdtemp(prefix="bitladder-pg-"))  # short: a socket's path has at most 107 bytes
        if user:
            shutil.chown(self._folder, user)
        self._as_user: dict[str, Any] = {"user": user, "cwd": self._folder} if user else {"cwd": self._folder}
        options = ["-U", "ladder", "-A", "trust", "--no-sync", "-E", "UTF8"]
        initdb = [folder_of_binaries / "initdb", "-D", self._folder / "data", *options]
        subprocess.run(initdb, check=True, capture_output=True, **self._as_user)
        self.url = f"postgresql://ladder@/postgres?host={self._folder}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = [part for name, value in SETTINGS.items() for part in ("-c", f"{name}={value}")]
        command = [self._binaries / "postgres", "-D", self._folder / "data", "-k", self._folder, *options]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **self._as_user)
        _wait(self._binaries, self._folder, self._process)

    def stop(self) -> None:
        """Stop it at once; its data stay."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=30)

    def remove(self) -> None:
        """Stop it, and delete what it kept."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    """A server for a module's tests; those that ask for it are skipped where there is none."""
    found = binaries()
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not installed (pip install 'bitladder[postgres]')")
    server = Server(found)
    try:
        yield server
    finally:
        server.remove()


def _wait(folder_of_binaries: Path, folder: Path, server: subprocess.Popen[bytes]) -> None:
    """Until it answers."""
    for _ in range(200):
        ready = subprocess.run([folder_of_binaries / "pg_isready", "-q", "-h", folder], check=False)
        if ready.returncode == 0:
            return
        if server.poll() is not None:
            raise RuntimeError((folder / "log").read_text())
        time.sleep(0.1)
    raise RuntimeError("the server did not start in 20 seconds:\n" + (folder / "log").read_text())
