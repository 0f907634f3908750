"""The options of a run, spelled once for the verbs that make one."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitladder.cli.build import (
    Context,
    EffortName,
    Importance,
    Levels,
    WorkOptions,
    effort_named,
    known_device,
    split_levels,
)
from bitladder.cli.completion import level_names
from bitladder.cli.terminal import ModelArgument, say
from bitladder.errors import UsageError

if TYPE_CHECKING:
    from bitladder.describe.cache_types import CacheTypes
    from bitladder.engines.endpoint import EndpointSettings
    from bitladder.levels import Level
    from bitladder.stages.run_facts import RunSettings

Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", help="Measure on this text instead of the shipped one; repeat it for several documents."),
]
WorkloadFile = Annotated[Path | None, typer.Option("--workload", help="Your inputs and criteria (YAML or JSON lines).")]
Yes = Annotated[bool, typer.Option("--yes", help="Agree beforehand to what endpoints cost.")]
TrustPython = Annotated[
    bool, typer.Option("--trust-python", help="Let functions that the workload names run. They can do anything.")
]
KeyNames = Annotated[
    list[str] | None,
    typer.Option(
        "--key-env",
        metavar="[HOST=]VARIABLE",
        help="Environment variable with the key of an endpoint; those of well-known clouds are known.",
    ),
]
KeyFiles = Annotated[
    list[str] | None,
    typer.Option("--key-file", metavar="[HOST=]FILE", help="File with the key of an endpoint; repeatable."),
]


CacheTypesList = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="T1,T2",
        help="Types of the KV cache: f16, q8_0, q5_1, q4_0, ...; keys and values apart as q8_0/q4_0.",
    ),
]


def caches_named(text: str | None) -> tuple[CacheTypes, ...]:
    """Types of a KV cache; none where none is named. Raises UsageError for what is none."""
    from bitladder.describe.cache_types import parse_caches

    return () if text is None else parse_caches(text)


@dataclass(kw_only=True)
class RunOptions(WorkOptions):
    """What ``run`` and ``gate`` are asked."""

    model: ModelArgument
    levels: Levels = None
    bar: Annotated[str | None, typer.Option("--bar", help="The quality a level must hold, like 'kl < 0.05'.")] = None
    workload: WorkloadFile = None
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="LEVEL|FILE.jsonl|URL#MODEL",
            help="What answers are compared with, instead of the source: a level, stored answers, or an endpoint.",
            autocompletion=level_names,
        ),
    ] = None
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="[LEVEL=]URL#MODEL",
            help="Test an OpenAI-compatible endpoint, too, or the one that serves a checkpoint level; repeatable.",
        ),
    ] = None
    key_env: KeyNames = None
    key_file: KeyFiles = None
    rpm: Annotated[
        float, typer.Option("--rpm", min=0, help="Requests per minute to each endpoint; 0 for no limit.")
    ] = 0.0
    yes: Yes = False
    ctx: Context = None
    kv: CacheTypesList = None
    speculate: Annotated[
        str | None,
        typer.Option(
            "--speculate", metavar="auto|ngram|mtp|draft:LEVEL,...",
            help="Try guessing tokens ahead: tiers do so where it surely pays, and the fast level is chosen with it.",
        ),
    ] = None  # fmt: skip
    text: Texts = None
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for files to build, and a run's report.", show_default="<name>-ladder"),
    ] = None
    imatrix: Importance = "auto"
    effort: EffortName = "good"
    within: Annotated[
        str | None,
        typer.Option(
            "--within",
            metavar="TIME",
            help="Decide in 30s, 10m, 2h: measure what it needs most; auto: a usual time.",
        ),
    ] = None
    full: Annotated[
        bool,
        typer.Option("--full", help="Measure, ask and time also levels that cannot be chosen, on everything there is."),
    ] = False
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="URL[#MODEL]", help="OpenAI-compatible endpoint of a judge model."),
    ] = None
    judge_model: Annotated[str, typer.Option("--judge-model", help="The judge, as its endpoint names it.")] = ""
    judge_key_env: Annotated[
        str, typer.Option("--judge-key-env", help="Environment variable with the judge's key.")
    ] = ""
    trust_python: TrustPython = False

    def settings(self) -> RunSettings:
        """For the pipeline.

        Raises:
            UsageError: a level, an address or a reference that cannot be.
        """
        from bitladder.levels import parse_level
        from bitladder.stages.run_facts import AUTO_TIME, RunSettings
        from bitladder.units import parse_duration

        if self.full and self.within:
            raise UsageError("--full and --within contradict each other.", do="Leave out one of them.")
        also = [served_address(text) for text in self.also or ()]
        self._check_addressed()

        def named(address: str) -> EndpointSettings:
            return endpoint_named(address, self.key_env, self.rpm, self.key_file)

        return RunSettings(
            model=self.model,
            levels=split_levels(self.levels),
            reference=reference_named(self.reference, self.key_env, self.rpm, self.key_file),
            also=tuple(named(address) for level, address in also if not level),
            served=tuple((parse_level(level), named(address)) for level, address in also if level),
            workload=self.workload,
            bar=self.bar,
            n_ctx=self.ctx,
            texts=tuple(self.text or ()),
            out=self.out,
            threads=self.threads,
            device=known_device(self.device, self.on),
            on=self.on,
            unit_needs=self.unit_needs,
            imatrix=self.imatrix,
            effort=effort_named(self.effort),
            judge=self._judge(),
            trust_python=self.trust_python,
            caches=caches_named(self.kv),
            speculate=tuple(dict.fromkeys(word.strip() for word in (self.speculate or "").split(",") if word.strip())),
            within=None if not self.within else AUTO_TIME if self.within == AUTO_TIME else parse_duration(self.within),
            full=self.full,
        )

    def _check_addressed(self) -> None:
        """Refuse options about endpoints where none is named."""
        elsewhere = self.judge or self.also or "://" in (self.reference or "")
        about_any = {"--key-env": self.key_env, "--key-file": self.key_file, "--rpm": self.rpm}
        about_judge = {"--judge-model": self.judge_model, "--judge-key-env": self.judge_key_env}
        for options, named, kind, how in (
            (about_judge, self.judge, "a judge", "--judge"),
            (about_any, elsewhere, "endpoints", "--also, --reference or --judge"),
        ):
            if not named and (option := next((name for name, value in options.items() if value), "")):
                raise UsageError(f"{option} is for {kind}.", do=f"Name one with {how}, or leave it out.")

    def _judge(self) -> EndpointSettings | None:
        if not self.judge:
            return None
        address = f"{self.judge}#{self.judge_model}" if self.judge_model else self.judge
        if self.judge_key_env:
            return endpoint_named(address, [self.judge_key_env], self.rpm)
        return endpoint_named(address, self.key_env, self.rpm, self.key_file)


def endpoint_named(
    address: str, key_names: list[str] | None, rpm: float = 0.0, key_files: list[str] | None = None
) -> EndpointSettings:
    """``URL#model`` with the place of the key that belongs to its host; a file goes before a variable."""
    from bitladder.engines.endpoint import endpoint_at

    settings = endpoint_at(address, requests_per_minute=rpm)
    for named in key_names or ():
        host, _, variable = named.rpartition("=")
        if _is_host(host, settings):
            settings = dataclasses.replace(settings, key_env=variable)
    for named in key_files or ():
        host, _, file = named.partition("=")
        if "/" in host or not file:  # no host: a path, which may hold an equals sign
            host, file = "", named
        if _is_host(host, settings):
            settings = dataclasses.replace(settings, key_file=str(Path(file).absolute()))
    return settings


