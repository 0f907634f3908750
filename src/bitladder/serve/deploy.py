"""From settings to running tiers: which engines to start, which share the memory, which upstream is which."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import random
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bitladder.engines.base import EngineKind, EngineTask, Launch, Running, TakesProjectors
from bitladder.engines.names import same_model
from bitladder.engines.network import proxy_for, tls_context
from bitladder.errors import EngineError
from bitladder.serve.aside import Aside
from bitladder.serve.backends import Complete, UpstreamFailed
from bitladder.serve.connections import ConnectionPool, HttpBackend
from bitladder.serve.discovery import Discovery, Resolve, resolve_name
from bitladder.serve.gateway import Gateway
from bitladder.serve.guessing import GuessTrial
from bitladder.serve.limits import Gate
from bitladder.serve.metrics import Metrics
from bitladder.serve.protocol import EMBEDDINGS, RERANK
from bitladder.serve.replicas import Replica, ReplicaSet
from bitladder.serve.router import QUALITY, SPEED
from bitladder.serve.settings import ServeSettings, TierSpec
from bitladder.serve.shadow import ShadowMode
from bitladder.serve.supervisor import EngineFingerprint, Supervisor, Turns
from bitladder.serve.tiers import Tier
from bitladder.serve.watch import Watchman
from bitladder.units import human_bytes

log = logging.getLogger("bitladder.serve")

TASKS = {"": EngineTask.TEXT, EMBEDDINGS: EngineTask.EMBEDDINGS, RERANK: EngineTask.RERANK}
"""What an engine is started for, by the only path that its tier answers."""
MakeEngine = Callable[[TierSpec, int], Running]
"""``make(spec, threads)``: an engine for a file, not yet started."""


def own_engine(spec: TierSpec, threads: int, kind: EngineKind | None = None) -> Running:
    """The engine of a tier, not yet started; ``kind``: what runs files; None, and for folders: what is registered."""
    from bitladder.engines.llama import with_cache, with_speculation
    from bitladder.engines.registry import container_of, prepare
    from bitladder.levels import Container

    assert spec.path is not None
    launch = Launch(
        spec.path,
        n_ctx=spec.n_ctx,
        n_parallel=spec.slots,
        threads=threads,
        alias=spec.served_name,
        api_key=spec.api_key,
        projector=spec.projector or "",
        task=TASKS[spec.task],
    )
    launch = with_speculation(with_cache(launch, spec.cache), spec.speculate)
    return prepare(launch, kind if container_of(spec.path) is Container.FILE else None)


@dataclass
class Deployment:
    """A gateway with everything it stands on, running."""

    settings: ServeSettings
    tiers: tuple[Tier, ...]
    metrics: Metrics
    gateway: Gateway
    shadow: ShadowMode | None
    notes: tuple[str, ...]
    """What the operator should know, a sentence each."""

    @property
    def ready(self) -> bool:
        """Whether every request that may be asked for has something to answer it."""
        return all(tier.usable for tier in self.tiers if tier.name in (QUALITY, SPEED))


def specs_by_role(settings: ServeSettings) -> list[tuple[tuple[str, ...], TierSpec]]:
    """The levels to serve, each with the names that mean it."""
    quality, speed = settings.quality, settings.speed
    if speed is None or speed == quality:
        roles: list[tuple[tuple[str, ...], TierSpec]] = [((QUALITY, SPEED, quality.level.lower()), quality)]
    else:
        roles = [((QUALITY, quality.level.lower()), quality), ((SPEED, speed.level.lower()), speed)]
    return roles + [(_names_of(spec), spec) for spec in settings.extra]


def _names_of(spec: TierSpec) -> tuple[str, ...]:
    """A level's name, after that of its task where it has one."""
    return (*([TASKS[spec.task].value] if spec.task else []), spec.level.lower())


def must_take_turns(specs: list[TierSpec], budget_bytes: int) -> bool:
    """Whether the files that we run do not fit in memory together."""
    own = [spec for spec in specs if spec.path is not None]
    return len(own) > 1 and budget_bytes > 0 and sum(spec.memory_bytes for spec in own) > budget_bytes


def has_room_again(specs: Sequence[TierSpec], spec: TierSpec, budget_bytes: int) -> bool:
    """Whether a tier that guesses, and every other that does, could run a second time beside all that runs."""
    own = [one for one in specs if one.path is not None]
    twice = [one for one in own if one.speculate is not None]
    return spec in twice and (budget_bytes == 0 or sum(one.memory_bytes for one in [*own, *twice]) <= budget_bytes)


