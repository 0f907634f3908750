"""The verb that puts levels to work: two tiers behind one endpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitladder.cli.build import ALL_CORES, Context, Threads, working
from bitladder.cli.completion import level_names, model_names
from bitladder.cli.grouped import grouped
from bitladder.cli.options import KeyFiles, KeyNames, endpoint_named
from bitladder.cli.settings_file import options_from
from bitladder.cli.terminal import say, verb
from bitladder.errors import BadInput, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitladder.describe.cache_types import CacheTypes
    from bitladder.engines.endpoint import EndpointSettings
    from bitladder.progress import Progress
    from bitladder.serve.deploy import Deployment
    from bitladder.serve.settings import ServeSettings, TierSpec
    from bitladder.stages.job import Work
    from bitladder.stages.measured_levels import LatestRun, TierFile


AUTO_ENGINE = "auto"
NO_GUESSES = "none"
_TIER = (
    "A level or a GGUF file, with its KV cache as in Q4_K_M+q8_0, or URL[#MODEL]; repeat it with more URLs of the same "
    "model for replicas."
)
_ENDPOINT_SLOTS = 64  # requests at once to an endpoint, which has a queue of its own

TierModel = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="What levels are levels of: a GGUF file, a checkpoint folder, hf:org/name[@revision], or smollm2-135m. "
        "Not needed when every tier is a file or an endpoint.",
        autocompletion=model_names,
    ),
]


@dataclass(kw_only=True)
class TierOptions:
    """Which two tiers a deployment has."""

    model: TierModel = None
    quality: Annotated[list[str] | None, typer.Option("--quality", help=_TIER, autocompletion=level_names)] = None
    speed: Annotated[list[str] | None, typer.Option("--speed", help=_TIER, autocompletion=level_names)] = None
    name: Annotated[
        str | None, typer.Option("--name", help="What the deployment is called.", show_default="the model's name")
    ] = None
    key_env: KeyNames = None
    key_file: KeyFiles = None
    ctx: Context = None
    kv: Annotated[
        str | None,
        typer.Option("--kv", metavar="TYPE", help="Type of the KV cache of tiers that name none.", show_default="f16"),
    ] = None
    speculate: Annotated[
        list[str] | None,
        typer.Option(
            "--speculate",
            metavar="[TIER=]ngram|mtp|draft:FILE|auto|none",
            help="Guess tokens ahead; auto: where it was measured to pay. Without: as the run decided. Repeatable.",
        ),
    ] = None
    threads: Threads = ALL_CORES
    api_key_file: Annotated[Path | None, typer.Option("--api-key-file", help="Keys that clients need.")] = None

    def endpoint(self, address: str) -> EndpointSettings:
        """The model behind an address, with the place of its key."""
        return endpoint_named(address, self.key_env, key_files=self.key_file)


@dataclass(kw_only=True)
class ServeOptions(TierOptions):
    """What ``serve`` is asked."""

    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes any free one.")] = 8077
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1"
    processes: Annotated[
        int, typer.Option("--processes", min=1, max=64, help="Gateway processes behind the port, before endpoints.")
    ] = 1
    shadow: Annotated[
        float, typer.Option("--shadow", min=0.0, max=1.0, help="Share of speed-tier requests to check.")
    ] = 0.0
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", help="TIER:tag=T,key=K,path=P for `auto`; repeatable, first match wins."),
    ] = None
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A name that clients call this machine by; repeatable.")
    ] = None
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="Listen on other addresses than loopback without keys.")
    ] = False
    slots: Annotated[
        int | None,
        typer.Option("--slots", min=1, max=256, help="Requests each tier computes at once.", show_default="what fits"),
    ] = None
    embeddings: Annotated[
        list[str] | None,
        typer.Option("--embeddings", help="What answers /v1/embeddings: a GGUF file, or URL[#MODEL]; repeatable."),
    ] = None
    rerank: Annotated[
        list[str] | None,
        typer.Option("--rerank", help="What answers /v1/rerank: a reranker's GGUF file, or URL[#MODEL]; repeatable."),
    ] = None
    engine: Annotated[
        str, typer.Option("--engine", help="built-in, a llama-server's path, or auto: one on the PATH if it will do.")
    ] = AUTO_ENGINE
    out: Annotated[Path | None, typer.Option("--out", help="Folder for levels that must be built.")] = None
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", is_eager=True, callback=options_from,
            help="YAML with these options by their names; the command line goes before it.",
        ),
    ] = None  # fmt: skip


@verb
@grouped
def serve(options: ServeOptions) -> None:
    """Serve a quality tier and a speed tier behind one OpenAI-compatible endpoint.

    Without --quality and --speed the tiers of the latest `bitladder run` of this model are taken; a file that no run
    knows, or an address, is served by itself.
    """
    from dataclasses import replace

    from bitladder.engines.llama_program import chosen_program
    from bitladder.serve.app import serve as serve_settings
    from bitladder.serve.deploy import specs_by_role
    from bitladder.serve.limits import read_keys
    from bitladder.serve.router import parse_rule
    from bitladder.stages.serve import check_template

    program, why = chosen_program(options.engine)
    if why:
        say(why)
    if options.api_key_file is not None:
        read_keys(options.api_key_file)  # one that cannot be used is refused before engines are started
    rules = tuple(parse_rule(text) for text in options.rule or ())
    with working(options.threads) as work:
        of_tasks = _checked_tasks(options)
        settings = tiers_of(options, work, slots=options.slots, out=options.out, with_keys=True)
        settings = _with_tasks(options, settings, of_tasks, work)
    settings = replace(
        settings,
        host=options.host,
        port=options.port,
        processes=options.processes,
        api_key_file=options.api_key_file,
        shadow=replace(settings.shadow, share=options.shadow),
        rules=rules,
        allowed_hosts=tuple(options.allow_host or ()),
        open_to_all=options.open_to_all,
        program=program,
    )
    for path in {spec.path for _, spec in specs_by_role(settings) if spec.path is not None and spec.path.is_file()}:
        check_template(path)
    serve_settings(settings, on_ready=_ready)


def _checked_tasks(options: ServeOptions) -> dict[str, tuple[str, ...]]:
    """What answers each path that text tiers do not; what cannot is refused here, before anything is built."""
    from bitladder.engines.address import is_address
    from bitladder.serve.protocol import EMBEDDINGS, RERANK
    from bitladder.stages.serve import check_reranker, is_level

    found = {EMBEDDINGS: _places("--embeddings", options.embeddings), RERANK: _places("--rerank", options.rerank)}
    for path, places in found.items():
        for what in places:
            if is_address(what):
                options.endpoint(what).read_key()
            elif is_level(what):
                raise UsageError(f"'{what}' is no file and no address.", do="Give a GGUF file, or URL#MODEL.")
            elif path == RERANK:
                check_reranker(Path(what))
    return {path: places for path, places in found.items() if places}


def _places(option: str, given: list[str] | None) -> tuple[str, ...]:
    """What answers for a tier: one level or file, or addresses of one model.

    Raises:
        UsageError: several that are not all addresses, or of models with different names.
    """
    from bitladder.engines.address import is_address, split_address

    places = tuple(dict.fromkeys(given or ()))
    if len(places) < 2:
        return places
    wrong = next((what for what in places if not is_address(what)), None)
    if wrong is not None:
        raise UsageError(
            f"{option} is given {len(places)} times, and '{wrong}' is no address.",
            means="Replicas of a tier are addresses that answer for the same model.",
            do="Give one level or file, or addresses alone.",
        )
    models = sorted({split_address(what)[1] for what in places})
    if len(models) > 1:
        raise UsageError(
            f"The addresses of {option} name different models: {', '.join(name or 'none' for name in models)}.",
            means="Whoever asks for a level must get it, whichever replica answers.",
            do="Name the same model behind each #, or leave all of them out.",
        )
    return places


def _with_tasks(
    options: ServeOptions, settings: ServeSettings, of_tasks: dict[str, tuple[str, ...]], work: Work
) -> ServeSettings:
    """The settings with a tier for each path that text tiers do not answer."""
    from dataclasses import replace

    from bitladder.engines.address import is_address
    from bitladder.serve.settings import TASK_OPTIONS
    from bitladder.stages.measured_levels import tier_file
    from bitladder.stages.serve import tier_context

    taken = {spec.level.lower() for spec in (settings.quality, *([settings.speed] if settings.speed else []))}
    extra = []
    for path, places in of_tasks.items():
        if is_address(places[0]):
            spec = _endpoint_tier(options, places, with_keys=True)
        else:
            n_ctx = tier_context("", places[0], None, work.progress)
            spec = _file_tier(tier_file("", places[0], None, n_ctx=n_ctx, work=work), n_ctx)
        level = (
            spec.level if spec.level.lower() not in taken else f"{spec.level}@{TASK_OPTIONS[path].removeprefix('--')}"
        )
        taken.add(level.lower())
        extra.append(replace(spec, level=level, task=path, projector=None))
    return replace(settings, extra=(*settings.extra, *extra))


def _ready(address: str, deployment: Deployment) -> None:
    say(f"Serving {deployment.settings.name} at {address}/v1 (models: quality, speed, auto), page at {address}/")
    for note in deployment.notes:
        say(note)


def tiers_of(
    options: TierOptions, work: Work, *, slots: int | None = None, out: Path | None = None, with_keys: bool = False
) -> ServeSettings:
    """Tiers from the options, or from the latest run of the model with what its evidence says about routing.

    ``slots``: requests that each tier computes at once; None for as many as fit. ``with_keys``: read the keys of
    endpoints, which an export only names.
    """
    from bitladder.engines.address import is_address
    from bitladder.files.probe import probe_machine
    from bitladder.plan.placement import usable_ram, usable_vram
    from bitladder.serve.settings import ServeSettings, with_distinct_names
    from bitladder.stages.measured_levels import tier_file

    model = options.model
    quality, speed = _places("--quality", options.quality), _places("--speed", options.speed)
    run = _run_of(model, [*quality, *speed], work.progress)
    itself = not quality and not speed and model is not None and _is_served_itself(model, run)
    if itself and model is not None:
        quality = (model,)
    elif not quality and not speed:
        if run is None or run.decision.quality is None:
            raise BadInput(
                f"There is no stored decision for {model} that names tiers.",
                means="`bitladder run` was not run on it here, or no level met its bar.",
                do="Run `bitladder run` first, or name the tiers with --quality and --speed: a level, a file, a URL.",
            )
        quality = (run.decision.quality,)
        speed = (run.decision.speed,) if run.decision.speed else ()
    if run is not None:
        say(f"{run.sentence} The model is served as it is." if itself else run.sentence)
    wanted = list(dict.fromkeys(places for places in (quality, speed) if places))
    # All that can be refused is refused before the first level is built.
    guesses = _guesses(options)
    parts = [_with_usual_cache(options, places) for places in wanted]
    contexts = [_checked(options, places, cache, work.progress, with_keys=with_keys) for places, cache in parts]
    specs = [
        _endpoint_tier(options, places, with_keys=with_keys)
        if is_address(places[0])
        else _file_tier(
            tier_file(model or "", places[0], run, n_ctx=n_ctx, out=out, work=work, cache=cache), n_ctx, cache
        )
        for (places, cache), n_ctx in zip(parts, contexts, strict=True)
    ]
    names = ["quality", "speed"] if quality or len(specs) > 1 else ["speed"]
    specs = [
        _with_guesses(spec, guesses.get(name, guesses.get("", "")), work, run)
        for spec, name in zip(specs, names, strict=False)
    ]
    machine = probe_machine()
    budget = usable_ram(machine) + usable_vram(machine)
    tiers = _with_slots(with_distinct_names(specs), budget, slots)
    settings = ServeSettings(
        quality=tiers[0],
        speed=tiers[1] if len(tiers) > 1 else None,
        threads=work.threads,
        memory_budget_bytes=budget,
        run_json=run.path if run and run.record else None,
        name=options.name
        or (run.record.source.name if run and run.record else _named(model) if model else specs[0].level),
    )
    return _routed(settings, run)


def _named(model: str) -> str:
    """What a deployment of a model is called: after its file or folder, or the model behind an address."""
    from bitladder.engines.address import is_address, split_address

    if not is_address(model):
        return Path(model).stem
    base, name = split_address(model)
    return name or base.partition("://")[2].partition("/")[0]


def _is_served_itself(model: str, run: LatestRun | None) -> bool:
    """Whether MODEL is a file that no run has chosen tiers of, or an address: one tier that serves everything."""
    from bitladder.engines.address import is_address

    decided = run is not None and run.decision.quality is not None
    return is_address(model) or (not decided and Path(model).is_file())


def _name(model: str | None, run: LatestRun | None) -> str:
    """The model's, as the run knows it; empty where there is none."""
    return run.record.source.name if run and run.record else Path(model or "").stem


