"""A gateway for the page's tests: the real page and the real paths, with answers from a table."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bitladder.serve.page_app import build_page

PENS_QUALITY = [("So", 0.9), (" they", 0.95), (" cost", 0.9), (" $", 0.99), ("8", 0.8), (".", 0.99)]
PENS_SPEED = [("So", 0.9), (" they", 0.9), (" cost", 0.9), (" $", 0.98), ("12", 0.7), (".", 0.98)]
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
ANSWERS = {
    "What do 12 pens cost?": {"Q6_K": PENS_QUALITY, "Q4_K_M": PENS_SPEED},
    "Say it formally.": {
        "Q6_K": [("The", 0.9), (" file", 0.9), (" shall", 0.52), (" go", 0.9)],
        "Q4_K_M": [("The", 0.9), (" file", 0.9), (" will", 0.5), (" go", 0.9)],
    },
    "Same?": {"Q6_K": [("Yes", 0.9)], "Q4_K_M": [("Yes", 0.8)]},
    "evil": {"Q6_K": [(EVIL, 0.9)], "Q4_K_M": [(EVIL + "!", 0.9)]},
    "long": {"Q6_K": [(" word", 0.9)] * 400, "Q4_K_M": [(" word", 0.9)] * 400},
}
ALTERNATIVES = {"8": ("12", 0.05), "12": ("8", 0.06), " shall": (" will", 0.45), " will": (" shall", 0.46)}


class Fake:
    """What the tests can turn: how fast tokens come, and whether a key is asked for."""

    def __init__(self) -> None:
        self.delay = 0.002
        self.key = ""
        self.cut = False
        self.alarm = False
        self.asked: list[dict] = []

    def refused(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "A key is needed.", "code": "no_key"}}, 401)
        return None

    async def models(self, request: Request) -> Response:
        if refusal := self.refused(request):
            return refusal
        tiers = (("quality", "Q6_K"), ("speed", "Q4_K_M"))
        data = [{"id": "auto", "object": "model"}]
        data += [
            {"id": name, "bitladder": {"tier": tier, "level": level}} for tier, level in tiers for name in (tier, level)
        ]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, request: Request) -> Response:
        if refusal := self.refused(request):
            return refusal
        body = await request.json()
        self.asked.append(body)
        prompt = body["messages"][-1]["content"]
        if prompt not in ANSWERS:
            return JSONResponse({"error": {"message": "The context is too small for this.", "code": "too_long"}}, 400)
        tokens = ANSWERS[prompt][body["model"]]
        tier = "quality" if body["model"] == "Q6_K" else "speed"
        headers = {"x-bitladder-tier": tier, "x-bitladder-level": body["model"], "x-bitladder-reason": "asked for"}
        return StreamingResponse(self.stream(tokens), media_type="text/event-stream", headers=headers)

    async def stream(self, tokens: list[tuple[str, float]]) -> AsyncIterator[str]:
        for n, (token, chance) in enumerate(tokens):
            await asyncio.sleep(self.delay)
            if self.cut and n == 2:
                return
            top = [{"token": token, "logprob": math.log(chance)}]
            if token in ALTERNATIVES:
                other, other_chance = ALTERNATIVES[token]
                top.append({"token": other, "logprob": math.log(other_chance)})
            entry = {"token": token, "logprob": math.log(chance), "top_logprobs": top}
            yield event({"delta": {"content": token}, "logprobs": {"content": [entry]}, "finish_reason": None})
        yield event({"delta": {}, "finish_reason": "stop"})
        yield "data: [DONE]\n\n"

    async def live(self, request: Request) -> Response:
        if refusal := self.refused(request):
            return refusal
        return JSONResponse(live_example(alarm=self.alarm))


def event(choice: dict) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, **choice}]})}\n\n"


def live_example(*, alarm: bool) -> dict:
    now = time.time()

    def tier(name: str, level: str, rate: float) -> dict:
        return {
            "tier": name, "names": [name, level], "level": level, "file_sha256": "ab" * 32, "state": "ready",
            "resident": True, "running": 1, "queued": 0, "slots": 4, "restarts": 0, "last_error": "",
            "outcomes": {"complete": 42}, "first_byte_s": {"p50": 0.12, "p95": 0.4},
            "tokens_per_s": {"p50": rate, "p95": rate},
        }  # fmt: skip

    def line(name: str, level: str, reason: str, outcome: str = "complete") -> dict:
        return {
            "id": "x-1", "at": now - 5, "tier": name, "level": level, "reason": reason, "kind": "auto",
            "outcome": outcome, "first_s": 0.1, "total_s": 1.0, "tokens": 40, "tokens_per_s": 44.0, "escalated": False,
        }  # fmt: skip

    shadow = {
        "share": 0.1, "bar": 0.8, "compared": 25, "failed": 0, "waiting": 1, "alarm": alarm,
        "agreement": 0.6 if alarm else 0.92, "low": 0.4 if alarm else 0.8, "high": 0.75 if alarm else 0.97,
    }  # fmt: skip
    guesses = {
        "from": "draft", "guessed": 400, "accepted": 248, "acceptance": 0.62, "on": False,
        "because": "costs: 0.59 times as fast (0.54 to 0.64) on these requests", "times_as_fast": 0.59,
        "answers_with": 60, "answers_without": 64,
        "by_tag": {
            EVIL: {
                "times_as_fast": 0.7, "answers_with": 9, "answers_without": 8, "acceptance": 0.31, "apart": False,
            },
            "code": {
                "times_as_fast": 1.8, "answers_with": 30, "answers_without": 31, "acceptance": 0.9, "apart": True,
            },
        },
        "second_engine": "ready",
    }  # fmt: skip
    return {
        "tiers": [tier("quality", "Q6_K", 31.0), tier("speed", "Q4_K_M", 44.5) | {"guesses": guesses}],
        "requests": 84,
        "routing": {"auto": {"requests": 63, "share": 0.75}, "model": {"requests": 21, "share": 0.25}},
        "recent": [
            line("speed", "Q4_K_M", "tag 'recall' lost nothing at Q4_K_M on 12 inputs"),
            line("quality", "Q6_K", "tag 'arithmetic' lost 2 of 8 at Q4_K_M", "cut"),
        ],
        "name": "reference-191m", "ready": True, "notes": ["Both tiers stay in memory."], "shadow": shadow,
    }  # fmt: skip


@contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """The app on a free port, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        with contextlib.suppress(RuntimeError):
            thread.join(timeout=10)


def gateway_app(run_json: Path, fake: Fake) -> Starlette:
    """The page's own app, with the gateway's paths before it."""
    app = build_page(run_json)
    app.router.routes[:0] = [
        Route("/v1/models", fake.models),
        Route("/v1/chat/completions", fake.chat, methods=["POST"]),
        Route("/bitladder/api/live", fake.live),
    ]
    return app
