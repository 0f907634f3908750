"""Endless and broken forms of everything a client can send to the gateway, while its memory is watched.

The gateway runs as a process of its own before an engine that computes nothing. Hostile clients draw, with a fixed
seed, a form of talking to it (an endless head, trailers, chunk extensions, bodies nobody reads, clients that take
nothing, requests without end, bytes turned over, ...), send it for as long as the gateway takes it, and go on to the
next. Beside them a good client asks for documents and streams, whose tokens are numbered. Ends with 1 when the memory
grew by more than the bound, a good answer was wrong or late, the gateway logged a traceback or died, or an answer to a
hostile client was one that must not be. Prints what was done, and JSON as the last line.

    scripts/fuzz gateway --seconds 60 --seed 1 --clients 16 --only trailers
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gateway_setup

MiB = 1 << 20
TOKENS = 20
BODY = 8 * MiB
"""The largest body that the gateway takes."""
ROUND = 32
"""Bodies of that size at once: more than the gateway has room for."""
GOOD_S = 20.0
"""A good client that waits longer than this for an answer beside the hostile ones was kept out."""
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
PATHS = (b"/health", b"/v1/models", b"/v1/models/quality", b"/v1/responses", b"/nope", b"/", b"/v1/chat/completions",
         b"/metrics", b"/bitladder/api/live")  # fmt: skip
METHODS = (b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS")
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


class Talk:
    """A hostile client's connection, for a limited time and a limited number of bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chance: random.Random) -> None:
        self.reader, self.writer, self.chance = reader, writer, chance
        self.sent = 0
        self.ends = time.monotonic() + 1.0

    @property
    def alive(self) -> bool:
        """Whether there is time, and a connection, left."""
        return time.monotonic() < self.ends and not self.writer.is_closing() and not self.reader.at_eof()

    async def say(self, data: bytes) -> None:
        """Send."""
        self.writer.write(data)
        self.sent += len(data)
        async with asyncio.timeout(max(0.1, self.ends - time.monotonic())):
            await self.writer.drain()

    async def forever(self, piece: bytes, slowly: bool | None = None) -> None:
        """Send a piece again and again: as fast as it is taken, or now and then."""
        slowly = self.chance.random() < 0.2 if slowly is None else slowly
        while self.alive:
            await self.say(piece[:7] if slowly else piece)
            await asyncio.sleep(0.2 if slowly else 0)

    async def take(self) -> bytes:
        """All that comes until the end of the connection or of the time, at most 1 MiB of it kept."""
        found = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.1, self.ends - time.monotonic())):
                while piece := await self.reader.read(65536):
                    found += piece if len(found) < MiB else b""
        return found


Form = Callable[[Talk], Awaitable[None]]
FORMS: dict[str, Form] = {}


def form(call: Form) -> Form:
    """A form of talking, by its name."""
    FORMS[call.__name__.replace("_", " ")] = call
    return call


def head(chance: random.Random) -> bytes:
    """The beginning of a request that means to go on."""
    return chance.choice(METHODS) + b" " + chance.choice(PATHS) + b" HTTP/1.1\r\nhost: localhost\r\n"


def chat(**more: object) -> bytes:
    """A whole request for a chat."""
    body = json.dumps({"model": "quality", "messages": [{"role": "user", "content": "x"}], **more}).encode()
    return CHAT + b"content-length: %d\r\n\r\n" % len(body) + body


@form
async def fields(talk: Talk) -> None:
    await talk.say(head(talk.chance))
    await talk.forever(b"".join(b"x-%d: %b\r\n" % (n, b"a" * talk.chance.choice((0, 9, 999))) for n in range(64)))


@form
async def one_field(talk: Talk) -> None:
    await talk.say(head(talk.chance) + b"a: ")
    await talk.forever(b"x" * 50_000)


@form
async def target(talk: Talk) -> None:
    await talk.say(b"GET /")
    await talk.forever(talk.chance.choice((b"x", b"%41", b"/..", b"?a=b&")) * 9000)


@form
async def empty_lines(talk: Talk) -> None:
    await talk.say(talk.chance.choice((b"", head(talk.chance) + b"\r\n")))
    await talk.forever(b"\r\n" * 9000)


@form
async def trailers(talk: Talk) -> None:
    begin = talk.chance.choice((head(talk.chance), CHAT))
    await talk.say(begin + CHUNKED + talk.chance.choice((b"", b"2\r\n{}\r\n")) + b"0\r\n")
    await talk.forever(b"".join(b"x-%d: %b\r\n" % (n, b"a" * talk.chance.choice((0, 9, 999))) for n in range(64)))


