"""The shapes on the wire: what a request must be, which parts we read, and how a refusal looks.

A request is forwarded as the bytes that came in. We read a few top-level members and leave every other one
alone, known to us or not; when a member must differ (the name an upstream knows its model by) its bytes
alone are replaced. Parsing and writing the whole body again would change numbers, key order and escapes
that are none of our business.

What comes back is checked in ``events`` and ``relay``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NamedTuple

from bitladder.units import KiB

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, RERANK = "/v1/responses", "/v1/rerank"
MESSAGES, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"
TASK_MEMBER = {
    CHAT: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input", RESPONSES: "input", MESSAGES: "messages",
    COUNT_TOKENS: "messages", RERANK: "documents",
}  # fmt: skip
"""The member without which a request to each path asks for nothing."""
_OF_MESSAGES = (CHAT, MESSAGES, COUNT_TOKENS)
_WITHOUT_STREAM = (EMBEDDINGS, RERANK, COUNT_TOKENS)
_ANTHROPIC = (MESSAGES, COUNT_TOKENS)

MAX_NAME = 256
MAX_VALUES = 500_000
"""JSON values in a request's body. Each takes up to 128 bytes when read, where it took two as text."""
_WINDOW = 64 * KiB
"""Bytes of a body that are looked at together; taken apart they need up to fifty times as much."""
_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN_KEY = re.compile(r'"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*')
_AFTER_VALUE = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")
_WHOLE_TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TEXT = re.compile(_WHOLE_TEXT[:-1] + rb'(?:"|\\?\Z)', re.DOTALL)
_WHOLE_TEXTS = re.compile(rb'(?:[^"]*+%b)*+[^"]*+' % _WHOLE_TEXT, re.DOTALL)
_PROMPT_BEGINS = 1024
"""Characters that tell one prompt from another."""
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")


