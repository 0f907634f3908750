"""Keys, hosts, origins, body size, and the bounded queue."""

import asyncio
import contextlib
import functools
import gc
import json
import threading
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.errors import BadInput, UsageError
from bitladder.serve import limits
from bitladder.serve.limits import (
    Gate,
    Refused,
    RequestMemory,
    add_key,
    held_bytes,
    key_name,
    new_key,
    read_body,
    read_keys,
    revoke_key,
)
from bitladder.serve.protocol import MAX_VALUES, count_values, parse_request
from bitladder.serve.settings import ServeSettings, TierSpec, UpstreamTimeouts
from upstreams import CHAT, chat, fails, gateway, replies, says


def get(path="/v1/models", *, headers=None, method="GET", content=b"", **settings) -> httpx.Response:
    async def run() -> httpx.Response:
        async with gateway(says("x", "Q8_0"), says("x", "Q4_K_M"), **settings) as (client, _):
            return await client.request(method, path, headers=headers, content=content)

    return asyncio.run(run())


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8077", "[::1]:8077", "LOCALHOST.", "models.lan"])
def test_own_hosts_are_answered(host):
    assert get(headers={"host": host}, allowed_hosts=("models.lan",)).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example:80"])
def test_other_hosts_are_refused(host):
    reply = get(headers={"host": host})
    assert (reply.status_code, reply.json()["error"]["code"]) == (421, "wrong_host")


@pytest.mark.parametrize("first", ["localhost", "", "evil.example"])
@pytest.mark.parametrize("second", ["localhost", "evil.example", ""])
def test_two_hosts_are_refused_whichever_they_are(first, second):
    reply = get(headers=[("host", first), ("host", second)])
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "wrong_host")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://localhost"}, 200),
        ({"origin": "http://tool.example"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "http://[::1"}, 403),
        ({"origin": "http://localhost:9999"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_calls_from_other_web_sites_are_refused(headers, status):
    reply = get(headers={"host": "localhost", **headers}, allowed_origins=("http://tool.example",))
    assert reply.status_code == status
    if status == 403:
        assert "access-control-allow-origin" not in reply.headers


def test_keys_are_asked_for_and_named(tmp_path):
    secret, key = new_key("alice")
    file = tmp_path / "keys"
    file.write_text(f"# team\n{new_key('bob')[1]}\n\n{key}  # laptop\n")
    good = {"authorization": f"Bearer {secret}"}
    assert get(headers=good, api_key_file=file).status_code == 200
    for wrong in ({}, {"authorization": "Bearer x"}, {"authorization": f"Basic {secret}"}, {"authorization": secret}):
        reply = get(headers=wrong, api_key_file=file)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert [get(path, api_key_file=file).status_code for path in ("/health", "/ready", "/metrics")] == [200, 200, 401]
    assert secret not in file.read_text()


def test_key_name_finds_whose_key_it_is():
    pairs = [new_key(name) for name in ("alice", "bob")]
    keys = tuple(key for _, key in pairs)
    assert [key_name(secret, keys) for secret, _ in pairs] == ["alice", "bob"]
    assert key_name("\udcff\x00", keys) is None


def test_a_key_file_with_a_plain_key_is_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_text("alice sk-not-hashed\n")
    with pytest.raises(BadInput) as error:
        read_keys(file)
    assert error.value.found == f"Line 1 of the key file '{file}' is no hashed key."
    assert "sk-not-hashed" not in str(error.value)
    file.write_text("# nobody\n")
    with pytest.raises(BadInput, match="holds no key"):
        read_keys(file)
    with pytest.raises(BadInput, match="cannot be read"):
        read_keys(tmp_path / "none")
    with pytest.raises(BadInput, match="cannot name a key"):
        new_key("a b")


def test_a_key_is_added_for_each_client_once(tmp_path):
    file = tmp_path / "keys"
    secrets = [add_key(file, name) for name in ("alice", "bob")]
    assert [key_name(secret, read_keys(file)) for secret in secrets] == ["alice", "bob"]
    assert not any(secret in file.read_text() for secret in secrets)
    with pytest.raises(BadInput, match="'bob' has a key"):
        add_key(file, "bob")


def test_a_key_is_added_where_the_last_one_was_revoked(tmp_path):
    file = tmp_path / "keys"
    add_key(file, "alice")
    revoke_key(file, "alice")
    secret = add_key(file, "bob")
    assert key_name(secret, read_keys(file)) == "bob"
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def test_keys_made_at_the_same_time_are_all_kept(tmp_path, monkeypatch):
    """Each was read by the others before it was written, were there no lock."""
    file, names = tmp_path / "keys", [f"client{number}" for number in range(4)]
    all_at_once, write = threading.Barrier(len(names)), limits.write_whole

    def write_late(path, content):
        with contextlib.suppress(threading.BrokenBarrierError):  # with one, nobody else comes as far
            all_at_once.wait(0.1)
        write(path, content)

    monkeypatch.setattr(limits, "write_whole", write_late)
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(functools.partial(add_key, file), names))
    assert sorted(key.name for key in read_keys(file)) == names


def test_a_key_file_without_an_end_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"'/dev/zero' has more than 4194304 bytes"):
        read_keys(Path("/dev/zero"))
    large = tmp_path / "keys"
    with large.open("wb") as file:
        file.truncate(1 << 23)
    with pytest.raises(BadInput, match=r"has more than 4194304 bytes"):
        add_key(large, "alice")


