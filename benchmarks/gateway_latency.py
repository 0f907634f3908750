"""Claim: the gateway adds under 1 ms (median) and 5 ms (99th percentile) to the first byte, at most a tenth
of LiteLLM's proxy.

The same client asks the same fake engine directly, through the gateway, and through LiteLLM's proxy if the
environment variable BITLADDER_LITELLM names its command; in turns, several rounds, in one run. Added
latency is the difference of the two medians (or 99th percentiles) over all rounds. Clients think as long as
the engine takes, on average, at random; with ``--lockstep`` they do not think, and an engine with a fixed time to
first token keeps all 64 in step, so that each measures how long a burst of 64 takes. Prints a table, and JSON as
the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import time

import aiohttp
import gateway_setup
import numpy as np
import uvloop


async def ask(session: aiohttp.ClientSession, url: str, *, stream: bool) -> float:
    """Seconds to the first byte of the body."""
    body = {"model": "quality", "messages": [{"role": "user", "content": "hello " * 50}], "max_tokens": 2}
    began = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", json={**body, "stream": stream}) as response:
        assert response.status == 200, await response.text()
        await response.content.readany()
        first = time.perf_counter() - began
        async for _ in response.content.iter_any():
            pass
    return first


async def measure(url: str, clients: int, requests: int, think_s: float, *, stream: bool) -> list[float]:
    """Every client asks one after the other, thinking between; all first-byte times."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def client(number: int) -> list[float]:
            chance, times = random.Random(number), []
            for _ in range(requests + 1):
                await asyncio.sleep(2 * think_s * chance.random())
                times.append(await ask(session, url, stream=stream))
            return times[1:]  # the first one opened the connection

        return [value for times in await asyncio.gather(*map(client, range(clients))) for value in times]


def milliseconds(values: list[float]) -> dict[str, float]:
    return {
        "p50_ms": round(float(np.median(values)) * 1e3, 3),
        "p99_ms": round(float(np.quantile(values, 0.99)) * 1e3, 3),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300, help="per round with one client")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-ms", type=float, default=100.0, help="engine's time to first token at 64 clients")
    parser.add_argument("--lockstep", action="store_true", help="64 clients that do not think, alone")
    options = parser.parse_args()
    rows = []
    for clients, first_ms in ((1, 0.0), (64, options.first_ms))[options.lockstep :]:
        with contextlib.ExitStack() as stack:
            engine, _ = stack.enter_context(gateway_setup.fake_engine(first_ms=first_ms, interval_ms=10))
            gateway, _ = stack.enter_context(gateway_setup.our_gateway(engine))
            sides = {"direct": engine, "bitladder": gateway}
            if gateway_setup.LITELLM:
                sides["litellm"] = stack.enter_context(gateway_setup.litellm_proxy(engine))
            for stream in (False, True):
                times: dict[str, list[float]] = {side: [] for side in sides}
                each = max(2, options.requests // clients) if clients > 1 else options.requests
                for _ in range(options.rounds):
                    for side, url in sides.items():
                        think_s = 0.0 if options.lockstep else first_ms / 1000
                        times[side] += await measure(url, clients, each, think_s, stream=stream)
                found = {side: milliseconds(values) for side, values in times.items()}
                for side in sides:
                    added = {
                        f"added_{name}": round(found[side][name] - found["direct"][name], 3) for name in found[side]
                    }
                    row = {"side": side, "clients": clients, "stream": stream, "n": len(times[side])}
                    rows.append({**row, **found[side], **(added if side != "direct" else {})})
                    print(rows[-1], flush=True)
    print(json.dumps({"setting": gateway_setup.setting(), "rows": rows}))


if __name__ == "__main__":
    uvloop.run(main())
