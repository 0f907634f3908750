"""What the gateway is told: tiers, limits, rules. Plain values; everything else follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, urlsplit

from bitladder.describe.cache_types import F16_CACHE, CacheTypes
from bitladder.engines.address import api_base
from bitladder.engines.base import EngineKind
from bitladder.engines.speculation import Speculation
from bitladder.errors import UsageError
from bitladder.records.level_file import FileStanding
from bitladder.records.plan import DEFAULT_CTX
from bitladder.serve.protocol import EMBEDDINGS, RERANK
from bitladder.serve.router import AUTO, QUALITY, SPEED, AutoRule, Rule
from bitladder.units import MiB

TASK_OPTIONS = {EMBEDDINGS: "--embeddings", RERANK: "--rerank"}
"""Paths that a tier of text does not answer, each with the option that names one which does."""
ROLES = (AUTO, QUALITY, SPEED)
"""Model names that mean a role, and so cannot be a level's own."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ReplicaSpec:
    """A further address that answers for a level as its first one does."""

    url: str
    api_key: str = field(default="", repr=False)
    key_env: str = ""
    key_file: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", api_base(self.url))


@dataclass(frozen=True)
class TierSpec:
    """One level, and what answers for it: a file or folder that we run, or an endpoint that somebody else runs."""

    level: str
    """Its name on the ladder; also a model name that clients may ask for."""
    path: Path | None = None
    url: str | None = None
    """Address of an OpenAI-compatible endpoint, kept as `engines.address.api_base` gives it."""
    replicas: tuple[ReplicaSpec, ...] = ()
    """More addresses of the same model; each gets a share of the requests."""
    model: str = ""
    """What the endpoint calls the model; empty: its only model, or the level's name. Replies must name it too."""
    api_key: str = field(default="", repr=False)
    """Sent to the endpoint as a bearer token. Engines of our own get a fresh one."""
    key_env: str = ""
    """Environment variable that the endpoint's key comes from; exports name it."""
    key_file: Path | None = None
    """File that the endpoint's key comes from; exports hand it over."""
    sha256: str = ""
    """Hash of the file, named in every reply. Empty for an endpoint: nobody can vouch for it."""
    standing: FileStanding | None = None
    """What evidence says about this very file, named in every reply. None for an endpoint, or where nobody looked."""
    note: str = ""
    """What the operator should know about the file."""
    slots: int = 1
    """Requests at the upstream at once, at each replica; more wait in the queue."""
    n_ctx: int = DEFAULT_CTX
    """Tokens one request may use, prompt and answer together. 0: unknown (an endpoint)."""
    memory_bytes: int = 0
    """What the plan says it needs when loaded."""
    projector: Path | None = None
    """The file that takes in pictures and sounds for it."""
    task: str = ""
    """The only path that it answers (`TASK_OPTIONS`); empty for text."""
    cache: CacheTypes = F16_CACHE
    """Types of the KV cache that our engine runs it with; its level's name says them, too."""
    speculate: Speculation | None = None
    """Where guesses of the next tokens come from; None: nowhere."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.url is None):
            found = "neither a file nor" if self.path is None else "both a file and"
            raise UsageError(
                f"Level '{self.level}' has {found} a URL.",
                do="Give exactly one of them.",
            )
        if self.url is not None:
            object.__setattr__(self, "url", api_base(self.url))
        addresses = [replica.url for replica in self.replicas]
        if self.url is None and addresses:
            raise UsageError(f"Level '{self.level}' is a file, and has replicas.", do="Give addresses alone.")
        twice = next((one for one in addresses if [self.url, *addresses].count(one) > 1), None)
        if twice is not None:
            raise UsageError(f"Level '{self.level}' has the address {twice} twice.", do="Give each address once.")
        if self.slots < 1:
            raise UsageError(f"The slots of level '{self.level}' must be at least 1. Got {self.slots} instead.")

    @property
    def served_name(self) -> str:
        """The name the upstream answers to."""
        return self.model or self.level

    @property
    def address(self) -> str:
        """As the command line takes it: the file's absolute path, or ``URL[#MODEL]``."""
        if self.path is not None:
            return str(self.path.absolute())
        return f"{self.url}#{quote(self.model, safe='/:@')}" if self.model else str(self.url)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its address, and those of its replicas, as the command line takes them."""
        return (self.address, *(replace(self, url=one.url, replicas=()).address for one in self.replicas))

    @property
    def keyed(self) -> tuple[ReplicaSpec, ...]:
        """All addresses of an endpoint, each with its key."""
        if self.url is None:
            return ()
        return (ReplicaSpec(self.url, self.api_key, self.key_env, self.key_file), *self.replicas)

    @property
    def places(self) -> tuple[str, ...]:
        """Where it lies, each longer than the last: what tells it from another level of the same name."""
        if self.path is not None:
            folders = [part for part in self.path.absolute().parent.parts if part != "/"]
            return tuple("-".join(folders[-count:]) for count in range(1, len(folders) + 1))
        parts = urlsplit(str(self.url))
        return (parts.netloc, (parts.netloc + parts.path).replace("/", "-"))


def with_distinct_names(specs: Sequence[TierSpec]) -> list[TierSpec]:
    """The same levels, those of one name renamed by where they lie: ``model@a`` and ``model@b``.

    A level that is called like a role (``quality.gguf``) is renamed too. Levels given twice stay what they are.
    """
    places = {_place(spec): spec for spec in specs}
    groups: dict[str, list[TierSpec]] = {}
    for spec in places.values():
        groups.setdefault(spec.level.lower(), []).append(spec)
    names: dict[TierSpec, str] = {}
    for level, group in groups.items():
        if len(group) == 1 and level not in ROLES:
            names[group[0]] = group[0].level
            continue
        for depth in range(max(len(spec.places) for spec in group)):
            found = [f"{spec.level}@{spec.places[min(depth, len(spec.places) - 1)]}" for spec in group if spec.places]
            if len({name.lower() for name in found}) == len(group):
                break
        else:
            found = [f"{spec.level}@{number}" for number, spec in enumerate(group, 1)]
        names |= dict(zip(group, found, strict=True))
    return [replace(spec, level=names[places[_place(spec)]]) for spec in specs]


def _place(spec: TierSpec) -> tuple[object, ...]:
    return spec.path, tuple(one.url for one in spec.keyed), spec.model, spec.cache


@dataclass(frozen=True)
class UpstreamTimeouts:
    """Seconds allowed to each phase of a request at an upstream."""

    connect: float = 5.0
    first_byte: float = 600.0
    """From sending the request to the first bytes of the answer: the time to read a long prompt."""
    between: float = 120.0
    """Between two pieces of an answer."""
    client: float = 60.0
    """A client that takes nothing for so long is given up."""
    restart: float = 10.0
    """How long a request waits for an engine that is just starting again, when no other tier can answer."""
    probe: float = 5.0
    """A replica that does not answer two probes in a row within so long gets no more requests."""
    probe_every: float = 2.0
    """Between two probes of a replica."""
    resolve_every: float = 5.0
    """Between two looks at what a name resolves to."""


@dataclass(frozen=True)
class Escalation:
    """Keep the speed tier's answer only when it was sure of it; see ``serve.escalation``."""

    threshold: float
    """Lowest natural log-probability of a token among the first ``window`` that still counts as sure."""
    window: int | None = None
    """Tokens looked at before the first byte is sent; None: the whole answer (buffered mode)."""


