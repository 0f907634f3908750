"""What a bounded run does next, as a table of cases; and a whole run on a simulated clock."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bitladder.plan.schedule import (
    LEAST,
    Kind,
    Piece,
    Seen,
    contending,
    far_off,
    looks,
    next_piece,
    open_levels,
    spread,
    worth_asking,
)
from bitladder.records.decision import Certainty, Decision, Loss, Status, Verdict

DOCUMENTS, INPUTS, ROUNDS = Kind
TOTALS = {DOCUMENTS: 12, INPUTS: 24, ROUNDS: 3}
EVER = math.inf


def free(_):
    return 0.0


def a_second_each(piece):
    return (piece.stop - piece.start) * len(piece.levels)


def ladder(*counts, names="ABCDEF"):
    return [Seen(name, *count) for name, count in zip(names, counts, strict=False)]


@pytest.mark.parametrize(
    ("kind", "total", "ends"),
    [
        (DOCUMENTS, 12, (6, 12)),
        (DOCUMENTS, 9, (6, 9)),
        (DOCUMENTS, 8, (8,)),
        (DOCUMENTS, 100, (25, 100)),
        (DOCUMENTS, 2, (2,)),
        (DOCUMENTS, 1, (1,)),
        (DOCUMENTS, 0, ()),
        (DOCUMENTS, 3, (3,)),
        (INPUTS, 5, (5,)),
        (INPUTS, 25, (7, 25)),
        (INPUTS, 3, (3,)),
        (INPUTS, 4000, (1000, 4000)),
        (ROUNDS, 3, (1, 3)),
        (ROUNDS, 1, (1,)),
        (ROUNDS, 0, ()),
    ],
)
def test_looks_grow_fourfold(kind, total, ends):
    assert looks(kind, total) == ends


NOTHING, LOOKED, MORE, ALL = (0, 0, 0), (3, 6, 1), (6, 6, 1), (12, 24, 3)
CASES = {
    # first a look at everything, all levels, open or not
    "documents first": (ladder(NOTHING, NOTHING), "", EVER, (DOCUMENTS, "AB", 0, 6)),
    "then inputs": (ladder((3, 0, 0), (3, 0, 0)), "", EVER, (INPUTS, "AB", 0, 6)),
    "then a round": (ladder((3, 6, 0), (3, 6, 0)), "", EVER, (ROUNDS, "AB", 0, 1)),
    "those that lack it": (ladder(LOOKED, (0, 6, 1)), "A", EVER, (DOCUMENTS, "B", 0, 3)),
    # then what is open
    "nothing open": (ladder(LOOKED, LOOKED), "", EVER, None),
    "an open level": (ladder(LOOKED, LOOKED, LOOKED), "B", EVER, (DOCUMENTS, "B", 3, 6)),
    "what least was seen of": (ladder(MORE, MORE), "AB", EVER, (INPUTS, "AB", 6, 24)),
    "rounds when it is their turn": (ladder((6, 12, 1)), "A", EVER, (ROUNDS, "A", 1, 3)),
    "the level that is behind": (ladder((6, 12, 3), LOOKED), "AB", EVER, (DOCUMENTS, "B", 3, 6)),
    "an uneven beginning": (ladder((4, 6, 1)), "A", EVER, (INPUTS, "A", 6, 24)),
    "goes on to the usual end": (ladder((4, 24, 3)), "A", EVER, (DOCUMENTS, "A", 4, 6)),
    "a kind that is used up": (ladder((12, 24, 1)), "A", EVER, (ROUNDS, "A", 1, 3)),
    "all used up": (ladder(ALL, LOOKED), "A", EVER, None),
    "an unknown open level": (ladder(LOOKED), "Z", EVER, None),
    # time
    "no time": (ladder(NOTHING, NOTHING), "", 0, None),
    "a shorter look": (ladder(NOTHING, NOTHING), "", 8, (DOCUMENTS, "AB", 0, 2)),
    "a look at some, the smallest among them": (ladder(*[NOTHING] * 5), "", 12, (DOCUMENTS, "ACE", 0, 2)),
    "the others when it turns out quicker": (
        ladder((2, 0, 0), NOTHING, (2, 0, 0), NOTHING, (2, 0, 0)),
        "",
        12,
        (DOCUMENTS, "BD", 0, 2),
    ),
    "all the time for losses": (ladder(NOTHING, NOTHING), "", 2, (DOCUMENTS, "B", 0, 2)),
    "and of the others next": (ladder(NOTHING, (2, 0, 0)), "B", 9, (DOCUMENTS, "A", 0, 2)),
    "a look at what fits": (ladder(NOTHING, NOTHING), "", 1.9, None),
    "half of the time for speeds": (ladder((12, 12, 0), (12, 12, 0)), "", 2, (ROUNDS, "B", 0, 1)),
    "a shorter piece": (ladder(LOOKED), "A", 2, (DOCUMENTS, "A", 3, 5)),
    "another kind where one does not fit": (ladder((6, 12, 1)), "A", 1, (ROUNDS, "A", 1, 2)),
    "not even one": (ladder(LOOKED), "A", 0.5, None),
}


@pytest.mark.parametrize(("seen", "still_open", "left", "expected"), CASES.values(), ids=CASES)
def test_what_comes_next(seen, still_open, left, expected):
    found = next_piece(seen, TOTALS, set(still_open), a_second_each, left)
    assert found == (expected and Piece(expected[0], tuple(expected[1]), *expected[2:]))


def test_what_cannot_be_chosen_any_more_gets_no_first_look():
    seen = ladder((6, 0, 0), (6, 0, 0), (6, 0, 0))
    assert next_piece(seen, TOTALS, {"A"}, free, EVER, closed={"B"}) == Piece(INPUTS, ("A", "C"), 0, 6)
    assert next_piece(seen, TOTALS, set(), free, EVER, closed=set("ABC")) is None


def test_a_kind_there_is_nothing_of_is_left_out():
    totals = {DOCUMENTS: 0, INPUTS: 4, ROUNDS: 0}
    assert next_piece([Seen("A")], totals, {"A"}, free, EVER) == Piece(INPUTS, ("A",), 0, 4)
    assert next_piece([Seen("A", inputs=4)], totals, {"A"}, free, EVER) is None


def run(totals, names, is_open, cost, seconds):
    """All pieces of a run on a clock of its own, with the seconds each took."""
    seen, spent, pieces = {name: Seen(name) for name in names}, 0.0, []
    while piece := next_piece(list(seen.values()), totals, is_open(seen), cost, seconds - spent):
        spent += cost(piece)
        pieces.append(piece)
        for name in piece.levels:
            before = {kind: seen[name].of(kind) for kind in Kind}
            assert before[piece.kind] == piece.start < piece.stop <= totals[piece.kind]
            seen[name] = Seen(
                name, **{kind.value: count for kind, count in (before | {piece.kind: piece.stop}).items()}
            )
    return seen, spent, pieces


@pytest.mark.parametrize("seed", range(40))
def test_runs_end_in_time_and_waste_none(seed):
    rng = np.random.default_rng(seed)
    names = "ABCDEFGH"[: rng.integers(1, 9)]
    totals = {kind: int(rng.integers(0, 40)) for kind in Kind}
    each = {kind: rng.uniform(0.1, 3) for kind in Kind}
    seconds = rng.uniform(0, 400)
    contested = set(rng.choice(list(names), size=rng.integers(0, len(names) + 1), replace=False).tolist())

    def cost(piece):
        return 0.5 + each[piece.kind] * (piece.stop - piece.start) * len(piece.levels)

    seen, spent, pieces = run(totals, names, lambda _: contested, cost, seconds)
    assert spent <= seconds
    for name, own in seen.items():
        for kind in Kind:
            first = looks(kind, totals[kind])[:1]
            assert name in contested or own.of(kind) <= (first[0] if first else 0)
            if spent + cost(Piece(kind, tuple(names), 0, max(totals[kind], 1))) <= seconds and name in contested:
                assert own.of(kind) == totals[kind]  # there was time, so nothing open is left
    assert len(pieces) == len(set(pieces))


def test_of_a_ladder_as_many_levels_as_there_is_time_for():
    names = "ABCDEFG"

    def cost(some):
        return 10.0 * len(some)

    assert spread(names, cost, 100) == tuple(names)
    assert spread(names, cost, 40) == ("A", "C", "E", "G")
    assert spread(names, cost, 39) == ("A", "D", "G")
    assert spread(names, cost, 20) == ("A", "G")
    assert spread(names, cost, 19) == ("G",)
    assert spread(names, cost, 9) == () == spread((), cost, 9)
    for count in range(1, 30):
        ladder_ = tuple(range(count))
        for wanted in range(1, count + 1):
            found = spread(ladder_, len, wanted)
            assert found[-1] == count - 1 and len(found) <= wanted


def test_a_look_always_shows_something():
    assert all(looks(kind, 50)[0] >= LEAST[kind] for kind in Kind)


def decided(quality, speed, pairs, **verdicts):
    """A decision; verdicts by level: status, and whether no loss can be told."""
    found = tuple(
        Verdict(level, status, "", Loss.NOT_SEEN if lossless else Loss.MEASURABLE)
        for level, (status, lossless) in verdicts.items()
    )
    sure = tuple(Certainty(*pair, share) for pair, share in pairs)
    return Decision("kl < 0.1", quality, speed, found, "", certainty=sure)


MEETS, FAILS, UNKNOWN = (Status.MEETS, False), (Status.FAILS, False), (Status.UNKNOWN, False)
NEAR = (Status.BOTH, True)
SIZES = {"F": 9, "E": 8, "D": 7, "C": 6, "B": 5, "A": 4}
OPEN = {
    "nothing known": (decided(None, None, [], E=UNKNOWN, A=UNKNOWN), "AE"),
    "all fail": (decided(None, None, [((None, None), 1.0)], E=FAILS, A=FAILS), ""),
    "the tiers stay": (decided("D", "B", [(("D", "B"), 1.0)], E=MEETS, D=NEAR, B=MEETS, A=FAILS), "DB"),
    "a rival pair": (decided("D", "D", [(("D", "D"), 0.9), (("D", "B"), 0.1)], D=NEAR, B=MEETS, A=FAILS), "DB"),
    "a sure pair's rivals": (decided("D", "D", [(("D", "D"), 0.96), (("E", "B"), 0.04)], D=NEAR, B=MEETS), "D"),
    "no level as a rival": (decided("D", "D", [(("D", "D"), 0.9), ((None, None), 0.1)], D=NEAR), "D"),
    "smaller and open": (decided("D", "D", [(("D", "D"), 1.0)], E=UNKNOWN, D=NEAR, A=UNKNOWN), "DA"),
    "larger and open, where the tier has a loss": (
        decided("D", "D", [(("D", "D"), 1.0)], E=UNKNOWN, D=MEETS, A=FAILS), "DE",
    ),
    "what does not fit": (decided("D", "D", [(("D", "D"), 1.0)], D=NEAR, A=(Status.DOES_NOT_FIT, False)), "D"),
}  # fmt: skip


def test_what_is_far_above_the_limit_gets_no_answers_however_few_documents_say_so():
    losses = {"Q8_0": 0.002, "Q4_K_M": 0.5, "Q2_K": 1.5, "lost": math.nan}
    assert far_off("kl < 0.1 and no known loss", losses) == {"Q2_K"}
    assert far_off("kl < 0.1, kl p99 < 3, kl < 0.04", losses) == {"Q4_K_M", "Q2_K"}
    assert far_off("top1 > 0.9", losses) == set()


def test_levels_that_hold_the_bar_or_may_are_contending():
    found = decided("D", "D", [], F=(Status.REFERENCE, True), E=UNKNOWN, D=NEAR, C=MEETS, B=FAILS)
    assert contending(found) == {"E", "D", "C"}


def test_open_levels_are_worth_asking_where_answers_may_show_that_they_hold_the_bar():
    pairs = [(("D", "C"), 0.8), (("D", "B"), 0.2)]
    found = decided("D", "C", pairs, E=MEETS, D=NEAR, C=MEETS, B=UNKNOWN, A=UNKNOWN)
    assert worth_asking(found, SIZES) == set("DCB")  # as the bar is on KL: A is open, and no answer closes it
    for bar in ("kl < 0.1 and no loss", "passes >= reference - 4 points", "recall >= 90%"):
        assert worth_asking(replace(found, bar=bar), SIZES) == set("DCBA")


@pytest.mark.parametrize(("decision", "expected"), OPEN.values(), ids=OPEN)
def test_which_levels_are_open(decision, expected):
    assert open_levels(decision, SIZES) == set(expected)
