"""Types of a KV cache, for keys and values apart, and the name of a level that is run with one.

A deployment is a level and a cache: ``Q4_K_M`` is the level with llama.cpp's own 16-bit cache, ``Q4_K_M+q8_0`` the
same weights with keys and values in 8 bits, ``Q4_K_M+q8_0/q4_0`` with keys in 8 and values in 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitladder.describe.cache import layer_caches
from bitladder.describe.model import Model
from bitladder.errors import UsageError
from bitladder.formats.blocks import QTYPES
from bitladder.formats.families import family_of

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""What llama.cpp keeps keys and values in."""
PLUS = "+"
_CUDA_PAIRS = frozenset({("f16", "f16"), ("bf16", "bf16"), ("q8_0", "q8_0"), ("q4_0", "q4_0")})
"""Pairs that a usual CUDA build of llama.cpp has a flash kernel for; others need GGML_CUDA_FA_ALL_QUANTS."""


@dataclass(frozen=True)
class CacheTypes:
    """What keys and what values are kept in, as llama.cpp spells it.

    Raises:
        UsageError: llama.cpp has no such cache.
    """

    k: str = "f16"
    v: str = "f16"

    def __post_init__(self) -> None:
        for kind in (self.k, self.v):
            if kind not in CACHE_TYPES:
                raise UsageError(
                    f"'{kind[:40]}' is no type of a KV cache.",
                    do=f"Choose of {', '.join(CACHE_TYPES)}; for keys and values apart write q8_0/q4_0.",
                )

    def __str__(self) -> str:
        return self.k if self.k == self.v else f"{self.k}/{self.v}"

    @property
    def is_default(self) -> bool:
        """llama.cpp's own, which needs no word."""
        return self == CacheTypes()

    def named(self, level: str) -> str:
        """What a level is called with this cache."""
        return level if self.is_default else f"{level}{PLUS}{self}"


F16_CACHE = CacheTypes()


def parse_cache(text: str) -> CacheTypes:
    """``q8_0``, or keys and values apart: ``q8_0/q4_0``; raises UsageError for anything else."""
    keys, _, values = text.strip().lower().partition("/")
    return CacheTypes(keys, values or keys)


def parse_caches(text: str) -> tuple[CacheTypes, ...]:
    """Several, as in ``f16,q8_0,q8_0/q4_0``, each once.

    Raises:
        UsageError: none is named, or one of them is no type of a cache.
    """
    found = tuple(dict.fromkeys(parse_cache(part) for part in text.split(",") if part.strip()))
    if not found:
        raise UsageError("No type of a KV cache is named.", do="Name one or several, like --kv f16,q8_0.")
    return found


def split_name(name: str) -> tuple[str, CacheTypes | None]:
    """A level and the cache that its name ends with; None where it names none."""
    level, plus, ending = name.rpartition(PLUS)
    try:
        return (level, parse_cache(ending)) if plus and level else (name, None)
    except UsageError:
        return name, None


def cache_gap(model: Model, cache: CacheTypes) -> str:
    """Why llama.cpp will not run a model with a cache; empty where it will.

    It keeps each head's row in whole blocks, and multiplies with quantized values in its flash kernel only.
    Source: llama.cpp's llama-context.cpp, ``llama_init_from_model`` (build 11549).
    """
    layers = [layer for layer in layer_caches(model) if layer.k_width]
    latent = any(layer.k_width and not layer.v_width for layer in layers)
    dims = model.dims
    widths = [("keys", cache.k, layers[0].k_width if latent else dims.head_dim_k)] if layers else []
    widths += [("values", cache.v, dims.head_dim_v)] if layers and not latent else []
    for what, kind, width in widths:
        block = QTYPES[kind.upper()].block_size
        if width % block:
            return f"{what} of {width} weights a head do not divide into {kind}'s blocks of {block}"
    if not family_of(dims.architecture).flash_attention and QTYPES[cache.v.upper()].block_size > 1:
        return f"llama.cpp attends without its flash kernel in '{dims.architecture}', and quantized values need it"
    return ""


def check_cache(model: Model, cache: CacheTypes) -> None:
    """Refuse a cache that llama.cpp will not run a model with, before any work.

    Raises:
        UsageError: it will not; the message says why.
    """
    if gap := cache_gap(model, cache):
        raise UsageError(
            f"{model.name or 'The model'} cannot have a KV cache of {cache}: {gap}.",
            means="llama.cpp refuses to start so.",
            do="Leave it out, or choose another type with --kv; f16 always works.",
        )


def slow_on_gpu(cache: CacheTypes) -> str:
    """A sentence where a usual CUDA build computes attention over such a cache on the CPU; else empty."""
    if (cache.k, cache.v) in _CUDA_PAIRS:
        return ""
    return (
        f"A usual CUDA build of llama.cpp has no attention kernel for a cache of {cache} and computes it on the CPU; "
        "build it with GGML_CUDA_FA_ALL_QUANTS, or choose f16, q8_0 or q4_0 for both"
    )


def slow_on_processor(cache: CacheTypes) -> str:
    """A sentence where a processor reads prompts more slowly with such a cache (``benchmarks/kv_prompt.py``); else
    empty."""
    if all(QTYPES[kind.upper()].block_size == 1 for kind in (cache.k, cache.v)):
        return ""
    return (
        f"On a processor llama.cpp reads long prompts several times more slowly with a cache of {cache}: its fast "
        "attention there is for 16 and 32 bits. Keep f16 where the memory is there"
    )