@form
async def one_trailer(talk: Talk) -> None:
    await talk.say(talk.chance.choice((head(talk.chance), CHAT)) + CHUNKED + b"0\r\na: ")
    await talk.forever(b"x" * 50_000)


@form
async def chunk_extensions(talk: Talk) -> None:
    await talk.say(talk.chance.choice((head(talk.chance), CHAT)) + CHUNKED)
    piece = b"1;" + b"e" * talk.chance.choice((10, 1000, 60_000)) + b"\r\nx\r\n"
    await talk.forever(piece * max(1, 50_000 // len(piece)))


@form
async def one_chunk_extension(talk: Talk) -> None:
    await talk.say(talk.chance.choice((head(talk.chance), CHAT)) + CHUNKED + b"1;e=")
    await talk.forever(b"x" * 50_000)


@form
async def chunk_size(talk: Talk) -> None:
    await talk.say(talk.chance.choice((head(talk.chance), CHAT)) + CHUNKED)
    await talk.forever(talk.chance.choice((b"0", b"f", b" ", b"1")) * 9000)


@form
async def tiny_chunks(talk: Talk) -> None:
    await talk.say(talk.chance.choice((head(talk.chance), CHAT)) + CHUNKED)
    await talk.forever(b"1\r\nx\r\n" * 9000)


@form
async def body_that_nobody_reads(talk: Talk) -> None:
    length = talk.chance.choice((b"9999999", b"9" * 18, b"9" * 30, b"-1"))
    await talk.say(head(talk.chance) + b"content-length: " + length + b"\r\n\r\n")
    await talk.forever(b"x" * 60_000)


@form
async def body_as_large_as_allowed(talk: Talk) -> None:
    await talk.say(CHAT + b"content-length: %d\r\n\r\n" % BODY)
    character = talk.chance.choice((b"x", "é".encode(), "\U0001f600".encode(), b"[", b"{},", b'"a",', b"\x00"))
    if talk.chance.random() < 0.5:
        begin = b'{"model":"nobody","messages":[{"content":"' + character
        await talk.say(begin)
    await talk.forever(character * 12_000, slowly=False)


@form
async def whole_large_bodies(talk: Talk) -> None:
    kind = talk.chance.choice(("text", "wide", "values", "keys", "nested"))
    content = {
        "text": lambda: json.dumps("x, " * 2_500_000),
        "wide": lambda: '"' + "é\U0001f600" * 1_300_000 + '"',
        "values": lambda: "[" + "{}," * talk.chance.choice((400_000, 2_000_000)) + "1]",
        "keys": lambda: "{" + ",".join(f'"k{n}":{n}' for n in range(200_000)) + "}",
        "nested": lambda: "[" * 1_000_000,
    }[kind]()
    model = talk.chance.choice(("quality", "nobody"))
    body = f'{{"model":"{model}","messages":[{{"role":"user","content":{content}}}]}}'.encode()
    await talk.say(CHAT + b"content-length: %d\r\n\r\n" % len(body) + body)
    expect_status(await talk.take(), 200, 400, 404, 408, 413, 429, 503)


@form
async def structures_without_end(talk: Talk) -> None:
    piece = talk.chance.choice((b'{"a":', b"[", b'{"a":[', b'["",', b'"a":{},', b'"\\"",'))
    begin = talk.chance.choice((b"", b'{"messages":', b'{"model":"quality","messages":['))
    body = begin + piece * (talk.chance.choice((600_000, BODY - 100)) // len(piece))
    await talk.say(CHAT + b"content-length: %d\r\n\r\n" % len(body) + body)
    expect_status(await talk.take(), 400)


@form
async def many_large_bodies_at_once(talk: Talk) -> None:
    """So many that some give way, over and over: what those held must not stay."""
    host, port = talk.writer.get_extra_info("peername")[:2]
    text = talk.chance.choice((b"a", b"\\ud83d\\ude00", "\U0001f600".encode()))
    body = b'{"model":"nobody","messages":[{"role":"user","content":"' + text * ((BODY - 100) // len(text)) + b'"}]}'
    others = [await asyncio.open_connection(host, port) for _ in range(ROUND - 1)]
    talks = [talk, *(Talk(*connection, talk.chance) for connection in others)]
    try:
        for one in talks:
            one.ends = talk.ends
        head = CHAT + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        halves = (head + body[: len(body) * 4 // 5], body[len(body) * 4 // 5 :])
        for half in halves:  # all have most of theirs read before the first is whole
            await asyncio.gather(*(one.say(half) for one in talks), return_exceptions=True)
        for answer in await asyncio.gather(*(one.take() for one in talks), return_exceptions=True):
            if isinstance(answer, bytes):
                expect_status(answer, 404, 503)
    finally:
        talk.sent += sum(one.sent for one in talks[1:])
        for one in talks[1:]:
            one.writer.transport.abort()


@form
async def slow_body(talk: Talk) -> None:
    await talk.say(CHAT + b"content-length: 8000000\r\n\r\n" + b"x" * talk.chance.choice((0, 60_000, 7_000_000)))
    await talk.forever(b"x", slowly=True)


@form
async def slow_head(talk: Talk) -> None:
    await talk.forever(head(talk.chance), slowly=True)


@form
async def nothing(talk: Talk) -> None:
    await talk.take()


@form
async def many_connections(talk: Talk) -> None:
    host, port = talk.writer.get_extra_info("peername")[:2]
    opened: list[asyncio.StreamWriter] = []
    try:
        while talk.alive and len(opened) < 1500:
            _, writer = await asyncio.open_connection(host, port)
            opened.append(writer)
            writer.write(talk.chance.choice((b"", head(talk.chance), b"\r\n", head(talk.chance) + b"\r\n")))
        await asyncio.sleep(max(0.0, talk.ends - time.monotonic()))
    finally:
        for writer in opened:
            writer.transport.abort()


@form
async def pipelined(talk: Talk) -> None:
    one = talk.chance.choice((head(talk.chance) + b"\r\n", chat(max_tokens=1), chat(max_tokens=1, stream=True)))
    await talk.forever(one * max(1, 60_000 // len(one)))


@form
async def takes_nothing(talk: Talk) -> None:
    path = talk.chance.choice(PATHS)
    ask = chat(max_tokens=9000, stream=True) if talk.chance.random() < 0.5 else chat(max_tokens=100_000)
    if talk.chance.random() < 0.3:
        ask = b"GET " + path + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"
    talk.writer.transport.pause_reading()
    await talk.say(ask * talk.chance.choice((1, 8)))
    await asyncio.sleep(max(0.0, talk.ends - time.monotonic()))


@form
async def leaves(talk: Talk) -> None:
    for _ in range(3):
        await talk.say(chat(max_tokens=50, stream=talk.chance.random() < 0.5)[: talk.chance.choice((40, 200, 9999))])
        await asyncio.sleep(talk.chance.choice((0.0, 0.001, 0.01, 0.1)))
    talk.writer.transport.abort()


@form
async def half_closed(talk: Talk) -> None:
    await talk.say(talk.chance.choice((chat(max_tokens=5), head(talk.chance) + b"\r\n", head(talk.chance), b"")))
    talk.writer.write_eof()
    await talk.take()


@form
async def another_protocol(talk: Talk) -> None:
    protocol = talk.chance.choice((b"websocket", b"h2c", b"TLS/1.0", b""))
    begin = talk.chance.choice(
        (head(talk.chance) + b"connection: upgrade\r\nupgrade: " + protocol + b"\r\n\r\n",
         b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n",
         b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00")
    )  # fmt: skip
    await talk.say(begin)
    await talk.forever(talk.chance.randbytes(20_000))


@form
async def waits_to_be_asked_for_the_body(talk: Talk) -> None:
    await talk.say(
        talk.chance.choice((head(talk.chance), CHAT)) + b"expect: 100-continue\r\ncontent-length: 9999\r\n\r\n"
    )
    await talk.take()


@form
async def bytes_turned_over(talk: Talk) -> None:
    data = bytearray(chat(max_tokens=2) + head(talk.chance) + CHUNKED + b"5;a=b\r\nhello\r\n0\r\nx: y\r\n\r\n" + chat())
    for _ in range(talk.chance.choice((1, 3, 20))):
        at = talk.chance.randrange(len(data))
        data[at : at + talk.chance.choice((0, 1, 1, 9))] = talk.chance.randbytes(talk.chance.choice((0, 1, 1, 9)))
    await talk.say(bytes(data) + head(talk.chance) + b"connection: close\r\n\r\n")
    expect_status(await talk.take(), *range(200, 500), 501, 503)


@form
async def odd_fields(talk: Talk) -> None:
    name = talk.chance.choice(
        (b"origin", b"host", b"authorization", b"x-bitladder-tag", b"x-bitladder-tier", b"expect")
    )
    value = talk.chance.choice((b"http://[", b"", b"null", b"\xff\xfe", b"Bearer \x80", b"a," * 9000, b"http://a:b:c/"))
    ask = chat(max_tokens=2)
    await talk.say(ask.replace(b"\r\n", b"\r\n" + name + b": " + value + b"\r\nconnection: close\r\n", 1))
    expect_status(await talk.take(), *range(200, 500), 503)


class WrongAnswer(Exception):
    """The gateway answered as it must not."""


def expect_status(answer: bytes, *allowed: int) -> None:
    """Nothing, or an answer with one of these statuses."""
    if not answer:
        return
    line = answer.split(b"\r\n", 1)[0]
    status = line.split(b" ")[1:2]
    if not line.startswith(b"HTTP/1.1 ") or not status or int(status[0]) not in allowed:
        raise WrongAnswer(repr(answer[:200]))


async def hostile(
    address: tuple[str, int],
    names: Iterator[str],
    chance: random.Random,
    until: float,
    longest_s: float,
    seen: Seen,
) -> None:
    """One hostile client after the other."""
    while time.monotonic() < until:
        name = next(names)
        try:
            talk = Talk(*await asyncio.open_connection(*address), chance)
        except OSError:
            seen.refused += 1
            await asyncio.sleep(0.05)
            continue
        talk.ends = min(time.monotonic() + chance.uniform(0.1, 1.0) * longest_s, until + 1)
        try:
            await FORMS[name](talk)
        except (OSError, TimeoutError):
            pass
        except WrongAnswer as wrong:
            seen.wrong.append(f"{name}: {wrong}")
        finally:
            talk.writer.transport.abort()
            seen.count[name] += 1
            seen.sent[name] += talk.sent


class Seen:
    """What happened."""

    def __init__(self) -> None:
        self.count: collections.Counter[str] = collections.Counter()
        self.sent: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.refused = 0
        self.most_bytes = 0
        self.good = self.told_to_wait = 0
        self.slowest = 0.0


async def good(address: tuple[str, int], until: float, seen: Seen) -> None:
    """A client that behaves: documents and streams in turns, every token looked at. It may be told to come later."""
    wanted = "".join(f"{number} " for number in range(TOKENS))
    stream = False
    while time.monotonic() < until:
        stream = not stream
        began = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(GOOD_S):
                    reader, writer = await asyncio.open_connection(*address)
                    try:
                        ask = chat(max_tokens=TOKENS, stream=stream).replace(b"\r\n", b"\r\nconnection: close\r\n", 1)
                        writer.write(ask)
                        answer = await reader.read(-1)
                    finally:
                        writer.transport.abort()
            except (OSError, TimeoutError) as error:
                answer = repr(error).encode()
            later = answer.startswith((b"HTTP/1.1 503 ", b"HTTP/1.1 429 ", b"ConnectionResetError"))
            if not later or time.monotonic() - began > GOOD_S:
                break
            seen.told_to_wait += 1
            await asyncio.sleep(0.1)
        seen.slowest = max(seen.slowest, time.monotonic() - began)
        text = text_of(answer, stream)
        if text != wanted:
            seen.wrong.append(f"a good {'stream' if stream else 'document'}: {answer[:300]!r}")
        seen.good += 1
        await asyncio.sleep(0.05)


def text_of(answer: bytes, stream: bool) -> str:
    """The text in an answer; empty for anything that is none."""
    try:
        if not stream:
            return str(json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"])
        if b"data: [DONE]\n\n" not in answer:
            return ""
        events = [json.loads(line[6:]) for line in answer.split(b"\n") if line.startswith(b"data: {")]
        return "".join(event["choices"][0]["delta"]["content"] for event in events)
    except (ValueError, KeyError, IndexError):
        return ""


async def watch_memory(process: object, until: float, seen: Seen) -> None:
    """Note the most memory that the gateway held."""
    while time.monotonic() < until:
        seen.most_bytes = max(seen.most_bytes, gateway_setup.resident_bytes(process))
        await asyncio.sleep(0.05)


async def attack(address: tuple[str, int], process: object, options: argparse.Namespace, seen: Seen) -> None:
    """All at once."""
    until = time.monotonic() + options.seconds
    names = chosen(options)
    random.Random(options.seed).shuffle(names)
    turns = itertools.cycle(names)
    clients = [
        hostile(address, turns, random.Random(f"{options.seed} {number}"), until, options.longest, seen)
        for number in range(options.clients)
    ]
    await asyncio.gather(watch_memory(process, until + 1, seen), good(address, until, seen), *clients)


async def rounds(address: tuple[str, int], process: object, options: argparse.Namespace, seen: Seen) -> list[int]:
    """Many large bodies at once, round by round; the memory held after each, in bytes."""
    held = []
    watching = asyncio.create_task(watch_memory(process, float("inf"), seen))
    for number in range(options.rounds):
        talk = Talk(*await asyncio.open_connection(*address), random.Random(number))
        talk.ends = time.monotonic() + 20.0
        try:
            await many_large_bodies_at_once(talk)
        except (OSError, TimeoutError):
            pass
        except WrongAnswer as wrong:
            seen.wrong.append(f"a round: {wrong}")
        finally:
            talk.writer.transport.abort()
        await asyncio.sleep(0.5)
        held.append(gateway_setup.resident_bytes(process))
    watching.cancel()
    return held


LARGE = (
    "many large bodies at once",
    "structures without end",
    "body as large as allowed",
    "whole large bodies",
    "slow body",
    "many connections",
    "takes nothing",
    "pipelined",
)
"""Forms that take memory because they are allowed some; all others take next to none, however much they send."""
BOUND_MIB, SMALL_BOUND_MIB, KEPT_MIB = 1100, 64, 150
"""What docs/serve.md promises, what the other forms must stay within, and what may stay when all clients have left."""


def chosen(options: argparse.Namespace) -> list[str]:
    """The forms of this run."""
    names = options.only or list(FORMS)
    return [name for name in names if not (options.small and name in LARGE)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=12, help="hostile clients at a time")
    parser.add_argument("--longest", type=float, default=6.0, help="seconds of one talk at most")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of many large bodies at the end")
    parser.add_argument("--only", action="append", choices=sorted(FORMS), help="this form of talking (repeatable)")
    parser.add_argument("--small", action="store_true", help="leave out the forms that are allowed memory")
    options = parser.parse_args()
    bound = BOUND_MIB if set(chosen(options)) & set(LARGE) else SMALL_BOUND_MIB
    seen = Seen()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.NamedTemporaryFile("w+"))
        engine, _ = stack.enter_context(gateway_setup.fake_engine("fake", interval_ms=2.0))
        url, process = stack.enter_context(gateway_setup.our_gateway(engine, slots=16, log=log.name))
        host, port = url.removeprefix("http://").split(":")
        address = (host, int(port))
        asyncio.run(good(address, time.monotonic() + 0.5, Seen()))
        before = gateway_setup.resident_bytes(process)
        asyncio.run(attack(address, process, options, seen))
        held = [] if options.small else asyncio.run(rounds(address, process, options, seen))
        time.sleep(1.0)
        after = gateway_setup.resident_bytes(process)
        asyncio.run(good(address, time.monotonic() + 0.5, seen))
        died = process.poll() is not None
        lines = Path(log.name).read_text(errors="replace")
    grew = (seen.most_bytes - before) / MiB
    found = [*seen.wrong]
    if "Traceback" in lines:
        found.append("a traceback in the log: " + lines[max(0, lines.index("Traceback") - 300) :][:1500])
    if died:
        found.append("the gateway died")
    if grew > bound:
        found.append(f"memory grew by {grew:.0f} MiB, more than {bound}")
    if (kept := (after - before) / MiB) > KEPT_MIB:
        each = ", ".join(f"{size / MiB:.0f}" for size in held)
        found.append(f"{kept:.0f} MiB stayed, more than {KEPT_MIB}; after each round there were {each}")
    if missing := set(chosen(options)) - set(seen.count):
        found.append(f"too short a time for: {', '.join(sorted(missing))}")
    for name, count in sorted(seen.count.items()):
        print(f"  {count:5} x {name:32} {seen.sent[name] / MiB:9.1f} MiB")
    print(f"  {seen.good} good answers, the slowest after {seen.slowest:.2f} s; {seen.told_to_wait} times told to wait")
    print("  after each round of many large bodies:", *(f"{size / MiB:.0f}" for size in held))
    print(f"  memory {before / MiB:.0f} MiB, at most {seen.most_bytes / MiB:.0f}, {after / MiB:.0f} afterwards")
    for item in found[:20]:
        print(f"FOUND {item}")
    print(json.dumps({
        "seed": options.seed, "seconds": options.seconds, "talks": sum(seen.count.values()),
        "sent_mib": round(sum(seen.sent.values()) / MiB), "good": seen.good, "slowest_s": round(seen.slowest, 2),
        "grew_mib": round(grew), "kept_mib": round((after - before) / MiB), "found": len(found),
        **gateway_setup.setting(),
    }))  # fmt: skip
    sys.exit(1 if found or not seen.good else 0)


if __name__ == "__main__":
    main()
