"""The documents: links lead somewhere, commands exist with the options shown, Python examples run."""

import ast
import itertools
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from bitladder import __version__
from bitladder.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shown_commands(page: Path) -> list[str]:
    """Every ``bitladder ...`` line of the page's shell blocks, continuation lines joined."""
    lines = []
    for language, body in FENCE.findall(page.read_text()):
        if language in {"console", "sh", "shell", "bash"}:
            for line in body.replace("\\\n", " ").splitlines():
                text = re.sub(r"^\s*(\$ )?(\w+=\S+ )*", "", line).split("#")[0].strip()
                if text.startswith("bitladder "):
                    lines.append(text)
    return lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    missing = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not missing


def check_command(line: str) -> str | None:
    """None when the verb and each of its options exist, else what is wrong."""
    tokens = list(itertools.takewhile(lambda token: not token.startswith(("|", ">", "&")), shlex.split(line)))[1:]
    command = typer.main.get_command(app)
    while tokens and hasattr(command, "commands"):
        if tokens[0].startswith("-"):
            break
        if tokens[0] not in command.commands:
            return f"no verb '{tokens[0]}' in: {line}"
        command = command.commands[tokens.pop(0)]
    known = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)} | {
        "--help",
        "--version",
    }
    unknown = [token for token in tokens if re.match(r"--?[a-zA-Z]", token) and token.split("=")[0] not in known]
    return f"no option {unknown} in: {line}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_the_options_shown(page):
    wrong = [problem for line in shown_commands(page) if (problem := check_command(line))]
    assert not wrong


def test_the_command_check_can_fail():
    assert check_command("bitladder nonsense")
    assert check_command("bitladder plan x --no-such-option")
    assert check_command("bitladder plan x --ctx 4096 --json") is None


def python_examples(page: Path) -> list[str]:
    """The page's Python blocks; those marked ``py`` need files that a test does not have."""
    return [body for language, body in FENCE.findall(page.read_text()) if language == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if python_examples(page)], ids=lambda page: page.name)
def test_python_examples_do_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for body in python_examples(page):
        assert re.search(r"^\s*assert ", body, re.MULTILINE), "an example says what comes out, so that it can be wrong"
        exec(compile(body, str(page), "exec"), names)


def test_every_page_of_docs_is_linked_from_the_readme_or_the_index():
    linked = {
        target
        for page in (ROOT / "README.md", ROOT / "docs" / "architecture.md")
        for target in LINK.findall(page.read_text())
    }
    names = {Path(target).name for target in linked}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= names


def test_the_site_has_every_page():
    def pages(entries):
        for entry in entries:
            for one in entry.values() if isinstance(entry, dict) else [entry]:
                yield from pages(one) if isinstance(one, list) else [one]

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(pages(config["nav"]))


def test_the_changelog_knows_this_version():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


SOURCES = sorted((ROOT / "src").rglob("*.py"))
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
OTHER_PROGRAMS = {"--merge", "--output", "--mtp", "--vocab-only", "--head", "--address", "--object-store-memory"}
"""Options in advice that belong to other programs: llama-gguf-split's, the converter's and Ray's."""


def all_options() -> set[str]:
    """Every option of every verb."""
    commands, options = [typer.main.get_command(app)], {"--help", "--version"}
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        options |= {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
    return options


def advised_options(source: str) -> set[str]:
    """Options in the texts that errors give as advice (``do=``, ``means=``)."""
    texts = [
        part.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.keyword) and node.arg in {"do", "means"}
        for part in ast.walk(node.value)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    return {option for text in texts for option in OPTION.findall(text)}


def test_errors_advise_options_that_exist():
    assert advised_options("f(do='Use --no-such-option.', x='--elsewhere')") == {"--no-such-option"}
    advised = {option: path for path in SOURCES for option in advised_options(path.read_text())}
    assert len(advised) > 20
    unknown = {option: str(path) for option, path in advised.items() if option not in all_options() | OTHER_PROGRAMS}
    assert not unknown


def strays(source: str) -> list[int]:
    """Lines of class attributes' docstrings that stand under no attribute, so that they speak of the wrong one."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            for before, after in itertools.pairwise(node.body):
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    lines += [] if isinstance(before, ast.Assign | ast.AnnAssign) else [after.lineno]
    return lines


def test_every_attribute_has_its_own_docstring():
    assert strays('class A:\n    """A."""\n\n    b: int\n    """B."""\n    """C."""\n') == [6]
    found = {str(path): lines for path in SOURCES if (lines := strays(path.read_text()))}
    assert not found
