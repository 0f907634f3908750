"""Workloads on disk: read them, start a new one, bring others in from promptfoo, tables, JSON and lm-eval."""

from __future__ import annotations

import importlib
import importlib.resources
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bitladder import json_text, unicode
from bitladder.describe.promptfoo import from_promptfoo
from bitladder.describe.rows import from_csv, from_objects
from bitladder.describe.structured import Fault, Read, read_json_file, read_json_lines, read_yaml
from bitladder.describe.workload import Workload
from bitladder.describe.workload_file import parse_workload, workload_of
from bitladder.errors import BadInput, BadWorkload, OutputError, UsageError
from bitladder.records.evaluation import Answer, ToolCall
from bitladder.records.reading import from_json
from bitladder.visible import on_one_line

STARTER = "starter"
_MAX_BYTES = 16 * 1024**2


def load_workload(path: str | Path = STARTER) -> Workload:
    """Read a workload: a YAML, ``.json`` or ``.jsonl`` file, or ``starter`` for the one that comes with Bitladder.

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
        json_lines=path.suffix.lower() in (".jsonl", ".ndjson"),
        json=path.suffix.lower() == ".json",
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
            except (Exception, SystemExit) as error:
                why = str(error) or type(error).__name__
                raise BadWorkload(f"{workload.name}, line {line}: '{name}' cannot be imported: {why}.") from error
        yield functions
    finally:
        sys.path.remove(str(folder))


def load_reference(path: Path, workload: Workload) -> tuple[Answer, ...]:
    """Stored answers as a reference: a ``.jsonl`` file of ``{"id": ..., "text": ...}``, one line per input, with
    ``tool_calls`` (each ``{"name": ..., "arguments": JSON}``) where there are some.

    Inputs without a line are left out of every comparison.

    Raises:
        BadWorkload: a line cannot be used; the message names it.
    """
    known = {one.id for one in workload.inputs}
    chats = {one.id for one in workload.inputs if one.turns}
    answers: dict[str, Answer] = {}
    for number, line in enumerate(unicode.lines(_read(path)), start=1):
        if not line.strip():
            continue
        try:
            plain = json_text.read(line)
        except ValueError as error:
            raise BadWorkload(f"{path}, line {number}: this line is no JSON: {error}.") from error
        if not isinstance(plain, dict) or not all(isinstance(plain.get(key), str) for key in ("id", "text")):
            raise BadWorkload(f"{path}, line {number}: an answer needs the texts 'id' and 'text'.")
        if plain["id"] not in known:
            raise BadWorkload(f"{path}, line {number}: the workload has no input '{plain['id']}'.")
        if plain["id"] in answers:
            raise BadWorkload(f"{path}, line {number}: a second answer to '{plain['id']}'.")
        if plain["id"] in chats:
            raise BadWorkload(
                f"{path}, line {number}: '{plain['id']}' is a chat of several turns, and a stored answer is one.",
                do="Take the line out, or let a model be the reference.",
            )
        answers[plain["id"]] = Answer(
            plain["id"], unicode.mended(plain["text"]), False, "not judged yet", "stop", 0, 0,
            calls=_stored_calls(plain.get("tool_calls", []), f"{path}, line {number}"),
        )  # fmt: skip
    return tuple(answers.values())


def _stored_calls(plain: Any, where: str) -> tuple[ToolCall, ...]:
    try:
        return from_json(tuple[ToolCall, ...], plain)
    except ValueError as error:
        raise BadWorkload(f"{where}: tool_calls needs calls with the texts 'name' and 'arguments': {error}.") from error


def import_workload(path: Path) -> tuple[str, list[str]]:
    """A workload as YAML from another tool's file, and remarks on what was left out or is not quite the same.

    ``.csv`` and ``.tsv`` files are tables, ``.jsonl`` and lists in ``.json`` rows of objects or samples of
    lm-evaluation-harness, all else configurations of promptfoo. See ``describe.rows`` and ``describe.promptfoo``.

    Raises:
        BadInput: there is no such file, or it is too large or no text.
        BadWorkload: something in it has no counterpart here; the message names it and its line.
    """
    text, suffix = _read(path), path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            made = from_csv(text)
        elif suffix in (".jsonl", ".ndjson"):
            made = from_objects(_without_faults(read_json_lines(text)))
        else:
            read = _without_faults(read_json_file(text) if suffix == ".json" else read_yaml(text))
            is_config = isinstance(read.plain, dict) and "prompts" in read.plain
            is_promptfoo = suffix != ".json" or is_config
            made = from_promptfoo(read, _beside(path)) if is_promptfoo else from_objects(read)
    except Fault as fault:
        raise BadWorkload(f"{path}, line {fault.line}: {fault.found}", do=fault.do) from fault
    plain = {"name": path.stem or "imported", "inputs": made.inputs}
    workload_of(Read(plain, made.lines), source=str(path), read_file=_beside(path))
    return f"# Imported from {on_one_line(path.name)}.\n{_as_yaml(plain)}", made.remarks


def _without_faults(read: Read) -> Read:
    if read.faults:
        raise read.faults[0]
    return read


def _as_yaml(plain: dict[str, Any]) -> str:
    """YAML that is read back as what it was made of, or with escapes where raw characters are not."""
    for raw in (True, False):
        text = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=raw, width=100)
        if read_yaml(text).plain == plain:
            return text
    raise BadWorkload("A text of it cannot be written as YAML.")


class _Dumper(yaml.SafeDumper):
    """Writes what stands in two places twice, instead of an alias."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the name of the parent
        """Always."""
        return True


def _read(path: Path) -> str:
    try:
        return unicode.decoded(_bounded(path))
    except UnicodeDecodeError as error:
        found = f"'{path}' is no UTF-8 text: byte {error.start} is {error.object[error.start]:#x}."
        raise BadInput(found, do="Save it as UTF-8.") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"'{path}' cannot be read: {why}.", do="Check the path.") from error


def _bounded(path: Path) -> bytes:
    """The content of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than a workload may be, or its name is none.
    """
    with path.open("rb") as file:
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    return raw


def _beside(path: Path) -> Callable[[str], str]:
    """Reads files beside (or beneath) a workload, and no others: a workload may come from someone else."""
    folder = path.resolve().parent

    def read(name: str) -> str:
        target = (folder / name).resolve()
        if not target.is_relative_to(folder):
            raise ValueError(f"it lies outside the workload's folder {folder}")
        if not target.is_file():
            raise ValueError("it is no file" if target.exists() else "No such file or directory")
        return unicode.decoded(_bounded(target))

    return read


def _no_files(name: str) -> str:
    raise ValueError(f"this workload may not read files like {name}")


def _data(name: str) -> str:
    return (importlib.resources.files("bitladder") / "data" / name).read_text(encoding="utf-8")