@contextlib.asynccontextmanager
async def deployed(
    settings: ServeSettings,
    *,
    make_engine: MakeEngine | None = None,
    upstreams: Mapping[str, Complete] | None = None,
    resolve: Resolve = resolve_name,
) -> AsyncIterator[Deployment]:
    """Start everything, and stop it at the end.

    ``make_engine`` and ``upstreams`` replace the engines, and the upstream of a level by a function, ``resolve`` the
    system's resolver of names; a test hands in its own.

    Raises:
        EngineError: an engine does not start, or an endpoint serves another model.
    """
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(ConnectionPool(settings.timeouts.connect))
        roles: list[tuple[tuple[str, ...], TierSpec]] = []
        notes: list[str] = []
        for names, spec in specs_by_role(settings):
            if spec.url is not None and spec.level not in (upstreams or {}):
                spec, said = await _known_replicas(pool, spec)  # noqa: PLW2901 - the same level, its model known
                notes += said
            roles.append((names, spec))
        specs = [spec for _, spec in roles]
        turns = Turns() if must_take_turns(specs, settings.memory_budget_bytes) else None
        found = {spec.level: Discovery(spec, pool, settings.timeouts, resolve) for spec in specs if spec.url}
        looked_after = {level: one for level, one in found.items() if one.needed and level not in (upstreams or {})}
        addresses = {level: await discovery.start() for level, discovery in looked_after.items()}
        tiers = tuple(
            _tier(
                names,
                spec,
                settings=settings,
                pool=pool,
                make_engine=make_engine or functools.partial(own_engine, kind=settings.program),
                turns=turns,
                upstream=(upstreams or {}).get(spec.level),
                replicas=addresses.get(spec.level),
                room_again=has_room_again(specs, spec, settings.memory_budget_bytes),
            )
            for names, spec in roles
        )
        metrics, watchman = Metrics(), Watchman()
        shadow = _shadow(settings, tiers, metrics)
        gateway = Gateway(settings, tiers, metrics, watchman, shadow.sample if shadow else None)
        stack.push_async_callback(_stop, tiers)
        notes += _notes(settings, specs, turns)
        for spec in specs:
            if spec.note:
                log.warning(
                    spec.note, extra={"level": spec.level, "file_sha256": spec.sha256, "evidence": spec.standing}
                )
        for tier in tiers:
            if tier.engine is not None and turns is None:
                await tier.engine.start()
        kept = [discovery.run for discovery in looked_after.values()]
        kept += [tier.aside.keep for tier in tiers if tier.aside is not None]
        for work in (watchman.run, *kept, *([shadow.run] if shadow else [])):
            task = asyncio.create_task(work())
            stack.push_async_callback(_cancel, task)
        yield Deployment(settings, tiers, metrics, gateway, shadow, tuple(notes))


def _tier(
    names: tuple[str, ...],
    spec: TierSpec,
    *,
    settings: ServeSettings,
    pool: ConnectionPool,
    make_engine: MakeEngine,
    turns: Turns | None,
    upstream: Complete | None,
    replicas: ReplicaSet | None,
    room_again: bool,
) -> Tier:
    gate = Gate(spec.slots, settings.max_queue)
    if replicas is not None:
        return Tier(names, spec, replicas, gate)
    if upstream is not None:
        return Tier(names, spec, _alone(spec, upstream), gate)
    if spec.path is None:
        url = spec.url
        return Tier(names, spec, _alone(spec, HttpBackend(pool, lambda: url, spec.api_key).complete), gate)
    # Only the gateway may ask its engines: they listen on a port too, and check neither host nor origin.
    check_file = EngineFingerprint(spec.path).check
    spec = replace(spec, api_key=secrets.token_urlsafe(24))
    trial = GuessTrial() if spec.speculate and turns is None else None

    def supervised(name: str, making: _Making) -> Supervisor:
        return Supervisor(
            name,
            lambda: make_engine(making.begin(), settings.threads),
            pool,
            check_file=check_file,
            guesses_key=spec.api_key if spec.speculate else None,
            should_change=lambda: making.is_outdated and not (gate.running or gate.queued),
            on_ready=making.done,
        )

    def upstream_of(engine: Supervisor) -> ReplicaSet:
        return _alone(spec, HttpBackend(pool, engine.address, spec.api_key).complete)

    engine = supervised(names[0], _Making(spec, trial))
    tier = Tier(names, spec, upstream_of(engine), gate, engine, turns, trial)
    if trial is not None and room_again:
        second = supervised(f"{names[0]}, second engine", _Aside(spec, trial))
        tier.aside = Aside(trial, second, upstream_of(second))
    return tier


@dataclass
class _Making:
    """What an engine is made of: its tier's spec, with guesses or, where the trial wants none, without."""

    spec: TierSpec
    trial: GuessTrial | None
    guessing: bool = True

    @property
    def wanted(self) -> bool:
        """Whether it should guess."""
        return self.trial is None or self.trial.wanted

    def begin(self) -> TierSpec:
        """What is made now."""
        self.guessing = self.wanted
        return self.spec if self.guessing else replace(self.spec, speculate=None)

    def done(self, load_seconds: float) -> None:
        """It runs."""
        if self.trial is not None:
            self.trial.runs(guessing=self.guessing, load_seconds=load_seconds)

    @property
    def is_outdated(self) -> bool:
        """Whether another one should run, and may be started."""
        return self.trial is not None and self.trial.allowed and self.wanted is not self.guessing


