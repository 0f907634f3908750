"""Two answers side by side: where they part, tie or real, and which words differ."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitladder.engines.base import Completion, Timings, TokenChoice
from bitladder.records.wording import Parting
from bitladder.serve.compare import (
    MOST_LATER,
    Comparison,
    Side,
    compare,
    compared,
    differences,
    first_difference,
    later_partings,
)

HELLO = [{"role": "user", "content": "hello"}]


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


@settings(deadline=None)
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
    found = compare(a, b, [{"role": "system", "content": "be brief"}, *HELLO], max_tokens=7)
    assert a.asked == b.asked
    (chat,) = a.asked
    assert [message["role"] for message in chat.messages] == ["system", "user"]
    assert chat.max_tokens == 7 and chat.temperature == 0.0 and chat.logprobs > 0
    assert not found.same and found.parting is not None


SAID = [1, 2, 3, 4, 5, 6]
PROMPT = [100, 101]


def known(token_id: int, chance: float = 0.9, other: int | None = None, its_chance: float = 0.05) -> TokenChoice:
    top = [TokenChoice(f"t{token_id}", math.log(chance), token_id)]
    top += [TokenChoice(f"t{other}", math.log(its_chance), other)] if other else []
    return TokenChoice(f"t{token_id}", math.log(chance), token_id, tuple(top))


class Follower:
    """Goes on as the answer does except at some places: ``{index: (token, its chance, the answer's token's)}``."""

    name, parallel = "B", 1

    def __init__(self, departs, prompt=PROMPT):
        self.departs, self.prompt, self.requests = departs, prompt, 0

    def chat(self, _):
        return completion("b", *self.continue_tokens(self.prompt, max_tokens=len(SAID), top=1))

    def close(self): ...

    def render(self, _):
        return "prompt"

    def tokenize(self, text, add_special=False):
        return self.prompt

    def continue_tokens(self, tokens, *, max_tokens, top):
        self.requests += 1
        start = len(tokens) - len(PROMPT)
        assert list(tokens[len(PROMPT) :]) == SAID[:start]
        choices = []
        for place in range(start, start + max_tokens):
            if place in self.departs:
                other, chance, its_chance = self.departs[place]
                return [*choices, known(other, chance, SAID[place], its_chance), known(999)]
            choices.append(known(SAID[place]))
        return choices


def test_b_is_put_back_on_the_words_of_a_after_each_place():
    departs = {0: (9, 0.9, 0.05), 3: (8, 0.5, 0.4), 5: (7, 0.9, 0.01)}
    said = [known(one, 0.5, 8, 0.4) if one == SAID[3] else known(one) for one in SAID]
    a, b = Follower({}), Follower(departs)
    a.chat = lambda _: completion("a", *said)
    found = compare(a, b, HELLO)
    assert found.parting is not None and found.parting.index == 0 and not found.parting.is_tie
    assert [(at.index, at.token_a, at.token_b, at.is_tie) for at in found.later] == [
        (3, "t4", "t8", True),
        (5, "t6", "t7", False),
    ]
    assert b.requests == 3  # the chat, and what follows each place but the last token


def test_what_cannot_be_put_back_is_not():
    same, other = Follower({}), Follower({0: (9, 0.9, 0.01)}, prompt=[100, 102])
    assert compare(same, other, HELLO).later is None  # another tokenizer
    assert (
        later_partings([token("x", 0.9)], first_difference([known(1)], [known(2)]), same, PROMPT) is None
    )  # ids are not told


def test_the_search_for_places_has_a_limit():
    said = [known(one) for one in range(1, 40)]

    class Contrary(Follower):
        def continue_tokens(self, tokens, *, max_tokens, top):
            return [known(999)]

    later = later_partings(said, first_difference(said, [known(999)]), Contrary({}), PROMPT)
    assert [at.index for at in later] == list(range(1, 1 + MOST_LATER))


def test_names_and_speeds_are_whole_on_a_narrow_terminal(monkeypatch, capsys):
    from bitladder.cli.compare import _show

    monkeypatch.setenv("COLUMNS", "80")
    one = Side("SmolLM2-135M-Instruct-with-a-long-name-Q8_0", "It is 8.", "stop", 5, 0.051, 22.31)
    other = Side("SmolLM2-135M-Instruct-with-a-long-name-Q4_K_M", "It is 12.", "stop", 5, 0.042, 31.24)
    place = Parting(3, " 8", " 12", 0.8, math.nan, 0.06, 0.7)
    _show(Comparison("How many?", one, other, place, differences("It is 8.", "It is 12."), (place,)))
    shown = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    flat = shown.replace(" ", "")
    for side in (one, other):
        assert side.level in flat
        assert f"{side.decode_tokens_per_s:.1f}tok/s,firsttokenafter{side.first_token_s:.2f}s" in flat
    assert "' 12' was not among its likeliest" in shown
    assert "at 1 further places, 0 of them near ties" in shown
