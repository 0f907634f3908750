"""The OpenAI-compatible chat API over httpx: one request, streamed, with every way it can go wrong named.

Foreign engines are asked to stream: a stalled engine is noticed after ``stall_s`` without a word instead of
after the whole answer's worst case, the time to the first token is measured rather than guessed, and a stream
that ends without saying why it ended is known to be cut short.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from bitladder.describe.thoughts import parted
from bitladder.engines.base import Chat, Completion, Timings, TokenChoice
from bitladder.engines.event_stream import BOM, events, whole_events
from bitladder.errors import EngineGone, EngineReply, EngineTimeout
from bitladder.records.evaluation import ToolCall
from bitladder.unicode import mended
from bitladder.units import MiB

_SHOWN = 300
"""Characters of a foreign reply that an error message repeats."""
_LONGEST_EVENT = 4 * MiB
_MOST_TOKENS = 1 << 40
_DONE = b"[DONE]"
THOUGHT_BUDGET = "thinking_budget_tokens"
"""llama.cpp's field for the tokens of a thought: when they are spent, it ends the thought."""
MOST_CALLS = 128
"""Calls of tools in one answer."""
_LONGEST_THOUGHT = 8 * MiB
"""Characters: some services do not count thoughts among the tokens they are allowed."""
_LONGEST_TOKEN = 256
"""Characters; vocabularies hold runs of spaces and dashes, none of them this long."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds without progress before an engine is called stalled, by phase."""

    connect_s: float = 10.0
    send_s: float = 60.0
    stall_s: float = 300.0
    """Between two pieces of a reply; before the first it includes reading the whole prompt."""

    def for_httpx(self) -> httpx.Timeout:
        """The same for httpx; waiting for a free connection has no limit, since our own slots bound it."""
        return httpx.Timeout(connect=self.connect_s, write=self.send_s, read=self.stall_s, pool=None)


@dataclass(frozen=True)
class ChatRequest:
    """One chat for one engine: ``extra`` holds fields that only some engines know, ``without`` those it refuses."""

    model: str
    chat: Chat
    stream: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    max_tokens_field: str = "max_tokens"
    without: Sequence[str] = ()

    def body(self) -> dict[str, Any]:
        """As JSON for ``/chat/completions``."""
        chat = self.chat
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in chat.messages],
            self.max_tokens_field: chat.max_tokens,
            "temperature": chat.temperature,
            "seed": chat.seed,
            "stream": self.stream,
        }
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if chat.logprobs:
            body |= {"logprobs": True, "top_logprobs": chat.logprobs}
        if chat.stop:
            body["stop"] = list(chat.stop)
        if chat.tools:
            body["tools"] = [dict(tool) for tool in chat.tools]
        if chat.response_format is not None:
            body["response_format"] = dict(chat.response_format)
        if chat.max_thought_tokens is not None:
            body[THOUGHT_BUDGET] = chat.max_thought_tokens
        body |= chat.sampling
        body |= self.extra
        refused = {*self.without} | ({"model"} if not self.model else set())
        return {name: value for name, value in body.items() if name not in refused}


class ReplyStatus(EngineReply):
    """An HTTP error status, kept as a number so that callers can tell "later" from "never"."""

    def __init__(self, found: str, *, status: int, retry_after_s: float | None, means: str = "", do: str = "") -> None:
        super().__init__(found, means=means, do=do)
        self.status = status
        self.retry_after_s = retry_after_s


_STATUS_MEANS = {
    400: (
        "The engine refuses this request: usually the prompt is longer than its context, or it wants a model named.",
        "Name the model as the endpoint does: http://host:port#model.",
    ),
    401: ("The key is missing or wrong.", "Set the key in the environment variable that the endpoint names."),
    403: ("The key has no right to this model.", ""),
    404: ("Nothing answers there, or the model has another name.", "Check the URL and the model."),
    429: ("The endpoint limits how many requests it takes.", "Ask for less in parallel, or wait."),
}  # fmt: skip