def _run_of(model: str | None, wanted: list[str], progress: Progress) -> LatestRun | None:
    """The latest run of MODEL; none where the tiers need no model and MODEL is left out, or is only a name for them.

    Raises:
        UsageError: MODEL is needed, and left out.
    """
    from bitladder.engines.address import is_address
    from bitladder.stages.measured_levels import latest_run
    from bitladder.stages.serve import is_level, is_only_a_name, split_tier

    levels = [what for what in wanted if is_level(split_tier(what)[0])]
    if model is not None and is_address(model):
        if levels:
            raise UsageError(f"'{levels[0]}' is a level, and an address has none.", do="Give addresses or files.")
        return None
    if model is None and (levels or not wanted):
        raise UsageError(
            f"No MODEL is named that '{levels[0]}' is a level of." if levels else "No MODEL is named.",
            do="Name it first, as in `bitladder serve MODEL --quality Q8_0`, or give files or URLs with --quality and "
            "--speed.",
        )
    if model is None or (wanted and not levels and is_only_a_name(model)):
        return None
    return latest_run(model, progress)


def _guesses(options: TierOptions) -> dict[str, str]:
    """What each tier guesses with, by its role; empty role: both. What is no way to guess is refused."""
    from bitladder.engines.speculation import parse_speculation

    found = {}
    for text in options.speculate or ():
        role, equals, words = text.partition("=")
        if not equals or role not in ("quality", "speed"):
            role, words = "", text
        if words not in (AUTO_ENGINE, NO_GUESSES):
            parse_speculation(words)
        found[role] = words
    return found


