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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from bitladder.describe import criterion_values as values
from bitladder.describe.criteria import KINDS, doubts
from bitladder.describe.document import Document, shortened
from bitladder.describe.haystack import haystack, haystack_fields
from bitladder.describe.structured import Fault, Read, Where, read_json_file, read_json_lines, read_yaml
from bitladder.describe.tool_calls import dict_of, read_tools, unknown_tools
from bitladder.describe.workload import (
    FREE_TAG,
    GRAMMAR_TAG,
    TOOLS_TAG,
    TURNS_TAG,
    Criterion,
    Input,
    Workload,
)
from bitladder.describe.workload_chat import Chat, ChatReader
from bitladder.errors import BadWorkload

_SHARED = ("system", "max_tokens", "max_thought_tokens", "tools")
"""Fields of inputs that may stand at the top, for every input without its own."""
_TOP = ("name", "description", *_SHARED, "temperature", "samples", "repeat", "sampling", "inputs")
_CHAT = ("prompt", "messages", "turns")
_FILLED = ("variables", "files", "haystack")
_INPUT = ("id", *_CHAT, *_SHARED, *_FILLED, "tags", "weight", "response_format", "expect", "throughout")
_FORMATS = ("json_object", "json_schema")
_SAMPLING: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "temperature": (None, values.a_tolerance),
    "top_p": (None, values.a_share),
    "top_k": (None, values.a_whole),
    "min_p": (None, values.a_share),
    "repeat_penalty": (None, values.a_tolerance),
    "presence_penalty": (None, values.a_number),
    "frequency_penalty": (None, values.a_number),
}
RECOMMENDED = "recommended"


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
    document, top = Document(source, read), read.plain
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
    sampling = document.attempt(lambda: _sampling(document, top))
    samples = document.attempt(lambda: _samples(document, top))
    document.check()
    assert name is not None and sampling is not None and samples is not None
    warnings = [f"{source}, line {line}: input '{one.id}' {doubt}." for one in inputs for line, doubt in doubts(one)]
    return Workload(
        name=name,
        inputs=_told_apart(inputs),
        temperature=sampling.pop("temperature", 0.0),
        samples=samples,
        sampling=sampling,
        recommended=top.get("sampling") == RECOMMENDED,
        warnings=tuple(warnings),
    )


def _samples(document: Document, top: Mapping[str, Any]) -> int:
    """How often each input is asked: ``samples``, or ``repeat``, which says the same."""
    if "samples" in top and "repeat" in top:
        raise document.fault("'repeat' and 'samples' say the same thing.", "repeat", do="Leave out one of them.")
    name = "repeat" if "repeat" in top else "samples"
    return int(document.read(values.a_count, top.get(name, 1), name))


def _sampling(document: Document, top: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the sampler by name; empty where they are the model's own, or none are given."""
    plain = top.get("sampling", {})
    if plain == RECOMMENDED:
        found: dict[str, Any] = {}
    elif isinstance(plain, str):
        raise document.fault(f"sampling is '{RECOMMENDED}' or names settings.", "sampling")
    else:
        read = document.read(lambda value: values.fields(value, {}, _SAMPLING), plain, "sampling")
        found = {name: value for name, value in read.items() if value is not None}
    if "temperature" not in top:
        return found
    if "temperature" in found or plain == RECOMMENDED:
        raise document.fault("the temperature stands in 'sampling', too.", "temperature", do="Leave out one of them.")
    return {**found, "temperature": document.read(values.a_tolerance, top["temperature"], "temperature")}


def _told_apart(inputs: tuple[Input, ...]) -> tuple[Input, ...]:
    """Inputs with the tags of what they ask. JSON is told apart where some of it is written under a grammar."""
    by_grammar = any(one.response_format is not None for one in inputs)

    def tags(one: Input) -> list[str]:
        free = by_grammar and any(criterion.kind == "json_schema" for criterion in one.every_criterion)
        json = GRAMMAR_TAG if one.response_format is not None else FREE_TAG if free else ""
        return [TOOLS_TAG] * bool(one.tools) + [TURNS_TAG] * bool(one.turns) + [json] * bool(json)

    return tuple(replace(one, tags=tuple(dict.fromkeys((*one.tags, *tags(one))))) for one in inputs)


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
    thought = plain.get("max_thought_tokens", top.get("max_thought_tokens"))
    thought = None if thought is None else field(values.a_count, thought, "max_thought_tokens")
    tags = field(values.several_words, plain["tags"], "tags") if plain.get("tags") else ()
    tools = plain.get("tools", top.get("tools"))
    tools = () if tools is None or (tools == [] and "tools" in plain) else field(read_tools, tools, "tools")
    chat = document.attempt(lambda: _chat(document, top, plain, path, tools or (), read_file))
    mistyped = "expect" not in plain and "expect" in meant
    criteria = () if mistyped else _last_criteria(document, plain, path, chat, tools or ())
    shape = document.attempt(lambda: _response_format(document, plain, criteria, path))
    if len(document.faults) > before:
        return None
    assert chat is not None
    throughout = tuple(one for one in _optional_criteria(document, plain, path, "throughout", tools or ()))
    return Input(
        identity,
        chat.messages,
        criteria,
        tags=tuple(tags),
        weight=weight,
        max_tokens=max_tokens,
        line=document.line(*path),
        tools=tuple(tools),
        response_format=shape,
        max_thought_tokens=thought,
        turns=tuple(replace(turn, criteria=(*turn.criteria, *throughout)) for turn in chat.turns),
    )


def _chat(
    document: Document,
    top: Mapping[str, Any],
    plain: Mapping[str, Any],
    path: Where,
    tools: Sequence[Mapping[str, Any]],
    read_file: Callable[[str], str],
) -> Chat:
    variables = _variables(document, plain, path, read_file)
    if "haystack" in plain:
        asked = document.read(haystack_fields, plain["haystack"], *path, "haystack")
        text = _content(document, asked["text"], read_file, *path, "haystack", "text") if asked["text"] else ""
        variables["haystack"] = haystack(asked["needle"], asked["tokens"], asked["depth"], text)
    reader = ChatReader(
        document,
        path,
        variables,
        plain.get("system", top.get("system")),
        frozenset(tool["function"]["name"] for tool in tools),
        lambda turn, where: _criteria(document, turn, where, tools, earlier=True),
    )
    return reader.read(plain)


def _response_format(
    document: Document, plain: Mapping[str, Any], criteria: Sequence[Criterion], path: Where
) -> Mapping[str, Any] | None:
    """In OpenAI's form. ``json_schema`` alone stands for the schema of the input's criterion."""
    value = plain.get("response_format")
    if value is None:
        return None
    where = (*path, "response_format")
    if isinstance(value, str):
        kind = document.read(values.choice(*_FORMATS), value, *where)
        if kind == "json_object":
            return {"type": kind}
        schema = next((one.value for one in criteria if one.kind == "json_schema"), None)
        if schema is None:
            raise document.fault("response_format json_schema needs the criterion 'json_schema'.", *where)
        value = {"type": kind, "json_schema": {"schema": {} if schema is True else schema}}
    kinds = {"type": values.choice(*_FORMATS)}
    found = document.read(lambda one: values.fields(one, kinds, {"json_schema": (None, dict_of)}), value, *where)
    if found["type"] == "json_object":
        return {"type": "json_object"}
    shape = found["json_schema"] or {}
    schema = document.read(values.json_schema, shape.get("schema"), *where, "json_schema")
    if not isinstance(schema, dict):
        raise document.fault("response_format needs a schema that is an object.", *where)
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, **shape, "schema": schema}}


