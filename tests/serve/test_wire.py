"""What leaves together, and word of clients that leave."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator

import pytest
import uvicorn
import uvloop

from bitladder.serve import wire
from bitladder.serve.wire import WHEN_GONE, CarefulProtocol, Shared, Together


class Transport:
    """Keeps what was done to it."""

    def __init__(self) -> None:
        self.did: list[object] = []

    def write(self, data: bytes) -> None:
        self.did.append(data)

    def close(self) -> None:
        self.did.append("close")

    def is_closing(self) -> bool:
        return "close" in self.did

    def pause_reading(self) -> None:
        self.did.append("pause")

    def resume_reading(self) -> None:
        self.did.append("resume")

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> object:
        return {"sockname": ("127.0.0.1", 1), "peername": ("127.0.0.1", 2)}.get(name)


def test_what_is_written_in_one_turn_leaves_in_one_packet():
    async def run() -> list[object]:
        transport = Transport()
        together = Together(transport, asyncio.get_running_loop())
        together.write(b"head")
        together.write(b"first")
        assert transport.did == []
        await asyncio.sleep(0)
        together.write(b"second")
        await asyncio.sleep(0)
        together.write(b"last")
        together.close()
        await asyncio.sleep(0)
        return transport.did

    assert asyncio.run(run()) == [b"headfirst", b"second", b"last", "close"]


def test_a_client_that_leaves_is_told_at_once_even_after_a_body_that_paused_the_connection():
    gone: list[str] = []

    async def app(scope, receive, send) -> None:
        message = await receive()
        while message["more_body"]:
            message = await receive()
        scope["extensions"][WHEN_GONE](lambda: gone.append("gone"))
        await asyncio.sleep(1)

    async def run() -> list[object]:
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        transport = Transport()
        protocol = CarefulProtocol(config, Shared(), {})
        protocol.connection_made(transport)
        protocol.data_received(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
        await asyncio.sleep(0)
        protocol.data_received(b"x" * 100_000)
        await asyncio.sleep(0.01)
        assert transport.did[-2:] == ["pause", "resume"]
        protocol.connection_lost(None)
        assert gone == ["gone"]
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return transport.did

    asyncio.run(run())


class Gone(Transport):
    """As uvloop's transports are once the connection is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = 0

    def refuse(self, *_: object) -> None:
        self.reached += 1
        raise RuntimeError("unable to perform operation; the handler is closed")

    write = pause_reading = resume_reading = refuse

    def is_closing(self) -> bool:
        return True


def test_what_is_done_after_the_client_left_has_no_effect():
    async def run() -> None:
        gone = Gone()
        together = Together(gone, asyncio.get_running_loop())
        together.write(b"late")
        together.pause_reading()
        together.resume_reading()
        together.flush()
        together.close()
        assert gone.reached == 0

    asyncio.run(run())


async def answers(scope, receive, send) -> None:
    """/echo reads its body, /stream never ends, /big is 8 MiB at once, and every other path reads nothing."""
    body, path = b"hello", scope["path"]
    if path == "/echo":
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
    if path == "/fields":
        body = json.dumps([name.decode() for name, _ in scope["headers"]]).encode()
    if path == "/slow":
        await asyncio.sleep(0.3)
    if path == "/big":
        body = bytes(8 << 20)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    gone = asyncio.Event()
    scope["extensions"][WHEN_GONE](gone.set)
    while path == "/stream" and not gone.is_set():
        await send({"type": "http.response.body", "body": bytes(1000), "more_body": True})
        await asyncio.sleep(0.01)
    await send({"type": "http.response.body", "body": body})


class Talk:
    """A client's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def rest(self) -> bytes:
        """All that comes until the end of the connection."""
        found = b""
        with contextlib.suppress(ConnectionError):
            while piece := await self.reader.read(65536):
                found += piece
        return found

    async def forever(self, piece: bytes, at_most: int = 400 << 20) -> int:
        """Say one thing again and again until the connection ends; gives the bytes sent."""
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < at_most and not self.writer.is_closing():
                await self.say(piece)
                sent += len(piece)
        return sent


class Server:
    """The protocol on a real socket."""

    def __init__(self, url: tuple[str, int], shared: Shared) -> None:
        self.url, self.shared = url, shared
        self.talks: list[Talk] = []

    async def talk(self, data: bytes = b"") -> Talk:
        talk = Talk(*await asyncio.open_connection(*self.url))
        self.talks.append(talk)
        with contextlib.suppress(ConnectionError):
            await talk.say(data)
        return talk


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    config = uvicorn.Config(answers, lifespan="off", log_config=None, access_log=False, ws="none")
    config.load()
    shared = Shared()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: CarefulProtocol(config, shared, {}), "127.0.0.1", 0)
    served = Server(server.sockets[0].getsockname(), shared)
    try:
        yield served
    finally:
        server.close()
        for talk in served.talks:
            talk.writer.transport.abort()
        async with asyncio.timeout(5):
            while shared.connections or shared.tasks:
                await asyncio.sleep(0.01)
        await server.wait_closed()
        assert (shared.unsent, dict(shared.waiting), set(shared.connections)) == (0, {}, set())


def run(test) -> object:
    """Against a real server, in the gateway's own loop."""

    async def main() -> object:
        async with asyncio.timeout(30), serving() as server:
            return await test(server)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


