"""Reading a workload from text: YAML or JSON lines, every fault named with its line.

    name: my contracts
    system: You review contracts.          # optional, for every input
    max_tokens: 128                        # optional, for every input
    inputs:
      - id: liability
        prompt: "List the risks in this clause: {{clause}}"
        files: {clause: clauses/liability.txt}
        tags: [extraction]
        weight: 2
        expect:
          set_recall: [[uncapped, unlimited], indemnity]
          max_words: 80

As JSON lines, each line is one input. ``messages`` may stand in the place of ``prompt``. ``{{name}}`` is
filled from ``variables`` and ``files``; nothing else happens to a prompt.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, NoReturn

import yaml

from bitladder.describe import criterion_values as values
from bitladder.describe.criteria import KINDS, doubts
from bitladder.describe.workload import Criterion, Input, Workload
from bitladder.errors import BadWorkload

_MAX_NODES = 500_000
"""Of one YAML document with its aliases followed: a few lines of aliases can stand for billions of nodes."""
_TOP = ("name", "description", "system", "max_tokens", "temperature", "samples", "inputs")
_INPUT = (
    "id",
    "prompt",
    "messages",
    "system",
    "variables",
    "files",
    "tags",
    "weight",
    "max_tokens",
    "expect",
)
_ROLES = ("system", "user", "assistant")

Path_ = tuple[str | int, ...]
"""Where a value stands in a document: keys and positions from the top."""


class _Document:
    """A parsed file: plain values, and the line of each by its path."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[Path_, int] = {}

    def line(self, *path: str | int) -> int:
        """The line of the value at a path, or of the nearest thing around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def fault(self, found: str, *path: str | int, do: str = "") -> NoReturn:
        """Raise BadWorkload with file and line."""
        raise BadWorkload(f"{self.source}, line {self.line(*path)}: {found}", do=do)

    def known(self, plain: Mapping[str, Any], allowed: tuple[str, ...], *path: str | int) -> None:
        """No field but these."""
        for name in plain:
            if name not in allowed:
                near = difflib.get_close_matches(str(name), allowed, 1)
                do = f"Did you mean '{near[0]}'?" if near else f"It may have: {', '.join(allowed)}."
                self.fault(f"there is no field '{name}' here.", *path, name, do=do)

    def read(self, reader: Callable[[Any], Any], plain: Any, *path: str | int) -> Any:
        """A value through a reader of ``describe.criterion_values``; its complaint gets file, line and field."""
        try:
            return reader(plain)
        except ValueError as error:
            what = path[-1] if isinstance(path[-1], str) else f"entry {path[-1] + 1} of {path[-2]}"
            self.fault(f"{what} {error}.", *path)


def parse_workload(text: str, *, source: str, read_file: Callable[[str], str], json_lines: bool = False) -> Workload:
    """Read a workload.

    Args:
        text: content of the file.
        source: its name, for messages and for the workload's name.
        read_file: content of a file that the workload names, relative to it (OSError and ValueError become
            faults).
        json_lines: one input in JSON per line instead of YAML.

    Raises:
        BadWorkload: names the file and the line.
    """
    document = _Document(source)
    top = _json_lines(document, text) if json_lines else _yaml(document, text)
    if not isinstance(top, dict) or not isinstance(top.get("inputs"), list) or not top["inputs"]:
        document.fault(
            "a workload needs a list 'inputs' with at least one input.",
            do="`bitladder workload new` writes one to start from.",
        )
    document.known(top, _TOP)
    inputs = tuple(_input(document, top, index, read_file) for index in range(len(top["inputs"])))
    seen: dict[str, int] = {}
    for index, one in enumerate(inputs):
        if one.id in seen:
            document.fault(
                f"two inputs have the id '{one.id}'; the other is in line {seen[one.id]}.",
                "inputs",
                index,
                "id",
            )
        seen[one.id] = one.line
    warnings = [f"{source}, line {line}: input '{one.id}' {doubt}." for one in inputs for line, doubt in doubts(one)]
    return Workload(
        name=document.read(values.words, top.get("name", PurePath(source).stem), "name"),
        inputs=inputs,
        temperature=document.read(values.a_tolerance, top.get("temperature", 0.0), "temperature"),
        samples=document.read(values.a_count, top.get("samples", 1), "samples"),
        warnings=tuple(warnings),
    )


def _input(document: _Document, top: Mapping[str, Any], index: int, read_file: Callable[[str], str]) -> Input:
    path: Path_ = ("inputs", index)
    plain = top["inputs"][index]
    if not isinstance(plain, dict):
        document.fault(f"an input needs fields like prompt and expect, got {plain!r}.", *path)
    document.known(plain, _INPUT, *path)
    weight = document.read(values.a_tolerance, plain.get("weight", 1.0), *path, "weight")
    if weight == 0:
        document.fault("weight needs a number above 0, got 0.", *path, "weight", do="Remove the input instead.")
    max_tokens = plain.get("max_tokens", top.get("max_tokens", 256))
    return Input(
        id=document.read(values.words, plain.get("id", f"input-{index + 1}"), *path, "id"),
        messages=_messages(document, top, plain, path, read_file),
        criteria=_criteria(document, plain, path),
        tags=tuple(document.read(values.several_words, plain["tags"], *path, "tags")) if plain.get("tags") else (),
        weight=weight,
        max_tokens=document.read(values.a_count, max_tokens, *path, "max_tokens"),
        line=document.line(*path),
    )


def _criteria(document: _Document, plain: Mapping[str, Any], path: Path_) -> tuple[Criterion, ...]:
    expect = plain.get("expect")
    if not isinstance(expect, dict) or not expect:
        document.fault(
            "an input needs 'expect' with at least one criterion.",
            *path,
            "expect",
            do=f"Criteria: {', '.join(KINDS)}.",
        )
    document.known(expect, tuple(KINDS), *path, "expect")
    return tuple(
        Criterion(
            kind,
            document.read(KINDS[kind].parse, value, *path, "expect", kind),
            document.line(*path, "expect", kind),
        )
        for kind, value in expect.items()
    )


def _messages(
    document: _Document,
    top: Mapping[str, Any],
    plain: Mapping[str, Any],
    path: Path_,
    read_file: Callable[[str], str],
) -> tuple[Mapping[str, str], ...]:
    if ("prompt" in plain) == ("messages" in plain):
        document.fault("an input needs either 'prompt' or 'messages'.", *path)
    variables = _variables(document, plain, path, read_file)

    def fill(text: str, *where: str | int) -> str:
        return _fill(document, text, variables, *path, *where)

    if "prompt" in plain:
        system = plain.get("system", top.get("system"))
        prompt = {
            "role": "user",
            "content": fill(document.read(values.words, plain["prompt"], *path, "prompt"), "prompt"),
        }
        if system is None:
            return (prompt,)
        return (
            {
                "role": "system",
                "content": fill(document.read(values.words, system, *path, "system"), "system"),
            },
            prompt,
        )
    if not isinstance(plain["messages"], list) or not plain["messages"]:
        document.fault("messages needs a list of messages that is not empty.", *path, "messages")
    role = values.choice(*_ROLES)
    messages = []
    for place, message in enumerate(plain["messages"]):
        here = (*path, "messages", place)
        fields = document.read(
            lambda value: values.fields(value, {"role": role, "content": values.words}, {}), message, *here
        )
        messages.append({"role": fields["role"], "content": fill(fields["content"], "messages", place, "content")})
    if messages[-1]["role"] != "user":
        document.fault("the last message must be the user's.", *path, "messages", len(messages) - 1)
    return tuple(messages)


def _variables(
    document: _Document, plain: Mapping[str, Any], path: Path_, read_file: Callable[[str], str]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for section in ("variables", "files"):
        entries = plain.get(section, {})
        if not isinstance(entries, dict):
            document.fault(f"{section} needs names with values, got {entries!r}.", *path, section)
        for name, value in entries.items():
            found[name] = str(document.read(values.a_string, value, *path, section, name))
            if section == "files":
                try:
                    found[name] = read_file(value)
                except (OSError, ValueError) as error:
                    document.fault(f"the file '{value}' cannot be read: {error}.", *path, section, name)
    return found


def _fill(document: _Document, text: str, variables: Mapping[str, str], *path: str | int) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in variables:
            have = ", ".join(variables) or "none"
            document.fault(f"the variable '{match[1]}' has no value.", *path, do=f"Variables of this input: {have}.")
        return variables[match[1]]

    return re.sub(r"\{\{\s*([\w.-]+)\s*\}\}", value, text)


def _json_lines(document: _Document, text: str) -> dict[str, Any]:
    inputs: list[Any] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            document.lines["inputs", len(inputs)] = number
            try:
                inputs.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                document.fault(f"this line is no JSON: {error}.", "inputs", len(inputs))
    return {"inputs": inputs}


def _yaml(document: _Document, text: str) -> Any:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        document.lines[()] = mark.line + 1 if mark else 1
        document.fault(
            f"this is no YAML: {error.problem or error.context}.",
            do="Texts with ': ' or '#' in them need quotes.",
        )
    except (yaml.YAMLError, RecursionError) as error:
        document.fault(f"this is no YAML: {error}.")
    if root is None:
        return None
    return _Builder(document).build(root, ())


class _Builder:
    """Turns YAML nodes into plain values and notes the line of each."""

    def __init__(self, document: _Document) -> None:
        self.document = document
        self.nodes = 0
        self.scalars = yaml.constructor.SafeConstructor()

    def build(self, node: yaml.Node, path: Path_) -> Any:
        self.nodes += 1
        self.document.lines[path] = node.start_mark.line + 1
        if self.nodes > _MAX_NODES or len(path) > 50:
            self.document.fault(
                f"this is too large: more than {_MAX_NODES} values, or nested more than 50 deep.", *path
            )
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, place)) for place, child in enumerate(node.value)]
        try:
            value = self.scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            self.document.fault(f"'{node.value}' cannot be read: {error}.", *path)
        if value is None or isinstance(value, str | int | float):
            return value
        return node.value  # dates and the like are only text to us

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            if key in result:
                self.document.lines[(*path, key)] = key_node.start_mark.line + 1
                self.document.fault(f"the field '{key}' stands here twice.", *path, key)
            result[key] = self.build(value_node, (*path, key))
            self.document.lines[(*path, key)] = key_node.start_mark.line + 1
        return result
