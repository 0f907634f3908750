"""What a run is asked, and what it writes down beside its results so that anybody can repeat it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bitladder.describe.cache_types import CacheTypes
from bitladder.describe.model import Model
from bitladder.describe.text import Document, most_tokens, text_hash
from bitladder.describe.workload import Input, Workload
from bitladder.engines.endpoint import EndpointSettings
from bitladder.formats.recipes import FILE_TYPES
from bitladder.levels import Container
from bitladder.records.decision import Decision
from bitladder.records.evaluation import LevelAnswers
from bitladder.records.fidelity import Way
from bitladder.records.level_file import LevelFile
from bitladder.records.run import FileFacts, InputFacts, SourceFacts
from bitladder.store.recorded import protocol

if TYPE_CHECKING:
    from bitladder.files.gguf import GgufFile
    from bitladder.files.sources import Source
    from bitladder.kernels import Effort
    from bitladder.levels import Level

MATTERING_PACKAGES = ("xllamacpp", "torch", "transformers", "numba", "numpy")
"""Packages whose version can change a number."""
MOST_SLOTS = 4
"""Requests that a level computes together unless told otherwise, llama.cpp's own default. More share the
arithmetic units without being served sooner on most machines, and each takes a whole context of memory.
"""
CONTEXT_STEP = 256
TOOL_PROMPT = 1024
"""Tokens left for what a chat template writes around tools: some write pages of instructions."""


AUTO_TIME: Literal["auto"] = "auto"


@dataclass(frozen=True)
class RunSettings:
    """What a user can ask of a run; everything else is derived."""

    model: str
    levels: tuple[Level, ...] | None = None
    reference: Level | Path | EndpointSettings | None = None
    """A level, a file of stored answers, or a model behind an address; None for the source itself."""
    also: tuple[EndpointSettings, ...] = ()
    """Models behind addresses that are tested beside the levels."""
    served: tuple[tuple[Level, EndpointSettings], ...] = ()
    """Checkpoint levels with the engines that serve them: what these answer are the levels' answers. The levels belong
    to the run, be they in ``levels`` or not."""
    workload: Path | None = None
    bar: str | None = None
    n_ctx: int | None = None
    """Tokens of context; None: the usual number, or the model's own when that is less."""
    texts: tuple[Path, ...] = ()
    out: Path | None = None
    threads: int = 2
    device: str = "cpu"
    """Where walks compute and scales are searched for, as torch names it; several with commas between."""
    on: str = "local"
    """Who computes units: as ``executors.places.executor_of`` takes it."""
    unit_needs: str = ""
    effort: Effort = "good"
    """How long to search for scales."""
    imatrix: str = "auto"
    """A file, ``auto`` (made from the calibration text that ships) or ``none``."""
    judge: EndpointSettings | None = None
    """The judge model, for workloads that ask one."""
    trust_python: bool = False
    """Whether functions that the workload names may run."""
    caches: tuple[CacheTypes, ...] = ()
    """Types of the KV cache that every level is run with, each pair a candidate; none for llama.cpp's own alone."""
    speculate: tuple[str, ...] = ()
    """Ways to guess tokens ahead, tried on tiers and their rivals, as ``stages.speculate.check_ways`` takes them."""
    within: float | Literal["auto"] | None = None
    """Seconds in which a decision must be there, from when the model lies on the disk; ``auto``: derived from model and
    machine; None: as long as it takes."""
    full: bool = False
    """Measure, ask and time every level as much as there is, also those that cannot be chosen."""


def level_of(model: Model) -> str:
    """The level that a source file is: by its declared type, else by the type that most of its weights have."""
    declared = model.metadata.get("general.file_type")
    for level, number in FILE_TYPES.items():
        if number == declared:
            return level
    by_type: dict[str, int] = {}
    for tensor in model.tensors:
        by_type[tensor.qtype] = by_type.get(tensor.qtype, 0) + tensor.elements
    return max(by_type, key=lambda qtype: by_type[qtype])


def source_facts(opened: GgufFile, source: Source, location: str) -> SourceFacts:
    """The model that everything is compared with."""
    model = opened.model
    return SourceFacts(
        name=model.name or source.label,
        location=location,
        sha256=opened.sha256,
        level=level_of(model),
        architecture=model.dims.architecture,
        parameters=model.elements,
        bytes=model.header_bytes + model.tensor_bytes,
        quantized=source.quantized,
    )


def file_facts(file: LevelFile, method: str = "") -> FileFacts:
    """One written file, and how it was made."""
    seconds = 0.0 if file.reused else file.seconds
    return FileFacts(file.level, str(file.path), file.bytes, file.bpw, file.sha256, seconds, method)


def input_facts(workload: Workload) -> tuple[InputFacts, ...]:
    """The inputs, in the words a reader of the report needs."""
    return tuple(
        InputFacts(
            one.id,
            prompt="\n\n".join(_shown_message(message) for message in one.everything_asked),
            criterion="; ".join(f"{criterion.kind}: {_spoken(criterion.value)}" for criterion in one.every_criterion),
            tags=one.tags,
        )
        for one in workload.inputs
    )


def _shown_message(message: Mapping[str, Any]) -> str:
    """A message's text, and its calls of tools."""
    functions = (call["function"] for call in message.get("tool_calls", ()))
    calls = (f"{function['name']}({function['arguments']})" for function in functions)
    return "\n".join(part for part in (message["content"], *calls) if part)


def _spoken(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_spoken(inner)}" for name, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " | ".join(_spoken(inner) for inner in value)
    return str(value)


