"""Replicas of a tier: which one is asked, what happens when some fail, and names that resolve to several."""

import asyncio
import collections
import contextlib
import json
from collections.abc import AsyncIterator

import httpx
import pytest
import uvicorn
from aiohttp import ClientSession, TCPConnector, web

from bitladder.errors import EngineError, UsageError
from bitladder.serve.app import build_app
from bitladder.serve.backends import UpstreamFailed
from bitladder.serve.deploy import Deployment, deployed
from bitladder.serve.limits import Gate
from bitladder.serve.protocol import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, parse_request
from bitladder.serve.replicas import BOUND, TRIAL_S, Replica, ReplicaSet, ReplicaState, affinity_key, preferred
from bitladder.serve.settings import ReplicaSpec, ServeSettings, TierSpec, UpstreamTimeouts, with_distinct_names
from upstreams import chat

QUICK = UpstreamTimeouts(connect=1.0, first_byte=20.0, probe=1.5, probe_every=0.1, resolve_every=0.1)


# Choosing, without a wire.


async def never(_):
    raise AssertionError("nobody asks")


def several(count: int, clock: list[float] | None = None) -> ReplicaSet:
    now = clock or [0.0]
    return ReplicaSet([Replica(f"10.0.0.{number}:8000", never) for number in range(count)], now=lambda: now[0])


def test_without_a_beginning_the_one_with_fewest_requests_is_asked():
    replicas = several(4)
    taken = collections.Counter()
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            chosen = replicas.choose(b"")
            stack.enter_context(replicas.asking(chosen))
            taken[chosen.name] += 1
    assert set(taken.values()) == {10}
    assert all(one.outstanding == 0 for one in replicas)
    idle = collections.Counter(replicas.choose(b"").name for _ in range(40))
    assert set(idle.values()) == {10}  # ties are shared, too


def test_a_conversation_keeps_its_replica_until_that_one_has_more_than_its_share():
    replicas = several(4)
    first = replicas.choose(b"conversation")
    assert all(replicas.choose(b"conversation") is first for _ in range(20))
    order = preferred(b"conversation", list(replicas))
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(replicas.asking(replicas.choose(b"conversation")))
        loads = {one.name: one.outstanding for one in replicas}
        assert max(loads.values()) <= BOUND * 40 / 4 + 1
        assert loads[order[0].name] >= loads[order[-1].name]
    assert replicas.choose(b"conversation") is first


def test_a_replica_that_comes_or_goes_moves_only_its_own_conversations():
    keys = [bytes([number]) * 8 for number in range(200)]
    four, five = list(several(4)), list(several(5))
    before = {key: preferred(key, four)[0].name for key in keys}
    after = {key: preferred(key, five)[0].name for key in keys}
    moved = {key for key in keys if before[key] != after[key]}
    assert all(after[key] == five[-1].name for key in moved)
    assert 0 < len(moved) < 200 / 5 * 2
    assert set(collections.Counter(before.values())) == {one.name for one in four}


def test_a_slow_replica_gets_a_trial_now_and_then_and_is_taken_back():
    clock = [100.0]
    replicas = several(3, clock)
    slow, *others = replicas
    for one in replicas:
        for _ in range(10):
            one.observe(1.0 if one is slow else 0.1)
        one.last_used = clock[0]
    keys = [b"", *(bytes([number]) for number in range(50))]
    assert all(replicas.choose(key) is not slow for key in keys)
    clock[0] += TRIAL_S
    assert replicas.choose(b"any") is slow
    with replicas.asking(slow):
        assert replicas.choose(b"any") is not slow
    for _ in range(60):
        slow.observe(0.1)
    assert any(replicas.choose(key) is slow for key in keys)
    # so busy are the others that even a slow one is the quickest to turn to
    for _ in range(60):
        slow.observe(1.0)
    with contextlib.ExitStack() as stack:
        for one in others * 30:
            stack.enter_context(replicas.asking(one))
        slow.last_used = clock[0]
        assert replicas.choose(b"any") is slow


@pytest.mark.parametrize(
    ("phases", "state"),
    [
        (["connect"], ReplicaState.OUT),
        (["broken"], ReplicaState.UP),
        (["status", "garbage", "broken"], ReplicaState.OUT),
        (["status", "garbage", "answers", "broken"], ReplicaState.UP),
        (["busy"] * 9, ReplicaState.UP),
    ],
)
def test_what_puts_a_replica_out(phases, state):
    replicas = several(2)
    first = next(iter(replicas))
    for phase in phases:
        if phase == "answers":
            replicas.answers(first, object(), 0.1)
        else:
            replicas.failed(first, UpstreamFailed(phase, "x"))
    assert first.state is state
    alone = several(1)
    alone.failed(next(iter(alone)), UpstreamFailed("connect", "x"))
    assert alone.up == 1


