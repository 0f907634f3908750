"""Windows of several depths: the same tokens are scored, behind a longer or a shorter context."""

import numpy as np
import pytest

from bitladder.describe.depths import by_depth, check_depths, depth_windows, usual_depths
from bitladder.describe.windows import tokens_hash, tokens_in_common
from bitladder.errors import BadInput, UsageError

FILLER = [list(range(1000, 1400)), list(range(1400, 1900))]


def scored(window):
    return window.tokens[window.first + 1 :].tolist()


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize("lengths", [(300, 650), (80,), (9000, 500), (5000,)])
def test_the_same_tokens_are_scored_at_every_depth_behind_more_context(bos, lengths):
    documents = [(f"text {at}", list(range(10_000 * at, 10_000 * at + n))) for at, n in enumerate(lengths, 1)]
    shallow, middle, deep = depth_windows(documents, FILLER, (256, 1024, 4096), bos=bos)
    assert [one.depth for one in (shallow, middle, deep)] == [256, 1024, 4096]
    for one, two, three in zip(shallow.windows, middle.windows, deep.windows, strict=True):
        assert scored(one) == scored(two) == scored(three)
        assert one.document == two.document == three.document
        for window, depth in ((one, 256), (two, 1024), (three, 4096)):
            assert len(window.tokens) == depth
            assert bos is None or window.tokens[0] == bos
            assert not {*scored(window)} & {*window.tokens[: window.first + 1].tolist()}  # never read before
    assert {window.document for window in deep.windows} == {name for name, _ in documents}


def test_short_documents_have_the_same_filler_before_them_and_long_ones_their_own_text():
    documents = [
        ("a", list(range(10_000, 10_300))),
        ("b", list(range(20_000, 20_200))),
        ("c", list(range(30_000, 36_000))),
    ]
    (deep,) = depth_windows(documents, FILLER, (4096,))
    first, second, *own = deep.windows
    assert tokens_in_common(first.tokens.tolist(), second.tokens.tolist(), second.first) == 4096 - 300
    assert all(window.tokens.min() >= 30_000 for window in own)


def test_windows_of_other_depths_are_another_text():
    documents = [("a", list(range(10_000, 14_000)))]
    one, two = depth_windows(documents, FILLER, (256, 512))
    assert tokens_hash(one.windows) != tokens_hash(two.windows)
    assert by_depth([one, two]) == {256: slice(0, 4), 512: slice(4, 8)}  # parts of one document


def test_too_little_text_is_told():
    with pytest.raises(BadInput, match="too short"):
        depth_windows([("a", [1] * 20)], FILLER, (256,))
    with pytest.raises(BadInput, match="No text fills"):
        depth_windows([("a", [1] * 200)], [], (256,))


@pytest.mark.parametrize(("depths", "trained"), [((100, 512), 4096), ((), 4096), ((512, 8192), 4096)])
def test_depths_that_cannot_be_are_refused(depths, trained):
    with pytest.raises(UsageError):
        check_depths(depths, trained)


def test_depths_grow_up_to_the_context():
    assert usual_depths(4096) == (512, 4096)
    assert usual_depths(16384) == (512, 4096, 16384)
    assert usual_depths(300) == (300,)
    assert check_depths((4096, 512, 512), 0) == (512, 4096)


def test_few_tokens_in_common_are_none():
    ids = np.arange(500).tolist()
    assert tokens_in_common(ids, [*ids[:100], 9999, *ids[101:]], 250) == 0
    assert tokens_in_common(ids, [*ids[:200], 9999, *ids[201:]], 250) == 200
    assert tokens_in_common(ids, ids, 250) == 250
    assert tokens_in_common([], ids, 250) == 0