def test_listening_to_the_world_needs_keys_or_a_word():
    tier = TierSpec("Q8_0", url="http://x.invalid")
    with pytest.raises(UsageError, match=r"0\.0\.0\.0 without keys"):
        ServeSettings(tier, host="0.0.0.0")
    assert ServeSettings(tier, host="0.0.0.0", open_to_all=True)


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused(announced):
    async def run() -> httpx.Response:
        async def pieces():
            for _ in range(20):
                yield b"x" * 100

        async with gateway(says("x", "Q8_0"), says("x", "Q4_K_M"), max_body_bytes=1000) as (client, _):
            return await client.post(CHAT, content=b"x" * 2000 if announced else pieces())

    reply = asyncio.run(run())
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert reply.headers["connection"] == "close"


def test_an_announced_length_is_refused_before_the_body_is_read():
    async def receive():
        raise AssertionError("nothing should be read")

    scope = {"headers": [(b"content-length", b"9" * 30)]}
    with pytest.raises(Refused):
        asyncio.run(read_body(scope, receive, 1000, RequestMemory(1000).share(print)))


def test_a_body_that_does_not_come_is_refused(monkeypatch):
    async def run() -> httpx.Response:
        async def pieces():
            yield b"{"
            await asyncio.sleep(2)
            yield b"}"

        async with gateway(says("x", "Q8_0"), says("x", "Q4_K_M")) as (client, _):
            return await client.post(CHAT, content=pieces())

    monkeypatch.setattr("bitladder.serve.gateway.BODY_S", 0.1)
    reply = asyncio.run(run())
    assert (reply.status_code, reply.json()["error"]["code"]) == (408, "body_too_slow")
    assert reply.headers["connection"] == "close"


def test_compressed_bodies_are_refused():
    assert get(CHAT, method="POST", headers={"content-encoding": "gzip"}, content=b"x").status_code == 415


def test_all_requests_together_have_so_much_room_and_the_slowest_body_gives_way():
    gone: list[str] = []
    room = RequestMemory(100)
    with contextlib.ExitStack() as stack:
        slow, next_slow, whole, new = (
            stack.enter_context(room.share(lambda _, name=name: gone.append(name))) for name in "abcd"
        )
        slow.grow_to(30)
        next_slow.grow_to(20)
        whole.settle(50)
        new.grow_to(10)
        assert (gone, room.taken) == (["a"], 80)
        new.settle(40)
        assert (gone, room.taken) == (["a", "b"], 90)
        with pytest.raises(Refused) as refused:
            new.grow_to(60)  # what is complete stays
        assert refused.value.status == 503 and refused.value.headers["retry-after"]
    assert room.taken == 0


def test_a_body_that_gives_way_is_told_so():
    async def run() -> list[httpx.Response]:
        async def slow():
            yield b"x" * 1400
            await asyncio.sleep(1)
            yield b"x"

        settings = {"max_body_bytes": 1500, "max_requests_bytes": 24_000}
        async with gateway(says("x", "Q8_0"), says("x", "Q4_K_M"), **settings) as (client, deployment):
            first = [asyncio.create_task(client.post(CHAT, content=slow())) for _ in range(5)]
            await asyncio.sleep(0.2)
            second = await client.post(CHAT, json=chat("quality", "é" * 600), timeout=5)
            given = [second, *await asyncio.gather(*first)]
            assert deployment.gateway._room.taken == 0
            return given

    second, *first = asyncio.run(run())
    assert second.status_code == 200
    gave_way = [reply for reply in first if reply.status_code == 503]
    assert 0 < len(gave_way) < 5
    assert {reply.json()["error"]["code"] for reply in gave_way} == {"busy"}


async def _gives_way() -> None:
    async def slow():
        yield b"x" * 1400
        await asyncio.sleep(0.3)
        yield b"x"

    settings = {"max_body_bytes": 1500, "max_requests_bytes": 24_000}
    async with gateway(says("x", "Q8_0"), says("x", "Q4_K_M"), **settings) as (client, _):
        replies = await asyncio.gather(*(client.post(CHAT, content=slow()) for _ in range(9)))
        assert 503 in {reply.status_code for reply in replies}


