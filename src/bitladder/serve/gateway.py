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
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.types import Receive, Scope, Send

from bitladder.errors import EngineError
from bitladder.serve.backends import PHASES, UpstreamFailed, UpstreamRequest
from bitladder.serve.delivery import Delivery, Headers
from bitladder.serve.legacy_logprobs import in_own_shape
from bitladder.serve.limits import BODY_S, ClientShare, RequestMemory, held_bytes, let_go, read_body, send_refusal
from bitladder.serve.metrics import Metrics, Record, RequestOutcome
from bitladder.serve.protocol import (
    CHAT,
    COUNT_TOKENS,
    EMBEDDINGS,
    RERANK,
    ModelRequest,
    Refused,
    count_values,
    header_text,
    parse_request,
)
from bitladder.serve.relay import Relayed, judge, read_answer
from bitladder.serve.replicas import MOST_SENT, Replica, ReplicaSet, affinity_key
from bitladder.serve.rewording import TRANSLATED, as_chat, worded_for
from bitladder.serve.router import AUTO, QUALITY, SPEED, AutoRule, Features, Routing, TierChoice, choose
from bitladder.serve.settings import LONGEST_TOKEN, TASK_OPTIONS, ServeSettings
from bitladder.serve.tiers import Tier
from bitladder.serve.tool_choice import tool_values, with_calls
from bitladder.serve.watch import ClientGone, PhaseTimeout, Watch, Watchman
from bitladder.units import MiB

log = logging.getLogger("bitladder.serve")

_MAX_TAGS = 16
_MAX_SAMPLED = 1 * MiB
_ROLES = {QUALITY, SPEED}
_OF_ONE_TIER = (EMBEDDINGS, RERANK, COUNT_TOKENS)
_SELDOM_SPOKEN = (RERANK, COUNT_TOKENS)
_BUSY = 429
_UNKNOWN_PATH = (404, 405, 501)
"""Statuses of servers that do not know a path."""

Sampler = Callable[[ModelRequest], None]


class Attempt(NamedTuple):
    """A tier to ask, and whether its answer is judged by its token probabilities."""

    tier: Tier
    judged: bool = False


class _Try(NamedTuple):
    """A replica to ask for an attempt."""

    attempt: Attempt
    replicas: ReplicaSet
    """That it is one of."""
    replica: Replica
    last: bool
    """Whether no other replica would be asked after it."""


class _NextAttempt(Exception):
    """This attempt gave no answer to keep; nothing has been sent."""


class _NotSpoken(Exception):
    """The upstream does not know the path that it was asked."""


@dataclass
class _Task:
    """A request, and everything that its answer goes through."""

    request: ModelRequest
    body: bytes
    delivery: Delivery
    watch: Watch
    share: ClientShare
    chat: ModelRequest | None = None
    """The request in chat completions, where it came so or had to be worded so."""

    def __post_init__(self) -> None:
        if self.request.path == CHAT:
            self.chat = self.request

    def as_chat(self) -> ModelRequest:
        """The request in the words of chat completions.

        Raises:
            Refused: it cannot be said there, or there is no memory for it.
        """
        if self.chat is None:
            chat = as_chat(self.request)
            text = chat.text.encode()
            self.share.grow_to(self.share.size + held_bytes(text, count_values(text)))
            self.chat = chat
        return self.chat


