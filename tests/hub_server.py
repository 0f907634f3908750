"""A hub on this machine: the part of the Hugging Face API that fetching and header reading use."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repositories as name -> file name -> bytes; some refuse, one breaks off."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    """Listed by a search; what they hold is not shown."""
    downloads: dict[str, int] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    """Apache-2.0 where nothing stands."""
    cut_after: int | None = None
    """Close the connection after so many bytes of every answer that is longer."""
    dead_after: int | None = None
    """Answers to such requests after which the connection is closed at once, without a byte."""
    ranges: bool = True
    etags: dict[str, str] = field(default_factory=dict)
    """What is told instead of a file's hash."""
    break_after: int | None = None
    """Cut every file's answer after this many bytes."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Path and Range of every request for a file."""
    sent: int = 0


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0].strip("/")
            parts = path.split("/")
            if parts == ["api", "models"]:
                self.search(parse_qs(urlsplit(self.path).query))
            elif parts[:2] == ["api", "models"]:
                self.info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            elif len(parts) > 4 and parts[2] == "resolve":
                self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body=body)
            else:
                self.refuse(404, "EntryNotFound")

        def known(self, repo: str, revision: str) -> bool:
            if repo not in hub.repos:
                self.refuse(401, "RepoNotFound")
            elif repo in hub.gated:
                self.refuse(403, "GatedRepo")
            elif revision not in ("main", COMMIT):
                self.refuse(404, "RevisionNotFound")
            else:
                return True
            return False

        def info(self, repo: str, revision: str) -> None:
            if not self.known(repo, revision):
                return
            siblings = [{"rfilename": name, "size": len(raw)} for name, raw in hub.repos[repo].items()]
            card = {"license": "apache-2.0"}
            self.send(
                json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings, "cardData": card}).encode(), 200, {}, True
            )

        def search(self, query: dict[str, list[str]]) -> None:
            words = query.get("search", [""])[0].lower().split()
            found = [
                repo
                for repo, files in hub.repos.items()
                if all(word in repo.lower() for word in words)
                and ("gguf" not in query.get("filter", []) or any(name.endswith(".gguf") for name in files))
            ]
            found.sort(key=lambda repo: -hub.downloads.get(repo, 0))
            rows = [
                {
                    "id": repo,
                    "downloads": hub.downloads.get(repo, 0),
                    "gated": "manual" if repo in hub.gated else False,
                    "tags": ["gguf", f"license:{hub.licences.get(repo, 'apache-2.0')}"],
                }
                for repo in found[: int(query.get("limit", ["1000"])[0])]
            ]
            self.send(json.dumps(rows).encode(), 200, {"Content-Type": "application/json"}, True)

        def file(self, repo: str, revision: str, name: str, *, body: bool) -> None:
            if not self.known(repo, revision):
                return
            raw = hub.repos[repo].get(name)
            if raw is None:
                self.refuse(404, "EntryNotFound")
                return
            wanted = self.headers.get("Range", "")
            if body:
                hub.asked.append((name, wanted))
            etag = hub.etags.get(name, hashlib.sha256(raw).hexdigest())
            extra = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            status = 200
            if wanted.startswith("bytes=") and hub.ranges:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                stop = int(last) + 1 if last else len(raw)
                extra["Content-Range"] = f"bytes {first}-{stop - 1}/{len(raw)}"
                raw, status = raw[int(first) : stop], 206
            self.send(raw, status, extra, body)

        def send(self, raw: bytes, status: int, extra: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(raw)), **extra}.items():
                self.send_header(key, value)
            self.end_headers()
            if not body:
                return
            if hub.break_after is not None and status == 206 and len(raw) > hub.break_after:
                self.broken(raw[: hub.break_after])
                return
            if hub.dead_after is not None and status in (200, 206) and len(raw) > 10_000:
                hub.dead_after -= 1
                if hub.dead_after < 0:
                    self.broken(b"")
                    return
            if hub.cut_after is not None and len(raw) > hub.cut_after:
                self.broken(raw[: hub.cut_after])
                return
            hub.sent += len(raw)
            self.wfile.write(raw)

        def broken(self, raw: bytes) -> None:
            """Some bytes, and the end of the connection."""
            hub.sent += len(raw)
            self.wfile.write(raw)
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def safetensors(tensors: dict[str, list[int]]) -> bytes:
    """A file of zeros in BF16: tensor name to shape."""
    at, table = 0, {}
    for name, shape in tensors.items():
        size = 2
        for length in shape:
            size *= length
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(table).encode()
    return struct.pack("<Q", len(head)) + head + bytes(at)
