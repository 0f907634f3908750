"""YAML, JSON and JSON lines of others as plain values with the line of each: bounded, every fault by its line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from bitladder import json_text
from bitladder.unicode import lines

Where = tuple[str | int, ...]
"""Where a value stands in a document: keys and positions from the top."""
MOST_VALUES = 200_000
"""Of one document with its aliases followed: a few lines of aliases can stand for billions."""
_MOST_DEPTH = 50
_TOO_LARGE = f"this is too large: more than {MOST_VALUES} values, or nested more than {_MOST_DEPTH} deep."
_OTHER_BREAKS = "\x85\u2028\u2029"
"""Ends of lines in YAML 1.1, characters of a text in YAML 1.2, in JSON and everywhere else."""


class Fault(Exception):
    """What is wrong with a document, and in which line."""

    def __init__(self, found: str, line: int, do: str = "") -> None:
        super().__init__(found)
        self.found = found
        self.line = line
        self.do = do


@dataclass(frozen=True)
class Read:
    """A document as plain values, the line of each, and faults that did not stop the reading."""

    plain: Any
    lines: dict[Where, int]
    faults: list[Fault] = field(default_factory=list)


def read_json_lines(text: str) -> Read:
    """A list of what each line holds; empty lines are passed over. A line that is no JSON is a fault and no value."""
    found, places, faults = [], {}, []
    for number, line in enumerate(lines(text), start=1):
        if not line.strip():
            continue
        try:
            found.append(json_text.read(line, _once))
            places[(len(found) - 1,)] = number
        except ValueError as error:
            faults.append(Fault(f"this line is no JSON: {error}.", number))
    return Read(found, places, faults)


def read_json_file(text: str) -> Read:
    """One JSON document.

    Raises:
        Fault: it is none, or too large.
    """
    try:
        plain = json_text.read(text, _once)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise Fault(f"this is no JSON: {getattr(error, 'msg', error)}.", line) from error
    return Read(plain, _json_lines_of(text))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"the field '{twice[:80]}' stands here twice")
    return found


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|\n|[^\s{}\[\],:"]+')


def _json_lines_of(text: str) -> dict[Where, int]:
    """The line of every value of a JSON document that is known to be one."""
    places: dict[Where, int] = {}
    path: list[str | int] = []
    line, count, expects_key = 1, 0, False
    in_list: list[bool] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token == "\n":
            line += 1
        elif token in "}]":
            in_list.pop()
            path = path[: len(in_list)]
            expects_key = False
        elif token == ",":
            if in_list[-1]:
                path[-1] = int(path[-1]) + 1
            else:
                path = path[:-1]
                expects_key = True
        elif expects_key and token[0] == '"':
            path.append(json_text.read(token))
            expects_key = False
        elif token != ":":
            count += 1
            if count > MOST_VALUES or len(path) > _MOST_DEPTH:
                raise Fault(_TOO_LARGE, line)
            places.setdefault(tuple(path), line)
            if token in "[{":
                in_list.append(token == "[")
                expects_key = token == "{"
                if token == "[":
                    path.append(0)
    return places


def read_yaml(text: str) -> Read:
    """One YAML document, of YAML 1.1's types and 1.2's line ends.

    Raises:
        Fault: it is none, or too large.
    """
    stand_ins = _stand_ins(text)
    try:
        root = _Loader(text.translate(stand_ins)).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        found = f"this is no YAML: {error.problem or error.context}."
        raise Fault(found, mark.line + 1 if mark else 1, "Texts with ': ' or '#' in them need quotes.") from error
    except RecursionError:
        raise Fault(_TOO_LARGE, 1) from None
    except (yaml.YAMLError, ValueError) as error:
        raise Fault(f"this is no YAML: {' '.join(str(error).split())[:200]}.", 1) from error
    if root is None:
        return Read(None, {})
    builder = _Builder({ord(chosen): chr(code) for code, chosen in stand_ins.items()})
    plain = builder.build(root, ())
    return Read(plain, builder.lines, builder.faults)


def _stand_ins(text: str) -> dict[int, str]:
    """Characters that the text does not hold, for those that YAML 1.1 would take for ends of lines."""
    present = [ord(one) for one in _OTHER_BREAKS if one in text]
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    return {code: next(free) for code in present}


class _Counting(yaml.composer.Composer):
    """Composes nodes, and stops at too many."""

    count = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As its parent does, counted."""
        self.count += 1
        self.depth += 1
        if self.count > MOST_VALUES or self.depth > 2 * _MOST_DEPTH:
            raise Fault(_TOO_LARGE, self.peek_event().start_mark.line + 1)  # type: ignore[attr-defined]
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


if yaml.__with_libyaml__:

    class _Loader(_Counting, yaml.cyaml.CParser, yaml.constructor.SafeConstructor, yaml.resolver.Resolver):
        """PyYAML's safe loader over libyaml's parser, ten times as fast."""

        def __init__(self, text: str) -> None:
            yaml.cyaml.CParser.__init__(self, text)
            _Counting.__init__(self)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

else:

    class _Loader(_Counting, yaml.SafeLoader):  # type: ignore[no-redef]
        """PyYAML's safe loader."""


class _Builder:
    """Turns YAML nodes into plain values and notes the line of each."""

    def __init__(self, stand_ins: dict[int, str]) -> None:
        self.stand_ins = stand_ins
        self.values = 0
        self.lines: dict[Where, int] = {}
        self.faults: list[Fault] = []
        self.scalars = yaml.constructor.SafeConstructor()

    def build(self, node: yaml.Node, path: Where) -> Any:
        self.values += 1
        line = node.start_mark.line + 1
        self.lines[path] = line
        if self.values > MOST_VALUES or len(path) > _MOST_DEPTH:
            raise Fault(_TOO_LARGE, line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, place)) for place, child in enumerate(node.value)]
        try:
            value = self.scalars.construct_object(node)
        except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            why = getattr(error, "problem", "") or error
            self.faults.append(Fault(f"'{node.value[:80]}' cannot be read as {node.tag[:80]}: {why}.", line))
            return None
        if isinstance(value, str):
            return value.translate(self.stand_ins)
        if value is None or isinstance(value, int | float):
            return value
        return str(node.value)  # dates and the like are only text to us

    def _mapping(self, node: yaml.MappingNode, path: Where) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged |= self._merged(value_node, (*path, "<<"))
                continue
            key = key_node.value.translate(self.stand_ins) if isinstance(key_node, yaml.ScalarNode) else "?"
            if key in result:
                self.faults.append(Fault(f"the field '{key[:80]}' stands here twice.", line))
                continue
            result[key] = self.build(value_node, (*path, key))
            self.lines[(*path, key)] = line
        return {**merged, **result}

    def _merged(self, node: yaml.Node, path: Where) -> dict[str, Any]:
        """What `<<` brings in; of several mappings the first counts."""
        found = self.build(node, path)
        listed = found if isinstance(found, list) else [found]
        if not all(isinstance(one, dict) for one in listed):
            self.faults.append(Fault("'<<' needs a mapping, or a list of some.", node.start_mark.line + 1))
            return {}
        return {name: value for one in reversed(listed) for name, value in one.items()}