@pytest.fixture
def quick(monkeypatch):
    """Every limit of time is short."""
    for name, seconds in (("HEAD_S", 0.3), ("UNWANTED_S", 0.3), ("LINGER_S", 0.2), ("TAKE_S", 0.5)):
        monkeypatch.setattr(wire, name, seconds)


GET = b"GET / HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /echo HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
ENDLESS = {
    "a field of the head": (GET + b"a: ", b"x" * 5000),
    "fields of the head": (GET, b"a: x\r\n" * 50),
    "the target": (b"GET /", b"x" * 5000),
    "the method": (b"", b"G" * 5000),
    "empty lines before a request": (b"", b"\r\n" * 500),
    "trailers": (POST + CHUNKED + b"0\r\n", b"a: x\r\n" * 50),
    "one trailer": (POST + CHUNKED + b"0\r\na: ", b"x" * 5000),
    "trailers that nobody waits for": (GET + CHUNKED + b"0\r\n", b"a: x\r\n" * 50),
    "one trailer that nobody waits for": (GET + CHUNKED + b"0\r\na: ", b"x" * 5000),
    "a chunk's extension": (POST + CHUNKED + b"5;", b"x" * 5000),
    "a chunk's extension that nobody waits for": (GET + CHUNKED + b"5;", b"x" * 5000),
    "a chunk's size": (POST + CHUNKED, b"0" * 5000),
    "a body that nobody waits for": (GET + CHUNKED, b"400\r\n" + b"x" * 1024 + b"\r\n"),
    "a length that nobody waits for": (GET + b"content-length: 999999999999\r\n\r\n", b"x" * 5000),
    "another protocol": (GET + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n", b"x" * 5000),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_whatever_never_ends_is_ended(name, quick, monkeypatch):
    monkeypatch.setattr(wire, "MAX_UNWANTED", 1 << 20)
    begin, piece = ENDLESS[name]

    async def test(server: Server) -> None:
        talk = await server.talk(begin)
        assert await talk.forever(piece) < 40 << 20  # beyond the limits only what waits in the sockets
        good = await server.talk(POST + b"content-length: 2\r\nconnection: close\r\n\r\nhi")
        assert (await good.rest()).endswith(b"hi\r\n0\r\n\r\n")

    run(test)


@pytest.mark.parametrize("name", ["a field of the head", "fields of the head", "trailers", "a chunk's extension"])
def test_the_client_is_told_what_was_too_much(name):
    begin, piece = ENDLESS[name]

    async def test(server: Server) -> bytes:
        talk = await server.talk(begin + piece * (100_000 // len(piece)))
        return await talk.rest()

    head, _, body = run(test).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ") and b"connection: close" in head
    assert json.loads(body)["error"]["code"] == "head_too_large"


SLOW = {
    "nothing": (b"", b""),
    "half a head": (GET, b""),
    "an empty line": (b"\r\n", b""),
    "an empty line after a request": (GET + b"\r\n", b"\r\n"),
    "half of the next head": (GET + b"\r\n", GET),
    "half of the next head at once": (GET + b"\r\n" + GET, b""),
    "half a body that nobody waits for": (GET + b"content-length: 5\r\n\r\nx", b""),
    "half of the trailers that nobody waits for": (GET + CHUNKED + b"0\r\na: ", b""),
}


@pytest.mark.parametrize("name", SLOW)
def test_who_keeps_us_waiting_is_closed(name, quick):
    async def test(server: Server) -> bytes:
        begin, more = SLOW[name]
        talk = await server.talk(begin)
        await asyncio.sleep(0.1)
        await talk.say(more)
        return await talk.rest()

    began = time.monotonic()
    found = run(test)
    assert 0.2 < time.monotonic() - began < 4  # a connection that is idle is kept for longer
    assert found.startswith(b"HTTP/1.1 200") or not found


def test_trailers_are_no_header_fields():
    async def test(server: Server) -> bytes:
        ends = b"0\r\nauthorization: evil\r\n\r\n" + GET + b"connection: close\r\n\r\n"
        return await (await server.talk(POST.replace(b"/echo", b"/fields") + CHUNKED + ends)).rest()

    found = run(test)
    assert b'["host", "transfer-encoding"]' in found and b"evil" not in found and found.count(b"HTTP/1.1 200") == 2


def test_a_body_may_be_cut_however_it_likes():
    chunks = b"".join(b"1;" + b"e" * 1000 + b"\r\nx\r\n" for _ in range(500))

    async def test(server: Server) -> bytes:
        return await (await server.talk(POST + b"connection: close\r\n" + CHUNKED + chunks + b"0\r\n\r\n")).rest()

    found = run(test)
    assert found.startswith(b"HTTP/1.1 200") and found.count(b"x") >= 500


def test_a_connection_is_kept_after_a_body_that_nobody_read():
    async def test(server: Server) -> bytes:
        talk = await server.talk(GET + b"content-length: 300000\r\n\r\n" + b"x" * 300_000)
        await asyncio.sleep(0.1)
        await talk.say(GET + b"connection: close\r\n\r\n")
        return await talk.rest()

    assert run(test).count(b"HTTP/1.1 200") == 2


def test_an_answer_arrives_though_its_request_is_still_being_sent():
    async def test(server: Server) -> bytes:
        talk = await server.talk(GET + b"connection: close\r\ncontent-length: 20000000\r\n\r\n")
        await asyncio.sleep(0.1)
        await talk.say(b"x" * 20_000_000)
        return await talk.rest()

    assert run(test).endswith(b"hello\r\n0\r\n\r\n")


def test_of_many_requests_at_once_the_first_are_answered_and_the_rest_are_not_kept():
    async def test(server: Server) -> bytes:
        talk = await server.talk(GET.replace(b"/ ", b"/slow ") + b"\r\n" + (GET + b"\r\n") * 5000)
        return await talk.rest()

    assert run(test).count(b"HTTP/1.1 200") == 1 + wire.MAX_PIPELINED


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c"])
def test_another_protocol_is_not_spoken(upgrade):
    async def test(server: Server) -> bytes:
        talk = await server.talk(GET + b"connection: upgrade\r\nupgrade: " + upgrade + b"\r\n\r\n\x81\x00")
        return await talk.rest()

    found = run(test)
    assert found.startswith(b"HTTP/1.1 200") and b"connection: close" in found and found.endswith(b"0\r\n\r\n")


def test_garbage_does_not_stand_in_the_middle_of_an_answer():
    async def test(server: Server) -> bytes:
        talk = await server.talk(GET.replace(b"/ ", b"/stream ") + b"\r\n")
        await asyncio.sleep(0.1)
        await talk.say(b"\x00garbage\r\n\r\n")
        return await talk.rest()

    assert run(test).count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("path", [b"/stream", b"/big"])
def test_a_client_that_takes_nothing_is_closed(path, quick):
    async def test(server: Server) -> None:
        await server.talk(GET.replace(b"/ ", path + b" ") + b"\r\n")
        if path == b"/stream":  # a stream that fits into the sockets is taken by them
            for connection in server.shared.connections:
                connection.transport.write(bytes(16 << 20))
        await asyncio.sleep(0.2)
        assert server.shared.unsent > 64 << 10
        await asyncio.sleep(1.5)
        assert not server.shared.connections

    run(test)


def test_what_slow_clients_leave_unread_is_bounded_together(monkeypatch):
    monkeypatch.setattr(wire, "MAX_UNSENT", 20 << 20)

    async def test(server: Server) -> None:
        talks = [await server.talk(GET.replace(b"/ ", b"/big ") + b"\r\n") for _ in range(20)]
        await asyncio.sleep(0.3)
        assert 0 < server.shared.unsent <= 20 << 20
        assert len(server.shared.connections) < len(talks)

    run(test)


def test_for_one_connection_more_the_one_that_waited_longest_makes_way(monkeypatch):
    monkeypatch.setattr(wire, "MAX_CONNECTIONS", 20)

    async def test(server: Server) -> None:
        busy = await server.talk(GET.replace(b"/ ", b"/stream ") + b"\r\n")
        await busy.reader.read(10)
        idle = [await server.talk(GET) for _ in range(60)]
        good = await server.talk(GET + b"connection: close\r\n\r\n")
        assert (await good.rest()).endswith(b"hello\r\n0\r\n\r\n")
        assert len(server.shared.connections) <= 20
        assert await busy.reader.read(10)  # whoever gets an answer stays
        assert await idle[0].rest() == b""

    run(test)


def test_when_all_are_busy_one_more_is_refused(monkeypatch):
    monkeypatch.setattr(wire, "MAX_CONNECTIONS", 3)

    async def test(server: Server) -> bytes:
        for _ in range(3):
            await (await server.talk(GET.replace(b"/ ", b"/stream ") + b"\r\n")).reader.read(10)
        return await (await server.talk()).rest()

    assert run(test).startswith(b"HTTP/1.1 503 ")


def test_clients_that_leave_at_any_moment_leave_no_trace(caplog):
    caplog.set_level(logging.WARNING)

    async def test(server: Server) -> None:
        for number in range(300):
            data = (POST + CHUNKED + b"5\r\nhello\r\n0\r\n\r\n") * 3 + GET.replace(b"/ ", b"/stream ") + b"\r\n"
            talk = await server.talk(data[: number % len(data)] if number % 2 else data)
            await asyncio.sleep(0.0005 * (number % 5))
            talk.writer.transport.abort()
        await asyncio.sleep(0.2)

    run(test)
    assert caplog.records == []
