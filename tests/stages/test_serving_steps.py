"""How many requests each level may compute at once, from the memory that is there."""

import itertools

import pytest

from bitladder.describe.cache import cache_bytes, layer_caches
from bitladder.files.gguf import GgufFile
from bitladder.stages.run_facts import MOST_SLOTS
from bitladder.stages.serve import memory_by_slots, slots_that_fit

BIG, SMALL = (10, 12, 14, 16), (5, 6, 7, 8)


@pytest.mark.parametrize(
    ("needs", "budget", "slots"),
    [
        ((BIG, SMALL), 0, (4, 4)),  # nothing is known: no bound
        ((BIG, SMALL), 24, (4, 4)),
        ((BIG, SMALL), 23, (3, 4)),
        ((BIG, SMALL), 16, (1, 2)),  # the speed tier first
        ((BIG, SMALL), 15, (1, 1)),
        ((BIG, SMALL), 12, (2, 4)),  # they take turns: each has the memory to itself
        ((BIG,), 13, (2,)),
        ((BIG,), 1, (1,)),
        (((10,), (5,)), 100, (1, 1)),
        ((), 5, ()),
    ],
)
def test_as_many_as_leave_every_level_in_memory(needs, budget, slots):
    assert slots_that_fit(needs, budget) == slots


@pytest.mark.model
def test_memory_grows_by_a_cache_per_request(demo_gguf):
    found = memory_by_slots(demo_gguf, 2048, range(1, MOST_SLOTS + 1))
    with GgufFile.open(demo_gguf) as file:
        cache = cache_bytes(layer_caches(file.model), 2048).total
        logits = 4 * file.model.dims.n_vocab
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert steps == [cache + logits] * (MOST_SLOTS - 1)
