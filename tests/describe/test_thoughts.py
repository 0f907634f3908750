"""Thoughts apart from answers in every dialect, and loops along a text."""

import pytest

from bitladder.describe.repetition import loop_start, repeated_shares
from bitladder.describe.thoughts import DIALECTS, parted

NO_MARKS = "4"


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda one: one.begin)
def test_every_dialect(dialect):
    whole = parted(f"{dialect.begin} Is it 4 or 5? {dialect.end}\n\n4")
    assert whole == ("Is it 4 or 5?", "4", True, True)
    assert parted(f"\n{dialect.begin}Is it 5") == ("Is it 5", "", True, False)
    if dialect.end_alone:  # the chat template has written the beginning
        assert parted(f"Is it 4?{dialect.end}4") == ("Is it 4?", "4", True, True)


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>a</think><answer>4</answer>", "a", "4"),
        ("<think>a</think>\n<response>4", "a", "4"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>", "a", "4"),
        ("<|start|>assistant<|channel|>analysis<|message|>a", "a", ""),
        ("<think></think>4", "", "4"),
        ("write <think> before it", "", "write <think> before it"),
        ("  indented", "", "  indented"),
        ("a [THINK] b", "", "a [THINK] b"),
        ("", "", ""),
        ("<think>" * 50_000, "<think>" * 49_999, ""),
    ],
)
def test_texts(text, thought, answer):
    found = parted(text)
    assert (found.thought, found.answer) == (thought, answer)


def prose(words):
    """Words that repeat nothing."""
    return " ".join(f"w{number}" for number in range(words))


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (prose(300), None),
        (prose(200) + " and so it goes on" * 20, 205),  # the first time is no repetition
        (prose(200) + " the" * 30, 201),
        (prose(40) + " a b" * 2, None),
        ("no " * 20, None),  # too short to speak of a loop
        (prose(50) + " x y z" * 10 + " " + prose(20), None),  # it came out of it
        ("木" * 400, 1),
        ("", None),
    ],
)
def test_where_a_text_begins_to_loop(text, start):
    assert loop_start(text) == start


def test_repetition_along_a_text():
    assert repeated_shares(prose(149)) == [0.0, 0.0]
    shares = repeated_shares(prose(100) + " and so it goes on" * 20)
    assert shares[:2] == [0.0, 0.0]
    assert 0.8 < shares[2] < 1.0
    assert shares[3] == 1.0
    assert repeated_shares("") == []


def test_neither_takes_long_on_hostile_texts():
    assert loop_start("a " * 2_000_000) is not None
    assert len(repeated_shares("a b " * 500_000)) < 2001