class Gateway:
    """Answers the POST paths of the API, as an ASGI application."""

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
        self._levels = frozenset(self._by_name) - _ROLES
        self._of_its_own = {tier.spec.task: tier.spec.level.lower() for tier in tiers if tier.spec.task}
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
                await self._answer(scope, _Task(request, body, delivery, watch, share))
        except Refused as refused:
            let_go(refused)
            record.status = refused.status
            record.outcome = RequestOutcome.REFUSED if refused.status < 500 else RequestOutcome.ERROR
            await send_refusal(send, refused, scope["path"])
        except ClientGone as gone:
            let_go(gone)
            record.outcome = RequestOutcome.CLIENT_LEFT
        except Exception as error:
            log.exception("unexpected error", extra={"id": record.id})
            if record.first_s is not None:
                raise  # an answer has begun; closing its connection is the only way to say that it is not whole
            let_go(error)
            record.status = 500
            internal = Refused(500, "Something went wrong inside the gateway.", code="internal")
            await send_refusal(send, internal, scope["path"])
        finally:
            record.total_s = time.monotonic() - began
            self._metrics.add(record)
            tier = self._by_name.get(record.tier)
            if tier is not None and tier.guessing is not None and record.outcome is RequestOutcome.COMPLETE:
                tier.guessing.saw(
                    record.tokens, record.tokens_per_s, record.work, guessing=record.guessing, told=record.guesses
                )

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

    async def _answer(self, scope: Scope, task: _Task) -> None:
        record, request = task.delivery.record, task.request
        record.asked_for, record.stream = request.model, request.stream
        choice = self._choose(scope, request, record)
        record.kind, record.reason = choice.kind, choice.reason
        record.work = record.tags or ((choice.tag,) if choice.tag else ())
        if self._settings.log_prompts:
            log.info("prompt", extra={"id": record.id, "asked": request.asked})
        attempts = self._attempts(choice, request)
        for attempt in attempts:
            check_offered(request, attempt.tier)
            _check_context(request, attempt.tier)
            role = choice.tier if choice.tier in _ROLES & set(attempt.tier.names) else attempt.tier.name
            headers = (*attempt.tier.headers, (b"x-bitladder-tier", role.encode()))
            try:
                await self._attempt(attempt, task, headers, alone=attempt is attempts[-1])
                break
            except _NextAttempt as skipped:
                let_go(skipped)
                record.reason += f"; {skipped}"
        else:
            failed = "; ".join(record.failures)
            raise Refused(503, f"No tier could answer: {failed}.", code="upstream_failed", retry_after_s=2)
        wanted = record.tier == SPEED and record.outcome is RequestOutcome.COMPLETE
        if self._sample and wanted and task.chat is not None and len(task.chat.text) <= _MAX_SAMPLED:
            self._sample(task.chat)

    def _choose(self, scope: Scope, request: ModelRequest, record: Record) -> TierChoice:
        header, tags = "", ""
        for name, value in scope["headers"]:
            if name == b"x-bitladder-tier":
                header = value.decode("latin-1")
            elif name == b"x-bitladder-tag":
                tags = value.decode("latin-1")
        split = record.tags = tuple(tag.strip() for tag in tags.split(",")[:_MAX_TAGS] if tag.strip())
        tools = bool(request.value("tools"))
        features = Features(request.model, header, split, record.key, request.path, lambda: request.asked, tools)
        if request.path in self._of_its_own and request.model.lower() == AUTO and not header:
            return TierChoice(self._of_its_own[request.path], "the only tier for this", Routing.LEVEL)
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
        if request.path in _OF_ONE_TIER or other is tier or not choice.may_fall_back:
            # Vectors of two levels must not meet in one index, so embeddings never change their tier.
            return (Attempt(tier),)
        if choice.escalate and self._settings.escalation is not None:
            return Attempt(tier, judged=True), Attempt(other), Attempt(tier)
        return Attempt(tier), Attempt(other)

    async def _attempt(self, attempt: Attempt, task: _Task, headers: Headers, *, alone: bool) -> None:
        """Have this attempt's tier answer, its slot held until the answer is delivered.

        Raises:
            _NextAttempt: it gave no answer to keep, and nothing was sent.
        """
        tier, record, watch = attempt.tier, task.delivery.record, task.watch
        try:
            if not tier.usable and tier.engine is not None:
                await tier.engine.wait_ready(self._settings.timeouts.restart if alone else 0.0)
            async with tier.hold() as loaded:
                if loaded:
                    record.reason += f"; {tier.spec.level} was loaded for this"
                await self._ask_replicas(attempt, task, headers)
        except UpstreamFailed as failure:
            raise self._failed(record, tier, failure.phase, failure.found) from None
        except EngineError as error:
            raise self._failed(record, tier, "down", error.found) from None
        except asyncio.CancelledError:
            cause = watch.cause()
            if isinstance(cause, PhaseTimeout):
                raise self._failed(record, tier, "stalled", str(cause)) from None
            raise cause or asyncio.CancelledError from None

    async def _ask_replicas(self, attempt: Attempt, task: _Task, headers: Headers) -> None:
        """Have one replica of the tier after another try, until one answers.

        A request that was sent and failed may be what makes them fail, so it is sent to `MOST_SENT` at most; those that
        could not be connected to never saw it.

        Raises:
            UpstreamFailed: none of them did.
        """
        record = task.delivery.record
        replicas, record.guessing = attempt.tier.answering(record.work)
        key = affinity_key(task.request) if replicas.several else b""
        tried: frozenset[str] = frozenset()
        sent = 0
        while True:
            replica = replicas.choose(key, tried)
            assert replica is not None  # the last one's failure is raised
            tried |= {replica.name}
            last = sent + 1 >= MOST_SENT or not replicas.others(tried)
            try:
                with replicas.asking(replica, task.watch):
                    await self._ask_replica(_Try(attempt, replicas, replica, last), task, headers)
                return
            except UpstreamFailed as failure:
                replicas.failed(replica, failure)
                sent += failure.phase != "connect"
                if sent >= MOST_SENT or not replicas.others(tried):
                    raise
                record.retries += (f"{replica.name}: {failure.phase}",)
                record.reason += f"; {replica.name} failed ({failure.phase})"
                let_go(failure)

    async def _ask_replica(self, one: _Try, task: _Task, headers: Headers) -> None:
        """Have this replica answer, in the words that it understands.

        Raises:
            UpstreamFailed: it gave no answer to keep, and nothing was sent.
        """
        tier, path, watch = one.attempt.tier, task.request.path, task.watch
        watch.phase("the first byte", self._settings.timeouts.first_byte)
        try:
            if tier.speaks(path) and not (one.attempt.judged and path in TRANSLATED):
                try:
                    await self._exchange(one, task.request, task, headers)
                    return
                except _NotSpoken as unknown:
                    let_go(unknown)
                    tier.unspoken.add(path)
            await self._exchange(one, task.as_chat(), task, headers)
        except asyncio.CancelledError:
            cause = watch.cause()
            if isinstance(cause, PhaseTimeout):
                if task.delivery.record.first_s is not None:
                    raise ClientGone from None  # it takes nothing of a document
                raise UpstreamFailed("stalled", str(cause)) from None
            raise cause or asyncio.CancelledError from None

    async def _exchange(self, one: _Try, asked: ModelRequest, task: _Task, headers: Headers) -> None:
        """Ask the upstream, in the client's words or in those of chat completions, and deliver its answer.

        Raises:
            _NotSpoken: it does not know the API that the client speaks, but may know chat completions.
        """
        attempt, replicas, replica, _ = one
        tier, record, request = attempt.tier, task.delivery.record, task.request
        body = task.body if asked is request else b""
        began = time.monotonic()
        reply = await replica.complete(_upstream_request(attempt, asked, body))
        try:
            if asked is request and reply.status in _UNKNOWN_PATH:
                if request.path in TRANSLATED:
                    raise _NotSpoken
                if request.path in _SELDOM_SPOKEN:
                    found = f"What answers for {tier.spec.level} does not know {request.path}."
                    raise Refused(501, found, code="not_supported")
            answer = await read_answer(
                reply,
                tier.spec.served_name,
                stream=request.stream,
                secret=replica.secret,
                path=asked.path,
                client_path=request.path,
            )
            if answer.status == _BUSY and not one.last:
                raise UpstreamFailed("busy", "The upstream has too many requests.")
            if attempt.judged:
                answer = await self._judged(answer, asked, record)
            answer = in_own_shape(with_calls(answer, asked, tier), asked)
            if asked is not request:
                answer = worded_for(request, answer)
            record.tier, record.level = tier.name, tier.spec.level
            replicas.answers(replica, task.watch, time.monotonic() - began)
            if replicas.several:
                record.replica = replica.name
                headers = (*headers, (b"x-bitladder-replica", header_text(replica.name).encode()))
            await task.delivery.deliver(answer, headers, task.watch)
            if record.outcome is RequestOutcome.CUT:
                replicas.failed(replica, UpstreamFailed("broken", "It broke off in the middle of an answer."))
        finally:
            reply.close()

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
        return _NextAttempt(f"the {tier.name} tier {PHASES.get(phase, f'failed ({phase})')}")


