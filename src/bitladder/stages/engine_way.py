"""The engine's way of measuring and of gathering importance, for models whose layers the walk does not know.

The walk is the way wherever it can go: it sees what the weights alone cost, and needs one layer's memory. llama.cpp's
own library does the same for every architecture that llama.cpp runs, with its own arithmetic, on files as they lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.describe.cache_types import F16_CACHE
from bitladder.describe.windows import tokens_in_common
from bitladder.errors import BadInput, UnknownArchitecture
from bitladder.progress import LevelNews, Part, Progress
from bitladder.records.fidelity import Fidelity, Way
from bitladder.stages.forecast import forecast, weights_used
from bitladder.stages.job import Job

if TYPE_CHECKING:
    from bitladder.describe.cache_types import CacheTypes
    from bitladder.describe.depths import DepthWindows
    from bitladder.describe.model import Model
    from bitladder.describe.windows import Window
    from bitladder.files.gguf import GgufFile
    from bitladder.files.imatrix import ImportanceMatrix
    from bitladder.plan.preflight import JobNeed
    from bitladder.walk.head import TokenScores

KEPT = ("walks", "engine")
"""Where in the cache a killed measurement leaves what it has."""


def way_for(source: GgufFile, wanted: Way | None = None) -> Way:
    """The way a model is measured: the one wanted, else the walk where its family has rows of layers or its checkpoint
    is at hand, else the engine's. The walk may still refuse (``instead_of_walk``).

    Raises:
        UnknownArchitecture: neither way can go, or not the one wanted.
    """
    from bitladder.files.convert import checkpoint_of
    from bitladder.formats.families import family_of

    dims = source.model.dims
    if wanted is None:
        row = family_of(dims.architecture).layers_of(dims.n_expert) is not None
        wanted = Way.WALK if row or checkpoint_of(source.path) is not None else None
    if wanted is Way.WALK:
        return Way.WALK
    if why := engine_missing(source.model):
        walk = "" if wanted else f"No layers are known for the architecture '{dims.architecture}', and "
        raise UnknownArchitecture(
            f"{walk}{'t' if walk else 'T'}he engine cannot measure it: {why}.",
            means="Fidelity and importance come from the layers of known families, or from llama.cpp's own library.",
            do="Quantize with --imatrix none and judge levels by a workload; or install the engine that is known.",
        )
    return Way.ENGINE


def engine_missing(model: Model) -> str:
    """Why the engine's library cannot measure a model; empty where nothing speaks against it. Starts nothing."""
    from bitladder.files.engine_package import ENGINE, engine_knows, engine_version, library_missing

    if missing := library_missing():
        return missing
    architecture = model.dims.architecture
    if model.metadata.get(f"{architecture}.attention.causal") is False:
        return "it is an encoder, which predicts no next token"
    if engine_knows(architecture) is False:
        return f"llama.cpp in {ENGINE} {engine_version()} does not know it"
    return ""


def instead_of_walk(model: Model, refusal: UnknownArchitecture) -> Way:
    """The engine's way, after the walk refused a variant of a known family; raises the refusal where it cannot go."""
    if engine_missing(model):
        raise refusal
    return Way.ENGINE


def announce(job: Job, what: str, refusal: UnknownArchitecture | None = None) -> None:
    """Say in a line that the engine's way is gone, and what that means. ``what``: "Fidelity is measured"."""
    if refusal is not None:
        why = refusal.found
    elif way_for(job.source) is Way.WALK:
        why = "that was asked for"
    else:
        why = f"no layers are known for the architecture '{job.source.model.dims.architecture}'"
    line = f"{what} in the engine, whose own rounding is part of it: {why[:1].lower()}{why[1:].rstrip('.')}."
    if line not in job.journal.warnings:
        job.journal.warn(line)


def engine_fidelities(
    job: Job, reference: Path, levels: Sequence[tuple[str, Path]], windows: Sequence[Window]
) -> Iterator[Fidelity]:
    """Fidelity of files (by level) against the reference's file, in order. Raises as ``scores_in_engine``."""
    from bitladder.stages.fidelity import fidelity

    for (name, _), (own, beside) in zip(levels, scores_in_engine(job, reference, levels, windows), strict=True):
        yield replace(fidelity(name, own, beside, windows), way=Way.ENGINE)


def deployed_fidelities(
    job: Job, levels: Sequence[tuple[str, Path]], caches: Sequence[CacheTypes], windows: Sequence[DepthWindows]
) -> Iterator[Fidelity]:
    """Fidelity by depth of files that are each run with a KV cache, against the source with a 16-bit one. Raises as
    ``scores_in_engine``."""
    from bitladder.stages.fidelity import fidelity_by_depth

    every = [window for one in windows for window in one.windows]
    scored = scores_in_engine(job, job.source.path, levels, every, caches)
    for (name, _), (own, beside) in zip(levels, scored, strict=True):
        yield fidelity_by_depth(name, own, beside, windows)


def deployed_seconds(job: Job, caches: Sequence[CacheTypes], windows: Sequence[DepthWindows]) -> float:
    """What ``deployed_fidelities`` will take for levels with these caches, were all of them open at a time."""
    from bitladder.stages.forecast import corrected_seconds

    every = [window for one in windows for window in one.windows]
    return corrected_seconds(_need("measure", [job.source], every, 0, job.threads, [F16_CACHE, *caches]))


