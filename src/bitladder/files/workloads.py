"""Workloads on disk: read them, start a new one, bring others in from promptfoo and CSV."""

from __future__ import annotations

import csv
import importlib
import importlib.resources
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bitladder.describe.workload import Workload
from bitladder.describe.workload_file import parse_workload
from bitladder.errors import BadInput, BadWorkload, OutputError, UsageError
from bitladder.records.evaluation import Answer

STARTER = "starter"
_MAX_BYTES = 16 * 1024**2


def load_workload(path: str | Path = STARTER) -> Workload:
    """Read a workload: a YAML file, a ``.jsonl`` file, or ``starter`` for the one that comes with Bitladder.

    Raises:
        BadInput: there is no such file, or it is too large or no text.
        BadWorkload: it has a fault; the message names the line.
    """
    if str(path) == STARTER and not Path(path).exists():
        return parse_workload(_data("workload-starter.yaml"), source="workload-starter.yaml", read_file=_no_files)
    path = Path(path)
    return parse_workload(
        _read(path),
        source=str(path),
        read_file=_beside(path),
        json_lines=path.suffix in (".jsonl", ".ndjson"),
    )


def new_workload(path: Path) -> None:
    """Write a commented template.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_data("workload-template.yaml"))
    except FileExistsError as error:
        raise OutputError(f"'{path}' exists already.", do="Choose another name, or remove it first.") from error
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written: {error.strerror}.") from error


@contextmanager
def trusted_functions(workload: Workload, folder: Path, *, trust: bool) -> Iterator[dict[str, Callable[..., Any]]]:
    """The user's own functions that a workload names, by ``module:function``; modules beside the workload are found.

    Importing a module runs it. A workload file may come from someone else, so nothing is imported unless the
    user said that they trust it.

    Raises:
        UsageError: the workload names functions and ``trust`` is off.
        BadWorkload: a function cannot be imported; the message names the line.
    """
    wanted = {c.value: c.line for one in workload.inputs for c in one.criteria if c.kind == "python"}
    if wanted and not trust:
        raise UsageError(
            f"The workload runs Python code of its own: {', '.join(sorted(wanted))}.",
            means="A workload from someone else could do anything you can.",
            do="If you trust it, say so with --trust-python.",
        )
    functions: dict[str, Callable[..., Any]] = {}
    sys.path.insert(0, str(folder))
    try:
        for name, line in wanted.items():
            module, _, attribute = name.partition(":")
            try:
                functions[name] = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise BadWorkload(f"{workload.name}, line {line}: '{name}' cannot be imported: {error}.") from error
        yield functions
    finally:
        sys.path.remove(str(folder))


def load_reference(path: Path, workload: Workload) -> tuple[Answer, ...]:
    """Stored answers as a reference: a ``.jsonl`` file of ``{"id": ..., "text": ...}``, one line per input.

    Inputs without a line are left out of every comparison.

    Raises:
        BadWorkload: a line cannot be used; the message names it.
    """
    known = {one.id for one in workload.inputs}
    answers: dict[str, Answer] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            plain = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadWorkload(f"{path}, line {number}: this line is no JSON: {error}.") from error
        if not isinstance(plain, dict) or not all(isinstance(plain.get(key), str) for key in ("id", "text")):
            raise BadWorkload(f"{path}, line {number}: an answer needs the texts 'id' and 'text'.")
        if plain["id"] not in known:
            raise BadWorkload(f"{path}, line {number}: the workload has no input '{plain['id']}'.")
        if plain["id"] in answers:
            raise BadWorkload(f"{path}, line {number}: a second answer to '{plain['id']}'.")
        answers[plain["id"]] = Answer(plain["id"], plain["text"], False, "not judged yet", "stop", 0, 0)
    return tuple(answers.values())


def from_csv(path: Path) -> str:
    """A workload as YAML from a CSV file with a header.

    Column ``prompt`` is asked; ``id``, ``tags`` (separated by ``;``) and ``weight`` are optional; every
    column named like a criterion of plain text (``exact``, ``one_of``, ``contains_all``, ``contains_any``,
    ``contains_none``, ``regex``: lists separated by ``|`` where a list is meant) or ``number`` is one.
    ``expected`` means ``one_of``.

    Raises:
        BadWorkload: a column or a row cannot be used; the message names the line.
    """
    rows = csv.DictReader(io.StringIO(_read(path)))
    columns = rows.fieldnames or []
    known = {"prompt", "id", "tags", "weight", "expected", "number", *_CSV_TEXTS, *_CSV_LISTS}
    if "prompt" not in columns:
        raise BadWorkload(f"{path}, line 1: there is no column 'prompt'; the columns are {', '.join(columns)}.")
    for column in columns:
        if column not in known:
            allowed = ", ".join(sorted(known))
            raise BadWorkload(f"{path}, line 1: the column '{column}' means nothing here.", do=f"Columns: {allowed}.")
    inputs = [_csv_input(path, rows.line_num, {k: v for k, v in row.items() if v}) for row in rows]
    return _as_yaml(path, inputs)


_CSV_TEXTS = ("exact", "regex")
_CSV_LISTS = ("one_of", "contains_all", "contains_any", "contains_none")


def _csv_input(path: Path, line: int, row: dict[str, str]) -> dict[str, Any]:
    one: dict[str, Any] = {name: row[name] for name in ("id", "prompt") if name in row}
    if "tags" in row:
        one["tags"] = [tag.strip() for tag in row["tags"].split(";") if tag.strip()]
    expect: dict[str, Any] = {name: row[name] for name in _CSV_TEXTS if name in row}
    expect |= {name: row[name].split("|") for name in _CSV_LISTS if name in row}
    if "expected" in row:
        expect["one_of"] = row["expected"].split("|")
    for name, section in (("weight", one), ("number", expect)):
        if name in row:
            try:
                section[name] = float(row[name])
            except ValueError as error:
                raise BadWorkload(f"{path}, line {line}: {name} needs a number, got '{row[name]}'.") from error
    return one | {"expect": expect}


def from_promptfoo(path: Path) -> str:
    """A workload as YAML from a promptfoo configuration: every prompt with every test.

    Assertions are translated where both tools mean the same: equals, contains, icontains, contains-any,
    contains-all and their ``i`` forms, regex, is-json and contains-json with a schema, llm-rubric, and
    ``not-contains`` forms.

    Raises:
        BadWorkload: something in it has no counterpart here; the message names it, so that nothing is dropped
            quietly.
    """
    try:
        config = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise BadWorkload(f"{path}: this is no YAML: {error}.") from error
    if not isinstance(config, dict) or not config.get("prompts") or not isinstance(config.get("tests"), list):
        raise BadWorkload(f"{path}: a promptfoo configuration needs 'prompts' and a list of 'tests'.")
    prompts = config["prompts"] if isinstance(config["prompts"], list) else [config["prompts"]]
    default = config.get("defaultTest") or {}
    inputs = []
    for number, test in enumerate(config["tests"], start=1):
        if not isinstance(test, dict):
            raise BadWorkload(f"{path}: test {number} is no mapping: {test!r}.")
        for place, prompt in enumerate(prompts, start=1):
            text = prompt.get("raw") if isinstance(prompt, dict) else prompt
            if not isinstance(text, str) or text.startswith("file://"):
                raise BadWorkload(f"{path}: prompt {place} is no text: {prompt!r}.", do="Put its text here.")
            expect: dict[str, Any] = {}
            for assertion in [*default.get("assert", []), *test.get("assert", [])]:
                _promptfoo_assertion(path, number, assertion, expect)
            identity = test.get("description") or f"test-{number}"
            inputs.append(
                {
                    "id": identity if len(prompts) == 1 else f"{identity} / prompt {place}",
                    "prompt": text,
                    "variables": {k: str(v) for k, v in ({**default.get("vars", {}), **test.get("vars", {})}).items()},
                    "expect": expect,
                }
            )
    return _as_yaml(path, inputs)


_PROMPTFOO = {
    "equals": "exact", "contains": "contains_all", "icontains": "contains_all", "contains-all": "contains_all",
    "icontains-all": "contains_all", "contains-any": "contains_any", "icontains-any": "contains_any",
    "not-contains": "contains_none", "not-icontains": "contains_none", "not-contains-any": "contains_none",
    "regex": "regex", "is-json": "json_schema", "contains-json": "json_schema", "llm-rubric": "judge",
}  # fmt: skip


def _promptfoo_assertion(path: Path, number: int, assertion: Any, expect: dict[str, Any]) -> None:
    kind = _PROMPTFOO.get(assertion.get("type", "")) if isinstance(assertion, dict) else None
    if kind is None:
        known = ", ".join(_PROMPTFOO)
        raise BadWorkload(
            f"{path}: test {number} has an assertion that has no counterpart here: {assertion!r}.",
            do=f"Translate it by hand or remove it. Known: {known}.",
        )
    value = assertion.get("value")
    if kind in ("contains_all", "contains_any", "contains_none"):
        expect.setdefault(kind, []).extend(map(str, value if isinstance(value, list) else [value]))
        return
    if kind in expect:
        raise BadWorkload(f"{path}: test {number} has two assertions that both become '{kind}'; an input can have one.")
    expect[kind] = (value or True) if kind == "json_schema" else value if isinstance(value, dict) else str(value)


def _as_yaml(path: Path, inputs: list[dict[str, Any]]) -> str:
    text = yaml.safe_dump({"name": path.stem, "inputs": inputs}, sort_keys=False, allow_unicode=True, width=100)
    parse_workload(text, source=f"{path} (imported)", read_file=_beside(path))
    return f"# Imported from {path.name}.\n{text}"


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadInput(f"'{path}' is {path.stat().st_size} bytes; a workload has at most {_MAX_BYTES}.")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(f"'{path}' cannot be read: {error.strerror}.", do="Check the path.") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"'{path}' is no UTF-8 text: byte {error.start} is {error.object[error.start]:#x}.") from error


def _beside(path: Path) -> Callable[[str], str]:
    """Reads files beside (or beneath) a workload, and no others: a workload may come from someone else."""
    folder = path.resolve().parent

    def read(name: str) -> str:
        target = (folder / name).resolve()
        if not target.is_relative_to(folder):
            raise ValueError(f"it lies outside the workload's folder {folder}")
        return target.read_text(encoding="utf-8")

    return read


def _no_files(name: str) -> str:
    raise ValueError(f"this workload may not read files like {name}")


def _data(name: str) -> str:
    return (importlib.resources.files("bitladder") / "data" / name).read_text(encoding="utf-8")