def test_one_that_fails_again_and_again_stays_out_longer():
    clock = [0.0]
    replicas = several(2, clock)
    first = next(iter(replicas))
    waits = []
    for _ in range(9):
        replicas.failed(first, UpstreamFailed("connect", "x"))
        began = clock[0]
        while first.state is ReplicaState.OUT:
            clock[0] += 0.5
            replicas.let_in(first)
        waits.append(clock[0] - began)
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (1.0, 60.0)
    assert replicas.choose(b"") is not None


def key_of(path: str, **members) -> bytes:
    return affinity_key(parse_request(path, json.dumps({"model": "auto", **members}).encode()))


def test_what_begins_alike_has_one_key():
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a level?"}
    more = [{"role": "assistant", "content": "One precision."}, {"role": "user", "content": "And a tier?"}]
    key = key_of(CHAT, messages=[system, first])
    assert key == key_of(CHAT, messages=[system, first, *more], temperature=0.3)
    assert key != key_of(CHAT, messages=[{**system, "content": "Be long."}, first])
    assert key != key_of(CHAT, messages=[system, more[-1]])
    assert key == key_of(CHAT, messages=[system, {**first, "content": [{"type": "text", "text": first["content"]}]}])
    assert key_of(COMPLETIONS, prompt="a" * 1024) == key_of(COMPLETIONS, prompt="a" * 4000)
    assert key_of(RESPONSES, input="Hello") == key_of(RESPONSES, input=[{"role": "user", "content": "Hello"}, *more])
    given = {"prompt_cache_key": "mine"}
    assert key_of(CHAT, messages=[first], **given) == key_of(CHAT, messages=more, **given) != key
    assert key_of(EMBEDDINGS, input="Hello") == b""
    assert key_of(CHAT, messages=[{"role": "user", "content": "\ud800"}], prompt_cache_key=7) != b""


def test_a_gate_that_shrinks_lets_what_runs_end_and_one_that_grows_lets_waiting_ones_in():
    async def run() -> None:
        gate = Gate(4, 10)
        for _ in range(4):
            await gate.enter()
        waiting = [asyncio.create_task(gate.enter()) for _ in range(4)]
        await asyncio.sleep(0)
        gate.resize(2)
        for running in (3, 2):
            gate.leave(0.1)
            await asyncio.sleep(0)
            assert (gate.running, gate.queued) == (running, 4)
        gate.leave(0.1)
        await asyncio.sleep(0)
        assert (gate.running, gate.queued) == (2, 3)
        gate.resize(4)
        await asyncio.sleep(0)
        assert (gate.running, gate.queued) == (4, 1)
        for task in waiting:
            task.cancel()

    asyncio.run(run())


# Over real sockets.


