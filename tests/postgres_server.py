"""A PostgreSQL server of the test's own, from the system's binaries (Debian: apt-get install postgresql)."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def running(folder_of_binaries: Path) -> Iterator[str]:
    """The URL of an empty database; the server is gone afterwards."""
    user = unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="bitladder-pg-"))  # short: a socket's path has at most 107 bytes
    if user:
        shutil.chown(folder, user)
    data = folder / "data"
    as_user = {"user": user, "cwd": folder} if user else {"cwd": folder}
    initdb = [
        folder_of_binaries / "initdb",
        "-D",
        data,
        "-U",
        "ladder",
        "-A",
        "trust",
        "--no-sync",
        "-E",
        "UTF8",
    ]
    subprocess.run(initdb, check=True, capture_output=True, **as_user)
    options = [part for name, value in SETTINGS.items() for part in ("-c", f"{name}={value}")]
    command = [folder_of_binaries / "postgres", "-D", data, "-k", folder, *options]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, **as_user)
    try:
        _wait(folder_of_binaries, folder, server)
        yield f"postgresql://ladder@/postgres?host={folder}"
    finally:
        server.terminate()
        server.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


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