@dataclass(frozen=True)
class Shadow:
    """Ask both tiers again in idle time, and compare."""

    share: float = 0.0
    """Of the requests that the speed tier answered: 0 none, 1 all."""
    bar: float = 0.0
    """Agreement that the evidence promises; an observed agreement surely below it raises the alarm."""
    max_tokens: int = 128


LONGEST_TOKEN = 64
"""Bytes of a token at most; the few longer ones in a vocabulary are runs of spaces."""
_USUAL_BODY, _LARGEST_BODY = 8 * MiB, 32 * MiB


@dataclass(frozen=True)
class ServeSettings:
    """Everything `serve` needs to know."""

    quality: TierSpec
    speed: TierSpec | None = None
    """None: one tier serves everything."""
    extra: tuple[TierSpec, ...] = ()
    """More levels, reachable by name only."""
    host: str = "127.0.0.1"
    port: int = 8077
    """0: any free one."""
    processes: int = 1
    """Gateway processes behind the port; more than one only before endpoints."""
    threads: int = 2
    """Of each engine that we run."""
    memory_budget_bytes: int = 0
    """Both tiers stay loaded when their ``memory_bytes`` fit in it, otherwise they take turns. 0: no limit.
    """
    rules: tuple[Rule, ...] = ()
    auto: AutoRule = field(default_factory=AutoRule)
    escalation: Escalation | None = None
    shadow: Shadow = field(default_factory=Shadow)
    api_key_file: Path | None = None
    open_to_all: bool = False
    """Allow other hosts in without keys."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header to accept besides loopback and ``host``."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins that may call from a browser, besides the gateway's own page."""
    max_body_bytes: int | None = None
    """None: as much as the longest context that is served has use for; see `body_limit`."""
    max_requests_bytes: int = 512 * MiB
    """Memory that all requests may hold together."""
    max_queue: int = 64
    """Waiting requests per tier; one more is told to come back later."""
    timeouts: UpstreamTimeouts = field(default_factory=UpstreamTimeouts)
    drain_s: float = 30.0
    """On SIGTERM: how long running answers may take to finish."""
    program: EngineKind | None = None
    """What runs the files, such as an installed ``llama-server``; None for the engine that measures."""
    run_json: Path | None = None
    """The run that this deployment comes from, for the page."""
    log_prompts: bool = False
    name: str = "model"
    """What the deployment is called."""

    @property
    def body_limit(self) -> int:
        """Bytes that a request's body may have: 8 MiB, which a context of 131,072 tokens at their longest fills, more
        for a longer one, 32 MiB at most.
        """
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        specs = (self.quality, *self.extra, *([self.speed] if self.speed else []))
        return min(max(_USUAL_BODY, *(spec.n_ctx * LONGEST_TOKEN for spec in specs)), _LARGEST_BODY)

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and self.api_key_file is None and not self.open_to_all:
            raise UsageError(
                f"The gateway would listen on {self.host} without keys.",
                means="Anyone who reaches this machine could use the models.",
                do="Give an API key file, listen on 127.0.0.1, or say that it should be open to all.",
            )
        specs = (self.quality, *self.extra, *([self.speed] if self.speed else []))
        own = next((spec.level for spec in specs if spec.path is not None), None)
        if self.processes > 1 and own is not None:
            raise UsageError(
                f"{self.processes} processes cannot share the engine of {own}.",
                means="Each process of the gateway would start an engine of its own for a file.",
                do="Serve the file with one process, and give the others its address with --quality URL.",
            )
        if not 0.0 <= self.shadow.share <= 1.0:
            raise UsageError(f"The shadow share must be between 0 and 1. Got {self.shadow.share} instead.")
        names = [spec.level.lower() for spec in specs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice and not (self.speed == self.quality and not self.extra):
            raise UsageError(f"The level '{twice[0]}' is served twice.", do="Give each level once.")
