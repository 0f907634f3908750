"""Two answers side by side: where they part, tie or real, and which words differ."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitladder.engines.base import Completion, Timings, TokenChoice
from bitladder.serve.compare import compare, compared, differences, first_difference


def token(text: str, chance: float, **others: float) -> TokenChoice:
    top = {text: chance, **others}
    return TokenChoice(text, math.log(chance), top=tuple(TokenChoice(name, math.log(p)) for name, p in top.items()))


def completion(text: str, *tokens: TokenChoice) -> Completion:
    return Completion(text, "stop", 5, len(tokens), "m", 0.25, 1.0, tokens, Timings(5, 100.0, len(tokens), 20.0))


def test_the_first_token_where_they_part_and_what_each_gave_it():
    a = [token("The", 0.9), token("cat", 0.6, dog=0.3), token("sat", 0.9)]
    b = [token("The", 0.8), token("dog", 0.7, cat=0.2), token("ran", 0.9)]
    found = first_difference(a, b)
    assert found is not None
    assert (found.index, found.token_a, found.token_b) == (1, "cat", "dog")
    assert (found.a_of_a, found.a_of_b, found.b_of_a, found.b_of_b) == pytest.approx((0.6, 0.3, 0.2, 0.7))
    assert not found.is_tie


@pytest.mark.parametrize(
    ("a_of_b", "b_of_a", "tie"), [(0.3, 0.3, True), (0.26, 0.26, True), (0.3, 0.2, False), (0.2, 0.3, False)]
)
def test_a_choice_that_both_levels_nearly_made_the_other_way_is_a_tie(a_of_b, b_of_a, tie):
    found = first_difference([token("x", 0.5, y=a_of_b)], [token("y", 0.5, x=b_of_a)])
    assert found is not None and found.is_tie is tie


def test_a_token_that_was_not_told_has_no_probability_and_makes_no_tie():
    found = first_difference([token("x", 0.5)], [token("y", 0.5)])
    assert found is not None and math.isnan(found.a_of_b) and not found.is_tie


def test_equal_answers_do_not_part():
    assert first_difference([token("x", 0.5)], [token("x", 0.9)]) is None
    assert first_difference([token("x", 0.5)], []) is None


@given(st.text("ab .,\n", max_size=40), st.text("ab .,\n", max_size=40))
def test_the_runs_of_each_side_join_to_its_text(a, b):
    spans = differences(a, b)
    assert "".join(span.text for span in spans if span.where != "b") == a
    assert "".join(span.text for span in spans if span.where != "a") == b
    assert all(span.text for span in spans)


def test_words_that_differ_are_marked():
    spans = differences("The cat sat here.", "The dog sat here.")
    assert [(span.where, span.text) for span in spans] == [
        ("both", "The "),
        ("a", "cat"),
        ("b", "dog"),
        ("both", " sat here."),
    ]


def test_speeds_stand_beside_the_texts():
    found = compared(
        "p", ("Q8_0", completion("yes", token("yes", 0.9))), ("Q4_K_M", completion("yes", token("yes", 0.8)))
    )
    assert found.same and found.parting is None
    assert (found.b.level, found.b.first_token_s, found.b.decode_tokens_per_s) == ("Q4_K_M", 0.25, 20.0)


def test_both_engines_are_asked_the_same_greedily():
    class Engine:
        parallel = 1

        def __init__(self, name: str) -> None:
            self.name, self.asked = name, []

        def chat(self, chat) -> Completion:
            self.asked.append(chat)
            return completion(self.name, token(self.name, 0.9))

        def close(self) -> None: ...

    a, b = Engine("A"), Engine("B")
    found = compare(a, b, "hello", max_tokens=7, system="be brief")
    assert a.asked == b.asked
    (chat,) = a.asked
    assert [message["role"] for message in chat.messages] == ["system", "user"]
    assert chat.max_tokens == 7 and chat.temperature == 0.0 and chat.logprobs > 0
    assert not found.same and found.parting is not None
