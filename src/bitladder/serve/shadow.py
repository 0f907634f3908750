"""Shadow mode: a share of what the speed tier answered is asked again, of both tiers, when nobody else is
waiting.

Both are asked greedily (temperature 0) and cut at the same length, so that sampling noise is not taken for
a difference between the levels; texts are compared exactly. The agreement is watched with an interval that
may be looked at after every comparison (`stats.sequential`), over the last comparisons only, so that a
change shows. When even its upper end is under the bar, which is what the evidence promised, the alarm is
raised: the work has drifted from the workload.

Prompts wait in memory only, at most ``_MAX_WAITING`` of them, and are dropped first when there is too much
to do.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
from collections import deque
from typing import Any

from bitladder.serve.backends import UpstreamFailed, UpstreamRequest
from bitladder.serve.metrics import Metrics
from bitladder.serve.protocol import ModelRequest, Refused
from bitladder.serve.relay import read_answer
from bitladder.serve.replicas import affinity_key
from bitladder.serve.settings import Shadow
from bitladder.serve.tiers import Tier
from bitladder.stats.sequential import confidence_sequence

log = logging.getLogger("bitladder.serve")

_MAX_WAITING = 32
_LOOK_BACK = 200
_IDLE_EVERY_S = 0.25


class ShadowMode:
    """Samples requests, compares both tiers in idle time, and knows whether they still agree."""

    def __init__(self, settings: Shadow, quality: Tier, speed: Tier, metrics: Metrics, chance: random.Random) -> None:
        self._settings = settings
        self._quality = quality
        self._speed = speed
        self._metrics = metrics
        self._chance = chance
        self._waiting: deque[ModelRequest] = deque(maxlen=_MAX_WAITING)
        self._same: deque[float] = deque(maxlen=_LOOK_BACK)
        self._compared = 0
        self._failed = 0
        self.low, self.high = math.nan, math.nan
        self.alarm = False

    def sample(self, request: ModelRequest) -> None:
        """Take this request with the stated chance."""
        if self._chance.random() < self._settings.share:
            self._waiting.append(request)

    async def run(self) -> None:
        """Compare whenever both tiers are idle; until cancelled."""
        while True:
            await asyncio.sleep(_IDLE_EVERY_S)
            while self._waiting and self._idle():
                await self.compare(self._waiting.popleft())

    def _idle(self) -> bool:
        return not any(tier.gate.running or tier.gate.queued for tier in (self._quality, self._speed))

    async def compare(self, request: ModelRequest) -> None:
        """Ask both tiers, one after the other, and count."""
        try:
            answers = [await self._ask(tier, request) for tier in (self._speed, self._quality)]
        except (UpstreamFailed, Refused, TimeoutError) as error:
            self._failed += 1
            log.warning("shadow request failed", extra={"found": str(error)})
            return
        await self.count(answers[0] == answers[1])

    async def count(self, same: bool) -> None:
        """Add one comparison, and look at the agreement again."""
        self._same.append(float(same))
        self._compared += 1
        self._metrics.shadowed.labels(str(same).lower()).inc()
        # Milliseconds of arithmetic, which must not hold up streams.
        self.low, self.high = await asyncio.to_thread(confidence_sequence, list(self._same))
        alarm = self.high < self._settings.bar
        if alarm != self.alarm:
            told = {"agreement": self.agreement, "high": self.high, "bar": self._settings.bar}
            log.log(
                logging.ERROR if alarm else logging.INFO,
                "shadow alarm" if alarm else "shadow alarm over",
                extra=told,
            )
        self.alarm = alarm
        self._metrics.alarm.set(alarm)

    @property
    def agreement(self) -> float:
        """Share of the last comparisons with the very same answer; NaN before the first."""
        return sum(self._same) / len(self._same) if self._same else math.nan

    async def _ask(self, tier: Tier, request: ModelRequest) -> str:
        wanted: dict[str, Any] = {
            "temperature": 0,
            "stream": False,
            "max_tokens": self._settings.max_tokens,
            "n": 1,
        }
        if tier.spec.url is not None:
            wanted["model"] = tier.spec.served_name
        replica = tier.replicas.choose(affinity_key(request))
        assert replica is not None  # a tier has at least one
        async with asyncio.timeout(120), tier.hold():
            with tier.replicas.asking(replica):
                reply = await replica.complete(UpstreamRequest(request.path, request.with_values(wanted), stream=False))
                try:
                    answer = await read_answer(reply, tier.spec.served_name, stream=False)
                finally:
                    reply.close()
        if answer.status >= 300:
            raise UpstreamFailed("status", f"The {tier.name} tier answered with status {answer.status}.")
        choices = json.loads(answer.head).get("choices") or [{}]
        return json.dumps(choices[0].get("message"), sort_keys=True)

    def live(self) -> dict[str, Any]:
        """For the page; undefined numbers are null."""
        numbers = {"agreement": self.agreement, "low": self.low, "high": self.high}
        return {
            "share": self._settings.share,
            "bar": self._settings.bar,
            "compared": self._compared,
            "failed": self._failed,
            "waiting": len(self._waiting),
            "alarm": self.alarm,
            **{name: None if math.isnan(value) else round(value, 4) for name, value in numbers.items()},
        }