def served_address(text: str) -> tuple[str, str]:
    """``[LEVEL=]URL#MODEL`` as the level's name, empty where there is none, and the address."""
    level, equals, address = text.partition("=")
    return (level, address) if equals and "://" not in level else ("", text)


def _is_host(host: str, settings: EndpointSettings) -> bool:
    """Whether ``[HOST=]...`` speaks of this endpoint; without a host it speaks of every one."""
    return not host or host in (settings.host, settings.host.rsplit(":", 1)[0])


def reference_named(
    text: str | None,
    key_names: list[str] | None = None,
    rpm: float = 0.0,
    key_files: list[str] | None = None,
) -> Level | Path | EndpointSettings | None:
    """A level, a file of stored answers, or an endpoint."""
    from bitladder.levels import parse_level

    if text is None:
        return None
    if "://" in text:
        return endpoint_named(text, key_names, rpm, key_files)
    if Path(text).suffix in (".jsonl", ".ndjson"):
        return Path(text)
    return parse_level(text)


def confirm_with(*, yes: bool) -> Callable[[str], bool]:
    """Shows what will be spent; asks a person when there is one."""

    def confirm(spending: str) -> bool:
        say("This run asks models that may cost money:")
        for line in spending.splitlines():
            say(f"  {line}")
        return yes or (sys.stdin.isatty() and typer.confirm("Go on?", err=True))

    return confirm


def refuse_elsewhere(reference: Level | Path | EndpointSettings | None) -> Level | None:
    """A level as the reference of token figures; raises UsageError for anything else."""
    from bitladder.engines.endpoint import EndpointSettings

    if not isinstance(reference, Path | EndpointSettings):
        return reference
    raise UsageError(
        "Only the source or one of its levels can be the reference of token figures.",
        means="KL divergence needs whole distributions, which neither an address nor a file of answers has.",
        do="Compare answers with it instead: bitladder run MODEL --workload FILE --reference ...",
    )
