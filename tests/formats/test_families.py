"""A model family is a row of formats/families: complete where it claims to be, and named nowhere else."""

import ast
import re
from pathlib import Path

import gguf
import pytest
import transformers
from transformers import AutoConfig

from bitladder.formats.families import BY_CLASS, FAMILIES, family_of, planned, walked
from bitladder.formats.families.family import LayerKind, Layers, Windows

SRC = Path(__file__).parents[2] / "src" / "bitladder"
HOME = SRC / "formats" / "families"

ALLOWED = {
    "files/stub_gguf.py": {"gpt2"},  # a kind of tokenizer in GGUF
    "describe/gguf_kinds.py": {"clip"},  # what files of projectors have in the architecture's place
    "stages/measure_machine.py": {"llama"},  # shapes that time the machine's engine: some family they must have
}
"""Names outside formats/families, and why they may be there."""


def names() -> set[str]:
    """Every name of a family that code could compare with: llama.cpp's, ours, transformers' model types."""
    model_types = {
        layers.model_type for row in FAMILIES.values() for layers in (row.layers, row.expert_layers) if layers
    }
    return set(gguf.MODEL_ARCH_NAMES.values()) | set(FAMILIES) | model_types


def constants(path: Path) -> set[str]:
    """The string constants of a module; docstrings are too long to be names."""
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def named(found: set[str], known: set[str]) -> set[str]:
    """Those that name a family: its name itself, one with something after it, a class of transformers."""
    return {
        one
        for one in found
        if one in known
        or one.partition("+")[0] in known
        or re.fullmatch(r"\w+For(CausalLM|ConditionalGeneration)", one)
    }


def test_no_module_outside_names_a_family():
    known = names()
    found = {
        str(path.relative_to(SRC)): hits
        for path in sorted(SRC.rglob("*.py"))
        if not path.is_relative_to(HOME) and (hits := named(constants(path), known))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "line", ['x == "gpt-oss"', 'f("llama+experts")', 'y = {"Qwen3ForCausalLM": 1}', 'z in ("a", "falcon")']
)
def test_a_name_in_code_is_found(line, tmp_path):
    module = tmp_path / "module.py"
    module.write_text(line)
    assert named(constants(module), names())


def test_rows_are_listed_once_and_say_something():
    rows = list(FAMILIES.values())
    assert all(row != family_of("no such family") for row in rows)
    classes = [name for row in rows if row.checkpoint for name in row.checkpoint.classes]
    assert len(classes) == len(set(classes)) == len(BY_CLASS)
    for row in rows:
        assert type(row)(row.architecture) != row, f"the row of {row.architecture} says nothing"


def test_every_name_is_one_that_others_know():
    assert set(FAMILIES) <= set(gguf.MODEL_ARCH_NAMES.values())
    assert all(hasattr(transformers, name) for name in BY_CLASS)
    for row in FAMILIES.values():
        for layers in (row.layers, row.expert_layers):
            assert not layers or AutoConfig.for_model(layers.model_type).model_type == layers.model_type


def test_a_family_without_a_row_has_no_parts():
    row = family_of("bloom")
    assert (row.architecture, row.checkpoint, row.features, row.windows, row.layers) == (
        "bloom",
        None,
        None,
        None,
        None,
    )
    assert row.layers_of(8) is None
    assert "bloom" not in planned() + walked()


def test_what_config_json_can_name_can_be_planned():
    assert {row.architecture for row in BY_CLASS.values()} <= set(planned())


def test_layers_take_no_windows_but_the_familys():
    for row in FAMILIES.values():
        assert row.layers is None or row.layers.windows in (None, row.windows)


def test_groups_of_layers_with_windows():
    assert [Windows(3).window(layer) for layer in range(6)] == [True, True, False] * 2
    assert [Windows(3, whole_first=True).window(layer) for layer in range(6)] == [False, True, True] * 2


def test_layers_of_several_kinds_follow_the_header():
    first, second = (
        LayerKind((), (), ()),
        LayerKind(
            (),
            (),
            (),
        ),
    )
    layers = Layers("any", (first, second), kind_of=lambda keys, layer: int(layer >= keys["dense"]))
    assert [layers.kind({"dense": 2}, layer) is second for layer in range(4)] == [False, False, True, True]
