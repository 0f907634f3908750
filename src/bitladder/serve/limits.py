"""Who may call, from where, how much at once: keys, hosts and origins, body size, the bounded queue."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from bitladder import system, unicode
from bitladder.errors import BadInput, OutputError
from bitladder.files.atomic import write_whole
from bitladder.serve.protocol import Refused, header_text
from bitladder.units import MiB

log = logging.getLogger("bitladder.serve")

_PORT = re.compile(r":\d+$")
_LINE = re.compile(r"([\w.@-]{1,64}) sha256:([0-9a-f]{32}):([0-9a-f]{64})")
_LARGEST = 4 * MiB
"""Bytes of a key file: thirty thousand keys."""
_WAIT_S = 30.0
BODY_S = 60.0
"""Seconds for the whole body of a request; the caller of `read_body` keeps the time."""
_LOOK_AGAIN_S = 1.0
_KEYED_PREFIXES = ("/v1/", "/bitladder/api/", "/metrics")


@dataclass(frozen=True)
class Key:
    """A client's key at rest: its name, a salt and SHA-256 of salt and key, both as hexadecimal text.

    A key holds 256 random bits, so there is nothing to guess and a slow hash would only slow every request.
    """

    name: str
    salt: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} sha256:{self.salt}:{self.digest}"


def _digest(salt: str, secret: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + secret.encode("utf-8", "surrogateescape")).hexdigest()


def new_key(name: str) -> tuple[str, Key]:
    """A fresh key for a client: the secret to hand over once, and the line for the key file."""
    secret, salt = "bl-" + secrets.token_urlsafe(32), secrets.token_hex(16)
    key = Key(name, salt, _digest(salt, secret))
    if not _LINE.fullmatch(str(key)):
        raise BadInput(f"'{name}' cannot name a key.", do="Use letters, digits and . _ @ -, at most 64 characters.")
    return secret, key


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read a key file: one key a line, `#` starts a comment.

    Raises:
        BadInput: no such file, no key in it, or a line is something else (a key in plain text, say).
    """
    keys = _keys(_text(path), path)
    if not keys:
        raise BadInput(f"The key file '{path}' holds no key.", do="Make one with `bitladder key NAME --file FILE`.")
    return keys


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
        text = unicode.decoded(raw)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"The key file '{path}' cannot be read: {getattr(error, 'strerror', None) or error}.",
            do="Check the path; `bitladder key NAME --file FILE` makes one.",
        ) from None
    if len(raw) > _LARGEST:
        raise BadInput(f"'{path}' has more than {_LARGEST} bytes.", do="Give a file of keys.")
    return text


def _keys(text: str, path: Path) -> tuple[Key, ...]:
    keys = []
    for number, line in enumerate(unicode.lines(text), 1):
        entry = line.split("#", 1)[0].strip()
        if entry:
            match = _LINE.fullmatch(entry)
            if match is None:
                raise BadInput(
                    f"Line {number} of the key file '{path}' is no hashed key.",
                    means="Keys are kept as 'name sha256:salt:hash', never in plain text.",
                    do="Make keys with `bitladder key NAME --file FILE`; it prints the key once and keeps the hash.",
                )
            keys.append(Key(*match.groups()))
    return tuple(keys)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Nobody else changes a key file while the block runs: two that both began with what it held would each write
    their own change alone, and a key that was handed out be lost.

    Raises:
        OutputError: its folder cannot be written, or somebody else keeps it for long.
    """
    lock = path.with_name(f".{path.name}.lock")
    until = time.monotonic() + _WAIT_S
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = system.open_file(lock, "O_RDWR", "O_CREAT", "O_NOFOLLOW")
        while not system.claim(handle, lock):
            os.close(handle)
            if time.monotonic() > until:
                raise OutputError(f"{path} is being changed by another process.", do="Wait for it to end.")
            time.sleep(0.01)
            handle = system.open_file(lock, "O_RDWR", "O_CREAT", "O_NOFOLLOW")
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}.", do="Name another place with --file."
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file: there it stays
            lock.unlink()
        os.close(handle)


def add_key(path: Path, name: str) -> str:
    """Make a key for a client, add its hash to the key file (made when it is not there), and give the secret.

    Raises:
        BadInput: the name cannot be one or has a key already, or the file is no key file.
        OutputError: the file cannot be written.
    """
    secret, key = new_key(name)
    there = path.resolve()  # where the file is kept by a link, that stays one
    with _alone(there):
        text = _text(path) if path.exists() else ""
        if any(known.name == name for known in _keys(text, path)):
            raise BadInput(
                f"'{name}' has a key in '{path}' already.",
                do=f"`bitladder key revoke {name} --file {path}` takes it away.",
            )
        write_whole(there, f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{key}\n")
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Take a client's key out of the key file; a gateway that runs refuses it from then on (`KeyRing`).

    Raises:
        BadInput: there is no key of that name, or the file is no key file.
        OutputError: the file cannot be written.
    """
    read_keys(path)  # where there are none, no folder is made for a lock
    there = path.resolve()
    with _alone(there):
        text = _text(path)
        known = [key.name for key in _keys(text, path)]
        if name not in known:
            raise BadInput(f"'{name}' has no key in '{path}'.", do=f"There are keys of: {', '.join(known)}.")
        kept = [line for line in unicode.lines(text) if line.split("#", 1)[0].strip().split(" ", 1)[0] != name]
        write_whole(there, "".join(f"{line}\n" for line in kept))