def send_chat(client: httpx.Client, url: str, request: ChatRequest) -> Completion:
    """Send one chat and read the answer to its end.

    Raises:
        EngineGone: nobody listens, or the connection broke.
        EngineTimeout: no word in time; the message names the phase.
        EngineReply: an error status, something that is no completion, a stream that stops without a reason or
            does not stop.
    """
    began = time.monotonic()
    answer = _Answer(began)
    try:
        with translated(url), client.stream("POST", url, json=request.body()) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                raise status_error(url, response)
            if response.headers.get("content-type", "").startswith("application/json"):
                response.read()
                answer.take(parse_json(url, response.text), whole=True)
            else:
                for event in _events(url, response.iter_bytes()):
                    answer.take(event, whole=False)
                    answer.check_length(url, request.chat.max_tokens)
        return answer.finished(url, request.model)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise EngineReply(
            f"The engine at {url} answered with JSON that is no completion ({type(error).__name__}: {error}).",
            means="It speaks another protocol, or another version of this one.",
            do="Check the URL; an OpenAI-compatible API usually ends in /v1.",
        ) from error


class translated:  # noqa: N801 - reads as a word where it is used
    """``with translated(url):`` turns httpx' errors into ours."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise our error from httpx' one; let every other through."""
        if isinstance(error, httpx.TimeoutException):
            phase = type(error).__name__.removesuffix("Timeout").lower()
            what = {
                "connect": "connecting",
                "read": "waiting for its reply",
                "write": "sending the request",
            }.get(phase, phase)
            raise EngineTimeout(
                f"The engine at {self.url} did not answer in time while {what}.",
                means="It is overloaded, stalled, or needs longer for a prompt of this length.",
                do="Allow more time, ask for less in parallel, or look at the engine's own log.",
            ) from error
        if isinstance(error, httpx.RemoteProtocolError):
            raise EngineReply(
                f"The engine at {self.url} broke off in the middle of its reply.",
                means="It crashed, was restarted, or something between us and it closed the connection.",
                do="Look at the engine's own log, then run again: what was answered is kept.",
            ) from error
        if isinstance(error, httpx.TransportError):
            raise EngineGone(
                f"The engine at {self.url} cannot be reached: {error or type(error).__name__}.",
                means="It is not running, or the address is wrong.",
                do="Start it, or correct the URL.",
            ) from error
        if isinstance(error, httpx.InvalidURL):
            raise EngineGone(
                f"'{self.url}' is no address: {error}.", do="Write it like http://host:port/v1."
            ) from error


def parse_json(url: str, text: str) -> Any:
    """JSON, or an EngineReply that shows what came instead."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EngineReply(
            f"The engine at {url} answered with something that is not JSON: {shorten(text)}",
            means="The address belongs to another kind of server, or a proxy answered in its place.",
            do="Check the URL; an OpenAI-compatible API usually ends in /v1.",
        ) from error


_TOO_LONG = (
    "The prompt, with the chat template's tokens and tools, is longer than the engine's context.",
    "Shorten the input, or give the engine a larger context (--ctx of what started it).",
)


def status_error(url: str, response: httpx.Response) -> ReplyStatus:
    """The error for a reply whose status is not 200; the response must have been read."""
    means, do = _STATUS_MEANS.get(response.status_code, ("", ""))
    if response.status_code == httpx.codes.BAD_REQUEST and "exceed_context_size" in response.text:  # llama.cpp's word
        means, do = _TOO_LONG
    retry_after = response.headers.get("retry-after", "")
    return ReplyStatus(
        f"The engine at {url} answered with status {response.status_code}: {shorten(response.text)}",
        status=response.status_code,
        retry_after_s=float(retry_after) if retry_after.replace(".", "", 1).isdigit() else None,
        means=means,
        do=do,
    )


def shorten(text: str) -> str:
    """One line of a foreign text, bounded."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."


