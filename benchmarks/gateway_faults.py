"""Claim: whatever the engines do, every request ends in a complete answer or a clear error, and service
comes back in 5 s.

Two fake engines stand behind the gateway, quality and speed. While clients send 10,000 requests (half of
them streams), the engines take turns at being killed with SIGKILL and started again, stopped with SIGSTOP
and continued, and at answering garbage (at the start or in the middle of a stream), cutting streams and being
slow (a share of all requests, drawn with a fixed seed inside the engine). Every token is numbered: an answer
counts as complete only when every number came once, in order, from one engine. Prints what became of the
requests, and JSON as the last line; ends with 1 when a request was cut silently or answered twice.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import signal
import socket
import sys
import time

import aiohttp
import gateway_setup
import uvloop

TOKENS = 8


def free_port() -> int:
    """A port for an engine that will come back at the same address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Tormented:
    """A fake engine at a fixed port, killed and stopped on purpose."""

    def __init__(self, model: str, stack: contextlib.ExitStack) -> None:
        self.model = model
        self.port = free_port()
        self._stack = stack
        self.start()

    @property
    def url(self) -> str:
        """Its base URL, the same after every start."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, with its own share of misbehaviour."""
        engine = gateway_setup.fake_engine(self.model, first_ms=5.0, interval_ms=5.0, port=self.port, mischief=0.05)
        _, self.process = self._stack.enter_context(engine)

    async def die(self) -> None:
        """SIGKILL, half a second of nothing, start again."""
        self.process.kill()
        await asyncio.to_thread(self.process.wait)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(self.start)

    async def hang(self) -> None:
        """SIGSTOP for two seconds."""
        self.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(2.0)
        self.process.send_signal(signal.SIGCONT)


def verdict_on_stream(body: bytes) -> str:
    """What a client sees: a complete answer, a clear error, or something that must not happen."""
    numbers, models, error = [], set(), False
    for line in body.split(b"\n"):
        if line.startswith(b"data:") and b"[DONE]" not in line:
            try:
                event = json.loads(line[5:])
            except ValueError:
                return "WRONG: an event that is not JSON"
            if "error" in event:
                error = True
            else:
                models.add(event["model"])
                numbers += [int(event["choices"][0]["delta"]["content"])]
    if len(models) > 1 or numbers != list(range(len(numbers))):
        return "WRONG: mixed, repeated or lost tokens"
    if b"[DONE]" in body:
        return "complete" if len(numbers) == TOKENS and not error else "WRONG: ended early as if complete"
    return "clear error in the stream" if error else "WRONG: cut silently"


def verdict_on_document(body: bytes) -> str:
    """As for a stream."""
    text = json.loads(body)["choices"][0]["message"]["content"]
    whole = "".join(f"{number} " for number in range(TOKENS))
    return "complete" if text == whole else "WRONG: not the whole answer"


async def ask(session: aiohttp.ClientSession, url: str, model: str, *, stream: bool) -> str:
    """One request, and what became of it."""
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": TOKENS, "stream": stream}
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            received = await response.read()
            if response.status != 200:
                return f"clear error {response.status}" if b'"error"' in received else "WRONG: error without words"
            return verdict_on_stream(received) if stream else verdict_on_document(received)
    except aiohttp.ClientError as error:
        return f"WRONG: {type(error).__name__}"
    except TimeoutError:
        return "WRONG: no end within 30 s"


async def torment(engines: list[Tormented], session: aiohttp.ClientSession, url: str, back: list[float]) -> None:
    """Kill and hang the engines in turn; after each kill time how long its tier is not served by itself."""
    names = ("fake", "fake-fast")
    while True:
        for engine, name in zip(engines, names, strict=True):
            await asyncio.sleep(1.0)
            await engine.die()
            began = time.monotonic()
            while await ask(session, url, name, stream=False) != "complete":
                await asyncio.sleep(0.02)
            back.append(time.monotonic() - began)
            await asyncio.sleep(0.5)
            await engine.hang()


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    outcomes: collections.Counter[str] = collections.Counter()
    back: list[float] = []
    chance = random.Random(0)
    left = iter(range(options.requests))
    with contextlib.ExitStack() as stack:
        engines = [Tormented(model, stack) for model in ("fake", "fake-fast")]
        gateway, _ = stack.enter_context(gateway_setup.our_gateway(*(engine.url for engine in engines)))
        timeout = aiohttp.ClientTimeout(total=30)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

            async def client() -> None:
                for number in left:
                    model = chance.choice(("quality", "speed", "auto", "fake-fast"))
                    outcomes[await ask(session, gateway, model, stream=number % 2 == 0)] += 1

            began = time.monotonic()
            tormentor = asyncio.create_task(torment(engines, session, gateway, back))
            await asyncio.gather(*(client() for _ in range(options.clients)))
            seconds = time.monotonic() - began
            tormentor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await tormentor
            for engine in engines:
                engine.process.send_signal(signal.SIGCONT)
    for outcome, count in outcomes.most_common():
        print(f"{count:6d}  {outcome}")
    row = {
        "requests": options.requests,
        "outcomes": dict(outcomes),
        "kills": len(back),
        "service_back_s_max": round(max(back), 3) if back else None,
        "seconds": round(seconds, 1),
    }
    print(json.dumps({"setting": gateway_setup.setting(), "rows": [row]}))
    return int(any(outcome.startswith("WRONG") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