class Server:
    """An OpenAI-compatible server: answers after ``delay`` seconds, and can be killed, hung and started again."""

    def __init__(self, model: str = "m") -> None:
        self.model, self.delay, self.status = model, 0.0, 200
        self.asked: list[dict] = []
        self.hangs = False
        self.breaks_after: int | None = None
        self._runner: web.AppRunner | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self, host: str = "127.0.0.1") -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def kill(self) -> None:
        """Nothing listens, and every connection breaks."""
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        for site in tuple(runner.sites):
            await site.stop()
        for connection in tuple(runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        while self.hangs:
            await asyncio.sleep(0.02)
        return web.json_response({"data": [{"id": self.model}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        await asyncio.sleep(self.delay)
        while self.hangs:
            await asyncio.sleep(0.02)
        if self.status != 200:
            return web.json_response({"error": {"message": "busy or broken"}}, status=self.status)
        if not body.get("stream"):
            message = {"role": "assistant", "content": self.name}
            return web.json_response({"model": self.model, "choices": [{"index": 0, "message": message}]})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(4):
            if number == self.breaks_after:
                request.transport.abort()
                return response
            delta = {"index": 0, "delta": {"content": str(number)}}
            await response.write(b"data: " + json.dumps({"model": self.model, "choices": [delta]}).encode() + b"\n\n")
            await asyncio.sleep(0.002)
        await response.write(b"data: [DONE]\n\n")
        return response


@contextlib.asynccontextmanager
async def servers(count: int, model: str = "m") -> AsyncIterator[list[Server]]:
    made = [Server(model) for _ in range(count)]
    for one in made:
        await one.start()
    try:
        yield made
    finally:
        for one in made:
            one.hangs = False
        await asyncio.gather(*(one.kill() for one in made))


def tier_over(urls: list[str], **more) -> TierSpec:
    replicas = tuple(ReplicaSpec(url) for url in urls[1:])
    return TierSpec(
        **{"level": "big", "url": urls[0], "model": "m", "slots": 64, "n_ctx": 0, "replicas": replicas} | more
    )


@contextlib.asynccontextmanager
async def gateway_over(*specs: TierSpec, **more) -> AsyncIterator[tuple[str, Deployment]]:
    """A gateway on a socket of its own; its address."""
    settings = ServeSettings(specs[0], *specs[1:], timeouts=QUICK)
    async with deployed(settings, **more) as deployment:
        config = uvicorn.Config(build_app(deployment), port=0, lifespan="off", log_level="critical")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", deployment
        finally:
            server.should_exit = True
            await task


async def load(address: str, requests: int, clients: int, conversations: int, meanwhile=None) -> collections.Counter:
    """Send requests, half of them streams; what became of them."""
    found: collections.Counter = collections.Counter()
    left = iter(range(requests))

    async def client(session: ClientSession) -> None:
        for number in left:
            body = chat("quality", f"conversation {number % conversations}", stream=number % 2 == 0)
            async with session.post(f"{address}/v1/chat/completions", json=body) as reply:
                text = await reply.read()
                whole = b"[DONE]" in text if body["stream"] else b'"content": "127' in text
                found["complete" if reply.status == 200 and whole and b'"error"' not in text else text[-400:]] += 1
                found[reply.headers.get("x-bitladder-replica", "none")] += 1

    async with ClientSession(connector=TCPConnector(limit=0)) as session:
        helper = asyncio.create_task(meanwhile()) if meanwhile else None
        await asyncio.gather(*(client(session) for _ in range(clients)))
        if helper is not None:
            await helper
    return found


def test_two_of_eight_are_killed_and_one_is_slow_and_no_request_is_lost():
    async def run() -> None:
        async with servers(8) as made:
            for one in made:
                one.delay = 0.01
            slow, first, second, *rest = made
            slow.delay = 2.0
            async with gateway_over(tier_over([one.url for one in made])) as (address, deployment):

                async def kill() -> None:
                    while sum(len(one.asked) for one in made) < 300:
                        await asyncio.sleep(0.01)
                    await first.kill()
                    await second.kill()

                found = await load(address, 1200, 24, 300, kill)
                assert found["complete"] >= 1200 - 24, found
                cut = [text for text in found if isinstance(text, bytes)]
                assert all(b"not complete" in text for text in cut)  # streams that had begun when they were killed
                states = {one.name: one.state for one in deployment.tiers[0].replicas}
                assert states.pop(first.name) == states.pop(second.name) == ReplicaState.OUT
                assert set(states.values()) == {ReplicaState.UP}
                shares = [found[one.name] for one in rest]
                assert max(shares) < 2.5 * min(shares), shares
                assert found[slow.name] < 0.1 * 1200
                # all that one conversation asked went to few of them
                asked_of = {one.name: {body["messages"][0]["content"] for body in one.asked} for one in rest}
                assert sum(map(len, asked_of.values())) < 2.2 * 300
                async with httpx.AsyncClient(base_url=address) as client:
                    metrics = (await client.get("/metrics")).text
                    live = (await client.get("/bitladder/api/live")).json()
                assert f'bitladder_replica_up{{replica="{first.name}",tier="quality"}} 0.0' in metrics
                assert f'bitladder_replica_up{{replica="{slow.name}",tier="quality"}} 1.0' in metrics
                rows = {row["replica"]: row for row in live["tiers"][0]["replicas"]}
                assert rows[first.name]["state"] == "out" and rows[first.name]["last_error"]
                assert rows[slow.name]["first_byte_s"] > rows[rest[0].name]["first_byte_s"]
                await first.start()
                for _ in range(200):
                    if deployment.tiers[0].replicas.up == 7:
                        break
                    await asyncio.sleep(0.05)
                assert deployment.tiers[0].replicas.up == 7

    asyncio.run(run())


def test_what_waits_at_a_replica_that_hangs_is_asked_of_another():
    async def run() -> None:
        async with servers(2) as (hung, good), gateway_over(tier_over([hung.url, good.url])) as (address, deployment):
            hung.hangs = True
            found = await load(address, 12, 12, 12)
            assert found["complete"] == 12
            assert found[good.name] == 12
            assert hung.asked  # some were there
            async with httpx.AsyncClient(base_url=address) as client:
                live = (await client.get("/bitladder/api/live")).json()
            moved = [line for line in live["recent"] if line["retries"]]
            assert all(line["retries"] == [f"{hung.name}: stalled"] for line in moved)
            assert len(moved) == len(hung.asked)
            hung.hangs = False
            for _ in range(200):
                if deployment.tiers[0].replicas.up == 2:
                    break
                await asyncio.sleep(0.05)
            assert deployment.tiers[0].replicas.up == 2

    asyncio.run(run())


@pytest.mark.parametrize(
    ("statuses", "status", "asked"),
    [
        ((500, 500, 200, 200), 200, 3),
        ((500, 500, 500, 200), 503, 3),  # such a request may be what makes them fail
        ((429, 200, 200, 200), 200, 2),
        ((429, 429, 429, 429), 429, 3),
        ((400, 200, 200, 200), 400, 1),  # the request's own fault
    ],
)
def test_how_often_a_failing_request_is_sent(statuses, status, asked):
    async def run() -> None:
        async with servers(4) as made, gateway_over(tier_over([one.url for one in made])) as (address, deployment):
            body = chat("quality", "hello")
            key = affinity_key(parse_request(CHAT, json.dumps(body).encode()))
            by_name = {one.name: one for one in made}
            order = [by_name[one.name] for one in preferred(key, list(deployment.tiers[0].replicas))]
            for one, own in zip(order, statuses, strict=True):
                one.status = own
            async with httpx.AsyncClient(base_url=address) as client:
                reply = await client.post(CHAT, json=body)
            assert reply.status_code == status, reply.text
            assert sum(len(one.asked) for one in made) == asked
            if status == 200:
                assert reply.headers["x-bitladder-replica"] == order[asked - 1].name
                assert f"{order[0].name} failed" in reply.headers["x-bitladder-reason"]

    asyncio.run(run())


def test_a_stream_that_broke_is_not_answered_twice():
    async def run() -> None:
        async with servers(2) as made, gateway_over(tier_over([one.url for one in made])) as (address, _):
            for one in made:
                one.breaks_after = 2
            async with httpx.AsyncClient(base_url=address) as client:
                reply = await client.post(CHAT, json=chat("quality", stream=True))
            assert reply.text.count('"content": "0"') == 1
            assert "not complete" in reply.text and "[DONE]" not in reply.text
            assert sum(len(one.asked) for one in made) == 1

    asyncio.run(run())


def test_a_name_that_resolves_to_several_is_as_many_replicas_and_one_that_leaves_loses_nothing():
    async def run() -> None:
        first = Server()
        await first.start("127.0.0.1")
        second = Server()
        second.port = first.port
        await second.start("127.0.0.2")
        known = ["127.0.0.1", "127.0.0.2"]
        lookups = []

        async def resolve(name: str, port: int) -> list[str]:
            lookups.append((name, port))
            if len(lookups) % 3 == 0:
                raise OSError("the resolver is out")
            return list(known)

        url = f"http://engines.invalid:{first.port}"
        try:
            async with gateway_over(tier_over([url]), resolve=resolve) as (address, deployment):
                found = await load(address, 60, 6, 60)
                names = [f"127.0.0.{last}:{first.port}" for last in (1, 2)]
                assert found["complete"] == 60
                assert min(found[name] for name in names) > 10
                assert lookups[0] == ("engines.invalid", first.port)
                second.delay = 0.4
                running = asyncio.create_task(load(address, 8, 8, 8))
                await asyncio.sleep(0.1)
                known[:] = ["127.0.0.1"]
                assert (await running)["complete"] == 8
                second.asked.clear()
                for _ in range(100):
                    if len(deployment.tiers[0].replicas) == 1:
                        break
                    await asyncio.sleep(0.05)
                assert (await load(address, 20, 4, 20))["complete"] == 20
                assert not second.asked
        finally:
            await first.kill()
            await second.kill()

    asyncio.run(run())


def test_every_replica_must_serve_the_model_and_those_that_are_down_may_come_later():
    async def run() -> None:
        async with servers(1) as (good,), servers(1, "other") as (wrong,):
            with pytest.raises(EngineError, match="serves other, and not 'm'"):
                async with gateway_over(tier_over([good.url, wrong.url])):
                    pass
            gone = "http://127.0.0.1:9"
            async with gateway_over(tier_over([gone, good.url], model="")) as (address, deployment):
                assert any("127.0.0.1:9" in note for note in deployment.notes), deployment.notes
                assert (await load(address, 4, 2, 4))["complete"] == 4
                assert good.asked[0]["model"] == "m"

    asyncio.run(run())


def test_settings_of_replicas_are_checked():
    with pytest.raises(UsageError, match="twice"):
        tier_over(["http://a:1", "http://a:1/v1"])
    with pytest.raises(UsageError, match="is a file"):
        TierSpec("q4", path=__file__, replicas=(ReplicaSpec("http://a:1"),))
    both = tier_over(["http://a:1", "http://b:1"])
    assert both.addresses == ("http://a:1/v1#m", "http://b:1/v1#m")
    one = tier_over(["http://a:1"])
    assert len({spec.level for spec in with_distinct_names([both, one])}) == 2