def shown_answers(answers: Sequence[LevelAnswers], decision: Decision) -> tuple[LevelAnswers, ...]:
    """All answers; token probabilities only of the reference (the first) and the chosen tiers, for routing."""
    detailed = {answers[0].level, decision.quality, decision.speed}
    return tuple(one if one.level in detailed else _without_tokens(one) for one in answers)


def _without_tokens(level: LevelAnswers) -> LevelAnswers:
    return dataclasses.replace(level, answers=tuple(dataclasses.replace(answer, tokens=()) for answer in level.answers))


def slots(workload: Workload, n_ctx: int) -> tuple[int, int]:
    """Context of one request, and requests at once, so that together they take no more context than was planned for."""
    longest = max(
        most_tokens(_everything_asked(one))
        + one.most_tokens * (1 + len(one.turns))
        + CONTEXT_STEP
        + (TOOL_PROMPT if one.tools else 0)
        for one in workload.inputs
    )
    room = min(n_ctx, -(-longest // CONTEXT_STEP) * CONTEXT_STEP)
    return room, max(1, min(MOST_SLOTS, n_ctx // room))


def _everything_asked(one: Input) -> str:
    """Tools among it."""
    return "".join([*map(json.dumps, one.tools), *map(_shown_message, one.everything_asked)])


def engine_facts(
    *, n_ctx: int, n_parallel: int, threads: int, container: Container = Container.FILE, path: Path | None = None
) -> dict[str, Any]:
    """The engine that runs models stored so (``path``: this one), and its settings: part of the key of every answer and
    speed.

    The processor is among them: it decides speed and, by the order of its sums, near ties.

    Raises:
        EngineError: no engine for such models is installed.
    """
    from bitladder.engines.registry import engine_for
    from bitladder.files.probe import cpu_name

    identity = engine_for(container, path).identity()
    return {
        "engine": identity.engine,
        "version": identity.version,
        "n_ctx": n_ctx,
        "n_parallel": n_parallel,
        "threads": threads,
        "cpu": cpu_name(),
    }


def settings_facts(
    settings: RunSettings, n_ctx: int, texts: Sequence[Document], workload: Workload, *, way: Way = Way.WALK
) -> dict[str, Any]:
    """Whatever changes a number: texts and workload by hash, how fidelity was measured, threads, effort."""
    room, parallel = slots(workload, n_ctx)
    return {
        "text": {"documents": [text.name for text in texts], "sha256": text_hash(texts)},
        "protocol": protocol(way),
        "workload": {"name": workload.name, "inputs": len(workload.inputs), "sha256": workload.hash},
        "engine": engine_facts(n_ctx=room, n_parallel=parallel, threads=settings.threads),
        "temperature": workload.temperature,
        **({"sampling": dict(workload.sampling)} if workload.sampling else {}),
        "effort": settings.effort,
        "importance": settings.imatrix,
        **({"kv": [str(cache) for cache in settings.caches]} if settings.caches else {}),
        **({"speculate": list(settings.speculate)} if settings.speculate else {}),
        **({"within_s": settings.within} if settings.within is not None else {}),
        **({"device": settings.device} if settings.device != "cpu" else {}),
        **({"endpoints": addresses} if (addresses := [one.address for one in _endpoints(settings)]) else {}),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that can change a number."""
    return {name: metadata.version(name) for name in MATTERING_PACKAGES}


def _endpoints(settings: RunSettings) -> list[EndpointSettings]:
    """Every endpoint of a run, the judge's among them."""
    found = [settings.reference, *settings.also, *(endpoint for _, endpoint in settings.served), settings.judge]
    return [one for one in found if isinstance(one, EndpointSettings)]


def commands(settings: RunSettings, n_ctx: int, out: Path) -> tuple[str, ...]:
    """What to type to get the same numbers."""
    words = ["bitladder", "run", settings.model]
    if settings.levels:
        words += ["--levels", ",".join(map(str, settings.levels))]
    if settings.workload:
        words += ["--workload", str(settings.workload)]
    if settings.reference is not None:
        reference = settings.reference
        words += ["--reference", reference.address if isinstance(reference, EndpointSettings) else str(reference)]
    for endpoint in settings.also:
        words += ["--also", endpoint.address]
    for level, endpoint in settings.served:
        words += ["--also", f"{level}={endpoint.address}"]
    if settings.judge:
        words += ["--judge", settings.judge.address]
    for name in sorted({f"{one.host}={one.key_env}" for one in _endpoints(settings) if one.key_env}):
        words += ["--key-env", name]
    for name in sorted({f"{one.host}={one.key_file}" for one in _endpoints(settings) if one.key_file}):
        words += ["--key-file", name]
    if settings.trust_python:
        words += ["--trust-python"]
    if settings.bar:
        words += ["--bar", settings.bar]
    words += ["--kv", ",".join(map(str, settings.caches))] if settings.caches else []
    words += ["--speculate", ",".join(settings.speculate)] if settings.speculate else []
    for text in settings.texts:
        words += ["--text", str(text)]
    if settings.within is not None:
        words += ["--within", AUTO_TIME if settings.within == AUTO_TIME else f"{settings.within:g}s"]
    words += ["--full"] if settings.full else []
    words += [
        "--imatrix",
        settings.imatrix,
        "--ctx",
        str(n_ctx),
        "--threads",
        str(settings.threads),
        *(["--effort", settings.effort] if settings.effort != RunSettings.effort else []),
        *(["--device", settings.device] if settings.device != "cpu" else []),
        *(["--on", settings.on] if settings.on != RunSettings.on else []),
        *(["--unit-needs", settings.unit_needs] if settings.unit_needs else []),
        "--out",
        str(out),
    ]
    return (shlex.join(words), shlex.join(["bitladder", "report", str(out / "run.json")]))
