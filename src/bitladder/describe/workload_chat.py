"""The chat of an input: a prompt, messages with calls of tools and their results, or several turns.

    turns:
      - "Answer in French from now on. What is the capital of Italy?"
      - {user: "And of Spain?", answer: "Madrid."}      # given: the model is not asked
      - {user: "And of Portugal?", expect: {contains_all: Lisbonne}}
      - {results: {search: "No trains today."}}         # of the tools that the answer before has called

The model's own answers stand between the turns, but for those that are given.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitladder.describe import criterion_values as values
from bitladder.describe.document import Document, filled, shortened
from bitladder.describe.structured import Where
from bitladder.describe.tool_calls import dict_of, tool_name
from bitladder.describe.workload import Criterion, Turn

ROLES = ("system", "user", "assistant", "tool")
MOST_TURNS = 200
Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """What is asked first, how it goes on, and what the last answer must satisfy beside the input's own criteria."""

    messages: tuple[Message, ...]
    turns: tuple[Turn, ...] = ()
    criteria: tuple[Criterion, ...] = ()


@dataclass(frozen=True)
class ChatReader:
    """Reads the chat of one input.

    ``system`` stands before a prompt or turns; ``criteria_of`` reads the criteria at a path, ``tools`` are the names of
    the input's tools.
    """

    document: Document
    path: Where
    variables: Mapping[str, str]
    system: Any
    tools: frozenset[str]
    criteria_of: Callable[[Mapping[str, Any], Where], tuple[Criterion, ...]]

    def read(self, plain: Mapping[str, Any]) -> Chat:
        """The chat.

        Raises:
            Fault: what is wrong with it.
        """
        ways = [name for name in ("prompt", "messages", "turns") if name in plain]
        if len(ways) != 1:
            raise self.document.fault("an input needs either 'prompt' or 'messages', or 'turns'.", *self.path)
        if ways == ["prompt"]:
            return Chat((*self._system(), self._user(plain["prompt"], "prompt")))
        listed, name = plain[ways[0]], ways[0]
        if not isinstance(listed, list) or not listed:
            raise self.document.fault(f"{name} needs a list of {name} that is not empty.", *self.path, name)
        return Chat(self._messages(listed)) if name == "messages" else self._turns(listed)

    def _fill(self, text: str, *where: str | int) -> str:
        return filled(self.document, text, self.variables, *self.path, *where)

    def _text(self, value: Any, *where: str | int) -> str:
        return self._fill(self.document.read(values.words, value, *self.path, *where), *where)

    def _system(self) -> tuple[Message, ...]:
        return () if self.system is None else ({"role": "system", "content": self._text(self.system, "system")},)

    def _user(self, value: Any, *where: str | int) -> Message:
        return {"role": "user", "content": self._text(value, *where)}

    def _messages(self, listed: list[Any]) -> tuple[Message, ...]:
        history = _History(self)
        for place, message in enumerate(listed):
            history.add(message, "messages", place)
        history.check_answered("messages", len(listed) - 1)
        if history.messages[-1]["role"] not in ("user", "tool"):
            where = (*self.path, "messages", len(listed) - 1)
            raise self.document.fault("the last message must be the user's, or a tool's result.", *where)
        return tuple(history.messages)

    def _turns(self, listed: list[Any]) -> Chat:
        if len(listed) > MOST_TURNS:
            raise self.document.fault(f"a chat has at most {MOST_TURNS} turns.", *self.path, "turns")
        groups = [_Group(list(self._system()))]
        for place, plain in enumerate(listed):
            here: Where = ("turns", place)
            turn = {"user": plain} if isinstance(plain, str) else plain
            self._check_turn(turn, place, last=place == len(listed) - 1)
            if "results" in turn:
                groups[-1].results = self._results(turn["results"], *here, "results")
            else:
                where = here if isinstance(plain, str) else (*here, "user")
                groups[-1].messages.append(self._user(turn["user"], *where))
            if "answer" in turn:
                text = self._text(turn["answer"], *here, "answer")
                groups[-1].messages.append({"role": "assistant", "content": text})
            else:
                if "expect" in turn:
                    groups[-1].criteria = self.criteria_of(turn, (*self.path, *here))
                groups.append(_Group())
        asked = groups[:-1]
        turns = tuple(
            Turn(tuple(after.messages), after.results, before.criteria) for before, after in itertools.pairwise(asked)
        )
        return Chat(tuple(asked[0].messages), turns, asked[-1].criteria)

    def _check_turn(self, turn: Any, place: int, *, last: bool) -> None:
        where = (*self.path, "turns", place)
        if not isinstance(turn, dict):
            found = f"a turn is a text or has fields like user, got {shortened(repr(turn))}."
            raise self.document.fault(found, *where)
        self.document.known(turn, ("user", "answer", "expect", "results"), *where)
        if ("user" in turn) == ("results" in turn):
            raise self.document.fault("a turn needs either 'user' or 'results'.", *where)
        if "results" in turn and (place == 0 or not self.tools):
            found = "results of tools come after an answer that calls one" if self.tools else "this input has no tools"
            raise self.document.fault(f"{found}.", *where, "results")
        if "answer" in turn and (last or "expect" in turn or "results" in turn):
            why = "the last answer is the model's" if last else "an answer that is given is not judged"
            raise self.document.fault(f"{why}.", *where, "answer", do="Leave out one of them.")

    def _results(self, plain: Any, *where: str | int) -> dict[str, str]:
        found = {}
        for name, text in self.document.read(dict_of, plain, *self.path, *where).items():
            if name not in self.tools:
                raise self.document.fault(f"there is no tool '{shortened(name)}'.", *self.path, *where, name)
            said = self.document.read(values.a_string, text, *self.path, *where, name)
            found[name] = self._fill(said, *where, name)
        if not found:
            raise self.document.fault("results needs a tool with what it gives.", *self.path, *where)
        return found


