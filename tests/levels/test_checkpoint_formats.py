"""Checkpoint levels: names, refusals with what to do, config keys that readers look for."""

import pytest

from bitladder.errors import UnknownLevel, UsageError
from bitladder.levels import WHOLE_ROW, parse_level
from bitladder.levels.checkpoints import parse_checkpoint


@pytest.mark.parametrize(
    ("name", "bits", "group", "sym", "layout"),
    [
        ("GPTQ-4bit-g64", 4, 64, True, "gptq"),
        ("gptq-3bit-G32", 3, 32, True, "gptq"),
        ("GPTQ-4bit-row", 4, WHOLE_ROW, True, "gptq"),
        ("GPTQ-4bit-g64-asym", 4, 64, False, "gptq"),
        ("GPTQ-8bit-g128-ct", 8, 128, True, "pack-quantized"),
        ("GPTQ-4bit-g128-v2", 4, 128, True, "gptq_v2"),
        ("AWQ-4bit-g64", 4, 64, False, "awq"),
        ("AWQ-4bit-g64-sym-ct", 4, 64, True, "pack-quantized"),
        ("INT8-W8A16", 8, WHOLE_ROW, True, "pack-quantized"),
        ("INT8-W8A8", 8, WHOLE_ROW, True, "int-quantized"),
        ("int8-w8a8-smooth", 8, WHOLE_ROW, True, "int-quantized"),
    ],
)
def test_names(name, bits, group, sym, layout):
    level = parse_checkpoint(name)
    form = level.format
    assert (form.bits, form.group_size, form.sym, form.layout) == (bits, group, sym, layout)
    assert parse_level(level.name) == parse_level(name) == level


def test_options_are_printed_once_and_in_one_order():
    assert (
        parse_level("awq-4bit-g32-sym-ct-sym").name == parse_level("AWQ-4bit-g32-ct-sym").name == "AWQ-4bit-g32-ct-sym"
    )
    assert parse_level("GPTQ-04bit-g064").name == "GPTQ-4bit-g64"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("GPTQ-5bit-g64", "GPTQ has 2, 3, 4 and 8 bits"),
        ("GPTQ-4bit-g48", "groups of 32, 64 and 128 and whole rows"),
        ("GPTQ-4bit", "Levels look like"),
        ("AWQ-3bit-g64", "Ask for GPTQ-3bit-g64"),
        ("AWQ-8bit-g64", "Ask for AWQ-4bit-g64"),
        ("AWQ-4bit-row", "groups of 32, 64 and 128."),
        ("GPTQ-4bit-g64-fast", "an option 'fast'"),
        ("GPTQ-4bit-g64-ct-v2", "two layouts"),
        ("INT8-W4A4", "Levels look like"),
        ("GPTQ-4bit-g" + "9" * 5000, "is not a checkpoint level"),
    ],
)
def test_refused_names_say_what_exists(name, says):
    with pytest.raises(UnknownLevel, match=says):
        parse_checkpoint(name)


def check_shapes(name, shapes):
    parse_checkpoint(name).format.check_shapes(name, shapes)


def test_a_group_that_does_not_divide_offers_those_that_do():
    shapes = {"q_proj": (576, 576), "down_proj": (576, 1536)}
    check_shapes("GPTQ-4bit-g64", shapes)
    with pytest.raises(UsageError, match=r"rows of 576 weights(.|\n)*: g32, g64; GPTQ also takes whole rows"):
        check_shapes("GPTQ-4bit-g128", shapes)
    with pytest.raises(UsageError, match="30 x 64"):
        check_shapes("GPTQ-4bit-g64", {"odd": (30, 64)})


def test_config_keys_that_readers_need():
    gptq = parse_checkpoint("GPTQ-4bit-row").format.configuration(ignored=("lm_head",))
    assert (gptq["quant_method"], gptq["checkpoint_format"]) == ("gptq", "gptq")
    assert (gptq["bits"], gptq["group_size"], gptq["sym"], gptq["desc_act"]) == (4, -1, True, False)
    awq = parse_checkpoint("AWQ-4bit-g64").format.configuration(ignored=("lm_head",))
    assert (awq["quant_method"], awq["version"], awq["zero_point"], awq["group_size"]) == (
        "awq",
        "gemm",
        True,
        64,
    )
    int8 = parse_checkpoint("INT8-W8A8").format.configuration(ignored=("lm_head",))
    group = int8["config_groups"]["group_0"]
    assert (int8["format"], int8["ignore"]) == ("int-quantized", ["lm_head"])
    assert (group["weights"]["strategy"], group["input_activations"]["strategy"]) == ("channel", "token")
    assert group["input_activations"]["dynamic"] is True


def test_levels_that_engines_refuse_come_with_a_note():
    assert parse_checkpoint("GPTQ-4bit-g64").format.notes() == ()
    assert "Q8_0" in parse_checkpoint("GPTQ-8bit-g64").format.notes()[0]
    assert "asymmetric" in parse_checkpoint("GPTQ-4bit-g64-asym").format.notes()[0]
    assert "8-bit" in parse_checkpoint("INT8-W8A16").format.notes()[0]
