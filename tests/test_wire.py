"""What leaves together, and word of clients that leave."""

import asyncio

import uvicorn
from uvicorn.server import ServerState

from bitladder.serve.wire import WHEN_GONE, CarefulProtocol, Together


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
        protocol = CarefulProtocol(config, ServerState(), {})
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