def _with_guesses(spec: TierSpec, words: str, work: Work, run: LatestRun | None) -> TierSpec:
    """The tier with guesses: those named; of ``auto`` those that were measured to pay on this machine; where nothing is
    named those of the run's decision, if it is about this very file and its draft is the same."""
    from dataclasses import replace

    from bitladder.engines.speculation import check_speculation, parse_speculation
    from bitladder.stages.speculate import known_to_pay, usable

    if spec.path is None or words == NO_GUESSES:
        return spec
    if words == AUTO_ENGINE:
        known = known_to_pay(spec.path, work.threads, spec.cache)
        what = f"guesses with {known}" if known else "does not guess: nothing that was measured surely pays"
        say(f"{spec.level} {what}.")
        return replace(spec, speculate=known)
    if words:
        speculation = parse_speculation(words)
        check_speculation(spec.path, speculation)
        return replace(spec, speculate=speculation)
    decided = next((one for one in run.decision.speculate if one.level == spec.level), None) if run else None
    if decided is None or run is None or not run.is_about(spec.level, spec.sha256):
        return spec
    still = usable(spec.path, decided.guesses, decided.draft_sha256)
    if still is None:
        say(f"{spec.level} does not guess: {decided.guesses}, which the run decided on, is not there any more.")
    else:
        say(f"{spec.level} guesses with {still}, as the run decided: {decided.ratio:.3g} times as fast there.")
    return replace(spec, speculate=still)