class Refused(Exception):
    """A request we answer ourselves, with an error in the shape that OpenAI clients understand."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = {**(headers or {}), **({} if retry_after_s is None else {"retry-after": str(retry_after_s)})}

    @property
    def body(self) -> bytes:
        """The JSON document of the error."""
        return self.body_for("")

    def body_for(self, path: str) -> bytes:
        """The same as clients of this path expect it."""
        return error_body(self.message, self.code, self.status, path)

    @property
    def fields(self) -> list[tuple[bytes, bytes]]:
        """The header fields that go with the document."""
        return self.fields_for("")

    def fields_for(self, path: str) -> list[tuple[bytes, bytes]]:
        """The same as clients of this path expect it."""
        fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.body_for(path)))]
        return fields + [(name.encode(), value.encode()) for name, value in self.headers.items()]


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


_ANTHROPIC_KINDS = {413: "request_too_large", 503: "overloaded_error"}


def error_kind(status: int, path: str = "") -> str:
    """What an API calls an error of this status: OpenAI's words, or Anthropic's on its paths."""
    if path in _ANTHROPIC and (status >= 500 or status in _ANTHROPIC_KINDS):
        return _ANTHROPIC_KINDS.get(status, "api_error")
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(message: str, code: str, status: int, path: str = "") -> bytes:
    """``{"error": {...}}`` as OpenAI's API writes it; on Anthropic's paths it is marked as their API marks it, too."""
    error = {"message": message, "type": error_kind(status, path), "param": None, "code": code}
    return json.dumps({"type": "error", "error": error} if path in _ANTHROPIC else {"error": error}).encode()


class JsonMember(NamedTuple):
    """One top-level member of a JSON object. ``start`` and ``end`` say where its value stands, in
    characters.
    """

    value: Any
    start: int
    end: int


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def strict_json(text: bytes) -> Any:
    """JSON as its standard has it: NaN and Infinity, which Python reads, are none, and clients stumble over them.

    Raises:
        ValueError: it is none.
        RecursionError: it is nested too deeply.
    """
    return _DECODER.decode(text.decode())


def members(text: str) -> dict[str, JsonMember]:
    """Top-level members of a JSON object, with the place of each value.

    Stricter than ``json.loads``: NaN, Infinity and repeated keys are refused, because an upstream with
    another parser may read another request than the one that we checked.

    Raises:
        ValueError: the text is no such object.
        RecursionError: it is nested too deeply.
    """
    found: dict[str, JsonMember] = {}
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        raise ValueError("the body is not a JSON object")
    at = _skip(text, at + 1)
    if text[at : at + 1] == "}":
        _expect_end(text, at + 1)
        return found
    while True:
        key, start = _key(text, at)
        value, end = _DECODER.raw_decode(text, start)
        if key in found:
            raise ValueError(f"the key {key[:40]!r} comes twice")
        found[key] = JsonMember(value, start, end)
        mark = _AFTER_VALUE.match(text, end)
        if mark is None:
            raise ValueError(f"',' or '}}' was expected at character {_skip(text, end)}")
        at = mark.end()
        if mark[1] == "}":
            _expect_end(text, at)
            return found


def _key(text: str, at: int) -> tuple[str, int]:
    """The key at ``at``, and where its value begins."""
    plain = _PLAIN_KEY.match(text, at)
    if plain is not None:
        return plain[1], plain.end()
    if text[at : at + 1] != '"':
        raise ValueError(f"a key was expected at character {at}")
    key, at = scanstring(text, at + 1, True)
    at = _skip(text, at)
    if text[at : at + 1] != ":":
        raise ValueError(f"':' was expected at character {at}")
    return key, _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def _expect_end(text: str, at: int) -> None:
    if _skip(text, at) != len(text):
        raise ValueError(f"something follows the object at character {at}")


@dataclass(frozen=True)
class ModelRequest:
    """A checked request. ``text`` is the body exactly as it came."""

    path: str
    text: str
    members: Mapping[str, JsonMember]

    @property
    def model(self) -> str:
        """The model asked for."""
        return str(self.members["model"].value)

    @property
    def stream(self) -> bool:
        """Whether the answer is wanted as server-sent events."""
        return self.value("stream") is True

    def value(self, name: str) -> Any:
        """The value of a top-level member, None when it is not there."""
        member = self.members.get(name)
        return None if member is None else member.value

    def with_values(self, values: Mapping[str, Any]) -> bytes:
        """The body with these top-level members set and every other byte as it came."""
        text, added = self.text, ""
        spans = []
        for name, value in values.items():
            member = self.members.get(name)
            if member is None:
                added += f",{json.dumps(name)}:{json.dumps(value)}"
            else:
                spans.append((member.start, member.end, json.dumps(value)))
        if added:
            close = text.rindex("}")
            spans.append((close, close, added if self.members else added[1:]))
        pieces, at = [], 0
        for start, end, new in sorted(spans):  # encoded piece by piece: as text one may take four times as much
            pieces += [text[at:start].encode(), new.encode()]
            at = end
        return b"".join((*pieces, text[at:].encode()))

    @cached_property
    def asked(self) -> str:
        """What is asked, to tell one kind of work from another: the last user message, the prompt or the query."""
        if self.path == RERANK:
            return _plain(self.value("query"))
        asked = [text for role, text in self._texts() if role == "user"]
        return next((text for text in reversed(asked) if text), "")  # what tools answered may be a user's message

    @property
    def beginning(self) -> str:
        """What the next request of the same conversation begins with, too: the system's words and the user's first
        message, or the first kilobyte of a prompt; empty where there is no conversation.
        """
        if self.path in (EMBEDDINGS, RERANK):
            return ""
        texts = self._texts()
        if self.path == COMPLETIONS:
            return texts[0][1][:_PROMPT_BEGINS]
        first = next((number for number, (role, _) in enumerate(texts) if role == "user"), len(texts) - 1)
        return "\0".join(text for _, text in texts[: first + 1])

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all text in the request; images and the like do not count."""
        return sum(len(text.encode("utf-8", "replace")) for _, text in self._texts())

    def _texts(self) -> list[tuple[str, str]]:
        """Role and text of each message; a prompt and an input are the user's."""
        task = self.value(TASK_MEMBER[self.path])
        if self.path in _OF_MESSAGES:
            return [("system", _plain(self.value("system"))), *_of_messages(task)]
        if self.path == RESPONSES:
            asked = _of_messages(task) if isinstance(task, list) else [("user", _plain(task))]
            return [("system", _plain(self.value("instructions"))), *asked]
        return [("user", _plain(task))]


def _of_messages(messages: list[Any]) -> list[tuple[str, str]]:
    """Role and text of messages, and of what tools answered."""
    return [(str(one.get("role")), _plain(one.get("content", one.get("output")))) for one in messages]