@dataclass
class _Group:
    """What is said before one answer of the model, and what that answer must satisfy."""

    messages: list[Message] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)
    criteria: tuple[Criterion, ...] = ()


@dataclass
class _History:
    """Messages with the calls that wait for their results."""

    reader: ChatReader
    messages: list[Message] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    """Identity of a call to the name of its tool."""
    calls: int = 0

    def add(self, plain: Any, *where: str | int) -> None:
        """One more message.

        Raises:
            Fault: what is wrong with it.
        """
        document, path = self.reader.document, (*self.reader.path, *where)
        role = plain.get("role") if isinstance(plain, dict) else None
        read = {"assistant": self._assistant, "tool": self._result}.get(str(role))
        if read is None:
            wanted = {"role": values.choice(*ROLES), "content": values.words}
            found = document.read(lambda value: values.fields(value, wanted, {}), plain, *path)
            message = {"role": found["role"], "content": self.reader._fill(found["content"], *where, "content")}
        if role != "tool":
            self.check_answered(*where)
        self.messages.append(message if read is None else read(plain, *where))

    def check_answered(self, *where: str | int) -> None:
        """Raise a fault where a call has no result before the chat goes on."""
        if self.waiting:
            name = next(iter(self.waiting.values()))
            found = f"the call of '{shortened(name)}' before has no result."
            raise self.reader.document.fault(found, *self.reader.path, *where, do="Add a message with the role tool.")

    def _assistant(self, plain: Mapping[str, Any], *where: str | int) -> Message:
        document, path = self.reader.document, (*self.reader.path, *where)
        if not plain.get("tool_calls"):
            wanted = {"role": values.a_string, "content": values.words}
            found = document.read(lambda value: values.fields(value, wanted, {"tool_calls": ((), list)}), plain, *path)
            return {"role": "assistant", "content": self.reader._fill(found["content"], *where, "content")}
        text = plain.get("content") or ""
        document.known(plain, ("role", "content", "tool_calls"), *path)
        content = self.reader._fill(document.read(values.a_string, text, *path, "content"), *where, "content")
        listed = plain["tool_calls"]
        if not isinstance(listed, list):
            raise document.fault("tool_calls needs a list of calls.", *path, "tool_calls")
        calls = [document.read(self._call, one, *path, "tool_calls", place) for place, one in enumerate(listed)]
        return {"role": "assistant", "content": content, "tool_calls": calls}

    def _call(self, plain: Any) -> Message:
        """A call in OpenAI's form, or ``{name, arguments}``.

        Raises:
            ValueError: the rest of a sentence.
        """
        outer = values.fields(
            plain,
            {"function": dict_of} if isinstance(plain, dict) and "function" in plain else {"name": tool_name},
            {"id": ("", values.a_string), "type": ("function", values.a_string), "arguments": ({}, _arguments)},
        )
        inner = outer
        if "function" in outer:
            inner = values.fields(outer["function"], {"name": tool_name}, {"arguments": ({}, _arguments)})
        if inner["name"] not in self.reader.tools:
            raise ValueError(f"calls '{inner['name']}', which is none of this input's tools")
        self.calls += 1
        identity = outer["id"] or f"call_{self.calls}"
        if identity in self.waiting:
            raise ValueError(f"has the identity '{identity[:80]}' of the call before")
        self.waiting[identity] = inner["name"]
        arguments = inner["arguments"]
        spelled = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {"id": identity, "type": "function", "function": {"name": inner["name"], "arguments": spelled}}

    def _result(self, plain: Mapping[str, Any], *where: str | int) -> Message:
        document, path = self.reader.document, (*self.reader.path, *where)
        optional = {"tool_call_id": ("", values.a_string), "name": ("", values.a_string)}
        wanted = {"role": values.a_string, "content": values.a_string}
        found = document.read(lambda value: values.fields(value, wanted, optional), plain, *path)
        fitting = [
            identity
            for identity, name in self.waiting.items()
            if found["tool_call_id"] in ("", identity) and found["name"] in ("", name)
        ]
        if not fitting:
            what = "the call that it names is not there" if self.waiting else "no call stands before it"
            raise document.fault(f"a tool's result without a call: {what}.", *path)
        del self.waiting[fitting[0]]
        content = self.reader._fill(found["content"], *where, "content")
        return {"role": "tool", "tool_call_id": fitting[0], "content": content}


def _arguments(value: Any) -> dict[str, Any] | str:
    """A mapping, or JSON as OpenAI's form has it."""
    if isinstance(value, str):
        return values.a_string(value)
    return dict_of(value)
