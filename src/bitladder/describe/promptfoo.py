"""promptfoo's configurations as inputs of a workload: what means the same here is translated, all else refused by name.

Every prompt with every test, and for variables that are lists one test for each combination, as promptfoo runs them.
What is left out because it judges nothing (providers, metadata, names of metrics), and what is not quite the same
here, becomes a remark.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bitladder import json_text
from bitladder.describe.document import line_of, shortened
from bitladder.describe.structured import Fault, Read, Where, read_yaml

_MOST_TESTS = 20_000
_VARIABLE = re.compile(r"\{\{-?\s*([A-Za-z_]\w*)\s*-?\}\}")
_MARKUP = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
_REFUSED_TOP = ("scenarios", "nunjucksFilters", "extensions", "assertionTemplates", "redteam")
_TEST = ("description", "vars", "assert", "metadata", "options", "threshold", "provider", "providers")
_ASSERTION = ("type", "value", "metric", "weight", "provider", "threshold")
_PARTS = {
    "contains": ("contains_all", True), "icontains": ("contains_all", False), "contains-all": ("contains_all", True),
    "icontains-all": ("contains_all", False), "contains-any": ("contains_any", True),
    "icontains-any": ("contains_any", False), "not-contains": ("contains_none", True),
    "not-icontains": ("contains_none", False), "not-contains-any": ("contains_none", True),
    "not-icontains-any": ("contains_none", False),
}  # fmt: skip
"""Assertions about parts of the answer: the criterion, and whether letter case counts."""
KNOWN = (*_PARTS, "equals", "starts-with", "regex", "is-json", "llm-rubric")


class Imported:
    """Inputs of a workload as plain values, the line of each in its source, and remarks."""

    def __init__(self) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.lines: dict[Where, int] = {}
        self._remarks: dict[str, int] = {}

    def add(self, one: dict[str, Any], line: int) -> None:
        """One more input, which began in this line."""
        self.lines["inputs", len(self.inputs)] = line
        self.inputs.append(one)

    def remark(self, text: str) -> None:
        """Something that was left out, or is not quite the same."""
        self._remarks[text] = self._remarks.get(text, 0) + 1

    @property
    def remarks(self) -> list[str]:
        """Each once, with how often it applies."""
        return [text if count == 1 else f"{text} ({count} times)" for text, count in self._remarks.items()]


def from_promptfoo(read: Read, read_file: Callable[[str], str]) -> Imported:
    """Inputs from a configuration that is read already.

    Args:
        read: the configuration.
        read_file: content of a text file that it names, relative to it (OSError and ValueError).

    Raises:
        Fault: something in it has no counterpart here, with its line.
    """
    return _Translation(read, read_file).done()


class _Translation:
    def __init__(self, read: Read, read_file: Callable[[str], str]) -> None:
        self.read, self.read_file = read, read_file
        self.made = Imported()

    def fault(self, found: str, *path: str | int, do: str = "Translate it by hand, or remove it.") -> Fault:
        return Fault(found, line_of(self.read.lines, path), do)

    def done(self) -> Imported:
        config = self.read.plain
        if not isinstance(config, dict) or not config.get("prompts") or not config.get("tests"):
            raise self.fault("a promptfoo configuration needs 'prompts' and 'tests'.", do="")
        if not isinstance(config["tests"], list):
            found = f"tests are a list here, got {shortened(repr(config['tests']))}."
            raise self.fault(found, "tests", do="A CSV file is imported by itself: bitladder workload import FILE.csv")
        for name in config:
            if name in _REFUSED_TOP:
                raise self.fault(f"'{shortened(name)}' has no counterpart here.", name)
            if name not in ("prompts", "tests", "defaultTest", "description", "$schema"):
                self.made.remark(f"'{shortened(name)}' is not imported: it says nothing of inputs and criteria")
        default = self._default(config.get("defaultTest"))
        prompts = [one for place in self._listed(config["prompts"]) for one in self._prompt(place, config["prompts"])]
        used: dict[str, int] = {}
        for index, test in enumerate(config["tests"]):
            self._test(index, test, default, prompts, used)
        return self.made

    @staticmethod
    def _listed(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]

    def _default(self, value: Any) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.fault(f"defaultTest is a mapping here, got {shortened(repr(value))}.", "defaultTest")
        self._check_test(value, "defaultTest")
        return value

    def _check_test(self, test: Mapping[str, Any], *path: str | int) -> None:
        """Refuse what changes the meaning of a test."""
        for name in test:
            if name not in _TEST:
                raise self.fault(f"'{shortened(name)}' of a test has no counterpart here.", *path, name)
        for name in ("metadata", "provider", "providers"):
            if test.get(name):
                self.made.remark(f"'{name}' of tests is not imported")
        if test.get("threshold") not in (None, 1):
            raise self.fault(
                "'threshold' of a test has no counterpart here: all criteria must hold.", *path, "threshold"
            )
        options = test.get("options") or {}
        if not isinstance(options, dict):
            raise self.fault(f"options are a mapping, got {shortened(repr(options))}.", *path, "options")
        for name, value in options.items():
            if name == "provider":
                self.made.remark("the provider that grades is not imported: name a judge with --judge")
            elif value not in (None, False, "", {}, []):
                raise self.fault(
                    f"the option '{shortened(name)}' of a test has no counterpart here.", *path, "options", name
                )

    def _prompt(self, prompt: Any, prompts: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """The fields of an input that a prompt makes, with its label; a text file may hold several prompts."""
        path: Where = ("prompts", prompts.index(prompt)) if isinstance(prompts, list) else ("prompts",)
        label, text = "", prompt
        if isinstance(prompt, dict):
            extra = set(prompt) - {"raw", "label", "id"}
            if extra:
                raise self.fault(f"'{shortened(min(extra))}' of a prompt has no counterpart here.", *path)
            label, text = str(prompt.get("label") or ""), prompt.get("raw", prompt.get("id"))
        if not isinstance(text, str) or not text.strip():
            raise self.fault(f"a prompt is a text here, got {shortened(repr(prompt))}.", *path)
        if text.startswith("file://"):
            yield from ((label, self._fields(one, path)) for one in self._prompts_in(text, path))
        else:
            yield label, self._fields(text, path)

    def _prompts_in(self, name: str, path: Where) -> list[str]:
        text = self._file(name, path, (".txt", ".md", ".json"))
        return (
            [text]
            if name.endswith(".json")
            else [one.strip() for one in re.split(r"(?m)^---\s*$", text) if one.strip()]
        )

    def _file(self, name: str, path: Where, kinds: tuple[str, ...]) -> str:
        place = name.removeprefix("file://")
        if not place.endswith(kinds):
            raise self.fault(f"the file '{shortened(place)}' is none of {', '.join(kinds)}.", *path)
        try:
            return self.read_file(place)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise self.fault(f"the file '{shortened(place)}' cannot be read: {why}.", *path, do="") from error

    def _fields(self, text: str, path: Where) -> dict[str, Any]:
        """A prompt as text, or as the messages of a chat that JSON or YAML spells."""
        self._check_markup(text, path)
        plain: Any = None
        if text.lstrip().startswith(("[", "{")):
            try:
                plain = json_text.read(text)
            except ValueError:
                plain = None
        elif text.lstrip().startswith("- role:"):
            plain = read_yaml(text).plain
        if plain is None:
            return {"prompt": text}
        if not isinstance(plain, list) or not all(
            isinstance(one, dict) and set(one) == {"role", "content"} for one in plain
        ):
            raise self.fault("a prompt in JSON is a list of messages with 'role' and 'content' here.", *path)
        return {"messages": plain}

    def _check_markup(self, text: str, path: Where) -> None:
        for match in _MARKUP.finditer(text):
            if not _VARIABLE.fullmatch(match[0]):
                raise self.fault(
                    f"the template {shortened(match[0])} has no counterpart here: only {{{{name}}}} is filled.", *path
                )

    def _test(
        self,
        index: int,
        test: Any,
        default: Mapping[str, Any],
        prompts: list[tuple[str, dict[str, Any]]],
        used: dict[str, int],
    ) -> None:
        here: Where = ("tests", index)
        if not isinstance(test, dict):
            raise self.fault(f"test {index + 1} is no mapping: {shortened(repr(test))}.", *here)
        self._check_test(test, *here)
        assertions = [*self._part(default, "assert", list, "defaultTest"), *self._part(test, "assert", list, *here)]
        if not assertions:
            raise self.fault(
                f"test {index + 1} asserts nothing, so nothing can be judged.", *here, do="Add an assertion."
            )
        values = {**self._part(default, "vars", dict, "defaultTest"), **self._part(test, "vars", dict, *here)}
        identity = str(test.get("description") or f"test-{index + 1}")
        combined = list(self._combinations(values, here))
        for number, (variables, files) in enumerate(combined, start=1):
            expect = self._expected(assertions, variables, here)
            for place, (label, fields) in enumerate(prompts, start=1):
                name = identity if len(combined) == 1 else f"{identity} ({number})"
                name = name if len(prompts) == 1 else f"{name} / {label or f'prompt {place}'}"
                used[name] = used.get(name, 0) + 1
                one = {"id": name if used[name] == 1 else f"{name} #{used[name]}", **fields}
                if variables:
                    one["variables"] = dict(variables)
                if files:
                    one["files"] = dict(files)
                self.made.add({**one, "expect": expect}, line_of(self.read.lines, here))
                if len(self.made.inputs) > _MOST_TESTS:
                    raise self.fault(f"these are more than {_MOST_TESTS} inputs.", *here, do="")

    def _part(self, test: Mapping[str, Any], name: str, kind: type, *path: str | int) -> Any:
        value = test.get(name)
        if value is not None and not isinstance(value, kind):
            raise self.fault(
                f"'{name}' is no {'list' if kind is list else 'mapping'}: {shortened(repr(value))}.", *path, name
            )
        return kind() if value is None else value

    def _combinations(self, values: Mapping[str, Any], here: Where) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
        """Variables and files for each combination of lists."""
        choices = []
        for name, value in values.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise self.fault(f"a variable cannot be called '{shortened(name)}' here.", *here, "vars", name)
            listed = value if isinstance(value, list) else [value]
            choices.append([(name, self._variable(one, (*here, "vars", name))) for one in listed])
        for count, chosen in enumerate(itertools.product(*choices)):
            if count > _MOST_TESTS:
                raise self.fault(f"its lists make more than {_MOST_TESTS} tests.", *here, "vars", do="")
            files = {name: text.removeprefix("file://") for name, text in chosen if text.startswith("file://")}
            yield {name: text for name, text in chosen if name not in files}, files

    def _variable(self, value: Any, path: Where) -> str:
        """A variable's value as promptfoo fills it in."""
        if isinstance(value, bool):
            return "true" if value else "false"
        if value is None:
            return ""
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        if isinstance(value, int | float):
            return str(value)
        if not isinstance(value, str):
            raise self.fault(f"a variable that is a {type(value).__name__} has no counterpart here.", *path)
        if _MARKUP.search(value):
            raise self.fault(f"templates in a variable have no counterpart here: {shortened(value)}.", *path)
        if value.startswith("file://"):
            self._file(value, path, (".txt", ".md"))
        return value

    def _expected(self, assertions: list[Any], variables: Mapping[str, str], here: Where) -> dict[str, Any]:
        expect: dict[str, Any] = {}
        for assertion in assertions:
            self._assertion(assertion, variables, expect, here)
        return expect

    def _assertion(self, assertion: Any, variables: Mapping[str, str], expect: dict[str, Any], here: Where) -> None:
        path = (*here, "assert")
        kind = assertion.get("type") if isinstance(assertion, dict) else None
        if not isinstance(kind, str) or kind not in KNOWN:
            found = f"an assertion has no counterpart here: {shortened(repr(assertion), 120)}."
            raise self.fault(found, *path, do=f"Translate it by hand or remove it. Known: {', '.join(KNOWN)}.")
        self._check_assertion(kind, assertion, path)
        value = assertion.get("value")
        if kind in _PARTS:
            self._parts(kind, value, variables, expect, path)
        elif kind == "is-json":
            self._is_json(value, expect, path)
        elif kind == "equals":
            self._equals(value, variables, expect, path)
        else:
            text = self._text(kind, value, variables, path)
            if kind == "llm-rubric":
                self._once(expect, "judge", text, kind, path)
                self.made.remark("llm-rubric is graded by the judge's own prompt here, in both orders")
            else:
                pattern = text if kind == "regex" else r"\A" + re.escape(text)
                self._add_pattern(expect, pattern)
                if kind == "regex":
                    self.made.remark("regular expressions are read in Python's dialect, not JavaScript's")

    def _check_assertion(self, kind: str, assertion: Mapping[str, Any], path: Where) -> None:
        """Refuse what changes the meaning of an assertion."""
        for name, value in assertion.items():
            changes = (name == "weight" and value != 1) or (name == "threshold" and value is not None)
            if name not in _ASSERTION or changes:
                raise self.fault(f"'{shortened(str(name))}' of the assertion '{kind}' has no counterpart here.", *path)
        if assertion.get("metric"):
            self.made.remark("names of metrics are not imported")
        if assertion.get("provider"):
            self.made.remark("the provider that grades is not imported: name a judge with --judge")
        if str(assertion.get("value")).startswith("file://"):
            raise self.fault(f"the assertion '{kind}' reads a file, which has no counterpart here.", *path)

    def _parts(self, kind: str, value: Any, variables: Mapping[str, str], expect: dict[str, Any], path: Where) -> None:
        criterion, same_case = _PARTS[kind]
        several = kind.endswith(("-all", "-any"))
        if several and isinstance(value, str):
            value = [one.strip() for one in value.split(",")]
            self.made.remark(f"the text of {kind} was read as a list parted by commas")
        listed = value if several and isinstance(value, list) else [value]
        if not listed:
            raise self.fault(f"the assertion '{kind}' lists nothing.", *path)
        if criterion == "contains_any" and criterion in expect:
            raise self.fault("two assertions become 'contains_any'; an input can have one.", *path)
        for one in listed:
            text = self._text(kind, one, variables, path)
            expect.setdefault(criterion, []).append({"text": text, "within_words": True, "same_case": same_case})

    def _text(self, kind: str, value: Any, variables: Mapping[str, str], path: Where) -> str:
        """An assertion's text with its variables filled in."""
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
            raise self.fault(f"the assertion '{kind}' needs a text, got {shortened(repr(value))}.", *path)
        text = self._variable(value, path) if not isinstance(value, str) else value
        self._check_markup(text, path)

        def fill(match: re.Match[str]) -> str:
            if match[1] not in variables:
                raise self.fault(
                    f"the variable '{match[1]}' of the assertion '{kind}' has no value that is a text.", *path
                )
            return variables[match[1]]

        return _VARIABLE.sub(fill, text)

    def _equals(self, value: Any, variables: Mapping[str, str], expect: dict[str, Any], path: Where) -> None:
        if isinstance(value, dict | list):
            self._add_schema(expect, {"const": value})
            self.made.remark("equals with an object: an answer in one code fence passes, too")
            return
        self._once(expect, "exact", self._text("equals", value, variables, path), "equals", path)
        self.made.remark("equals: white space around the answer does not count here")

    def _is_json(self, value: Any, expect: dict[str, Any], path: Where) -> None:
        if isinstance(value, str):
            try:
                value = read_yaml(value).plain
            except Fault as fault:
                raise self.fault(f"the schema of is-json cannot be read: {fault.found}", *path) from fault
        if value is not None and not isinstance(value, dict | bool):
            raise self.fault(f"is-json needs a schema, got {shortened(repr(value))}.", *path)
        self._add_schema(expect, True if value is None else value)
        self.made.remark("is-json: an answer in one code fence passes, too; schemas are read as draft 2020-12")

    @staticmethod
    def _add_schema(expect: dict[str, Any], schema: Any) -> None:
        before = expect.get("json_schema")
        expect["json_schema"] = schema if before is None else {"allOf": [before, schema]}

    @staticmethod
    def _add_pattern(expect: dict[str, Any], pattern: str) -> None:
        before = expect.get("regex", [])
        patterns = [*(before if isinstance(before, list) else [before]), pattern]
        expect["regex"] = patterns if len(patterns) > 1 else pattern

    def _once(self, expect: dict[str, Any], criterion: str, value: Any, kind: str, path: Where) -> None:
        if criterion in expect:
            raise self.fault(f"two assertions '{kind}' become '{criterion}'; an input can have one.", *path)
        expect[criterion] = value
