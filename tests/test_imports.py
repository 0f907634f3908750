"""Imports run one way: the drawing in docs/architecture.md, asserted."""

import ast
from collections.abc import Iterator
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "bitladder"

# The drawing, bottom to top. A module imports only from rows beneath its own, or from its own package.
ROWS = [
    {"__init__", "errors"},
    {"units", "progress", "visible", "unicode", "json_text", "system"},
    {"formats"},
    {"records", "describe", "kernels", "stats"},
    {"levels", "executors"},
    {"files"},
    {"plan", "engines", "walk", "store"},
    {"report"},
    {"stages"},
    {"pipeline", "serve"},
    {"cli"},
    {"__main__"},
]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Top-level packages of bitladder that a module imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bitladder":
            parts = node.module.split(".")
            found |= (
                {parts[1]}
                if len(parts) > 1
                else {alias.name if alias.name in ROW_OF else "__init__" for alias in node.names}
            )
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("bitladder.")}
    return found


def modules() -> dict[Path, str]:
    return {path: path.relative_to(SRC).parts[0].removesuffix(".py") for path in SRC.rglob("*.py")}


def test_every_package_stands_in_the_drawing():
    assert set(modules().values()) <= set(ROW_OF)


def test_imports_point_down():
    wrong = [
        f"{path.relative_to(SRC)} imports {target}"
        for path, package in modules().items()
        for target in imports_of(path)
        if target != package and ROW_OF[target] >= ROW_OF[package]
    ]
    assert not wrong


def test_kernels_see_only_formats_and_stats_only_errors():
    allowed = {"kernels": {"kernels", "formats", "errors"}, "stats": {"stats", "errors"}}
    wrong = [
        f"{path.relative_to(SRC)} imports {target}"
        for path, package in modules().items()
        for target in imports_of(path)
        if package in allowed and target not in allowed[package]
    ]
    assert not wrong


def test_modules_import_in_no_circle():
    """Within a room, too; what is imported for its types alone is left out."""
    edges = {path: set(_imported_modules(path)) for path in SRC.rglob("*.py")}
    done: set[Path] = set()

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert path not in way, " > ".join(str(one.relative_to(SRC)) for one in (*way[way.index(path) :], path))
        if path not in done:
            for target in edges[path]:
                visit(target, (*way, path))
            done.add(path)

    for path in edges:
        visit(path, ())


def _imported_modules(path: Path) -> Iterator[Path]:
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitladder."):
            place = SRC.joinpath(*node.module.split(".")[1:])
            for name in (place / alias.name for alias in node.names):
                if name.with_suffix(".py").is_file():
                    yield name.with_suffix(".py")
                elif (name / "__init__.py").is_file():
                    yield name / "__init__.py"
                elif place.with_suffix(".py").is_file():
                    yield place.with_suffix(".py")
                elif place / "__init__.py" != path:
                    yield place / "__init__.py"
        pending += ast.iter_child_nodes(node)