async def _is_refused(body: bytes) -> None:
    async with gateway(says("x", "Q8_0"), says("x", "Q4_K_M"), max_body_bytes=1_000_000) as (client, _):
        assert (await client.post(CHAT, content=body)).status_code in (400, 413)


async def _fails(upstream) -> None:
    async with gateway(upstream, upstream, timeouts=UpstreamTimeouts(first_byte=0.05, between=0.05)) as (client, _):
        assert (await client.post(CHAT, json=chat("auto", "x" * 1000))).status_code in (502, 503)


async def _breaks_off() -> None:
    async with gateway(replies(b'data: {"choices": []}\n\n', b"data: {\n\n"), says("x", "Q4_K_M")) as (client, _):
        assert b"error" in (await client.post(CHAT, json=chat("quality", stream=True))).content


async def _comes_too_slowly() -> None:
    async def slow():
        yield b"x"
        await asyncio.sleep(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitladder.serve.gateway.BODY_S", 0.1)
        async with gateway(says("x", "Q8_0"), says("x", "Q4_K_M")) as (client, _):
            assert (await client.post(CHAT, content=slow())).status_code == 408


async def _leaves() -> None:
    body = json.dumps(chat("auto")).encode()
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

    async def receive():
        await asyncio.sleep(0.01)
        return messages.pop(0)

    async def send(_):
        raise AssertionError("nobody is there")

    waiting = replies(1.0, kind="application/json")
    async with gateway(waiting, waiting) as (_, deployment):
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        await deployment.gateway(scope, receive, send)


ENDS = {
    "the body gives way": _gives_way,
    "the body is too slow": _comes_too_slowly,
    "the body is too large": lambda: _is_refused(b"x" * 2_000_000),
    "the body is no JSON": lambda: _is_refused(b"{" * 500),
    "the body is nested too deeply": lambda: _is_refused(b'{"a":' * 100_000),
    "the body is not UTF-8": lambda: _is_refused(b'{"a":"\xff"}'),
    "the upstream is down": lambda: _fails(fails()),
    "the upstream fails": lambda: _fails(replies(b"{}", status=500)),
    "the upstream sends garbage": lambda: _fails(replies(b"garbage", kind="application/json")),
    "the upstream stalls": lambda: _fails(replies(1.0, kind="application/json")),
    "the answer breaks off": _breaks_off,
    "the client leaves": _leaves,
}


@pytest.mark.parametrize("name", ENDS)
def test_what_a_request_held_is_free_when_it_ends_however_it_ends(name):
    """No frame, with the body in it, waits in a cycle for the collector, which counts objects and not their bytes."""
    asyncio.run(ENDS[name]())
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        asyncio.run(ENDS[name]())
        gc.collect()
        frames = [item for item in gc.garbage if isinstance(item, types.FrameType)]
        names = {f"{frame.f_code.co_filename}: {frame.f_code.co_qualname}" for frame in frames}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not {name for name in names if "bitladder/serve/" in name}


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"auto","messages":[' + b"{}," * 200_000 + b"{}]}",
        b'{"model":"auto","messages":[{"content":' + b"[" * 400 + b"1" + b"]" * 400 + b"}]}",
        b'{"model":"auto","messages":[{' + b",".join(b'"k%d":"v%d"' % (n, n) for n in range(100_000)) + b"}]}",
        b'{"model":"auto","messages":[{"content":"' + b"a\xf0\x9f\x98\x80," * 300_000 + b'"}]}',
        b'{"model":"auto","messages":[{"content":"' + b"words, " * 300_000 + b'"}]}',
    ],
)
def test_a_request_takes_no_more_memory_than_is_counted(body):
    tracemalloc.start()
    try:
        request = parse_request(CHAT, body)
        sent = request.with_values({"model": "x"})
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert request and sent and len(body) + taken <= held_bytes(body, count_values(body)) + 20_000


def test_more_values_than_a_request_has_use_for_are_refused_and_commas_in_a_text_are_none():
    with pytest.raises(Refused, match="JSON values"):
        count_values(b'{"model":"auto","messages":[' + b"{}," * MAX_VALUES + b"{}]}")
    text = r"a, \"b\": [c], {d} " * 100_000
    body = json.dumps(chat("auto", text)).encode()
    assert count_values(body) < 20 and parse_request(CHAT, body).asked == text


