"""Names of levels and what follows from their kinds."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitladder.errors import UnknownLevel, UsageError
from bitladder.formats.recipes import RECIPES
from bitladder.levels import (
    LADDER,
    CheckpointLevel,
    Container,
    FeedbackLevel,
    FoldedLevel,
    Needs,
    RecipeLevel,
    of_kinds,
    parse_level,
    parse_levels,
)


@pytest.mark.parametrize(
    ("name", "kind", "printed", "container", "needs"),
    [
        ("q4_k_m", RecipeLevel, "Q4_K_M", Container.FILE, Needs.IMPORTANCE),
        (" F16 ", RecipeLevel, "F16", Container.FILE, Needs.NOTHING),
        ("Q8_0", RecipeLevel, "Q8_0", Container.FILE, Needs.NOTHING),
        ("gptq-iq4_xs", FeedbackLevel, "GPTQ-IQ4_XS", Container.FILE, Needs.CALIBRATION),
        ("BPW4.5", FeedbackLevel, "bpw4.50", Container.FILE, Needs.CALIBRATION),
        ("bpw4.125", FeedbackLevel, "bpw4.125", Container.FILE, Needs.CALIBRATION),
        ("awq-q3_k_m", FoldedLevel, "AWQ-Q3_K_M", Container.FILE, Needs.CALIBRATION),
        ("awq-4BIT-g64", CheckpointLevel, "AWQ-4bit-g64", Container.FOLDER, Needs.CALIBRATION),
        ("gptq-3bit-row-ct", CheckpointLevel, "GPTQ-3bit-row-ct", Container.FOLDER, Needs.CALIBRATION),
        ("int8-w8a8", CheckpointLevel, "INT8-W8A8", Container.FOLDER, Needs.NOTHING),
        ("int8-w8a8-smooth", CheckpointLevel, "INT8-W8A8-smooth", Container.FOLDER, Needs.CALIBRATION),
    ],
)
def test_a_name_says_the_kind(name, kind, printed, container, needs):
    level = parse_level(name)
    assert isinstance(level, kind)
    assert (str(level), level.name, level.container, level.needs) == (printed, printed, container, needs)
    assert parse_level(printed) == level


def test_every_recipe_is_a_level_and_the_ladder_is_made_of_them():
    assert [parse_level(name.lower()) for name in RECIPES] == [RecipeLevel(name) for name in RECIPES]
    assert set(LADDER) <= set(parse_levels(RECIPES))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Q4", "Did you mean Q4_K_M"),
        ("Q6", "Did you mean Q6_K"),
        ("Q8", "Did you mean Q8_0"),
        ("Q4_K_N", "Did you mean Q4_K_"),
        ("AWQ-Q3_KM", "Did you mean AWQ-Q3_K_M"),
        ("AWQ", "AWQ-4bit-{g32,g64,g128}[-sym][-ct](.|\n)*AWQ-Q4_K_M"),
        ("GPTQ", "GPTQ-Q4_K_M"),
        ("GPTQ-F16", "GPTQ- works before"),
        ("INT8", "INT8-W8A8"),
        ("nonsense", "GPTQ-Q4_K_M(.|\n)*bpw4.25(.|\n)*AWQ-Q4_K_M(.|\n)*INT8-W8A8"),
        ("", "Levels are"),
        ("bpw0.5", "between 1 and 17"),
        ("bpw99", "no level"),
        ("bpw4.2.1", "no level"),
        ("GPTQ-9bit-g64", "2, 3, 4 and 8 bits"),
        ("GPTQ-4bit-g0", "Levels look like"),
    ],
)
def test_names_that_are_none_say_which_are(name, says):
    with pytest.raises(UnknownLevel, match=says.replace("{", r"\{").replace("[", r"\[").replace("]", r"\]")):
        parse_level(name)


@given(st.text(alphabet="GPTQAWINbpwit-_.0123456789Kks", max_size=18))
def test_whatever_is_typed_is_a_level_or_refused(text):
    try:
        level = parse_level(text)
    except UnknownLevel as error:
        assert error.do
    else:
        assert parse_level(level.name) == level


def test_kinds_that_a_verb_does_not_take_are_refused_with_the_reason():
    levels = parse_levels(["Q4_K_M", "INT8-W8A8"])
    assert of_kinds(levels[:1], (RecipeLevel,), what="It", why="", do="") == levels[:1]
    with pytest.raises(UsageError, match="It does not take INT8-W8A8: it is a checkpoint folder") as caught:
        of_kinds(levels, (RecipeLevel, FoldedLevel), what="It", why="because", do="go")
    assert caught.value.exit_code == 2


def test_reading_names_loads_no_arrays():
    code = "import sys, bitladder.levels; sys.exit(any(name in sys.modules for name in ('numpy', 'torch', 'numba')))"
    subprocess.run([sys.executable, "-c", code], check=True)
