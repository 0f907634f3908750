"""The gateway: one request in, one answer out, with the reason.

    read and check the body -> choose a tier -> wait for a slot -> ask the upstream -> check its answer ->
    deliver

Until the first byte is sent a failure means the next candidate; after it, an error event and the end. A
request is never answered by two upstreams, and an answer that breaks off never looks complete.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from starlette.types import Receive, Scope, Send

from bitladder.errors import EngineError
from bitladder.serve.backends import UpstreamFailed, UpstreamRequest
from bitladder.serve.delivery import Delivery, Headers
from bitladder.serve.limits import BODY_S, ClientShare, RequestMemory, held_bytes, let_go, read_body, send_refusal
from bitladder.serve.metrics import Metrics, Record, RequestOutcome
from bitladder.serve.protocol import CHAT, EMBEDDINGS, ModelRequest, Refused, count_values, parse_request
from bitladder.serve.relay import Relayed, judge, read_answer
from bitladder.serve.router import QUALITY, SPEED, AutoRule, Features, TierChoice, choose
from bitladder.serve.settings import LONGEST_TOKEN, ServeSettings
from bitladder.serve.tiers import Tier
from bitladder.serve.watch import ClientGone, PhaseTimeout, Watch, Watchman
from bitladder.units import MiB

log = logging.getLogger("bitladder.serve")

_MAX_TAGS = 16
_MAX_SAMPLED = 1 * MiB
_ROLES = {QUALITY, SPEED}

Sampler = Callable[[ModelRequest], None]


class Attempt(NamedTuple):
    """A tier to ask, and whether its answer is judged by its token probabilities."""

    tier: Tier
    judged: bool = False


class _NextAttempt(Exception):
    """This attempt gave no answer to keep; nothing has been sent."""


class Gateway:
    """Answers the three POST paths of the API, as an ASGI application."""

    def __init__(
        self,
        settings: ServeSettings,
        tiers: Sequence[Tier],
        metrics: Metrics,
        watchman: Watchman,
        sample: Sampler | None = None,
    ) -> None:
        self._settings = settings
        self._by_name: Mapping[str, Tier] = {name: tier for tier in tiers for name in tier.names}
        self._levels = frozenset(tier.spec.level.lower() for tier in tiers)
        alone = QUALITY in self._by_name and self._by_name[QUALITY] is self._by_name.get(SPEED)
        self._auto = AutoRule(fixed=QUALITY, because="one level serves everything") if alone else settings.auto
        self._metrics = metrics
        self._watchman = watchman
        self._sample = sample
        self._run_id = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._room = RequestMemory(settings.max_requests_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        began = time.monotonic()
        key = scope.get("state", {}).get("key", "")
        record = Record(f"{self._run_id}-{next(self._numbers)}", scope["path"], key=key)
        delivery = Delivery(send, record, began, self._settings.timeouts)
        try:
            if scope["method"] != "POST":
                raise Refused(405, f"{scope['path']} takes POST.", code="method_not_allowed", headers={"allow": "POST"})
            with self._watchman.watch() as watch, self._room.share(watch.cancel) as share:
                body = await self._body(scope, receive, watch, share)
                share.settle(held_bytes(body, count_values(body)))  # before it is parsed
                request = parse_request(scope["path"], body)
                watch.listen(scope, receive)
                await self._answer(scope, request, body, delivery, watch)
        except Refused as refused:
            let_go(refused)
            record.status = refused.status
            record.outcome = RequestOutcome.REFUSED if refused.status < 500 else RequestOutcome.ERROR
            await send_refusal(send, refused)
        except ClientGone as gone:
            let_go(gone)
            record.outcome = RequestOutcome.CLIENT_LEFT
        except Exception as error:
            log.exception("unexpected error", extra={"id": record.id})
            if record.first_s is not None:
                raise  # an answer has begun; closing its connection is the only way to say that it is not whole
            let_go(error)
            record.status = 500
            await send_refusal(send, Refused(500, "Something went wrong inside the gateway.", code="internal"))
        finally:
            record.total_s = time.monotonic() - began
            self._metrics.add(record)

    async def _body(self, scope: Scope, receive: Receive, watch: Watch, share: ClientShare) -> bytes:
        watch.phase("the body", BODY_S)
        try:
            body = await read_body(scope, receive, self._settings.body_limit, share)
        except asyncio.CancelledError:
            if (cause := watch.cause()) is None:
                raise
            if isinstance(cause, Refused):
                raise cause from None
            raise Refused(408, f"The body was not complete after {BODY_S:g} s.", code="body_too_slow") from cause
        if body is None:
            raise ClientGone
        return body

    async def _answer(self, scope: Scope, request: ModelRequest, body: bytes, delivery: Delivery, watch: Watch) -> None:
        record = delivery.record
        record.asked_for, record.stream = request.model, request.stream
        choice = self._choose(scope, request, record.key)
        record.kind, record.reason = choice.kind, choice.reason
        if self._settings.log_prompts:
            log.info("prompt", extra={"id": record.id, "asked": request.asked})
        attempts = self._attempts(choice, request)
        for attempt in attempts:
            _check_context(request, attempt.tier)
            role = choice.tier if choice.tier in _ROLES & set(attempt.tier.names) else attempt.tier.name
            headers = (*attempt.tier.headers, (b"x-bitladder-tier", role.encode()))
            try:
                await self._attempt(attempt, request, body, delivery, headers, watch, alone=attempt is attempts[-1])
                break
            except _NextAttempt as skipped:
                let_go(skipped)
                record.reason += f"; {skipped}"
        else:
            failed = "; ".join(record.failures)
            raise Refused(503, f"No tier could answer: {failed}.", code="upstream_failed", retry_after_s=2)
        wanted = record.tier == SPEED and record.outcome is RequestOutcome.COMPLETE and request.path == CHAT
        if self._sample and wanted and len(request.text) <= _MAX_SAMPLED:
            self._sample(request)

    def _choose(self, scope: Scope, request: ModelRequest, key: str) -> TierChoice:
        header, tags = "", ""
        for name, value in scope["headers"]:
            if name == b"x-bitladder-tier":
                header = value.decode("latin-1")
            elif name == b"x-bitladder-tag":
                tags = value.decode("latin-1")
        split = tuple(tag.strip() for tag in tags.split(",")[:_MAX_TAGS] if tag.strip())
        features = Features(request.model, header, split, key, request.path, lambda: request.asked)
        choice = choose(features, self._levels, self._settings.rules, self._auto)
        if choice is None or choice.tier not in self._by_name:
            names = ", ".join(sorted({"auto", *self._by_name}))
            asked = (header or request.model)[:80]
            raise Refused(404, f"No model '{asked}' is served here. There is: {names}.", code="model_not_found")
        return choice

    def _attempts(self, choice: TierChoice, request: ModelRequest) -> tuple[Attempt, ...]:
        """Whom to ask, in order."""
        tier = self._by_name[choice.tier]
        other = self._by_name.get(QUALITY if choice.tier == SPEED else SPEED, tier)
        if request.path == EMBEDDINGS or other is tier or not choice.may_fall_back:
            # Vectors of two levels must not meet in one index, so embeddings never change their tier.
            return (Attempt(tier),)
        if choice.escalate and self._settings.escalation is not None:
            return Attempt(tier, judged=True), Attempt(other), Attempt(tier)
        return Attempt(tier), Attempt(other)

    async def _attempt(
        self,
        attempt: Attempt,
        request: ModelRequest,
        body: bytes,
        delivery: Delivery,
        headers: Headers,
        watch: Watch,
        *,
        alone: bool,
    ) -> None:
        """Have this attempt's tier answer, its slot held until the answer is delivered.

        Raises:
            _NextAttempt: it gave no answer to keep, and nothing was sent.
        """
        tier, record = attempt.tier, delivery.record
        try:
            if not tier.usable and tier.engine is not None:
                await tier.engine.wait_ready(self._settings.timeouts.restart if alone else 0.0)
            async with tier.hold() as loaded:
                if loaded:
                    record.reason += f"; {tier.spec.level} was loaded for this"
                watch.phase("the first byte", self._settings.timeouts.first_byte)
                reply = await tier.complete(_upstream_request(attempt, request, body))
                try:
                    answer = await read_answer(
                        reply, tier.spec.served_name, stream=request.stream, secret=tier.spec.api_key
                    )
                    if attempt.judged:
                        answer = await self._judged(answer, request, record)
                    record.tier, record.level = tier.name, tier.spec.level
                    await delivery.deliver(answer, headers, watch)
                finally:
                    reply.close()
        except UpstreamFailed as failure:
            raise self._failed(record, tier, failure.phase, failure.found) from None
        except EngineError as error:
            raise self._failed(record, tier, "down", error.found) from None
        except asyncio.CancelledError:
            cause = watch.cause()
            if isinstance(cause, PhaseTimeout):
                raise self._failed(record, tier, "stalled", str(cause)) from None
            raise cause or asyncio.CancelledError from None

    async def _judged(self, answer: Relayed, request: ModelRequest, record: Record) -> Relayed:
        rule = self._settings.escalation
        assert rule is not None
        verdict = await judge(answer, rule, strip=not request.value("logprobs"))
        if isinstance(verdict, Relayed):
            return verdict
        record.escalated = True
        lowest, needed = math.exp(verdict.lowest), math.exp(rule.threshold)
        raise _NextAttempt(f"escalated: a token's probability was {lowest:.3f}, under {needed:.3f}")

    @staticmethod
    def _failed(record: Record, tier: Tier, phase: str, found: str) -> _NextAttempt:
        record.failures += (f"{tier.name}: {phase}",)
        log.warning("attempt failed", extra={"id": record.id, "tier": tier.name, "phase": phase, "found": found})
        return _NextAttempt(f"{tier.name} failed ({phase})")


def _check_context(request: ModelRequest, tier: Tier) -> None:
    """Refuse what cannot fit whatever its tokens are; what remains the engine counts exactly, before
    computing.
    """
    limit = tier.spec.n_ctx * LONGEST_TOKEN
    if limit and request.text_bytes > limit:
        found = f"The text has {request.text_bytes} bytes; a context of {tier.spec.n_ctx} holds at most {limit}."
        raise Refused(400, found, code="context_length_exceeded")


def _upstream_request(attempt: Attempt, request: ModelRequest, body: bytes) -> UpstreamRequest:
    values: dict[str, Any] = {}
    spec = attempt.tier.spec
    if spec.url is not None and request.model != spec.served_name:
        values["model"] = spec.served_name
    if attempt.judged and not request.value("logprobs"):
        values["logprobs"] = True if request.path == CHAT else 1
    return UpstreamRequest(request.path, request.with_values(values) if values else body, request.stream)
