"""Shadow mode: what is asked, what is compared, when the alarm rings."""

import asyncio
import json
import math
import random
from collections import deque

from bitladder.serve.protocol import parse_request
from bitladder.serve.settings import Shadow
from upstreams import CHAT, chat, document, fails, gateway, replies, says


def shadowed(quality, speed, body, share=1.0, bar=0.9) -> tuple[dict, list, list]:
    async def run():
        settings = {"shadow": Shadow(share, bar)}
        async with gateway(quality, speed, **settings) as (client, deployment):
            await client.post(CHAT, json=body)
            async with asyncio.timeout(5):
                while deployment.shadow.live()["waiting"] or deployment.shadow.live()["compared"] == 0:
                    if deployment.shadow.live()["failed"] or share == 0:
                        break
                    await asyncio.sleep(0.02)
            return (await client.get("/bitladder/api/live")).json()["shadow"]

    return asyncio.run(run()), quality.asked, speed.asked


def test_both_tiers_are_asked_again_greedily():
    quality, speed = says("same", "Q8_0"), says("same", "Q4_K_M")
    live, asked_quality, asked_speed = shadowed(quality, speed, chat("speed", temperature=0.9, stream=True))
    assert len(asked_speed) == 2 and len(asked_quality) == 1
    for request in (asked_speed[1], asked_quality[0]):
        body = json.loads(request.body)
        assert (body["temperature"], body["stream"], body["max_tokens"]) == (0, False, 128)
    assert (live["compared"], live["agreement"], live["alarm"]) == (1, 1.0, False)


def test_what_the_quality_tier_answered_is_not_shadowed():
    async def run() -> None:
        async with gateway(says("a", "Q8_0"), says("b", "Q4_K_M"), shadow=Shadow(1.0)) as (client, deployment):
            await client.post(CHAT, json=chat("quality"))
            assert deployment.shadow.live()["waiting"] == 0

    asyncio.run(run())


def test_a_failed_comparison_is_no_disagreement():
    live, *_ = shadowed(fails(), says("x", "Q4_K_M"), chat("speed"))
    assert (live["compared"], live["failed"], live["agreement"]) == (0, 1, None)


def test_the_alarm_rings_when_even_the_upper_end_is_under_the_bar_and_stops_again():
    async def run() -> None:
        async with gateway(says("a", "Q8_0"), says("b", "Q4_K_M"), shadow=Shadow(1.0, bar=0.8)) as (client, deployment):
            shadow = deployment.shadow
            shadow._same = deque(maxlen=50)  # the last comparisons, fewer than usual to be quicker
            assert math.isnan(shadow.agreement)
            for same in [True] * 12 + [False] * 3:
                await shadow.count(same)
            assert not shadow.alarm  # 12 of 15: as promised
            for _ in range(30):
                await shadow.count(False)
            assert shadow.alarm and shadow.high < 0.8
            assert "bitladder_shadow_alarm 1.0" in (await client.get("/metrics")).text
            for _ in range(50):
                await shadow.count(True)
            assert not shadow.alarm

    asyncio.run(run())


def test_the_share_is_kept():
    async def run() -> int:
        speed = replies(document("x", "Q4_K_M"), kind="application/json")
        async with gateway(says("a", "Q8_0"), speed, shadow=Shadow(0.25)) as (_, deployment):
            shadow = deployment.shadow
            shadow._chance = random.Random(7)
            taken, request = 0, parse_request(CHAT, json.dumps(chat("speed")).encode())
            for _ in range(400):
                before = shadow.live()["waiting"]
                shadow.sample(request)
                taken += shadow.live()["waiting"] - before
                shadow._waiting.clear()
            return taken

    assert 75 <= asyncio.run(run()) <= 125