def _with_usual_cache(options: TierOptions, places: tuple[str, ...]) -> tuple[tuple[str, ...], CacheTypes]:
    """What a tier is of, and the KV cache that it names, else the one of all tiers; raises UsageError for no cache."""
    from bitladder.describe.cache_types import parse_cache
    from bitladder.stages.serve import split_tier

    usual = parse_cache(options.kv or "f16")
    what, cache = split_tier(places[0])
    return (what, *places[1:]), cache or usual


def _checked(
    options: TierOptions, places: tuple[str, ...], cache: CacheTypes, progress: Progress, *, with_keys: bool
) -> int:
    """The context of a tier, 0 for an endpoint; raises for what cannot be served."""
    from bitladder.engines.address import is_address
    from bitladder.stages.serve import tier_context

    if not is_address(places[0]):
        return tier_context(options.model or "", places[0], options.ctx, progress, cache)
    for endpoint in map(options.endpoint, places):
        if with_keys:
            endpoint.read_key()
    return 0


def _with_slots(specs: list[TierSpec], budget: int, slots: int | None) -> list[TierSpec]:
    """Tiers that know how many requests they compute at once, and the memory it takes. Endpoints stay as they are."""
    from dataclasses import replace

    from bitladder.stages.run_facts import MOST_SLOTS
    from bitladder.stages.serve import slots_that_fit

    asked = range(1, MOST_SLOTS + 1) if slots is None else (slots,)
    needs = {_deployed(spec): _memory(spec, asked) for spec in specs if spec.path is not None}
    fitting = dict(zip(needs, slots_that_fit(tuple(needs.values()), budget), strict=True))
    found = []
    for spec in specs:
        key = _deployed(spec)
        if key in needs:
            memory = needs[key][fitting[key] - 1]
            found.append(replace(spec, slots=slots or fitting[key], memory_bytes=memory))
        else:
            found.append(spec)
    return found


