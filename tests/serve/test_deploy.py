"""From settings to running tiers: endpoints are asked what they serve; the wire has limits."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest
import uvicorn
from aiohttp import web
from uvicorn.server import ServerState

from bitladder.errors import EngineError, UsageError
from bitladder.serve import wire
from bitladder.serve.app import build_app
from bitladder.serve.deploy import deployed, must_take_turns, specs_by_role
from bitladder.serve.settings import ServeSettings, TierSpec
from upstreams import CHAT, chat


@contextlib.asynccontextmanager
async def endpoint(*models: str, status: int = 200) -> AsyncIterator[tuple[str, list[dict]]]:
    """An OpenAI-compatible endpoint that lists these models and answers as the one it is asked for."""
    asked: list[dict] = []

    async def listing(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in models]}, status=status)

    async def answer(request: web.Request) -> web.Response:
        asked.append({**await request.json(), "authorization": request.headers.get("authorization")})
        return web.json_response({"model": asked[-1]["model"], "choices": [{"index": 0, "message": {"content": "x"}}]})

    app = web.Application()
    app.router.add_get("/v1/models", listing)
    app.router.add_post(CHAT, answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


def ask(*models: str, name: str = "", status: int = 200) -> tuple[httpx.Response, list[dict], tuple[str, ...]]:
    async def run():
        async with endpoint(*models, status=status) as (url, asked):
            tier = TierSpec("Q8_0", url=f"{url}/v1", model=name, api_key="sk-upstream", n_ctx=0)
            async with deployed(ServeSettings(tier)) as deployment:
                transport = httpx.ASGITransport(build_app(deployment))
                async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                    reply = await client.post(CHAT, json=chat("auto"), headers={"authorization": "Bearer mine"})
                    return reply, asked, deployment.notes

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("models", "name", "sent"),
    [
        (("only",), "", "only"),
        (("a", "b"), "b", "b"),
        (("a", "Q8_0"), "", "Q8_0"),
        (("big-2026-01-31",), "big", "big"),
        ((), "named", "named"),
    ],
)
def test_the_model_of_an_endpoint_is_found_and_asked_for_by_its_name(models, name, sent):
    reply, asked, notes = ask(*models, name=name)
    assert reply.status_code == 200
    assert asked[0]["model"] == sent
    assert asked[0]["authorization"] == "Bearer sk-upstream"
    assert reply.headers["x-bitladder-file-sha256"] == "unknown"
    assert reply.headers["x-bitladder-reason"] == "auto: one level serves everything"
    assert any("lists no models" in note for note in notes) is (not models)


@pytest.mark.parametrize(
    ("models", "name", "means"),
    [
        (("a", "b"), "", "It is not clear which one is meant"),
        (("a",), "b", "answered by another model"),
    ],
)
def test_an_endpoint_that_serves_another_model_is_refused(models, name, means):
    with pytest.raises(EngineError, match="serves a") as error:
        ask(*models, name=name)
    assert means in error.value.means


def test_an_endpoint_without_a_list_is_taken_at_its_word():
    reply, asked, notes = ask("x", name="named", status=404)
    assert (reply.status_code, asked[0]["model"]) == (200, "named")
    assert "lists no models" in notes[0]


def test_an_endpoint_that_is_down_does_not_keep_the_gateway_from_starting():
    async def run() -> tuple[str, ...]:
        async with deployed(ServeSettings(TierSpec("Q8_0", url="http://127.0.0.1:9"))) as deployment:
            return deployment.notes

    assert "does not list its models yet" in asyncio.run(run())[0]


def test_one_level_has_both_roles_and_two_cannot_share_a_name(tmp_path):
    quality, speed = TierSpec("Q8_0", url="http://a"), TierSpec("Q4_K_M", url="http://b")
    assert specs_by_role(ServeSettings(quality)) == [(("quality", "speed", "q8_0"), quality)]
    names = [names for names, _ in specs_by_role(ServeSettings(quality, speed, (TierSpec("Q5_K_M", url="http://c"),)))]
    assert names == [("quality", "q8_0"), ("speed", "q4_k_m"), ("q5_k_m",)]
    with pytest.raises(UsageError, match="'q8_0' is served twice"):
        ServeSettings(quality, TierSpec("q8_0", url="http://b"))
    with pytest.raises(UsageError, match="neither a file nor a URL"):
        TierSpec("Q8_0")


@pytest.mark.parametrize(("sizes", "budget", "turns"), [((5, 5), 10, False), ((5, 6), 10, True), ((5, 6), 0, False)])
def test_tiers_take_turns_only_when_they_do_not_fit_together(tmp_path, sizes, budget, turns):
    specs = [TierSpec(str(size), path=tmp_path, memory_bytes=size) for size in sizes]
    assert must_take_turns(specs, budget) is turns


def test_a_head_that_does_not_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(wire, "HEAD_S", 0.2)

    async def run() -> bytes:
        config = uvicorn.Config(lambda *_: None, ws="none", lifespan="off", log_config=None)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: wire.CarefulProtocol(config, ServerState(), {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        async with asyncio.timeout(5):
            writer.write(b"GET / HTTP/1.1\r\nhost: ")
            received = await reader.read()
        writer.close()
        server.close()
        await server.wait_closed()
        return received

    assert asyncio.run(run()) == b""