class _Aside(_Making):
    """The same of a tier's second engine, which goes the other way than the tier does between trials."""

    @property
    def wanted(self) -> bool:
        """Whether it should guess."""
        return self.trial is not None and not self.trial.usual

    def done(self, load_seconds: float) -> None:
        """It runs, which is nothing to the trial."""


def _alone(spec: TierSpec, complete: Complete) -> ReplicaSet:
    """The only one that answers for a tier."""
    return ReplicaSet([Replica(spec.level, complete, spec.api_key)])


def _shadow(settings: ServeSettings, tiers: tuple[Tier, ...], metrics: Metrics) -> ShadowMode | None:
    by_name = {tier.name: tier for tier in tiers}
    if settings.shadow.share == 0 or SPEED not in by_name:
        return None
    return ShadowMode(settings.shadow, by_name[QUALITY], by_name[SPEED], metrics, random.Random())


def _notes(settings: ServeSettings, specs: list[TierSpec], turns: Turns | None) -> list[str]:
    notes = [spec.note for spec in specs if spec.note]
    notes += [_projector_note(spec, settings) for spec in specs if spec.projector]
    if turns is not None:
        needed = human_bytes(sum(spec.memory_bytes for spec in specs if spec.path is not None))
        notes.append(
            f"The levels need {needed} together and {human_bytes(settings.memory_budget_bytes)} are allowed: "
            "they take turns in memory, and each change costs a model load."
        )
    if settings.speed not in (None, settings.quality) and (settings.auto.fixed or not settings.auto.tags):
        target = settings.auto.fixed or QUALITY
        notes.append(f"The model name 'auto' uses the {target} tier for everything: {settings.auto.because}.")
    return notes


def _projector_note(spec: TierSpec, settings: ServeSettings) -> str:
    assert spec.projector is not None
    program = settings.program
    if isinstance(program, TakesProjectors) and not program.takes_projectors:
        return f"{spec.level} is served without {spec.projector.name}: this engine takes in no pictures or sounds."
    return f"{spec.level} takes in pictures or sounds, too ({spec.projector.name}); none of that was measured."


async def _known_replicas(pool: ConnectionPool, spec: TierSpec) -> tuple[TierSpec, list[str]]:
    """As `_known_endpoint`, asked of every address: all must serve the same model.

    Raises:
        EngineError, UsageError: as there.
    """
    notes: list[str] = []
    for one in spec.keyed:
        known, said = await _known_endpoint(pool, replace(spec, url=one.url, api_key=one.api_key, replicas=()))
        spec = replace(spec, model=known.model)
        notes += said
    return spec, notes


async def _known_endpoint(pool: ConnectionPool, spec: TierSpec) -> tuple[TierSpec, list[str]]:
    """The endpoint's spec with the name of its model, checked against what it lists; and what remains to be said.

    Raises:
        EngineError: it lists its models without ours, or several when none was named.
        UsageError: the environment names a proxy or certificates that cannot be used.
    """
    base_url, path = spec.url or "", "/models"
    proxy_for(base_url)
    if base_url.startswith("https:"):
        tls_context()
    url = base_url + path
    headers = {"authorization": f"Bearer {spec.api_key}"} if spec.api_key else {}
    try:
        status, body = await pool.get(base_url, path, 5.0, headers)
        listed = json.loads(body) if status == 200 else None
    except (UpstreamFailed, TimeoutError, ValueError, RecursionError) as error:
        return spec, [f"{url} does not list its models yet: {str(error).rstrip('.') or type(error).__name__}."]
    data = listed.get("data") if isinstance(listed, dict) else None
    names = [str(item.get("id")) for item in data if isinstance(item, dict)] if isinstance(data, list) else []
    if not names:
        return spec, [f"{url} lists no models; replies will be checked for the name '{spec.served_name}'."]
    if any(same_model(spec.served_name, name) for name in names):
        return spec, []
    if not spec.model and len(names) == 1:
        return replace(spec, model=names[0]), []
    shown = ", ".join(names[:8])
    raise EngineError(
        f"{url} serves {shown}, and not '{spec.served_name}'.",
        means="The level would be answered by another model." if spec.model else "It is not clear which one is meant.",
        do="Give the name that the endpoint uses, as in http://host:8000#name.",
    )


async def _stop(tiers: tuple[Tier, ...]) -> None:
    asides = [tier.aside.engine for tier in tiers if tier.aside is not None]
    engines = [tier.engine for tier in tiers if tier.engine is not None]
    await asyncio.gather(*(engine.stop() for engine in (*engines, *asides)))


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
