"""Claim: one gateway process relays 1,000 streams of 20 tokens per second each, none stalled over 250 ms,
none lost.

The fake engine numbers its tokens and sends them on a clock; the client, on raw sockets, checks every
number and times every gap between two pieces of one stream. What the engine and the client do to themselves
on a busy machine shows in the same run without the gateway. Memory per stream is the gateway's growth from
idle to all streams open. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import SplitResult, urlsplit

import gateway_setup
import numpy as np
import uvloop

NUMBER = re.compile(rb'"content":"(\d+) "')


@dataclass
class Stream(asyncio.Protocol):
    """One client: sends its request, checks the numbers, keeps the gaps."""

    tokens: int
    ended: asyncio.Future[None]
    expected: int = 0
    wrong: int = 0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    rest: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self.transport = cast(asyncio.Transport, transport)
        message = {"role": "user", "content": "hello"}
        body = json.dumps({"model": "quality", "messages": [message], "max_tokens": self.tokens, "stream": True})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write((head + body).encode())

    def data_received(self, data: bytes) -> None:
        """What came from the other side."""
        now = time.monotonic()
        if self.last:
            self.gaps.append(now - self.last)
        self.last = now
        data = self.rest + data
        cut = data.rfind(b"\n\n") + 2
        whole, self.rest = (data[:cut], data[cut:]) if cut > 1 else (b"", data)
        for match in NUMBER.finditer(whole):
            self.wrong += int(match[1]) != self.expected
            self.expected += 1
        if b"[DONE]" in whole:
            self.finish()

    def connection_lost(self, _: Exception | None) -> None:
        """It left."""
        self.finish()

    def finish(self) -> None:
        """Count what is missing, and close."""
        if not self.ended.done():
            self.wrong += self.expected != self.tokens
            self.ended.set_result(None)
            self.transport.close()


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def open_stream(address: SplitResult, tokens: int) -> Stream:
    loop = asyncio.get_running_loop()
    stream = Stream(tokens, loop.create_future())
    assert address.hostname is not None
    assert address.port is not None
    await loop.create_connection(lambda: stream, address.hostname, address.port)
    return stream


async def open_streams(url: str, count: int, tokens: int) -> list[Stream]:
    address = urlsplit(url)
    streams = []
    for number in range(count):
        streams.append(await open_stream(address, tokens))
        if number % 50 == 49:
            await asyncio.sleep(0.05)
    return streams


async def measure(url: str, count: int, tokens: int, process_id: int) -> dict[str, object]:
    began, cpu = time.monotonic(), processor_seconds(process_id)
    streams = await open_streams(url, count, tokens)
    await asyncio.wait_for(asyncio.gather(*(stream.ended for stream in streams)), tokens * 0.05 * 4 + 60)
    gaps = np.array([gap for stream in streams for gap in stream.gaps])
    return {
        "streams": count,
        "tokens": sum(stream.expected for stream in streams),
        "lost_or_reordered": sum(stream.wrong for stream in streams),
        "gap_p50_ms": round(float(np.median(gaps)) * 1e3, 1),
        "gap_p99_ms": round(float(np.quantile(gaps, 0.99)) * 1e3, 1),
        "gap_max_ms": round(float(gaps.max()) * 1e3, 1),
        "streams_stalled": sum(max(stream.gaps) > 0.25 for stream in streams),
        "process_cpu_share": round((processor_seconds(process_id) - cpu) / (time.monotonic() - began), 2),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    tokens = int(options.seconds * 20)
    rows = []
    with gateway_setup.fake_engine(interval_ms=50) as (engine, engine_process):
        rows.append({"side": "direct", **await measure(engine, options.streams, tokens, engine_process.pid)})
        print(rows[-1], flush=True)
        with gateway_setup.our_gateway(engine) as (gateway, process):
            await measure(gateway, 20, 20, process.pid)
            idle = gateway_setup.resident_bytes(process)
            task = asyncio.create_task(measure(gateway, options.streams, tokens, process.pid))
            await asyncio.sleep(options.seconds * 0.8)
            grown = gateway_setup.resident_bytes(process) - idle
            found = await task
            rows.append({"side": "bitladder", **found, "bytes_per_stream": round(grown / options.streams)})
            print(rows[-1], flush=True)
    print(json.dumps({"setting": gateway_setup.setting(), "rows": rows}))


if __name__ == "__main__":
    uvloop.run(main())
