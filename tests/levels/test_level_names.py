"""What a level's name says is read in ``levels/`` and nowhere else."""

import ast
from pathlib import Path

import bitladder
from bitladder.levels.checkpoints import prefixes

SOURCE = Path(bitladder.__file__).parent
CUTTING = {"startswith", "endswith", "partition", "rpartition", "removeprefix", "removesuffix", "split", "rsplit"}
GUESSING = {"stages/inspect.py"}
"""What somebody called a file is guessed at: it may be any name."""


def reads_a_level(text: str) -> list[int]:
    """Lines that cut a level's name, match it with a pattern, or put one together."""
    begun = (*(f"{prefix}-" for prefix in prefixes()), "bpw")
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, last = ast.unparse(node.func.value), ast.unparse(node.func.value).rpartition(".")[2]
            named = last in ("level", "levels") or owner.endswith("level.name")
            matched = owner == "re" and any("level" in ast.unparse(argument) for argument in node.args)
            found += [node.lineno] if matched or (named and node.func.attr in CUTTING) else []
        if isinstance(node, ast.JoinedStr) and node.values and isinstance(node.values[0], ast.Constant):
            found += [node.lineno] if str(node.values[0].value) in begun else []
        if isinstance(node, ast.Compare):
            sides = [side for side in (node.left, *node.comparators) if isinstance(side, ast.Constant)]
            found += [node.lineno for side in sides if isinstance(side.value, str) and side.value.startswith(begun)]
    return found


def test_the_check_sees_what_it_should():
    for line in ("level.startswith('GPTQ')", "one.level.partition('-')", "level.name.removeprefix('AWQ-')",
                 "re.match('x', level)", "f'AWQ-{recipe}'", "name == 'GPTQ-4bit-g64'"):  # fmt: skip
        assert reads_a_level(line), line
    for line in ("tensor.name.startswith('blk.')", "level == other", "f'{level} is written'", "re.match('x', name)"):
        assert not reads_a_level(line), line


def test_names_of_levels_are_read_in_one_place():
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE).as_posix()
        if not place.startswith("levels/") and place not in GUESSING and (lines := reads_a_level(path.read_text())):
            found[place] = lines
    assert found == {}
