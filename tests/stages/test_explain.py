"""What names mean, from the product's own tables; docs/formats.md has the same figures."""

import re
from pathlib import Path

import pytest

from bitladder.errors import UnknownLevel
from bitladder.files.catalogue import model_named
from bitladder.files.quality_prior import published_costs
from bitladder.formats.blocks import QTYPES
from bitladder.formats.recipes import LEVELS, RECIPES
from bitladder.levels import RecipeLevel, parse_level
from bitladder.levels.checkpoints import FORMATS
from bitladder.plan.cost import level_size
from bitladder.plan.quality import level_cost
from bitladder.plan.recommend import cost_words
from bitladder.stages.explain import EXAMPLE, FIELDS, WHEN, bits_of, block_words, explain, mix_words
from bitladder.units import human_bytes

DOCS = Path(__file__).parents[2] / "docs"
CHECKPOINTS = [
    "GPTQ-4bit-g64", "GPTQ-2bit-row", "AWQ-4bit-g128", "INT8-W8A8", "INT8-W8A16", "FP8-DYNAMIC", "FP8-BLOCK", "NVFP4",
    "NVFP4A16", "MXFP4", "MXFP8", "W3A16-g64", "MLX-4bit-g64", "MLX-mxfp4", "CT-bpw4.60",
]  # fmt: skip


def words(name):
    found = explain(name)
    return dict(found.parts) | {"": found.summary}


@pytest.mark.parametrize("name", [*RECIPES, *CHECKPOINTS, "GPTQ-Q4_K_M", "AWQ-Q3_K_M", "bpw4.25"])
def test_every_level_is_explained(name):
    found = explain(name.lower())
    assert found.name == str(parse_level(name))
    headings = [heading for heading, _ in found.parts]
    assert {"Bits", "Runs in"} <= set(headings) or name.startswith("bpw")
    assert all(text and not text.endswith(".") and "  " not in text for _, text in found.parts)


@pytest.mark.parametrize("name", QTYPES)
def test_every_block_format_is_explained(name):
    assert f"{QTYPES[name].type_size} bytes" in words(name)["Block"] or name in RECIPES
    assert all(field in FIELDS for field, _ in QTYPES[name].fields)
    assert bits_of(name) in WHEN


@pytest.mark.parametrize("name", ["GPTQ", "awq", "INT8", "FP8", "gptq-4bit", "AWQ-3bit"])
def test_methods_are_explained_with_their_levels(name):
    found = words(name)
    assert name.split("-")[0].upper() in found["Levels"]
    assert found["What"]


def test_every_checkpoint_format_says_what_it_is_for():
    assert all(len(form.about.split()) > 20 for form in FORMATS)


@pytest.mark.parametrize("name", ["nonsense", "Q4", "", "Q4_K_XXL", "\x1b[31m", "GPTQ-4bit-g63", "FP8_X"])
def test_what_is_no_name_is_refused_with_the_nearest(name):
    with pytest.raises(UnknownLevel):
        explain(name)


def test_the_usual_one():
    found = words("Q4_K_M")
    assert found[""] == "A GGUF file, 4 bits"
    assert found["Block"].startswith("Q4_K: 256 weights in 144 bytes (2 scale,")
    assert "attn_v Q6_K in 16 of 32 layers; ffn_down Q6_K in 16 of 32 layers; every other matrix Q4_K" in found["Mix"]
    assert "Q4_K_S" in found["Beside it"]
    assert "AWQ-4bit-g128" in found["Beside it"]
    names = [text for heading, text in explain("Q4_K_M").parts if heading == "Name"]
    assert [name.split(":")[0] for name in names] == ["K", "M"]


@pytest.mark.parametrize("recipe", LEVELS)
def test_a_mix_counts_what_the_writer_would_write(recipe):
    """Every tensor of the example that has another type than the main one is in the sentence."""
    size = level_size(model_named(EXAMPLE).whole(), RecipeLevel(recipe))
    others = {tensor.qtype for tensor in size.tensors if len(tensor.shape) > 1} - {RECIPES[recipe].qtype}
    named = {word.strip(";,") for word in mix_words(recipe).split() if word.strip(";,") in QTYPES}
    assert named == others | {RECIPES[recipe].qtype}


def test_the_page_has_the_same_figures():
    page = (DOCS / "formats.md").read_text()
    for name in LEVELS:
        size = level_size(model_named(EXAMPLE).whole(), RecipeLevel(name))
        cost = level_cost(name, model_named(EXAMPLE).params, published_costs())
        told = cost_words(cost).split("%")[0] + "%" if cost.value else "0"
        bits, total = bits_of(RECIPES[name].qtype), human_bytes(size.tensor_bytes)
        assert f"| `{name}` | {bits} | {size.bpw:.2f} | {total} | {told} | {mix_words(name)} |" in page
    for qtype in ("Q8_0", "Q4_K"):
        block = QTYPES[qtype]
        assert re.search(rf"{block.type_size} bytes for {block.block_size} weights: {block.bpw:g} bits", page)
        assert block_words(block).startswith(f"{qtype}: {block.block_size} weights in {block.type_size} bytes")
    for name in ("GPTQ-4bit-g128", "AWQ-4bit-g128"):
        assert f"{parse_level(name).bpw:.2f}" in page
