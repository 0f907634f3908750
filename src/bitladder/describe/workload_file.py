"""Reading a workload from text: YAML, JSON or JSON lines, every fault named with its line.

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

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, TypeVar

from bitladder.describe import criterion_values as values
from bitladder.describe.criteria import KINDS, doubts
from bitladder.describe.document import Document, shortened
from bitladder.describe.structured import Fault, Read, Where, read_json_file, read_json_lines, read_yaml
from bitladder.describe.workload import Criterion, Input, Workload
from bitladder.errors import BadWorkload

T = TypeVar("T")
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

_LONGEST_PROMPT = 4_000_000
"""Characters of a message with its variables filled in: a few lines can ask for one file a thousand times."""


def parse_workload(
    text: str, *, source: str, read_file: Callable[[str], str], json_lines: bool = False, json: bool = False
) -> Workload:
    """Read a workload.

    Args:
        text: content of the file.
        source: its name, for messages and for the workload's name.
        read_file: content of a file that the workload names, relative to it (OSError and ValueError become
            faults).
        json_lines: one input in JSON per line instead of YAML.
        json: one JSON document instead of YAML.

    Raises:
        BadWorkload: names the file, and every fault with its line.
    """
    reader = read_json_lines if json_lines else read_json_file if json else read_yaml
    try:
        read = reader(text)
    except Fault as fault:
        raise BadWorkload(f"{source}, line {fault.line}: {fault.found}", do=fault.do) from fault
    if json_lines:
        read = Read({"inputs": read.plain}, {("inputs", *path): line for path, line in read.lines.items()}, read.faults)
    return workload_of(read, source=source, read_file=read_file)


def workload_of(read: Read, *, source: str, read_file: Callable[[str], str]) -> Workload:
    """A workload from values that are read already, with the lines that faults name.

    Raises:
        BadWorkload: names the file, and every fault with its line.
    """
    document, top = Document(source, read, BadWorkload), read.plain
    if not isinstance(top, dict) or not isinstance(top.get("inputs"), list) or not top["inputs"]:
        if not document.faults:
            wanted = "a workload needs a list 'inputs' with at least one input."
            document.faults.append(document.fault(wanted, do="`bitladder workload new` writes one to start from."))
        document.check()
        raise AssertionError("faults end in an error")
    document.known(top, _TOP)
    found = [_input(document, top, index, read_file) for index in range(len(top["inputs"]))]
    inputs = tuple(one for one in found if one is not None)
    _check_ids(document, found)
    name = document.attempt(lambda: document.read(values.words, top.get("name", PurePath(source).stem or "-"), "name"))
    temperature = document.attempt(
        lambda: document.read(values.a_tolerance, top.get("temperature", 0.0), "temperature")
    )
    samples = document.attempt(lambda: document.read(values.a_count, top.get("samples", 1), "samples"))
    document.check()
    assert name is not None and temperature is not None and samples is not None
    warnings = [f"{source}, line {line}: input '{one.id}' {doubt}." for one in inputs for line, doubt in doubts(one)]
    return Workload(name=name, inputs=inputs, temperature=temperature, samples=samples, warnings=tuple(warnings))


def _check_ids(document: Document, inputs: list[Input | None]) -> None:
    seen: dict[str, int] = {}
    for index, one in enumerate(inputs):
        if one is not None and one.id in seen:
            found = f"two inputs have the id '{shortened(one.id)}'; the other is in line {seen[one.id]}."
            document.faults.append(document.fault(found, "inputs", index, "id"))
        elif one is not None:
            seen[one.id] = one.line


def _input(document: Document, top: Mapping[str, Any], index: int, read_file: Callable[[str], str]) -> Input | None:
    """One input; None when it has a fault, all of which are kept."""
    path: Where = ("inputs", index)
    plain = top["inputs"][index]
    before = len(document.faults)
    if not isinstance(plain, dict):
        found = f"an input needs fields like prompt and expect, got {shortened(repr(plain))}."
        document.faults.append(document.fault(found, *path))
        return None
    meant = document.known(plain, _INPUT, *path)

    def field(reader: Callable[[Any], Any], value: Any, name: str) -> Any:
        return document.attempt(lambda: document.read(reader, value, *path, name))

    identity = field(values.words, plain.get("id", f"input-{index + 1}"), "id")
    weight = field(_weight, plain.get("weight", 1.0), "weight")
    max_tokens = field(values.a_count, plain.get("max_tokens", top.get("max_tokens", 256)), "max_tokens")
    tags = field(values.several_words, plain["tags"], "tags") if plain.get("tags") else ()
    messages = document.attempt(lambda: _messages(document, top, plain, path, read_file))
    criteria = () if "expect" not in plain and "expect" in meant else _criteria(document, plain, path)
    if len(document.faults) > before:
        return None
    assert messages is not None
    line = document.line(*path)
    return Input(identity, messages, criteria, tags=tuple(tags), weight=weight, max_tokens=max_tokens, line=line)


def _weight(value: Any) -> float:
    weight = values.a_tolerance(value)
    if weight == 0:
        raise ValueError("needs a number above 0, got 0; remove the input instead")
    return weight


def _criteria(document: Document, plain: Mapping[str, Any], path: Where) -> tuple[Criterion, ...]:
    """The criteria of an input that have no fault; the others' faults are kept."""
    expect = plain.get("expect")
    if not isinstance(expect, dict) or not expect:
        wanted = "an input needs 'expect' with at least one criterion."
        document.faults.append(document.fault(wanted, *path, "expect", do=f"Criteria: {', '.join(KINDS)}."))
        return ()
    document.known(expect, tuple(KINDS), *path, "expect")
    found = []
    for kind, value in expect.items():
        if kind not in KINDS:
            continue
        here = (*path, "expect", kind)
        before = len(document.faults)
        parsed = document.attempt(functools.partial(document.read, KINDS[kind].parse, value, *here))
        if len(document.faults) == before:
            found.append(Criterion(kind, parsed, document.line(*here)))
    return tuple(found)