class KeyRing:
    """The keys of a file, read again when the file changes. A file that cannot be read lets nobody in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = read_keys(path)
        self._seen = self._look()
        self._looked = time.monotonic()

    def keys(self) -> tuple[Key, ...]:
        """Those that are good now; the file is looked at once in a second at most."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_AGAIN_S:
            self._looked = now
            if (seen := self._look()) != self._seen:
                self._seen = seen
                self._read()
        return self._keys

    def _look(self) -> tuple[int, ...]:
        try:
            stat = self._path.stat()
        except OSError:
            return ()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> None:
        try:
            self._keys = read_keys(self._path)
            log.info("keys read again", extra={"keys": len(self._keys)})
        except BadInput as error:
            self._keys = ()
            log.error("no key is good any more", extra={"error": error.found})


def key_name(secret: str, keys: tuple[Key, ...]) -> str | None:
    """Whose key this is. Every key is compared, each in constant time, so timing tells neither key nor
    place.
    """
    found = None
    for key in keys:
        if hmac.compare_digest(_digest(key.salt, secret), key.digest):
            found = key.name
    return found


class Doorman:
    """ASGI middleware: refuses wrong hosts (DNS rebinding), foreign web origins, and calls without a key.

    The key's name is left in ``scope["state"]["key"]``.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], origins: frozenset[str], keys: KeyRing | None) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = origins
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through or answer it with an error."""
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["key"] = self._check(scope)
            except Refused as refused:
                await send_refusal(send, refused, scope["path"])
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> str:
        host: str | None = None
        origin = site = authorization = own_key = ""
        for name, value in scope["headers"]:
            if name == b"host":
                if host is not None:
                    raise Refused(400, "A request names one host, and this one names two.", code="wrong_host")
                host = value.decode("latin-1")
            elif name == b"origin":
                origin = value.decode("latin-1")
            elif name == b"sec-fetch-site":
                site = value.decode("latin-1")
            elif name == b"authorization":
                authorization = value.decode("latin-1")
            elif name == b"x-api-key":
                own_key = value.decode("latin-1")
        if host is None or _host_name(host) not in self._hosts:
            raise Refused(421, f"This gateway does not answer for host '{header_text(host or '')}'.", code="wrong_host")
        if origin and origin not in self._origins and _network_location(origin) != host:
            raise Refused(403, f"Calls from origin '{header_text(origin)}' are not allowed.", code="cross_origin")
        keyed = scope["path"].startswith(_KEYED_PREFIXES)
        if keyed and not origin and site == "cross-site":
            raise Refused(403, "Calls from other web sites are not allowed.", code="cross_origin")
        if self._keys is None or not keyed:
            return ""
        known = self._keys.keys()
        scheme, _, secret = authorization.partition(" ")
        given = [secret] if scheme.lower() == "bearer" else []
        given += [own_key] if own_key else []  # which is where Anthropic's clients send theirs
        name = next((name for one in given if (name := key_name(one.strip(), known)) is not None), None)
        if name is None:
            raise Refused(
                401,
                "A valid API key is needed: 'Authorization: Bearer KEY', or 'x-api-key: KEY'.",
                code="invalid_api_key",
            )
        return name


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets, lower case."""
    name = host.rpartition(":")[0] if _PORT.search(host) else host
    return name.strip("[]").lower().rstrip(".")


def _network_location(origin: str) -> str:
    """Host and port of an origin; empty when it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


async def send_refusal(send: Send, refused: Refused, path: str = "") -> None:
    """Answer with a refusal's JSON document as clients of ``path`` expect it; the connection is closed, since the body
    may not have been read.
    """
    headers = refused.fields_for(path)
    if refused.status in (401, 403, 408, 413, 415, 421):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": refused.body_for(path)})


