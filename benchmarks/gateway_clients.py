"""Claim: as the gateway's client, our own costs at most half of aiohttp's processor time, and a quarter of httpx's.

One process asks the fake engine directly, one request after the other, with each library; its own processor
time per request and per token of a stream is reported, which other load on the machine hardly changes. JSON
is the last line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Awaitable, Callable

import aiohttp
import gateway_setup
import httpx
import uvloop

from bitladder.serve.backends import UpstreamRequest
from bitladder.serve.connections import ConnectionPool, HttpBackend

BODY = {"model": "fake", "messages": [{"role": "user", "content": "hello " * 50}]}
Ask = Callable[[int, bool], Awaitable[int]]
"""``ask(tokens, stream)`` gives the bytes that came."""


async def cpu_us(ask: Ask, requests: int, tokens: int, *, stream: bool) -> float:
    """Processor time per request, in microseconds."""
    await ask(tokens, stream)
    began = time.process_time()
    for _ in range(requests):
        await ask(tokens, stream)
    return (time.process_time() - began) / requests * 1e6


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    rows = []
    with gateway_setup.fake_engine(interval_ms=1) as (address, _):
        url = f"{address}/v1/chat/completions"
        async with (
            aiohttp.ClientSession() as session,
            httpx.AsyncClient(trust_env=False) as client,
            ConnectionPool(connect_s=5.0) as pool,
        ):
            backend = HttpBackend(pool, lambda: address)

            async def with_ours(tokens: int, stream: bool) -> int:
                data = json.dumps({**BODY, "max_tokens": tokens, "stream": stream}).encode()
                reply = await backend.complete(UpstreamRequest("/v1/chat/completions", data, stream))
                try:
                    return sum([len(piece) async for piece in reply.chunks()])
                finally:
                    reply.close()

            async def with_aiohttp(tokens: int, stream: bool) -> int:
                data = json.dumps({**BODY, "max_tokens": tokens, "stream": stream}).encode()
                async with session.post(url, data=data) as response:
                    return sum([len(piece) async for piece in response.content.iter_any()])

            async def with_httpx(tokens: int, stream: bool) -> int:
                data = json.dumps({**BODY, "max_tokens": tokens, "stream": stream}).encode()
                async with client.stream("POST", url, content=data) as response:
                    return sum([len(piece) async for piece in response.aiter_raw()])

            for name, ask in (("ours", with_ours), ("aiohttp", with_aiohttp), ("httpx", with_httpx)):
                document = await cpu_us(ask, options.requests, 1, stream=False)
                stream = await cpu_us(ask, 5, options.tokens, stream=True)
                per_token = (stream - document) / options.tokens
                rows.append({"client": name, "us_per_request": round(document), "us_per_token": round(per_token, 1)})
                print(rows[-1], flush=True)
    print(json.dumps({"setting": gateway_setup.setting(), "rows": rows}))


if __name__ == "__main__":
    uvloop.run(main())
