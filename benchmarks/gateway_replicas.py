"""Claim: of 10,000 requests over eight replicas, of which two are killed and one is slow, none is lost, the tail stays
within twice that of the undisturbed gateway, and the load of the others is even within 10%.

Eight fake engines stand behind a gateway process; a request has one of some hundred conversations' beginnings, so that
affinity is at work. In the disturbed run one engine takes ten times as long for its first token, and two are killed
with SIGKILL after a tenth of the requests. Half of the requests are streams; every token is numbered, as in
`gateway_faults`. A stream that had begun when its engine was killed cannot be saved, and must say so; those are counted
apart. `late` counts what took more than twice the median, by where and when. `--processes N` puts N gateway processes
behind the port. Prints a table, and JSON as the last line; ends with 1 when a request was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import subprocess
import sys
import time

import aiohttp
import gateway_setup
import numpy as np
import uvloop
from gateway_faults import TOKENS, verdict_on_document, verdict_on_stream

REPLICAS, CONVERSATIONS = 8, 640
FIRST_MS, SLOW_MS, INTERVAL_MS = 40.0, 400.0, 2.0


async def ask(session: aiohttp.ClientSession, url: str, number: int) -> tuple[str, str, float]:
    """What became of a request, which replica answered, and seconds to the first byte."""
    stream = number % 2 == 0
    body = {
        "model": "quality",
        "messages": [{"role": "user", "content": f"conversation {number * 7919 % CONVERSATIONS}"}],
        "max_tokens": TOKENS,
        "stream": stream,
    }
    began = time.perf_counter()
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            received = await response.content.readany()
            first = time.perf_counter() - began
            received += await response.content.read()
            if response.status != 200:
                return f"error {response.status}", "", first
            replica = response.headers["x-bitladder-replica"]
            return (verdict_on_stream if stream else verdict_on_document)(received), replica, first
    except aiohttp.ClientError as error:
        return f"WRONG: {type(error).__name__}", "", 0.0


async def measure(requests: int, clients: int, processes: int, *, disturbed: bool) -> dict[str, object]:
    outcomes: collections.Counter[str] = collections.Counter()
    shares: collections.Counter[str] = collections.Counter()
    homes: dict[int, set[str]] = collections.defaultdict(set)
    firsts: list[float] = []
    asked: list[tuple[float, str]] = []
    killed_at = 0.0
    numbers = iter(range(requests))
    with contextlib.ExitStack() as stack:
        engines: list[tuple[str, subprocess.Popen[str]]] = []
        for number in range(REPLICAS):
            slow = disturbed and number == 0
            first_ms = SLOW_MS if slow else FIRST_MS
            engine = gateway_setup.fake_engine(first_ms=first_ms, interval_ms=INTERVAL_MS)
            engines.append(stack.enter_context(engine))
        urls = [url for url, _ in engines]
        gateway, _ = stack.enter_context(gateway_setup.our_replicas(*urls, processes=processes))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
            done = 0

            async def work() -> None:
                nonlocal done, killed_at
                for number in numbers:
                    asked_at = time.perf_counter() - began
                    outcome, replica, first = await ask(client, gateway, number)
                    outcomes[outcome] += 1
                    shares[replica] += 1
                    homes[number * 7919 % CONVERSATIONS].add(replica)
                    firsts.append(first)
                    asked.append((asked_at, replica))
                    done += 1
                    if disturbed and done == requests // 10:
                        killed_at = time.perf_counter() - began
                        for _, process in engines[-2:]:
                            process.kill()

            began = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(clients)))
            seconds = time.perf_counter() - began
    whole = [url.partition("://")[2] for url in urls[1:-2]]  # those that nothing happened to
    counts = np.array([shares[name] for name in whole])
    times = np.array(firsts) * 1e3
    slow_one = urls[0].partition("://")[2]
    late: collections.Counter[str] = collections.Counter()
    for (at, replica), spent in zip(asked, times, strict=True):
        if spent > 2 * np.median(times):
            began_with = "in the first second" if at < 1 else "later"
            near = "around the kill" if killed_at and killed_at - 0.5 < at < killed_at + 0.5 else began_with
            late["at the slow one" if disturbed and replica == slow_one else near] += 1
    return {
        "disturbed": disturbed,
        "requests": requests,
        "outcomes": dict(outcomes),
        "lost": requests - outcomes["complete"] - outcomes["clear error in the stream"],
        "cut_streams": outcomes["clear error in the stream"],
        "first_ms_p50": round(float(np.median(times)), 1),
        "first_ms_p99": round(float(np.quantile(times, 0.99)), 1),
        "first_ms_max": round(float(times.max()), 1),
        "late": dict(late),
        "uneven": round(float(np.abs(counts / counts.mean() - 1).max()), 3),
        "slow_share": round(shares[urls[0].partition("://")[2]] / requests, 4),
        "replicas_per_conversation": round(float(np.mean([len(found) for found in homes.values()])), 2),
        "seconds": round(seconds, 1),
    }


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    rows = []
    for disturbed in (False, True):
        rows.append(await measure(options.requests, options.clients, options.processes, disturbed=disturbed))
        print(rows[-1], flush=True)
    print(json.dumps({"setting": gateway_setup.setting(), "rows": rows}))
    return int(any(row["lost"] for row in rows))


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