def scores_in_engine(
    job: Job,
    reference: Path,
    levels: Sequence[tuple[str, Path]],
    windows: Sequence[Window],
    caches: Sequence[CacheTypes] | None = None,
) -> Iterator[tuple[TokenScores, TokenScores]]:
    """Scores of files (by level) and of the reference's file beside them, in order; as many at a time as fit into
    memory. ``caches``: types of the KV cache of each, the reference's has 16 bits then; None for 32 bits of all.

    Raises:
        BadInput: a level is no file, or of another model.
        NothingFits: too little memory for the engine's buffers.
        BadFile, BadWeights, EngineError, OutputError: as ``stages.engine_scores``.
    """
    from bitladder.engines.llama_library import piece_length
    from bitladder.files.folders import cache_folder
    from bitladder.files.gguf import GgufFile
    from bitladder.files.probe import probe_machine
    from bitladder.plan.engine_need import context_bytes, together
    from bitladder.stages.engine_scores import engine_scores
    from bitladder.stages.fidelity import file_candidate

    with ExitStack() as stack:
        source = stack.enter_context(GgufFile.open(reference))
        files, sizes, opened = [], [], {reference: source}  # of a file that is run with several caches one is in memory
        for level, path in levels:
            if path.is_dir():
                raise BadInput(f"{level} is a folder, and the engine measures GGUF files.", do="Leave it out.")
            first = path not in opened
            if first:
                opened[path] = stack.enter_context(GgufFile.open(path))
                file_candidate(source, opened[path], level=level)  # refuses another model's
            files.append(opened[path])
            sizes.append(_bytes(files[-1]) if first else 0)
        longest, piece = max(len(window.tokens) for window in windows), piece_length(source.model.dims.n_vocab)
        each = caches or [F16_CACHE] * len(levels)
        context = max(context_bytes(source.model, longest, piece, cache) for cache in (F16_CACHE, *each))
        groups = together(sizes, _bytes(source), context, probe_machine().ram_available)
        for group in groups:
            names = [level for level, _ in levels[group]]

            def so_far(number: int, mean: float, names: Sequence[str] = names) -> None:
                job.progress.on_level(LevelNews(names[number], kl_mean=mean))

            held = [F16_CACHE, *each[group]]
            what = f"measure {', '.join(names)}"
            need = _need(what, [source, *files[group]], windows, context, job.threads, held)
            with forecast(need, job.journal):
                own, *scores = engine_scores(
                    source, files[group], windows, threads=job.threads, keep=cache_folder(*KEPT),
                    progress=_part(job.progress, group, len(files)), so_far=so_far,
                    caches=held if caches else None,
                )  # fmt: skip
            yield from ((one, own) for one in scores)


def engine_matrix(job: Job, windows: Sequence[Window], dataset: str) -> ImportanceMatrix:
    """An importance matrix from the engine.

    Raises:
        NothingFits: too little memory for the engine's buffers.
        BadInput, BadWeights, EngineError, OutputError: as ``stages.engine_importance``.
    """
    from bitladder.engines.llama_library import piece_length
    from bitladder.files.folders import cache_folder
    from bitladder.plan.engine_need import context_bytes
    from bitladder.stages.engine_importance import engine_importance

    source = job.source
    longest = max((len(window.tokens) for window in windows), default=0)
    context = context_bytes(source.model, longest, piece_length(source.model.dims.n_vocab))
    need = _need("gather an importance matrix", [source], windows, context, job.threads)
    with forecast(need, job.journal):
        return engine_importance(
            source, windows, dataset=dataset, threads=job.threads, keep=cache_folder(*KEPT), progress=job.progress
        )


def _need(
    what: str,
    files: Sequence[GgufFile],
    windows: Sequence[Window],
    context: int,
    threads: int,
    caches: Sequence[CacheTypes] = (F16_CACHE,),
) -> JobNeed:
    from bitladder.files.probe import probe_machine
    from bitladder.plan.engine_need import attention_operations, engine_need

    model = files[0].model
    spans = []
    for one, window in itertools.pairwise([None, *windows]):
        assert window is not None
        kept = tokens_in_common(one.tokens.tolist(), window.tokens.tolist(), window.first) if one else 0
        spans.append((kept, len(window.tokens)))
    tokens = sum(stop - start for start, stop in spans)
    used = weights_used(model) + model.dims.n_vocab * model.dims.n_embd
    what = f"{what} on {tokens} tokens in the engine"
    operations = [2 * used * tokens + attention_operations(model, spans, cache) for cache in caches]
    return engine_need(what, [_bytes(file) for file in files], context, operations, probe_machine(), threads)


def _part(progress: Progress, group: slice, total: int) -> Progress:
    """The share of one group in the progress of all; news of levels still arrive."""
    if group == slice(0, total):
        return progress
    return Part(progress, group.start, group.stop, total)


def _bytes(file: GgufFile) -> int:
    return sum(header.path.stat().st_size for header in file.headers)