def _events(url: str, pieces: Iterator[bytes]) -> Iterator[Any]:
    """The JSON of each event of a stream, up to ``[DONE]``. A last event without an empty line after it counts, if it
    is whole.
    """
    held = b""
    for piece in pieces:
        held = (held + piece).removeprefix(BOM)
        cut = whole_events(held)
        found, held = list(events(held[:cut])), held[cut:]
        for event in found:
            _check_unknown(url, event.unknown)
            if event.data == _DONE:
                return
            if event.data:
                yield parse_json(url, event.data.decode("utf-8", "replace"))
        if len(held) > _LONGEST_EVENT:
            raise EngineReply(f"The engine at {url} has sent {len(held)} bytes that hold no whole event.")
    for event in events(held + b"\n\n"):
        _check_unknown(url, event.unknown)
        if event.data not in (b"", _DONE):
            # Half an event: what it meant to say is missing, as will be found.
            with contextlib.suppress(ValueError, RecursionError):
                yield json.loads(event.data)


def _check_unknown(url: str, line: bytes) -> None:
    """Raise llama.cpp's own way to report an error once the stream has begun; other unknown lines are passed over."""
    if line.startswith(b"error:"):
        words = shorten(line[6:].decode("utf-8", "replace"))
        raise EngineReply(f"The engine at {url} gave up in the middle of its answer: {words}")


class _Answer:
    """Gathers the pieces of one answer."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.first_token_s = math.nan
        self.text: list[str] = []
        self.characters = 0
        self.tokens: list[TokenChoice] = []
        self.finish_reason = ""
        self.model = ""
        self.usage: dict[str, Any] = {}
        self.timings: dict[str, Any] = {}
        self.fault = ""
        self.reasoning: list[str] = []
        self.thought_characters = 0
        self.calls: dict[int, list[str]] = {}
        """By its place: name and arguments."""

    def take(self, event: Any, *, whole: bool) -> None:
        """One event of the stream, or the ``whole`` reply of an engine that does not stream."""
        if not isinstance(event, dict):
            self.fault = f"an event that is no object: {shorten(str(event))}"
            return
        if event.get("error") not in (None, "", False):
            self.fault = f"an error: {shorten(json.dumps(event['error']))}"
            return
        self.model = event.get("model") or self.model
        self.usage = event.get("usage") or self.usage
        self.timings = event.get("timings") or self.timings
        for choice in event.get("choices") or []:
            part = choice.get("message" if whole else "delta") or {}
            self._take_thought(part.get("reasoning_content") or part.get("reasoning"))
            self._take_calls(part.get("tool_calls") or [])
            piece = text_of(part.get("content"))
            if piece:
                if math.isnan(self.first_token_s):
                    self.first_token_s = time.monotonic() - self.began
                self.text.append(piece)
                self.characters += len(piece)
            for token in (choice.get("logprobs") or {}).get("content") or []:
                self.tokens.append(_token(token))
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _take_thought(self, thought: Any) -> None:
        if isinstance(thought, str) and thought:
            self.reasoning.append(thought)
            self.thought_characters += len(thought)
            if self.thought_characters > _LONGEST_THOUGHT:
                raise ValueError(f"a thought of more than {_LONGEST_THOUGHT} characters")

    def _take_calls(self, calls: Sequence[Mapping[str, Any]]) -> None:
        """Calls, or pieces of some: of a stream each piece names the place of its call."""
        for place, call in enumerate(calls):
            own = self.calls.setdefault(int(call.get("index", place)), ["", ""])
            if len(self.calls) > MOST_CALLS:
                raise ValueError(f"more than {MOST_CALLS} calls of tools")
            function = call.get("function") or {}
            arguments = function.get("arguments") or ""
            if not isinstance(arguments, str):  # some servers send the object itself
                arguments = json.dumps(arguments, ensure_ascii=False)
            own[0] += function.get("name") or ""
            own[1] += arguments
            self.characters += len(arguments)

    def check_length(self, url: str, max_tokens: int) -> None:
        """Refuse a stream that goes on and on: no token is as long as that."""
        if self.characters > _LONGEST_TOKEN * (max_tokens + 1):
            raise EngineReply(
                f"The engine at {url} was asked for {max_tokens} tokens and has sent {self.characters} characters.",
                means="It ignores the limit, or its stream does not end.",
            )

    def finished(self, url: str, wanted_model: str) -> Completion:
        if self.fault:
            raise EngineReply(f"The engine at {url} answered with {self.fault}")
        if not self.finish_reason:
            characters = sum(map(len, self.text))
            raise EngineReply(
                f"The answer of the engine at {url} stops after {characters} characters without saying why.",
                means="The stream was cut short: the engine crashed, or a proxy has a limit of its own.",
                do="Run again: what was answered before is kept.",
            )
        found = parted(mended("".join(self.text)))
        reasoning = mended("".join(self.reasoning)) or found.thought
        calls = tuple(ToolCall(mended(name), mended(arguments)) for _, (name, arguments) in sorted(self.calls.items()))
        completion_tokens = count_of(self.usage.get("completion_tokens"), len(self.tokens))
        return Completion(
            text=found.answer,
            thought=found.thinks or bool(self.reasoning),
            reasoning=reasoning,
            thought_tokens=self._thought_tokens(reasoning, found.answer, calls, completion_tokens),
            calls=calls,
            finish_reason=self.finish_reason,
            prompt_tokens=count_of(self.usage.get("prompt_tokens"), 0),
            completion_tokens=completion_tokens,
            model=self.model or wanted_model,
            first_token_s=self.first_token_s,
            total_s=time.monotonic() - self.began,
            tokens=tuple(self.tokens),
            timings=_timings(self.timings) if self.timings else None,
        )

    def _thought_tokens(self, thought: str, text: str, calls: Sequence[ToolCall], tokens: int) -> int:
        """As the engine counts them, or by the thought's share of all characters."""
        details = self.usage.get("completion_tokens_details")
        counted = details.get("reasoning_tokens") if isinstance(details, dict) else None
        if counted:
            return min(tokens, count_of(counted, 0))
        rest = len(text) + sum(len(call.name) + len(call.arguments) for call in calls)
        return round(tokens * len(thought) / (len(thought) + rest)) if thought else 0


