"""Engines that die, hang, do not start, change under us, or take turns. The engines here are fakes in this process."""

import asyncio
import contextlib
import time

import httpx
import pytest
from aiohttp import web

from bitladder.engines.base import Identity
from bitladder.errors import EngineError
from bitladder.serve.app import build_app
from bitladder.serve.backends import UpstreamFailed
from bitladder.serve.connections import ConnectionPool
from bitladder.serve.deploy import deployed
from bitladder.serve.settings import ServeSettings, TierSpec
from bitladder.serve.supervisor import EngineFingerprint, Supervisor, Turns, guess_counters
from upstreams import CHAT, chat


class FakeProcess:
    """Says it runs until told otherwise."""

    def __init__(self, base_url: str = "http://127.0.0.1:9", *, fail: bool = False) -> None:
        self.base_url = base_url
        self.identity = Identity("fake", "1")
        self.fail = fail
        self.code: int | None = None
        self.stopped = 0

    def start(self) -> None:
        if self.fail:
            raise EngineError("It does not start.")

    def poll(self) -> int | None:
        return self.code

    def stop(self, grace_s: float) -> None:
        self.stopped += 1

    def last_log(self) -> str:
        return "last words"


@contextlib.asynccontextmanager
async def supervised(made: list[FakeProcess], **options):
    """A supervisor that takes its processes from a list, in order."""
    waiting = list(made)
    async with ConnectionPool(5.0) as pool:
        supervisor = Supervisor("speed", lambda: waiting.pop(0), pool, health_every_s=60, **options)
        try:
            yield supervisor
        finally:
            await supervisor.stop()


def test_a_dead_engine_is_started_again():
    first, second = FakeProcess(), FakeProcess("http://127.0.0.1:10")

    async def run() -> None:
        async with supervised([first, second]) as supervisor:
            await supervisor.start()
            assert supervisor.address() == first.base_url
            first.code = -9
            assert supervisor.address() is None  # at once, not when it is looked at next
            with pytest.raises(UpstreamFailed):
                await supervisor.wait_ready(0.0)
            began = time.monotonic()
            while supervisor.address() != second.base_url:
                await asyncio.sleep(0.01)
                assert time.monotonic() - began < 5
            assert (supervisor.restarts, first.stopped) == (1, 1)
            assert supervisor.last_error == "it ended with code -9: last words"
        assert second.stopped == 1
        assert supervisor.state == "stopped"

    asyncio.run(run())


def test_an_engine_that_is_wanted_in_another_way_is_started_anew_and_nobody_calls_it_lost():
    first, second = FakeProcess(), FakeProcess("http://127.0.0.1:10")
    once: list[bool] = []
    loads: list[float] = []

    async def run() -> None:
        options = {"should_change": lambda: bool(once) and once.pop(), "on_ready": loads.append}
        async with supervised([first, second], **options) as supervisor:
            await supervisor.start()
            await asyncio.sleep(0.3)
            assert supervisor.address() == first.base_url
            once.append(True)
            seen = set()
            while supervisor.address() != second.base_url:
                seen.add(supervisor.state)
                await asyncio.sleep(0)
            assert "changing" in seen and "waiting" not in seen
            assert (supervisor.restarts, supervisor.last_error, first.stopped, len(loads)) == (0, "", 1, 2)

    asyncio.run(run())


def test_one_that_does_not_start_in_the_other_way_is_tried_again():
    first, bad, third = FakeProcess(), FakeProcess(fail=True), FakeProcess("http://127.0.0.1:11")
    once = [True]

    async def run() -> None:
        async with supervised([first, bad, third], should_change=lambda: bool(once) and once.pop()) as supervisor:
            await supervisor.start()
            while supervisor.address() != third.base_url:
                await asyncio.sleep(0.01)
            assert (supervisor.restarts, supervisor.last_error) == (1, "It does not start.")

    asyncio.run(run())


def test_while_it_is_down_requests_are_told_so():
    async def run() -> None:
        first = FakeProcess()
        async with supervised([first, FakeProcess(fail=True), FakeProcess(fail=True), FakeProcess()]) as supervisor:
            await supervisor.start()
            first.code = 1
            await asyncio.sleep(0.2)
            assert supervisor.address() is None
            with pytest.raises(UpstreamFailed, match="engine of speed is"):
                await supervisor.wait_ready(0.0)
            await supervisor.wait_ready(5.0)  # after two failed starts
            assert supervisor.restarts == 3

    asyncio.run(run())


def test_a_first_start_that_fails_is_the_users_to_know():
    async def run() -> None:
        async with supervised([FakeProcess(fail=True)]) as supervisor:
            with pytest.raises(EngineError, match="does not start"):
                await supervisor.start()

    asyncio.run(run())