def _messages(
    document: Document,
    top: Mapping[str, Any],
    plain: Mapping[str, Any],
    path: Where,
    read_file: Callable[[str], str],
) -> tuple[Mapping[str, str], ...]:
    if ("prompt" in plain) == ("messages" in plain):
        raise document.fault("an input needs either 'prompt' or 'messages'.", *path)
    variables = _variables(document, plain, path, read_file)

    def fill(text: str, *where: str | int) -> str:
        return _fill(document, text, variables, *path, *where)

    if "prompt" in plain:
        system = plain.get("system", top.get("system"))
        content = fill(document.read(values.words, plain["prompt"], *path, "prompt"), "prompt")
        prompt = {"role": "user", "content": content}
        if system is None:
            return (prompt,)
        instructions = fill(document.read(values.words, system, *path, "system"), "system")
        return ({"role": "system", "content": instructions}, prompt)
    if not isinstance(plain["messages"], list) or not plain["messages"]:
        raise document.fault("messages needs a list of messages that is not empty.", *path, "messages")
    role = values.choice(*_ROLES)
    messages = []
    for place, message in enumerate(plain["messages"]):
        here = (*path, "messages", place)
        fields = document.read(
            lambda value: values.fields(value, {"role": role, "content": values.words}, {}), message, *here
        )
        messages.append({"role": fields["role"], "content": fill(fields["content"], "messages", place, "content")})
    if messages[-1]["role"] != "user":
        raise document.fault("the last message must be the user's.", *path, "messages", len(messages) - 1)
    return tuple(messages)


def _variables(
    document: Document, plain: Mapping[str, Any], path: Where, read_file: Callable[[str], str]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for section in ("variables", "files"):
        entries = plain.get(section, {})
        if not isinstance(entries, dict):
            raise document.fault(f"{section} needs names with values, got {shortened(repr(entries))}.", *path, section)
        for name, value in entries.items():
            found[name] = str(document.read(values.a_string, value, *path, section, name))
            if section == "files":
                try:
                    found[name] = read_file(value)
                except (OSError, ValueError) as error:
                    why = error.strerror if isinstance(error, OSError) and error.strerror else error
                    found_ = f"the file '{shortened(value)}' cannot be read: {why}."
                    raise document.fault(found_, *path, section, name) from error
    return found


def _fill(document: Document, text: str, variables: Mapping[str, str], *path: str | int) -> str:
    length = len(text)

    def value(match: re.Match[str]) -> str:
        nonlocal length
        if match[1] not in variables:
            have = ", ".join(variables) or "none"
            do = f"Variables of this input: {shortened(have, 300)}."
            raise document.fault(f"the variable '{shortened(match[1])}' has no value.", *path, do=do)
        length += len(variables[match[1]])
        if length > _LONGEST_PROMPT:
            raise document.fault(f"filled in, this is longer than {_LONGEST_PROMPT} characters.", *path)
        return variables[match[1]]

    return re.sub(r"\{\{\s{0,99}([\w.-]+)\s{0,99}\}\}", value, text)