def text_of(content: Any) -> str:
    """A message's content: a text, nothing, or a list of parts, of which those that are text count.

    Raises:
        TypeError: it is something else.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TypeError(f"content is a {type(content).__name__}")
    texts = (part if isinstance(part, str) else part.get("text") for part in content)
    return "".join(text for text in texts if isinstance(text, str))


def count_of(value: Any, otherwise: int) -> int:
    """A number of tokens; ``otherwise`` where none is told, or one that cannot be.

    Raises:
        TypeError: it is no number.
    """
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a count of tokens is {type(value).__name__}")
    return int(value) if 0 <= value <= _MOST_TOKENS else otherwise


def _token(token: Mapping[str, Any]) -> TokenChoice:
    top = tuple(
        TokenChoice(other["token"], float(other["logprob"]), other.get("id"))
        for other in token.get("top_logprobs") or []
    )
    return TokenChoice(token["token"], float(token["logprob"]), token.get("id"), top)


def _timings(timings: Mapping[str, Any]) -> Timings:
    """llama.cpp's clock. Its decode time begins after the first token, so n tokens are n - 1 steps."""
    decoded = int(timings.get("predicted_n", 0))
    steps, decode_s = decoded - 1, float(timings.get("predicted_ms", 0.0)) / 1000
    prompt, prompt_s = int(timings.get("prompt_n", 0)), float(timings.get("prompt_ms", 0.0)) / 1000
    return Timings(
        prompt_tokens=prompt,
        prefill_tokens_per_s=prompt / prompt_s if prompt and prompt_s > 0 else math.nan,
        decode_tokens=decoded,
        decode_tokens_per_s=steps / decode_s if steps > 0 and decode_s > 0 else math.nan,
        drafted=int(timings.get("draft_n", 0)),
        accepted=int(timings.get("draft_n_accepted", 0)),
    )