@pytest.mark.parametrize("piece", [b'{"a":', b'[["a",', b'"",', b'"', b'"\\"', b'"\\\\",', b"[", b"\\", b'"a":{},'])
def test_counting_takes_little_memory_whatever_is_counted(piece):
    body = b"," * MAX_VALUES + piece * (6_000_000 // len(piece))
    tracemalloc.start()
    try:
        with contextlib.suppress(Refused):
            count_values(body[::-1] if piece == b"[" else body[MAX_VALUES - 1 :] + b'"' + b"," * MAX_VALUES)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < len(body) * 2 + 8_000_000


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
@pytest.mark.parametrize("text", [r"\\", r"\",,", r"\\\"[{", "é,", ",", "plain", ""])
def test_texts_across_the_windows_of_the_count_are_texts(text, shift):
    """Whatever stands where one window ends and the next begins."""
    texts = ["a" * shift, *[json.loads(f'"{text}"') * count for count in (1, 40_000, 7, 300_000, 2)]]
    padded = json.dumps({"messages": texts, "x": "," * MAX_VALUES}, ensure_ascii=False).encode()
    assert count_values(padded) == 1 + len("{:[,,,,,,:")


def test_the_queue_is_first_come_first_served_and_bounded():
    async def run() -> list[str]:
        gate, order = Gate(slots=1, max_queue=2), []

        async def visit(name: str) -> None:
            await gate.enter()
            order.append(name)
            await asyncio.sleep(0.01)
            gate.leave(0.01)

        await gate.enter()
        waiting = [asyncio.create_task(visit(name)) for name in "ab"]
        await asyncio.sleep(0)
        with pytest.raises(Refused) as refused:
            await gate.enter()
        assert refused.value.status == 429 and int(refused.value.headers["retry-after"]) >= 1
        gate.leave(0.01)
        await asyncio.gather(*waiting)
        assert (gate.running, gate.queued) == (0, 0)
        return order

    assert asyncio.run(run()) == ["a", "b"]


def test_who_gives_up_waiting_leaves_no_trace():
    async def run() -> None:
        gate = Gate(slots=1, max_queue=5)
        await gate.enter()
        tasks = [asyncio.create_task(gate.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        gate.leave(0.1)  # hands over to the second, although the first has not noticed yet
        await asyncio.gather(*tasks[:2], return_exceptions=True)
        assert tasks[0].cancelled() and tasks[1].done()
        tasks[2].cancel()
        await asyncio.gather(tasks[2], return_exceptions=True)
        gate.leave(0.1)
        assert (gate.running, gate.queued) == (0, 0)

    asyncio.run(run())


def test_a_slot_handed_to_one_who_just_gave_up_goes_on():
    async def run() -> None:
        gate = Gate(slots=1, max_queue=5)
        await gate.enter()
        first, second = (asyncio.create_task(gate.enter()) for _ in range(2))
        await asyncio.sleep(0)
        gate.leave(0.1)
        first.cancel()  # its turn has come, and it does not know
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.cancelled() and second.done() and not second.cancelled()
        assert gate.running == 1

    asyncio.run(run())


def test_prompts_with_markup_and_templates_reach_the_engine_as_they_are():
    quality = says("<b>not markup</b>", "Q8_0")
    text = "{{ config }} <script>alert(1)</script> ${7*7} %0d%0aset-cookie: a=b"

    async def run() -> httpx.Response:
        async with gateway(quality, says("x", "Q4_K_M")) as (client, _):
            return await client.post(CHAT, json=chat("quality", text))

    reply = asyncio.run(run())
    assert text.encode() in quality.asked[0].body
    assert reply.headers["content-type"] == "application/json"


def test_a_revoked_key_is_refused_by_a_gateway_that_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "_LOOK_AGAIN_S", 0.0)
    file = tmp_path / "keys"
    alice, bob = (add_key(file, name) for name in ("alice", "bob"))
    file.write_text(f"# clients\n{file.read_text()}")

    async def run() -> list[int]:
        async with gateway(says("x", "Q8_0"), says("x", "Q4_K_M"), api_key_file=file) as (client, _):

            async def status(key: str) -> int:
                headers = {"authorization": f"Bearer {key}"}
                return (await client.get("/v1/models", headers=headers)).status_code

            seen = [await status(alice), await status(bob)]
            done = CliRunner().invoke(app, ["key", "revoke", "alice", "--file", str(file)])
            assert done.exit_code == 0, done.output
            seen += [await status(alice), await status(bob)]
            carol = CliRunner().invoke(app, ["key", "carol", "--file", str(file)]).stdout.strip()
            seen += [await status(carol)]
            file.write_text("not a key\n")
            return [*seen, await status(bob)]

    assert asyncio.run(run()) == [200, 200, 401, 200, 200, 401]


def test_only_a_key_that_is_there_is_revoked(tmp_path):
    file = tmp_path / "keys"
    add_key(file, "alice")
    before = file.read_text()
    for words in (["revoke", "bob"], ["revoke"], ["alice", "bob"]):
        done = CliRunner().invoke(app, ["key", *words, "--file", str(file)])
        assert done.exit_code == 2, done.output
    assert file.read_text() == before
