"""What of a text that a model wrote is fit to calibrate on."""

import numpy as np
import pytest

from bitladder.describe.seed import Seed
from bitladder.describe.text import Document, languages_of
from bitladder.files.texts import shipped_seeds, shipped_texts
from bitladder.plan.own_text import LEAST_TOKENS, circling_start, loop_start, refusal, sound_part

ENGLISH = Seed("en-x", ("ask",), "begin")
WORDS = "a text in plain words that says nothing twice and goes on for long enough"


@pytest.mark.parametrize(
    ("ids", "end"),
    [
        (list(range(100)), 100),
        ([*range(50), *[7] * 40], 51),  # one token over and over: it stays once
        ([*range(50), *[1, 2, 3] * 12], 53),
        ([*range(50), *[1, 2, 3] * 12, 1, 2], 53),  # the last one cut short
        ([*range(50), *[1, 2, 3] * 3], 59),  # nine tokens: a list may do that
        ([*range(30), *range(60, 80), *range(60, 80)], 70),  # twice is no loop
        ([*[5] * 40, *range(100, 140)], 80),  # a loop that it came out of
        ([5] * 384, 1),
        ([], 0),
    ],
)
def test_a_loop_is_what_a_text_ends_in(ids, end):
    assert loop_start(ids) == end


def test_a_text_is_kept_up_to_its_loop():
    found = sound_part([*range(60), *[3, 4] * 30], WORDS, ENGLISH)
    assert (found.tokens, found.reason) == (62, "")


def test_a_text_that_goes_round_in_circles_is_kept_up_to_there():
    """Variations of one sentence, never twice the same: no loop, and nothing new either."""
    rng = np.random.default_rng(0)
    sentence = list(range(100, 120))
    circles = [token for _ in range(16) for token in [*sentence[: int(rng.integers(10, 20))], int(rng.integers(9))]]
    ids = [*range(200, 264), *circles]
    assert loop_start(ids) == len(ids)
    assert circling_start(ids) == 128
    assert sound_part(ids, WORDS, ENGLISH).tokens == 128


def test_code_and_tables_may_repeat_their_frame():
    rows = [token for row in range(40) for token in [1, 2, 1000 + row, 3, 4, 2000 + row, 5, 6]]
    assert circling_start(rows) == len(rows)


@pytest.mark.parametrize(
    ("ids", "text", "seed", "reason"),
    [
        ([], "", ENGLISH, "empty"),
        (list(range(60)), " \n\t ", ENGLISH, "empty"),
        (list(range(LEAST_TOKENS - 1)), WORDS, ENGLISH, "too short"),
        ([5] * 100, WORDS, ENGLISH, "a loop"),
        ([5, 6, 7] * 100, WORDS, ENGLISH, "a loop"),
        ([token for one in range(60) for token in (5, 5, 100 + one)], WORDS, ENGLISH, "one token over and over"),
        (list(range(60)), "все слова здесь по-русски, и ни одного английского", ENGLISH, "not in Latin script"),
        (list(range(60)), WORDS, Seed("ru-x", (), "", script="Cyrillic"), "not in Cyrillic script"),
        (
            list(range(60)),
            "これは日本語の文章です。カタカナと漢字もあります",
            Seed("ja", (), "", script="Japanese"),
            "",
        ),
        (
            list(range(60)),
            "соль, that is salt in plain words, and all the rest in English",
            Seed("ru-x", (), "", script="Cyrillic"),
            "not in Cyrillic script",
        ),
        (list(range(60)), "w\ufffd\ufffdo\ufffdrds and so on", ENGLISH, "broken characters"),
        (list(range(60)), WORDS + "\ufffd", ENGLISH, ""),  # cut within a character
        (list(range(60)), "1 2 3 4 5 6 7 8 9 10, x = 4", Seed("ru-x", (), "", script="Cyrillic"), ""),
        (list(range(LEAST_TOKENS)), WORDS, ENGLISH, ""),
    ],
)
def test_what_is_unfit_is_dropped_with_the_reason(ids, text, seed, reason):
    found = sound_part(ids, text, seed)
    assert found.reason == reason
    assert found.tokens == (0 if reason else len(ids))


def test_too_little_is_nothing():
    assert "only 4 of 10" in refusal(4, 10)
    assert refusal(5, 10) == ""
    assert refusal(0, 0)


def test_seeds_are_of_many_kinds_and_no_two_alike():
    seeds = shipped_seeds()
    names = [seed.name for seed in seeds]
    assert len(set(names)) == len(names) >= 64
    assert not set(names) & {document.name for document in shipped_texts("calibration")}
    assert all(seed.ask and all(seed.ask) and seed.begin.strip() for seed in seeds)
    languages = {language for name in names for language in languages_of(Document(name, ""))}
    assert len(languages) >= 22
    assert sum(name.startswith("code-") for name in names) >= 8
    assert sum(bool(seed.tools) for seed in seeds) >= 3
    assert sum(len(seed.ask) > 1 for seed in seeds) >= 3


def test_openings_are_in_the_script_that_they_ask_for():
    for seed in shipped_seeds():
        for text in (seed.begin, seed.ask[0]):
            assert sound_part(list(range(60)), text, seed).reason == "", (seed.name, text)
