"""Claim: half an hour of mixed work leaves the gateway's memory, speed and correctness as they were.

Clients send documents and streams to a fake engine through the gateway, some leave in the middle of an
answer, some read slowly. Every minute a line says how much memory the gateway holds and how long the first
byte took. Ends with 1 when an answer was wrong, or when memory kept growing: more than 10% from the first
fifth of the run to the last. JSON is the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time

import aiohttp
import gateway_setup
import numpy as np
import uvloop
from gateway_faults import verdict_on_document, verdict_on_stream

TOKENS = 8


async def one(session: aiohttp.ClientSession, url: str, chance: random.Random) -> tuple[str, float]:
    """One request of some kind: what became of it, and seconds to its first byte."""
    stream, mood = chance.random() < 0.7, chance.random()
    text = "hello " * chance.randrange(1, 400)
    model = chance.choice(("quality", "speed", "auto"))
    message = {"role": "user", "content": text}
    body = {"model": model, "max_tokens": TOKENS, "stream": stream, "messages": [message]}
    began = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        received = await response.content.readany()
        first = time.perf_counter() - began
        if mood < 0.1:
            response.close()
            return "left", first
        async for piece in response.content.iter_any():
            received += piece
            if mood > 0.95:
                await asyncio.sleep(0.05)
        if response.status != 200:
            return f"WRONG: status {response.status}", first
        return (verdict_on_stream if stream else verdict_on_document)(received), first


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    outcomes: dict[str, int] = {}
    memory: list[int] = []
    firsts: list[float] = []
    chance = random.Random(0)
    fake = gateway_setup.fake_engine(first_ms=20.0, interval_ms=10.0)
    with fake as (engine, _), gateway_setup.our_gateway(engine) as (gateway, process):
        deadline = time.monotonic() + options.minutes * 60
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def client() -> None:
                while time.monotonic() < deadline:
                    outcome, first = await one(session, gateway, chance)
                    outcomes[outcome] = outcomes.get(outcome, 0) + 1
                    firsts.append(first)

            async def watch() -> None:
                while time.monotonic() < deadline:
                    await asyncio.sleep(options.minutes)  # sixty looks in all
                    memory.append(gateway_setup.resident_bytes(process))
                    recent = np.array(firsts[-1000:]) * 1e3
                    print(f"{memory[-1] / 2**20:.1f} MiB, first byte p50 {np.median(recent):.1f} ms", flush=True)

            await asyncio.gather(watch(), *(client() for _ in range(options.clients)))
    fifth = max(1, len(memory) // 5)
    growth = float(np.median(memory[-fifth:]) / np.median(memory[fifth : 2 * fifth] or memory[:1])) - 1
    row = {
        "minutes": options.minutes,
        "outcomes": outcomes,
        "memory_MiB": round(memory[-1] / 2**20, 1),
        "memory_growth": round(growth, 4),
        "first_byte_p50_ms": round(float(np.median(firsts)) * 1e3, 2),
        "first_byte_p99_ms": round(float(np.quantile(firsts, 0.99)) * 1e3, 2),
    }
    print(json.dumps({"setting": gateway_setup.setting(), "rows": [row]}))
    return int(growth > 0.1 or any(outcome.startswith("WRONG") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
