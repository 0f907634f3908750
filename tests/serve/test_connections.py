"""The client for upstreams, against servers that write what a test says, byte for byte."""

import asyncio
import contextlib
import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from bitladder.serve import connections
from bitladder.serve.backends import UpstreamFailed, UpstreamRequest
from bitladder.serve.connections import ConnectionPool, HttpBackend, address_of, request_head

OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"content-length: 5\r\n\r\nhello"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def server(
    *scripts: Serve, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[ConnectionPool, str, list[int]]]:
    """A pool, and a server whose connections follow the scripts in order, the last one again and again."""
    opened: list[int] = []

    talks: list[asyncio.Task[None]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(len(opened))
        script = asyncio.create_task(scripts[min(len(opened), len(scripts)) - 1](reader, writer))
        talks.append(script)
        await asyncio.wait([script])
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    listening = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=tls)
    url = f"http{'s' if tls else ''}://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    async with listening:
        try:
            async with ConnectionPool(5.0) as pool:
                yield pool, url, opened
        finally:
            for script in talks:
                script.cancel()
            await asyncio.gather(*talks, return_exceptions=True)
            await asyncio.sleep(0.01)  # until the sockets are closed


def says(*pieces: bytes, again: bool = False) -> Serve:
    """Reads a request, answers with these pieces, and closes, or does so again."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            if not again:
                return

    return script


def get(*scripts: Serve, times: int = 1) -> tuple[list[tuple[int, bytes]], int]:
    """Replies to so many GETs, one after the other, and how many connections that took."""

    async def run():
        async with server(*scripts) as (pool, url, opened):
            return [await pool.get(url, "/x", 5.0) for _ in range(times)], len(opened)

    return asyncio.run(run())


def fails(*scripts: Serve) -> UpstreamFailed:
    with pytest.raises(UpstreamFailed) as caught:
        get(*scripts)
    return caught.value


CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [HELLO],
        [bytes([byte]) for byte in HELLO],
        [CHUNKED],
        [CHUNKED[:50], CHUNKED[50:]],
        [OK + b"\r\nhel", b"lo"],  # no length told: the end of the connection ends it
        [b"HTTP/1.1 100 Continue\r\n\r\n" + HELLO],
        [b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello"],
    ],
)
def test_a_reply_is_the_same_however_it_is_cut_and_framed(pieces):
    assert get(says(*pieces)) == ([(200, b"hello")], 1)


def test_a_connection_is_kept_for_the_next_request():
    assert get(says(HELLO, again=True), times=3) == ([(200, b"hello")] * 3, 1)


def test_a_kept_connection_that_was_closed_meanwhile_is_tried_once_on_a_fresh_one():
    async def closes_on_the_second(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await says(HELLO)(reader, writer)
        await reader.readuntil(b"\r\n\r\n")

    assert get(closes_on_the_second, says(HELLO), times=2) == ([(200, b"hello")] * 2, 2)


def test_a_connection_that_closes_without_a_word_is_not_tried_again_when_it_was_fresh():
    assert fails(says()).phase == "broken"


def test_a_connection_is_not_used_again_once_it_waited_too_long(monkeypatch):
    monkeypatch.setattr(connections, "KEPT_S", -1.0)
    assert get(says(HELLO, again=True), times=2)[1] == 2


def test_a_reply_that_is_let_go_in_its_middle_closes_its_connection():
    async def run():
        async with server(says(CHUNKED[:50], CHUNKED[50:], again=True)) as (pool, url, opened):
            reply = await pool.send(address_of(url), request_head("GET", address_of(url), "/", {}) + b"\r\n")
            reply.close()
            reply.close()  # twice does no harm
            return await pool.get(url, "/x", 5.0), len(opened)

    assert asyncio.run(run()) == ((200, b"hello"), 2)


@pytest.mark.parametrize("extra", [b"x", HELLO, b"HTTP/1.1 200 OK\r\n"])
def test_more_than_the_reply_is_not_taken_for_the_next_one(extra):
    assert get(says(HELLO + extra, again=True), times=2) == ([(200, b"hello")] * 2, 2)


@pytest.mark.parametrize("wait_s", [0.0, 0.0005, 0.003])
def test_an_upstream_that_answers_twice_costs_the_next_request_nothing(wait_s):
    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = 0
        while True:
            await reader.readuntil(b"\r\n\r\n")
            for name in (b"good", b"evil"):
                writer.write(OK + b"content-length: 5\r\n\r\n%b%d" % (name, number))
                await writer.drain()
                await asyncio.sleep(wait_s)
            number += 1

    async def run():
        found = []
        async with server(twice) as (pool, url, _):
            for _ in range(5):
                found.append((await pool.get(url, "/x", 5.0))[1][:4])
                await asyncio.sleep(0.01)
        return found

    assert asyncio.run(run()) == [b"good"] * 5


def test_what_waits_unread_on_a_kept_connection_is_not_the_next_answer():
    sent = threading.Event()

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        raw = writer.get_extra_info("socket")
        writer.write(HELLO)
        await asyncio.sleep(0.05)
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: (os.write(raw.fileno(), OK + b"content-length: 4\r\n\r\nevil"), sent.set()))
        await asyncio.sleep(1)

    async def run():
        async with server(late, says(HELLO)) as (pool, url, opened):
            first = await pool.get(url, "/x", 5.0)
            while not sent.is_set():
                await asyncio.sleep(0)
            return first, await pool.get(url, "/x", 5.0), len(opened)

    assert asyncio.run(run()) == ((200, b"hello"), (200, b"hello"), 2)


ENDLESS = {
    "trailers": (CHUNKED[:-2], b"x: y\r\n" * 1000),
    "one trailer": (CHUNKED[:-2] + b"x: ", b"y" * 5000),
    "an extension": (CHUNKED[:50] + b"1;", b"y" * 5000),
    "interim replies": (b"", b"HTTP/1.1 100 Continue\r\nx: y\r\n\r\n" * 100),
    "a field": (OK + b"x: ", b"y" * 5000),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_an_upstream_frames_its_reply_with_is_bounded(name):
    begin, piece = ENDLESS[name]

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(begin)
        with contextlib.suppress(ConnectionError):
            for _ in range(4000):
                writer.write(piece)
                await writer.drain()

    assert fails(endless).phase == "garbage"


def test_what_comes_unasked_on_a_kept_connection_closes_it():
    async def speaks_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await says(HELLO)(reader, writer)
        writer.write(OK + b"content-length: 4\r\n\r\nevil")
        await asyncio.sleep(1)

    async def run():
        async with server(speaks_late, says(HELLO)) as (pool, url, opened):
            first = await pool.get(url, "/x", 5.0)
            await asyncio.sleep(0.1)
            return first, await pool.get(url, "/x", 5.0), len(opened)

    assert asyncio.run(run()) == ((200, b"hello"), (200, b"hello"), 2)


@pytest.mark.parametrize(
    ("piece", "phase"),
    [
        (OK + b"content-length: 6\r\n\r\nhello", "broken"),
        (OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", "broken"),
        (b"HTTP/1.1 200", "broken"),
        (b"<html>", "garbage"),
        (OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello", "garbage"),
        (OK + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n", "garbage"),
        (OK + b"x: " + b"y" * 70_000, "garbage"),
        (OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n", "garbage"),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", "garbage"),
    ],
)
def test_a_reply_that_is_cut_or_no_http_fails(piece, phase):
    assert fails(says(piece)).phase == phase


def test_nobody_there_is_told_as_such():
    async def run() -> None:
        async with server(says(HELLO)) as (pool, url, _):
            pass
        await pool.get(url, "/x", 5.0)

    with pytest.raises(UpstreamFailed, match="cannot be reached at 127") as caught:
        asyncio.run(run())
    assert caught.value.phase == "connect"


def test_a_document_that_takes_too_long_is_given_up():
    async def run() -> None:
        async with server(says(OK + b"content-length: 9\r\n\r\nhello", again=True)) as (pool, url, _):
            await pool.get(url, "/x", 0.1)

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def test_while_nobody_reads_the_upstream_is_not_read_either():
    sent = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"\r\n")
        while True:
            writer.write(b"x" * 65536)
            sent += 65536
            await writer.drain()

    async def run() -> int:
        async with server(endless) as (pool, url, _):
            reply = await pool.send(address_of(url), request_head("GET", address_of(url), "/", {}) + b"\r\n")
            await asyncio.sleep(0.3)
            before = sent
            await asyncio.sleep(0.2)
            assert sent == before  # the sockets' own buffers are full
            size = 0
            async for piece in reply.chunks():
                size += len(piece)
                if size > before + 2**20:
                    break
            reply.close()
            return before

    assert asyncio.run(run()) < 64 * 2**20


def test_the_backend_sends_its_key_and_no_more_than_it_was_given():
    got = b""

    async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        got = await reader.readuntil(b"{}")
        writer.write(HELLO)

    async def run() -> bytes:
        async with server(keep) as (pool, url, _):
            backend = HttpBackend(pool, lambda: f"{url}/prefix/", "sk-1")
            reply = await backend.complete(UpstreamRequest("/v1/completions", b"{}", stream=False))
            return b"".join([piece async for piece in reply.chunks()])

    assert asyncio.run(run()) == b"hello"
    lines = got.decode().split("\r\n")
    assert lines[0] == "POST /prefix/completions HTTP/1.1"
    assert {line.partition(":")[0] for line in lines[1:-2]} == {
        "host", "content-type", "accept-encoding", "authorization", "content-length",
    }  # fmt: skip
    assert "authorization: Bearer sk-1" in lines


@pytest.mark.parametrize(
    ("url", "path", "names"),
    [
        ("https://api.anthropic.com/v1", "/v1/messages", {"x-api-key", "anthropic-version"}),
        ("https://api.anthropic.com/v1", "/v1/chat/completions", {"authorization"}),
        ("http://models.lan/v1", "/v1/messages/count_tokens", {"x-api-key", "anthropic-version", "authorization"}),
        ("http://models.lan/v1", "/v1/responses", {"authorization"}),
    ],
)
def test_the_key_is_where_each_api_wants_it(url, path, names):
    fields = HttpBackend(ConnectionPool(1.0), lambda: url, "sk-1")._fields(address_of(url), path)
    assert set(fields) - {"content-type", "accept-encoding"} == names
    assert {fields[name].removeprefix("Bearer ") for name in names if name != "anthropic-version"} == {"sk-1"}


def test_addresses():
    address = address_of("https://models.lan/openai/")
    assert (address.name, address.port, address.tls, address.host) == ("models.lan", 443, True, "models.lan")
    assert address.prefix == "/openai"
    assert address_of("http://[::1]:80").name == "::1"
    for wrong in ("ftp://x", "models.lan:80", "http://", "http://x:port", "http://[::1"):
        with pytest.raises(UpstreamFailed, match="address"):
            address_of(wrong)
    with pytest.raises(UpstreamFailed, match="line break"):
        request_head("GET", address, "/", {"authorization": "Bearer x\r\nevil: y"})
    with pytest.raises(UpstreamFailed, match="cannot be sent"):
        request_head("GET", address, "/", {"authorization": "Bearer \N{SNOWMAN}"})


def test_https_is_spoken_and_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)

    async def run() -> list[tuple[int, bytes]]:
        async with server(says(HELLO, again=True), tls=tls) as (pool, url, _):
            return [await pool.get(url, "/x", 5.0) for _ in range(2)]

    with pytest.raises(UpstreamFailed, match="certificate verify failed") as caught:
        asyncio.run(run())
    assert caught.value.phase == "connect"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert asyncio.run(run()) == [(200, b"hello")] * 2