async def read_body(scope: Scope, receive: Receive, limit: int, share: ClientShare) -> bytes | None:
    """The request's body, or None when the client left before it was complete. ``share`` of the memory grows with it.

    Raises:
        Refused: 413, before reading it when the length is announced, else once it has grown past ``limit``
            bytes; 503 when there is no room for it.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value[:20]) > limit:
            raise _too_large(limit)
        if name == b"content-encoding" and value.lower() != b"identity":
            raise Refused(415, "Compressed request bodies are not accepted.", code="unsupported_encoding")
    whole = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        if len(whole) + len(part) > limit:
            raise _too_large(limit)
        share.grow_to((len(whole) + len(part)) * _READING)
        more = message.get("more_body", False)
        if not more and not whole:
            return bytes(part)
        whole += part
        if not more:
            return bytes(whole)


def _too_large(limit: int) -> Refused:
    return Refused(413, f"The body is larger than the {limit} bytes allowed.", code="body_too_large")


_READING = 3
"""Bytes that a request holds for each byte of its body while that is read: it grows with room to spare, and is copied
once when it is whole.
"""
_HELD, _HELD_WIDE = 6, 12
"""Bytes that a request holds for each byte of its body until it is answered: the bytes, the text, its values, and what
is sent on; as text a character beyond ASCII may make four bytes of every other one.
"""
_VALUE = 128
"""Bytes that one JSON value takes beside its text: an entry of a dictionary with its key."""


def held_bytes(body: bytes, values: int) -> int:
    """No less than the memory that a request takes from here on, with so many JSON values in its body."""
    return len(body) * (_HELD if body.isascii() else _HELD_WIDE) + values * _VALUE


def let_go(error: BaseException) -> None:
    """Forget the frames that an error, and those it was raised in place of, came through; for errors that are answered.

    A frame that named its own error makes a cycle with it, in which all that the request held waits for Python's
    collector; that one counts objects, not their bytes, and comes after thousands of requests.
    """
    following: list[BaseException | None] = [error]
    while following:
        one = following.pop()
        if one is not None and one.__traceback__ is not None:
            one.__traceback__ = None
            following += [one.__cause__, one.__context__]


class RequestMemory:
    """Memory that all requests may hold together. Where one more byte does not fit, the request whose body has been
    coming in for longest gives way: whoever sends slowly, or never ends, must not keep the others out.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self._reading: dict[ClientShare, None] = {}

    def share(self, give_way: Callable[[Exception], None]) -> ClientShare:
        """A request's share, to be entered with ``with``. ``give_way`` is called when it is taken away."""
        return ClientShare(self, give_way)

    def enter(self, share: ClientShare) -> None:
        """A share begins."""
        self._reading[share] = None

    def settle(self, share: ClientShare) -> None:
        """A share is not taken away any more."""
        self._reading.pop(share, None)

    def fit(self, share: ClientShare, more: int) -> None:
        """Make room for a share to grow.

        Raises:
            Refused: 503, there is none; 413, there would be none if it were the only one.
        """
        if share.size + more > self.limit:
            raise Refused(
                413,
                f"Reading the body would take more than the {self.limit} bytes of memory that requests may take.",
                code="body_too_large",
            )
        while more > 0 and self.taken + more > self.limit:
            other = next((other for other in self._reading if other is not share and other.size), None)
            if other is None:
                raise _no_room()
            other.leave()
            other.give_way(_no_room())
        self.taken += more


class ClientShare:
    """What one request holds of a `Room`, in bytes."""

    def __init__(self, room: RequestMemory, give_way: Callable[[Exception], None]) -> None:
        self.give_way = give_way
        self.size = 0
        self._room = room

    def __enter__(self) -> Self:
        self._room.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def grow_to(self, size: int) -> None:
        """While its body comes in.

        Raises:
            Refused: 503, there is no room.
        """
        self._room.fit(self, size - self.size)
        self.size = size

    def settle(self, size: int) -> None:
        """Its body is complete; from here on it holds so much.

        Raises:
            Refused: 503, there is no room.
        """
        self.grow_to(size)
        self._room.settle(self)

    def leave(self) -> None:
        """Give back all of it."""
        self._room.settle(self)
        self._room.taken -= self.size
        self.size = 0


def _no_room() -> Refused:
    return Refused(
        503, "The requests at hand take all the memory that requests may take.", code="busy", retry_after_s=2
    )


class Gate:
    """How many requests an upstream gets at once, and how many may wait, first come first served."""

    def __init__(self, slots: int, max_queue: int) -> None:
        self.slots = slots
        self.max_queue = max_queue
        self.running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._usual_s = 1.0

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Wait for a slot.

        Raises:
            Refused: 429 with Retry-After, when the queue is full.
        """
        if self.running < self.slots and not self._waiting:
            self.running += 1
            return
        if len(self._waiting) >= self.max_queue:
            wait = math.ceil(self._usual_s * (len(self._waiting) + 1) / self.slots)
            raise Refused(
                429,
                f"{self.running} requests are running and {len(self._waiting)} waiting; no more fit.",
                code="queue_full",
                retry_after_s=max(1, min(wait, 600)),
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._hand_over()  # the slot came in the moment we gave up
            else:
                with contextlib.suppress(ValueError):  # another one's leaving may have skipped it already
                    self._waiting.remove(turn)
            raise

    def leave(self, seconds: float) -> None:
        """Give the slot back; ``seconds`` it was used for, which the next Retry-After goes by."""
        self._usual_s += 0.1 * (seconds - self._usual_s)
        self._hand_over()

    def resize(self, slots: int) -> None:
        """Have so many slots from now on; where there are fewer, requests that run go on."""
        self.slots = slots
        while self._waiting and self.running < self.slots:
            turn = self._waiting.popleft()
            if not turn.done():
                self.running += 1
                turn.set_result(None)

    def _hand_over(self) -> None:
        while self._waiting and self.running <= self.slots:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
