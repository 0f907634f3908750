"""Steps before serving: how many requests each level may compute at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from bitladder.describe.cache_types import F16_CACHE, CacheTypes
from bitladder.errors import BadInput
from bitladder.progress import Progress

if TYPE_CHECKING:
    from bitladder.engines.speculation import Speculation
    from bitladder.levels import FileLevel


_POOLS_TO_A_RANK = 4  # llama.cpp's LLAMA_POOLING_TYPE_RANK


def is_level(what: str) -> bool:
    """Whether a tier is a level of a model, and neither an endpoint nor a file.

    Raises:
        BadInput: it is spelled as a file, and there is none.
        UsageError: it is spelled as an address, and is none.
    """
    from bitladder.engines.address import is_address, split_address

    if is_address(what):
        split_address(what)
        return False
    if Path(what).is_file():
        return False
    if "/" in what or what.lower().endswith(".gguf"):
        raise BadInput(f"There is no file '{what}'.", do="Give a level, a GGUF file, or URL#MODEL.")
    return True


def is_only_a_name(model: str) -> bool:
    """Whether MODEL names no file, folder or store, and so can only be what a deployment is called."""
    from bitladder.files.sources import DEMOS

    spelled = "/" in model or ":" in model or model.lower().endswith(".gguf") or model in DEMOS
    return not spelled and not Path(model).exists()


def split_tier(what: str) -> tuple[str, CacheTypes | None]:
    """A tier as it is named, ``Q4_K_M+q8_0`` or ``file.gguf+q8_0/q4_0``: what it is of, and its KV cache; None where it
    names none. A file or an address that is called so is itself."""
    from bitladder.describe.cache_types import split_name
    from bitladder.engines.address import is_address

    return (what, None) if is_address(what) or Path(what).exists() else split_name(what)


def tier_context(model: str, what: str, n_ctx: int | None, progress: Progress, cache: CacheTypes = F16_CACHE) -> int:
    """The context in tokens that a tier gets; what cannot be served is refused here, before anything is built.

    Args:
        model: what ``what`` is a level of, when it is one.
        what: a GGUF file, or a level.
        n_ctx: the context asked for; None: `usable_context`.
        progress: hears about a fetched model.
        cache: types of the KV cache that it is run with.

    Raises:
        UnknownLevel: neither a file nor a level.
        BadInput: a file that is no model, or a model that is not there.
        UsageError: the model was not trained for such a context, or cannot have such a cache.
    """
    from bitladder.describe.cache_types import check_cache
    from bitladder.files.gguf import read_header
    from bitladder.files.sources import resolve
    from bitladder.plan.ladder import usable_context
    from bitladder.stages.run_facts import level_of

    if not is_level(what):
        header = read_header(Path(what))
        check_cache(header, cache)
        return usable_context(header, n_ctx)
    source = read_header(resolve(model, progress).path)
    check_cache(source, cache)
    if what.upper() != level_of(source):
        served_level(what)
    return usable_context(source, n_ctx)


def served_level(name: str) -> FileLevel:
    """A level that is served, and built where it is nowhere.

    Raises:
        UnknownLevel: there is none of that name.
        UsageError: it is of a kind that is not served.
    """
    from bitladder.levels import FeedbackLevel, FoldedLevel, RecipeLevel, of_kinds, parse_level

    of_kinds(
        [level := parse_level(name)],
        (RecipeLevel, FeedbackLevel, FoldedLevel),
        what="Serving",
        why="llama.cpp, which is started here, runs GGUF files; folders are run by vLLM, TGI and transformers.",
        do="Build it with `bitladder quantize`, serve the folder with vLLM, and give the address: URL#MODEL.",
    )
    return cast("FileLevel", level)


def check_reranker(path: Path) -> None:
    """Raise BadInput for a file that is no reranker: llama.cpp ranks with any model, and the numbers mean nothing."""
    from bitladder.files.gguf import read_header

    header = read_header(path)
    pooling = header.metadata.get(f"{header.metadata.get('general.architecture')}.pooling_type")
    if pooling != _POOLS_TO_A_RANK and not any(tensor.name.startswith("cls.") for tensor in header.tensors):
        raise BadInput(
            f"'{path}' is no reranker: it has neither a head that ranks nor says that it is one.",
            do="Give a reranker's GGUF file, such as bge-reranker-v2-m3's, or URL#MODEL.",
        )


def check_template(path: Path) -> None:
    """Raise ModelRefused for a file whose chat template does not end."""
    from bitladder.files.chat_template import refuse_endless
    from bitladder.files.gguf import read_header

    refuse_endless(read_header(path).metadata, f"'{path}'")


def memory_by_slots(path: Path, n_ctx: int, slots: Sequence[int], cache: CacheTypes = F16_CACHE) -> tuple[int, ...]:
    """Bytes that a GGUF file takes with so many requests of ``n_ctx`` tokens each, for every number in ``slots``.

    Raises:
        BadInput: the file is no model.
        UsageError: the model was not trained for such a context.
    """
    from bitladder.files.gguf import GgufFile
    from bitladder.files.probe import probe_machine
    from bitladder.plan.ladder import file_memory

    machine = probe_machine()
    with GgufFile.open(path) as opened:
        return tuple(file_memory(opened.model, machine, n_ctx=n_ctx, n_seq=number, cache=cache) for number in slots)


def guess_bytes(path: Path, speculation: Speculation | None, n_ctx: int, slots: Sequence[int]) -> tuple[int, ...]:
    """Bytes that guessing takes beside a model with so many requests, for every number in ``slots``: a draft with its
    cache; the cache and buffers of the model's own heads, whose weights are the model's; n-grams take next to none."""
    from bitladder.engines.speculation import MTP
    from bitladder.files.gguf import read_header
    from bitladder.plan.memory import ENGINE_BYTES, heads_bytes

    if speculation is None:
        return (0,) * len(slots)
    if speculation.kind == MTP:
        model = read_header(path)
        return tuple(heads_bytes(model, n_ctx, n_seq=number) for number in slots)
    if speculation.draft is None:
        return (0,) * len(slots)
    return tuple(need - ENGINE_BYTES for need in memory_by_slots(speculation.draft, n_ctx, slots))


def slots_that_fit(needs: Sequence[Sequence[int]], budget_bytes: int) -> tuple[int, ...]:
    """Requests at once for each level: as many as leave every level in memory beside the others.

    They are given one by one, the last level first (the speed tier is for volume). Levels that must take turns
    anyway get what fits when they have the memory to themselves.

    Args:
        needs: for each level the bytes it takes with one request at once, with two, and so on, rising.
        budget_bytes: memory for all of them; 0: unknown, no bound.
    """
    slots = [1] * len(needs)
    together = sum(need[0] for need in needs) <= budget_bytes or not budget_bytes

    def taken(level: int) -> int:
        others = sum(needs[one][slots[one] - 1] for one in range(len(needs)) if one != level) if together else 0
        return needs[level][slots[level]] + others

    for _ in range(max(map(len, needs), default=0)):
        for level in reversed(range(len(needs))):
            if slots[level] < len(needs[level]) and (not budget_bytes or taken(level) <= budget_bytes):
                slots[level] += 1
    return tuple(slots)