def check_offered(request: ModelRequest, tier: Tier) -> None:
    """Refuse what this tier is not for.

    Raises:
        Refused: 501, vectors or ranks from a model that is served for text; 400, the reverse.
    """
    task, path = tier.spec.task, request.path
    if task and path != task:
        raise Refused(400, f"{tier.spec.level} is served for {task} alone.", code="unsupported")
    if not task and path in TASK_OPTIONS and tier.engine is not None:
        raise Refused(
            501,
            f"{tier.spec.level} is served for text. {path} needs a tier of its own: start `bitladder serve` with "
            f"{TASK_OPTIONS[path]} MODEL.",
            code="not_supported",
        )


def _check_context(request: ModelRequest, tier: Tier) -> None:
    """Refuse what cannot fit whatever its tokens are; what remains the engine counts exactly, before
    computing.
    """
    limit = tier.spec.n_ctx * LONGEST_TOKEN
    if limit and request.text_bytes > limit:
        found = f"The text has {request.text_bytes} bytes; a context of {tier.spec.n_ctx} holds at most {limit}."
        raise Refused(400, found, code="context_length_exceeded")


def _upstream_request(attempt: Attempt, request: ModelRequest, body: bytes) -> UpstreamRequest:
    """``body``: the request's, where it came from the client; it is sent as it came where nothing must differ."""
    values: dict[str, Any] = {}
    spec = attempt.tier.spec
    # llama.cpp answers as its alias, but to a request for vectors or ranks as whatever it was called there.
    if (spec.url is not None or spec.task) and request.model != spec.served_name:
        values["model"] = spec.served_name
    if attempt.judged and not request.value("logprobs"):
        values["logprobs"] = True if request.path == CHAT else 1
    if request.path == CHAT:
        values |= tool_values(request, attempt.tier)
    return UpstreamRequest(
        request.path, request.with_values(values) if values else body or request.text.encode(), request.stream
    )
