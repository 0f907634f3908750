"""Embeddings and ranks: tiers of their own, which answer nothing else, as text tiers do not answer them."""

import asyncio
import json

import httpx
import pytest

from bitladder.serve.app import build_app
from bitladder.serve.deploy import deployed
from bitladder.serve.settings import ServeSettings, TierSpec
from tiny_engine import write_tiny
from upstreams import CHAT, QUALITY, SPEED, chat, gateway, replies, says

EMBEDDINGS, RERANK = "/v1/embeddings", "/v1/rerank"
INPUT = {"model": "auto", "input": "x"}
QUERY = {"model": "auto", "query": "x", "documents": ["a", "b"]}
VECTORS = json.dumps({"object": "list", "model": "nomic", "data": [{"index": 0, "embedding": [0.5]}]}).encode()
RANKS = json.dumps({"model": "bge", "results": [{"index": 0, "relevance_score": 0.5}]}).encode()
GOOD, FAST = says("good", "Q8_0"), says("fast", "Q4_K_M")


def ask(path, body, *, nomic=None, bge=None):
    extra = (
        TierSpec("nomic", url="http://n.invalid", task=EMBEDDINGS, n_ctx=0),
        TierSpec("bge", url="http://b.invalid", task=RERANK, n_ctx=0),
    )
    upstreams = {
        "Q8_0": GOOD.complete,
        "Q4_K_M": FAST.complete,
        "nomic": (nomic or replies(VECTORS, kind="application/json")).complete,
        "bge": (bge or replies(RANKS, kind="application/json")).complete,
    }

    async def run():
        async with deployed(ServeSettings(QUALITY, SPEED, extra=extra), upstreams=upstreams) as deployment:
            transport = httpx.ASGITransport(build_app(deployment))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.post(path, json=body)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body", "level", "answer"), [(EMBEDDINGS, INPUT, "nomic", VECTORS), (RERANK, QUERY, "bge", RANKS)]
)
def test_auto_and_the_tasks_own_name_mean_its_tier(path, body, level, answer):
    for name in ("auto", path.removeprefix("/v1/"), level):
        reply = ask(path, {**body, "model": name})
        assert (reply.status_code, reply.content, reply.headers["x-bitladder-level"]) == (200, answer, level)
        assert reply.headers["x-bitladder-tier"] == path.removeprefix("/v1/")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, chat("nomic"), 400),
        (RERANK, {**QUERY, "model": "nomic"}, 400),
        (EMBEDDINGS, {**INPUT, "stream": True}, 400),
        (RERANK, {"model": "auto", "query": "x"}, 400),
        (RERANK, {"model": "auto", "query": 5, "documents": ["a"]}, 400),
        (RERANK, {"model": "auto", "query": "x", "documents": []}, 400),
        (RERANK, {"model": "auto", "query": "x", "documents": "a"}, 400),
        (EMBEDDINGS, {"model": "nothing", "input": "x"}, 404),
    ],
)
def test_what_a_tier_is_not_for_is_refused(path, body, status):
    reply = ask(path, body)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_an_endpoint_that_knows_no_ranks_says_so():
    async def run():
        unknown = replies(b'{"detail": "Not Found"}', status=404, kind="application/json")
        async with gateway(unknown, FAST) as (client, _):
            return await client.post(RERANK, json={**QUERY, "model": "quality"})

    reply = asyncio.run(run())
    assert reply.status_code == 501 and f"does not know {RERANK}" in reply.json()["error"]["message"]


@pytest.mark.model
def test_the_real_engine_embeds_in_a_tier_of_its_own(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf")
    text = TierSpec("tiny", path=path, n_ctx=256)
    vectors = TierSpec("vectors", path=path, n_ctx=256, task=EMBEDDINGS)

    async def run():
        async with deployed(ServeSettings(text, extra=(vectors,), threads=1)) as deployment:
            transport = httpx.ASGITransport(build_app(deployment))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
                return [
                    await client.post(EMBEDDINGS, json={"model": "auto", "input": ["a text", "another " * 20]}),
                    await client.post(EMBEDDINGS, json={"model": "quality", "input": "x"}),
                    await client.post(RERANK, json=QUERY),
                    await client.post(CHAT, json=chat("auto", max_tokens=2)),
                ]

    embedded, by_text, ranked, said = asyncio.run(run())
    assert [len(one["embedding"]) for one in embedded.json()["data"]] == [256, 256]
    assert (by_text.status_code, ranked.status_code, said.status_code) == (501, 501, 200)
    assert "--embeddings" in by_text.json()["error"]["message"] and "--rerank" in ranked.json()["error"]["message"]
