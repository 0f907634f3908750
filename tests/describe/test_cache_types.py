"""Types of a KV cache: how they are spelled, what a level is called with one, which a model cannot have."""

from dataclasses import replace
from pathlib import Path

import pytest

from bitladder.describe.cache_types import (
    CacheTypes,
    cache_gap,
    check_cache,
    parse_cache,
    parse_caches,
    slow_on_processor,
    split_name,
)
from bitladder.describe.machine import Gpu, Machine
from bitladder.errors import UsageError
from bitladder.files.gguf import read_header
from bitladder.stages.plan import _slow_here
from tiny_engine import write_tiny


@pytest.mark.parametrize(
    ("text", "k", "v", "name"),
    [
        ("f16", "f16", "f16", "Q4_K_M"),
        (" Q8_0 ", "q8_0", "q8_0", "Q4_K_M+q8_0"),
        ("q8_0/q4_0", "q8_0", "q4_0", "Q4_K_M+q8_0/q4_0"),
        ("f16/q5_1", "f16", "q5_1", "Q4_K_M+f16/q5_1"),
        ("q8_0/", "q8_0", "q8_0", "Q4_K_M+q8_0"),
    ],
)
def test_a_cache_is_spelled_and_names_the_level_that_is_run_with_it(text, k, v, name):
    cache = parse_cache(text)
    assert (cache.k, cache.v, cache.named("Q4_K_M")) == (k, v, name)
    assert split_name(name) == ("Q4_K_M", None if cache.is_default else cache)


@pytest.mark.parametrize("text", ["", "q9", "q8_0/q9", "q8_0/q4_0/q4_0", "Q4_K_M", "f16;q8_0", "q8_0" * 1000])
def test_what_is_no_cache_is_refused_with_those_that_are(text):
    with pytest.raises(UsageError, match="is no type of a KV cache") as refused:
        parse_cache(text)
    assert "q8_0/q4_0" in str(refused.value)
    assert len(str(refused.value)) < 400


def test_several_are_each_taken_once_and_none_is_none():
    assert parse_caches("f16,q8_0,F16,q8_0/q8_0") == (CacheTypes(), CacheTypes("q8_0", "q8_0"))
    with pytest.raises(UsageError):
        parse_caches(" , ")


@pytest.mark.parametrize("name", ["Q4_K_M", "c++", "model+", "+q8_0", "a+b", "Q4_K_M+q9_0", "+"])
def test_a_name_that_ends_with_no_cache_is_itself(name):
    assert split_name(name) == (name, None)


@pytest.mark.parametrize(
    ("heads", "cache", "what"),
    [
        (4, "q4_0", ""),
        (4, "f16/q5_1", ""),
        (16, "f16", ""),
        (16, "bf16", ""),
        (16, "q8_0", "keys of 16"),
        (16, "f16/q8_0", "values of 16"),
    ],
)
def test_a_head_that_does_not_divide_into_blocks_is_told_before_any_work(tmp_path: Path, heads, cache, what):
    model = read_header(write_tiny(tmp_path / "tiny.gguf", heads=heads))
    gap = cache_gap(model, parse_cache(cache))
    assert gap.startswith(what) and bool(gap) == bool(what)
    if what:
        with pytest.raises(UsageError, match="refuses to start so"):
            check_cache(model, parse_cache(cache))


@pytest.mark.parametrize(
    ("cache", "slow"), [("f16", False), ("bf16", False), ("f32", False), ("q8_0", True), ("f16/q4_0", True)]
)
def test_caches_that_a_processor_reads_slowly_are_told(cache, slow):
    assert (f"a cache of {cache}:" in slow_on_processor(parse_cache(cache))) == slow
    assert bool(slow_on_processor(parse_cache(cache))) == slow


def test_the_plan_tells_it_of_the_machine_that_there_is():
    cpu = Machine("x", 2, (), 1 << 34, 1 << 34, 1 << 34)
    assert "On a processor" in _slow_here(cpu)(parse_cache("q4_0"))
    assert _slow_here(cpu)(parse_cache("f16")) == ""
    nvidia = replace(cpu, gpus=(Gpu("NVIDIA RTX 4090", 1 << 34, 1 << 34),))
    assert "CUDA build" in _slow_here(nvidia)(parse_cache("q5_1")) and _slow_here(nvidia)(parse_cache("q4_0")) == ""
    apple = replace(cpu, unified=True)
    assert _slow_here(apple)(parse_cache("q4_0")) == ""