def _deployed(spec: TierSpec) -> tuple[object, ...]:
    """What tells a file as it is run from others in memory."""
    return spec.path, spec.cache, spec.speculate


def _memory(spec: TierSpec, slots: Sequence[int]) -> tuple[int, ...]:
    """Bytes of a file with its KV cache and its guesses, for every number of requests in ``slots``."""
    from bitladder.stages.serve import guess_bytes, memory_by_slots

    assert spec.path is not None
    own = memory_by_slots(spec.path, spec.n_ctx, slots, spec.cache)
    beside = guess_bytes(spec.path, spec.speculate, spec.n_ctx, slots)
    return tuple(map(sum, zip(own, beside, strict=True)))


def _routed(settings: ServeSettings, run: LatestRun | None) -> ServeSettings:
    """What `auto` does, derived from the run's evidence about these two tiers, where it is about these very files."""
    from dataclasses import replace

    import numpy as np

    from bitladder.serve.evidence import advise, agreement_bar, routed_inputs
    from bitladder.serve.settings import Escalation, Shadow

    record = run.record if run else None
    if run is None or record is None or settings.speed is None:
        return settings
    if not all(run.is_about(tier.level, tier.sha256) for tier in (settings.quality, settings.speed)):
        return settings
    answers = {one.level: one for one in record.answers}
    pair = (answers.get(settings.quality.level), answers.get(settings.speed.level))
    if pair[0] is None or pair[1] is None:
        return settings
    scores = {
        answer.input_id: min(token.logprob for token in answer.tokens) for answer in pair[1].answers if answer.tokens
    }
    advice = advise(routed_inputs(record.inputs, pair[0], pair[1], scores), np.random.default_rng(0))
    say(advice.sentence)
    escalation = Escalation(advice.threshold) if advice.rule.escalate and math.isfinite(advice.threshold) else None
    expected = Shadow(bar=agreement_bar(pair[0], pair[1]))
    return replace(settings, auto=advice.rule, escalation=escalation, shadow=expected)


def _endpoint_tier(options: TierOptions, addresses: tuple[str, ...], *, with_keys: bool) -> TierSpec:
    """A model behind an address, or several, as a tier."""
    from bitladder.serve.settings import ReplicaSpec, TierSpec

    endpoints = [options.endpoint(address) for address in addresses]
    keyed = [
        ReplicaSpec(
            endpoint.base_url,
            endpoint.read_key() if with_keys else "",
            endpoint.key_env,
            Path(endpoint.key_file) if endpoint.key_file else None,
        )
        for endpoint in endpoints
    ]
    first = keyed[0]
    return TierSpec(
        level=endpoints[0].model or endpoints[0].host,
        url=first.url,
        replicas=tuple(keyed[1:]),
        model=endpoints[0].model,
        api_key=first.api_key,
        key_env=first.key_env,
        key_file=first.key_file,
        slots=_ENDPOINT_SLOTS,
        n_ctx=0,
    )


def _file_tier(file: TierFile, n_ctx: int, cache: CacheTypes | None = None) -> TierSpec:
    """A level's file as a tier: the measured file where it is, built when it is nowhere."""
    from bitladder.describe.cache_types import F16_CACHE
    from bitladder.serve.settings import TierSpec

    return TierSpec(
        level=file.level, path=file.path, sha256=file.sha256, standing=file.standing, note=file.note,
        n_ctx=n_ctx, memory_bytes=file.memory_bytes, projector=file.projector,
        cache=cache or F16_CACHE,
    )  # fmt: skip


def add_to(app: typer.Typer) -> None:
    """Register this module's verb."""
    app.command()(serve)