def test_a_hung_engine_is_replaced():
    async def hang(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/health", hang)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        made = [FakeProcess(f"http://127.0.0.1:{port}"), FakeProcess()]
        waiting = list(made)
        async with ConnectionPool(5.0) as pool:
            supervisor = Supervisor(
                "speed", lambda: waiting.pop(0), pool, health_every_s=0.05, health_timeout_s=0.1, health_misses=2
            )
            await supervisor.start()
            async with asyncio.timeout(5):
                while supervisor.restarts == 0:
                    await asyncio.sleep(0.02)
            assert made[0].stopped == 1
            assert supervisor.last_error == "it did not answer /health 2 times"
            await supervisor.stop()
        await runner.cleanup()

    asyncio.run(run())


def test_a_file_that_changed_is_not_served(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    print_of = EngineFingerprint(path)
    print_of.check()
    path.write_bytes(b"GGUF2")
    with pytest.raises(EngineError, match="had 4 bytes and has 5"):
        print_of.check()
    path.unlink()
    with pytest.raises(EngineError, match="is gone"):
        print_of.check()


def test_two_engines_take_turns_and_none_is_stopped_in_use():
    async def run() -> None:
        made: dict[str, list[FakeProcess]] = {"quality": [], "speed": []}
        async with ConnectionPool(5.0) as pool:

            def supervisor(name: str) -> Supervisor:
                def make() -> FakeProcess:
                    made[name].append(FakeProcess())
                    return made[name][-1]

                return Supervisor(name, make, pool, health_every_s=60)

            quality, speed, turns = supervisor("quality"), supervisor("speed"), Turns()
            log: list[str] = []

            async def work(engine: Supervisor, seconds: float) -> None:
                async with turns.use(engine) as changed:
                    assert engine.state == "ready"
                    assert {quality.state, speed.state} == {"ready", "stopped"}
                    log.append(f"{engine.name}{'*' if changed else ''}")
                    await asyncio.sleep(seconds)
                    assert engine.state == "ready"

            waits = ((quality, 0.03), (quality, 0.06), (speed, 0.02), (quality, 0.0), (quality, 0.0))
            await asyncio.gather(*(work(engine, seconds) for engine, seconds in waits))
            assert log == ["quality*", "quality", "speed*", "quality*", "quality"]
            assert turns.changes == 2
            for engine in (quality, speed):
                await engine.stop()
            assert all(process.stopped == 1 for processes in made.values() for process in processes)

    asyncio.run(run())


def test_a_gateway_whose_tiers_do_not_fit_together_loads_the_one_that_is_asked_for_and_says_so(tmp_path):
    """The engines are two addresses of a small server; each answers as its own model."""

    async def answer(request: web.Request) -> web.Response:
        model = request.match_info["model"]
        assert loaded == [model], "only one may be loaded"
        return web.json_response({"model": model, "choices": [{"index": 0, "message": {"content": model}}]})

    loaded: list[str] = []

    class Loaded(FakeProcess):
        def __init__(self, model: str, base_url: str) -> None:
            super().__init__(f"{base_url}/{model}/v1")
            self.model = model

        def start(self) -> None:
            loaded.append(self.model)

        def stop(self, grace_s: float) -> None:
            loaded.remove(self.model)

    async def run() -> list[httpx.Response]:
        app = web.Application()
        app.router.add_post("/{model}/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        specs = []
        for level, size in (("Q8_0", 800), ("Q4_K_M", 400)):
            path = tmp_path / f"{level}.gguf"
            path.write_bytes(b"GGUF")
            specs.append(TierSpec(level, path=path, memory_bytes=size))
        settings = ServeSettings(*specs, memory_budget_bytes=1000)
        async with deployed(settings, make_engine=lambda spec, _: Loaded(spec.level, base_url)) as deployment:
            assert "take turns in memory" in deployment.notes[0]
            assert deployment.ready and loaded == []
            transport = httpx.ASGITransport(build_app(deployment))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                asked = ("quality", "quality", "speed", "Q8_0")
                given = [await client.post(CHAT, json=chat(model)) for model in asked]
        assert loaded == []
        await runner.cleanup()
        return given

    replies = asyncio.run(run())
    assert [reply.json()["model"] for reply in replies] == ["Q8_0", "Q8_0", "Q4_K_M", "Q8_0"]
    told = ["was loaded for this" in reply.headers["x-bitladder-reason"] for reply in replies]
    assert told == [True, False, True, True]


def test_how_good_guesses_are_is_read_from_the_engines_counters():
    text = (
        "# TYPE llamacpp:spec_decode_num_draft_tokens_total counter\n"
        "llamacpp:spec_decode_num_draft_tokens_total 44\nllamacpp:spec_decode_num_accepted_tokens_total 8\n"
    )
    assert guess_counters(text) == (44, 8)
    assert guess_counters("") is None
    assert guess_counters("llamacpp:spec_decode_num_draft_tokens_total 44\n") is None
    assert guess_counters(text.replace("44", "many")) is None
    assert guess_counters(text.replace("44", "9" * 50)) is None
