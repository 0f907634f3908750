"""An OpenAI-compatible engine that computes nothing: numbered tokens on a clock, as cheaply as Python can.

Run as ``python benchmarks/fake_engine.py --port P [--first-ms F] [--interval-ms I]``. `max_tokens` of a
request says how many tokens to send. Every token's text is its number, so that a lost, repeated or
reordered one shows. One timer ticks for all streams. It serves the gateway's benchmarks and speaks just
enough HTTP for that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from typing import cast

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\n"
SPOILED = (
    b"data: {\xff\xfe\n\n",
    b"\x00\x01noise\n\n",
    b'data: ["not an object"]\n\n',
    b"data: " + b"[" * 20_000 + b"\n\n",
    b'data: {"error":{"message":"out of memory","code":500}}\n\n',
    b'data: {"model":"impostor","choices":[{"index":0,"delta":{"content":"7 "}}]}\n\n',
)
"""What may come in the middle of a stream of ours, which goes on after it as if nothing had happened."""
TOKEN = (
    b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"%s","choices":'
    b'[{"index":0,"delta":{"content":"%d "},"finish_reason":null}]}\n\n'
)


class Engine:
    """All streams, and the clock they run on."""

    def __init__(self, model: str, first_s: float, interval_s: float, mischief: float) -> None:
        self.model = model.encode()
        self.mischief = mischief
        self.chance = random.Random(1)
        self.first_s = first_s
        self.interval_s = interval_s
        self.streams: set[Connection] = set()

    async def tick(self) -> None:
        """One token for every stream, each interval."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += self.interval_s
            await asyncio.sleep(due - loop.time())
            for connection in tuple(self.streams):
                connection.next_token()


class Connection(asyncio.Protocol):
    """One client's connection, kept alive between requests."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.received = b""
        self.sent = 0
        self.wanted = 0
        self.spoiled_at = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, _: Exception | None) -> None:
        """It left."""
        self.engine.streams.discard(self)

    def data_received(self, data: bytes) -> None:
        """What came from the other side."""
        self.received += data
        head, found, rest = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        if len(rest) < length:
            return
        body, self.received = rest[:length], rest[length:]
        if head.startswith(b"GET"):
            model = self.engine.model.decode()
            self.document({"status": "ok", "object": "list", "data": [{"id": model, "object": "model"}]})
            return
        request = json.loads(body)
        self.wanted, self.sent, self.spoiled_at = int(request.get("max_tokens") or 16), 0, -1
        answer = self.start_stream if request.get("stream") else self.whole
        if self.engine.chance.random() < self.engine.mischief:
            tricks = [self.garbage, self.wrong_model, self.break_off, self.late, self.cut]
            answer = self.engine.chance.choice([*tricks, self.spoil] if request.get("stream") else tricks)
        asyncio.get_running_loop().call_later(self.engine.first_s, answer)

    def document(self, content: object) -> None:
        """A JSON document as a whole reply."""
        body = json.dumps(content).encode()
        if not self.transport.is_closing():
            self.transport.write(HEAD % b"application/json" + b"content-length: %d\r\n\r\n" % len(body) + body)

    def whole(self) -> None:
        """All tokens at once."""
        text = "".join(f"{number} " for number in range(self.wanted))
        message = {"role": "assistant", "content": text}
        self.document(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 1,
                "model": self.engine.model.decode(),
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {
                    "prompt_tokens": 1,
                    "completion_tokens": self.wanted,
                    "total_tokens": self.wanted + 1,
                },
            }
        )

    def start_stream(self) -> None:
        """The head and the first token."""
        if not self.transport.is_closing():
            self.transport.write(HEAD % b"text/event-stream" + b"transfer-encoding: chunked\r\n\r\n")
            self.engine.streams.add(self)
            self.next_token()

    def garbage(self) -> None:
        """Bytes that are no HTTP, or no JSON."""
        noise = self.engine.chance.choice(
            (b"\x00\x01garbage\r\n\r\n", HEAD % b"text/html" + b"content-length: 3\r\n\r\n<p>")
        )
        self.transport.write(noise)
        self.transport.close()

    def wrong_model(self) -> None:
        """A good answer of another model."""
        self.document({"model": "impostor", "choices": [{"index": 0, "message": {"content": "x"}}]})

    def break_off(self) -> None:
        """Nothing at all."""
        self.transport.abort()

    def late(self) -> None:
        """A document a second after it was due."""
        asyncio.get_running_loop().call_later(1.0, self.whole)

    def cut(self) -> None:
        """A stream that ends after one token and a half as if nothing were missing."""
        event = TOKEN % (self.engine.model, 0)
        body = event + event[:30]
        head = HEAD % b"text/event-stream" + b"content-length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)

    def spoil(self) -> None:
        """A stream with garbage somewhere in its middle."""
        self.spoiled_at = self.engine.chance.randrange(1, self.wanted)
        self.start_stream()

    def next_token(self) -> None:
        """One more token, or the end."""
        if self.sent == self.spoiled_at:
            self.spoiled_at = -1
            noise = self.engine.chance.choice(SPOILED)
            self.transport.write(b"%x\r\n%b\r\n" % (len(noise), noise))
        if self.sent < self.wanted:
            event = TOKEN % (self.engine.model, self.sent)
            self.sent += 1
            self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        else:
            self.engine.streams.discard(self)
            self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="fake")
    parser.add_argument("--first-ms", type=float, default=0.0)
    parser.add_argument("--interval-ms", type=float, default=50.0)
    parser.add_argument("--mischief", type=float, default=0.0, help="share of requests answered badly")
    options = parser.parse_args()
    engine = Engine(options.model, options.first_ms / 1000, options.interval_ms / 1000, options.mischief)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(engine), "127.0.0.1", options.port, backlog=2048)
    print(json.dumps({"address": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}), flush=True)
    await engine.tick()


if __name__ == "__main__":
    uvloop.run(main())