def _plain(content: Any) -> str:
    """Text of a message's content, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = (part.get("text") if isinstance(part, dict) else part for part in content)
        return "\n".join(text for text in texts if isinstance(text, str))
    return ""


def parse_request(path: str, body: bytes) -> ModelRequest:
    """Check what we rely on, and nothing else. The memory that it takes is bounded only where `count_values` let the
    body pass.

    Raises:
        Refused: 400 with the reason.
    """
    try:
        text = body.decode()
        found = members(text)
    except UnicodeDecodeError as error:
        raise _bad(f"The body is not UTF-8: byte {error.start} is {body[error.start]:#04x}.") from None
    except RecursionError:
        raise _bad("The body is nested too deeply.") from None
    except ValueError as error:
        raise _bad(f"The body is not a JSON request: {error}.") from None
    request = ModelRequest(path, text, found)
    _check(request)
    return request


def count_values(body: bytes) -> int:
    """No fewer than the JSON values (keys among them) that a body holds, found without parsing it, in little memory;
    the commas in its texts do not count where they would matter.

    Raises:
        Refused: 400, there are more than `MAX_VALUES`.
    """
    count = 1 + _marks(body)
    if count > MAX_VALUES:
        count = 1 + _marks_outside_texts(body)
    if count > MAX_VALUES:
        raise _bad(f"The body holds more than {MAX_VALUES} JSON values.")
    return count


def _marks(body: bytes) -> int:
    return sum(body.count(mark) for mark in (b",", b":", b"[", b"{"))


def _marks_outside_texts(body: bytes) -> int:
    """As many as there are, or some number beyond `MAX_VALUES`."""
    count = at = 0
    within = b""  # a quotation mark where the window begins in the middle of a text
    while at < len(body) and count < MAX_VALUES:
        window = within + body[at : at + _WINDOW]
        at += _WINDOW
        count += _marks(_TEXT.sub(b"", window))
        whole = _WHOLE_TEXTS.match(window)
        is_open = whole is not None and whole.end() < len(window)
        within = b'"' if is_open else b""
        if is_open and (len(window) - len(window.rstrip(b"\\"))) % 2:
            at -= 1  # the next window begins with the backslash that escapes its first character
    return count


def _check(request: ModelRequest) -> None:
    model = request.value("model")
    if not isinstance(model, str) or not 0 < len(model) <= MAX_NAME:
        raise _bad(f"'model' must be a name of 1 to {MAX_NAME} characters.")
    if not isinstance(request.value("stream"), bool | None):
        raise _bad("'stream' must be true or false.")
    if request.stream and request.path in _WITHOUT_STREAM:
        raise _bad(f"{request.path} answers with one document: 'stream' cannot be true.")
    wanted = TASK_MEMBER[request.path]
    task = request.value(wanted)
    if task is None:
        raise _bad(f"'{wanted}' is missing.")
    is_list = isinstance(task, list) and len(task) > 0
    of_objects = is_list and all(isinstance(item, dict) for item in task)
    if request.path in _OF_MESSAGES and not of_objects:
        raise _bad("'messages' must be a list of at least one message object.")
    if request.path == RESPONSES and not (of_objects or isinstance(task, str)):
        raise _bad("'input' must be a text or a list of at least one item object.")
    if request.path == RERANK and not (is_list and isinstance(request.value("query"), str)):
        raise _bad("'query' must be a text and 'documents' a list of at least one.")
    if request.path == CHAT:
        _check_tools(request.value("tools"), request.value("tool_choice"))
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n"):
        number = request.value(name)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise _bad(f"'{name}' must be a whole number.")


def named_tool(choice: Any) -> str | None:
    """The function that ``tool_choice`` names, None where it names none."""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def name_of_tool(tool: Any) -> Any:
    """The name of the function that a tool is; None where it is none."""
    function = tool.get("function") if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _check_tools(tools: Any, choice: Any) -> None:
    """Refuse a ``tool_choice`` that cannot be met whatever the model does.

    Raises:
        Refused: 400.
    """
    if tools is not None and not isinstance(tools, list):
        raise _bad("'tools' must be a list.")
    if choice in (None, "none", "auto"):
        return
    if choice != "required" and not isinstance(choice, dict):
        raise _bad("'tool_choice' must be none, auto, required, or name a function.")
    if not tools:
        raise _bad("'tool_choice' asks for a call, and 'tools' names none.")
    name = named_tool(choice)
    if name is not None and name not in map(name_of_tool, tools):
        raise _bad(f"'tool_choice' names '{name[:64]}', which is not among the tools.")


def _bad(message: str) -> Refused:
    return Refused(400, message, code="bad_request")


def header_text(value: str) -> str:
    """A value safe in a header: one line of printable ASCII, at most 300 characters."""
    return _UNPRINTABLE.sub("?", value)[:300]