def _weight(value: Any) -> float:
    weight = values.a_tolerance(value)
    if weight == 0:
        raise ValueError("needs a number above 0, got 0; remove the input instead")
    return weight


def _last_criteria(
    document: Document, plain: Mapping[str, Any], path: Where, chat: Chat | None, tools: Sequence[Mapping[str, Any]]
) -> tuple[Criterion, ...]:
    """What the last answer must satisfy: by its turn, by the input, and by what must hold throughout."""
    own = chat.criteria if chat is not None else ()
    throughout = _optional_criteria(document, plain, path, "throughout", tools)
    if "throughout" in plain and "turns" not in plain:
        document.faults.append(document.fault("'throughout' is of several turns.", *path, "throughout"))
    if "expect" in plain or not (own or throughout):
        return (*own, *_criteria(document, plain, path, tools), *throughout)
    return (*own, *throughout)


def _optional_criteria(
    document: Document, plain: Mapping[str, Any], path: Where, name: str, tools: Sequence[Mapping[str, Any]]
) -> tuple[Criterion, ...]:
    return _criteria(document, plain, path, tools, name=name, earlier=True) if name in plain else ()


def _criteria(
    document: Document,
    plain: Mapping[str, Any],
    path: Where,
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    name: str = "expect",
    earlier: bool = False,
) -> tuple[Criterion, ...]:
    """The criteria of an input that have no fault; the others' faults are kept. Those of ``earlier`` answers cannot
    compare with the reference's."""
    expect = plain.get(name)
    if not isinstance(expect, dict) or not expect:
        wanted = f"an input needs '{name}' with at least one criterion."
        document.faults.append(document.fault(wanted, *path, name, do=f"Criteria: {', '.join(KINDS)}."))
        return ()
    document.known(expect, tuple(KINDS), *path, name)
    found = []
    for kind, value in expect.items():
        if kind not in KINDS:
            continue
        here = (*path, name, kind)
        before = len(document.faults)
        parsed = document.attempt(functools.partial(document.read, KINDS[kind].parse, value, *here))
        if len(document.faults) == before:
            document.attempt(functools.partial(_check_fits, document, kind, parsed, tools, here, earlier))
        if len(document.faults) == before:
            found.append(Criterion(kind, parsed, document.line(*here)))
    return tuple(found)


def _check_fits(
    document: Document, kind: str, value: Any, tools: Sequence[Mapping[str, Any]], here: Where, earlier: bool
) -> None:
    """Refuse criteria that cannot be judged where they stand."""
    if earlier and kind in ("agrees_with_reference", "judge"):
        raise document.fault(f"{kind} judges the last answer of a chat only.", *here)
    if kind != "tool_call":
        return
    if not tools:
        raise document.fault("tool_call needs an input with 'tools'.", *here)
    unknown = unknown_tools(value, tools)
    if unknown:
        names = ", ".join(tool["function"]["name"] for tool in tools)
        raise document.fault(
            f"there is no tool '{shortened(unknown[0])}'.", *here, do=f"Tools of this input: {shortened(names, 300)}."
        )


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
                found[name] = _content(document, value, read_file, *path, section, name)
    return found


def _content(document: Document, name: str, read_file: Callable[[str], str], *path: str | int) -> str:
    try:
        return read_file(name)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise document.fault(f"the file '{shortened(name)}' cannot be read: {why}.", *path) from error
