"""Any OpenAI-compatible endpoint by URL: vLLM, TGI, Ollama, LM Studio, llama-server, a cloud API.

OpenAI, Anthropic and Google speak this protocol too (``https://api.openai.com/v1``,
``https://api.anthropic.com/v1``, ``https://generativelanguage.googleapis.com/v1beta/openai``), so that no
client of their own is needed. Their dialects differ in fields that one of them refuses: a refusal that names
such a field is heeded, and the request sent again without it. The key is read from the environment when the
endpoint is opened; it is in no record, no message and no log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx

from bitladder.engines.address import api_base, split_address
from bitladder.engines.base import Chat, Completion
from bitladder.engines.chat_api import (
    THOUGHT_BUDGET,
    ChatRequest,
    ReplyStatus,
    Timeouts,
    parse_json,
    send_chat,
    status_error,
    translated,
)
from bitladder.engines.names import same_model
from bitladder.engines.network import proxy_for, tls_context
from bitladder.errors import BadInput, EngineError, EngineGone, EngineReply, EngineTimeout, UsageError, WrongModel

_TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_WAIT_S = 60.0
_MOST_STALLS = 2
"""Tries that may end in silence: each costs the whole patience of ``Timeouts``."""
_LONGEST_KEY = 4096
_NOT_ESSENTIAL = (
    "seed", "stream_options", "temperature", THOUGHT_BUDGET, "top_k", "min_p", "repeat_penalty", "top_p",
    "presence_penalty", "frequency_penalty",
)  # fmt: skip
"""Fields that some endpoints refuse and an answer can do without."""
_SAMPLERS = _NOT_ESSENTIAL[4:]

CLOUD_KEYS = {
    "api.openai.com": "OPENAI_API_KEY",
    "api.anthropic.com": "ANTHROPIC_API_KEY",
    "generativelanguage.googleapis.com": "GEMINI_API_KEY",
    "api.mistral.ai": "MISTRAL_API_KEY",
    "api.deepseek.com": "DEEPSEEK_API_KEY",
    "openrouter.ai": "OPENROUTER_API_KEY",
    "api.groq.com": "GROQ_API_KEY",
    "api.together.xyz": "TOGETHER_API_KEY",
}
"""The environment variables that these services' own pages name for their keys, by host."""
_AZURE, _AZURE_KEY = (".openai.azure.com", ".services.ai.azure.com"), "AZURE_OPENAI_API_KEY"


@dataclass(frozen=True)
class EndpointSettings:
    """An endpoint as the user describes it; part of the evidence of everything measured with it, so it holds no key."""

    base_url: str
    """What ``/chat/completions`` is appended to; written as any address, kept as `api_base` gives it."""
    model: str = ""
    """As the endpoint names it; empty where it serves only one."""
    key_env: str = ""
    """Environment variable that holds the key; empty for endpoints that want none."""
    key_file: str = ""
    """File that holds the key, instead of the variable."""
    parallel: int = 4
    """Requests in flight at once."""
    retries: int = 4
    """Further tries after a refusal that may pass (too many requests, overload, a broken connection)."""
    requests_per_minute: float = 0.0
    """At most this many; 0 for no limit of ours."""
    logprobs: bool = False
    """Whether it reports probabilities."""
    max_tokens_field: str = "max_tokens"
    """Newer models of some clouds want ``max_completion_tokens``."""
    without: tuple[str, ...] = ()
    """Fields it refuses, such as ``seed`` or ``temperature``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", api_base(self.base_url))

    @property
    def host(self) -> str:
        """Host and port."""
        return urlsplit(self.base_url).netloc

    @property
    def wants_key(self) -> bool:
        """Whether a key goes with its requests, which is what costs money."""
        return bool(self.key_env or self.key_file)

    def read_key(self) -> str:
        """The key; empty for an endpoint that wants none.

        Raises:
            UsageError: the variable is empty, or the file cannot be read or holds no key.
        """
        if self.key_file:
            return _key_in(self.key_file)
        if not self.key_env:
            return ""
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise UsageError(
                f"The environment variable {self.key_env} is empty.",
                do=f"Put the key of {self.base_url} into it, or name a file that holds it with --key-file.",
            )
        return _sendable(key, f"The environment variable {self.key_env}")

    @property
    def address(self) -> str:
        """As ``endpoint_at`` reads it."""
        return f"{self.base_url}#{self.model}" if self.model else self.base_url

    @property
    def label(self) -> str:
        """What tables call it: the same model may stand behind several addresses."""
        return f"{self.model.rsplit('/', 1)[-1]}@{self.host}" if self.model else self.host


def endpoint_at(address: str, *, key_env: str = "", requests_per_minute: float = 0.0) -> EndpointSettings:
    """An endpoint from ``URL#model``, as the command line takes it; the key's variable is known for some clouds.

    Raises:
        UsageError: not an address.
    """
    url, model = split_address(address)
    key = key_env or _cloud_key(urlsplit(url).hostname or "")
    return EndpointSettings(url, model=model, key_env=key, requests_per_minute=requests_per_minute)


def _cloud_key(host: str) -> str:
    """The variable that a well-known cloud's key is in; empty for other hosts."""
    return _AZURE_KEY if host.endswith(_AZURE) else CLOUD_KEYS.get(host, "")


def connected(settings: EndpointSettings) -> Endpoint:
    """An endpoint that was asked what it serves: where no model is named, its only one is meant.

    Raises:
        UsageError: it serves several and none was named, or the key cannot be read.
        WrongModel, EngineError: as `Endpoint.probe`.
    """
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(Endpoint(settings))
        models = found.probe()
        if settings.model or not models:
            stack.pop_all()
            return found
    if len(models) > 1:
        shown = ", ".join(models[:8]) + (", ..." if len(models) > 8 else "")
        raise UsageError(
            f"{settings.base_url} serves {len(models)} models: {shown}.",
            means="It is not clear which one is meant.",
            do=f"Name it: {settings.base_url}#{models[0]}",
        )
    return Endpoint(dataclasses.replace(settings, model=models[0]))


def _key_in(path: str) -> str:
    """The key in a file: its first line, of at most a few thousand characters."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_LONGEST_KEY + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"The key file '{path}' cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}.",
            do="Check the path and who may read it.",
        ) from None
    lines = text.strip().splitlines()
    if len(lines) != 1 or len(text) > _LONGEST_KEY:
        found = "holds no key" if not lines else "holds more than a key"
        raise BadInput(f"The key file '{path}' {found}.", do="Write the key alone into it, on one line.")
    return _sendable(lines[0].strip(), f"The key file '{path}'")


def _sendable(key: str, where: str) -> str:
    """A key that can stand in a header."""
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise BadInput(f"{where} holds no key: there are spaces or other signs in it that no key has.")
    return key


class Endpoint:
    """One model at one endpoint; an ``engines.base.Engine`` and a context manager."""

    def __init__(
        self,
        settings: EndpointSettings,
        *,
        timeouts: Timeouts | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        key = settings.read_key()
        proxy = proxy_for(settings.base_url) if transport is None else None
        self.settings = settings
        self.name = settings.model or settings.host
        self.parallel = settings.parallel
        self._key = key
        self._sleep = sleep
        self._gate = _Gate(settings.requests_per_minute, sleep)
        self._served = ""
        self._thought = False
        self._unanswered = 0
        self._without = settings.without
        self._max_tokens_field = settings.max_tokens_field
        self._lock = threading.Lock()
        self._client = httpx.Client(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=(timeouts or Timeouts()).for_httpx(),
            transport=transport,
            trust_env=False,  # its rule would ask this machine through a proxy, too
            proxy=proxy.url if proxy else None,
            verify=tls_context() if transport is None else True,
        )

    def __repr__(self) -> str:
        return f"Endpoint({self.settings})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def probe(self) -> tuple[str, ...]:
        """The models it says it serves; empty where it keeps no list.

        Raises:
            WrongModel: it keeps a list and the wanted model is not on it.
            EngineError: it cannot be asked.
        """
        url = f"{self.settings.base_url.rstrip('/')}/models"
        try:
            with translated(url):
                response = self._client.get(url)
            if response.status_code in (404, 405):
                return ()
            if response.status_code in (401, 403):
                # A key may be good for chats alone, and some clouds list models under other headers: so ask.
                self.chat(Chat.of("Hello", 16))
                return ()
            if response.status_code != httpx.codes.OK:
                raise status_error(url, response)
            reply = parse_json(url, response.text)
        except EngineError as error:
            raise self._without_key(error) from None
        listed = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(listed, list):
            raise EngineReply(f"The engine at {url} lists its models in a way we cannot read.")
        models = tuple(str(one.get("id", "")) for one in listed if isinstance(one, dict))
        wanted = self.settings.model
        if wanted and models and not any(same_model(wanted, model) for model in models):
            shown = ", ".join(models[:8]) + (", ..." if len(models) > 8 else "")
            raise WrongModel(f"{self.settings.base_url} does not serve '{wanted}'.", do=f"It serves: {shown}.")
        return models

    def chat(self, chat: Chat) -> Completion:
        """Answer a chat (``engines.base.Engine.chat``), trying again where that may help.

        Raises:
            WrongModel: the reply names another model than the one asked for, or than the one that answered
                before.
            EngineError: no answer after all tries.
        """
        url = f"{self.settings.base_url.rstrip('/')}/chat/completions"
        if not self.settings.logprobs:
            chat = dataclasses.replace(chat, logprobs=0)
        tried = stalled = 0
        while True:
            request = ChatRequest(
                self.settings.model, chat, max_tokens_field=self._max_tokens_field, without=self._without
            )
            self._gate.wait()
            try:
                completion = send_chat(self._client, url, request)
            except (EngineReply, EngineTimeout, EngineGone) as error:
                if self._adapted(request, error):
                    continue
                stalled += isinstance(error, EngineTimeout)
                wait_s = _wait_before(error, tried)
                if wait_s is None or tried == self.settings.retries or stalled == _MOST_STALLS:
                    raise self._without_key(error) from None
                tried += 1
                self._sleep(wait_s)
            else:
                self._same_as_before(completion.model)
                with self._lock:
                    self._thought |= completion.thought
                    self._unanswered += completion.unfinished_thought
                return completion

    @property
    def notes(self) -> tuple[str, ...]:
        """What about its dialect bears on the answers."""
        label = self.settings.label
        found = []
        if "temperature" in self._without:
            found.append(f"{label} refuses a temperature: its answers are sampled, not greedy.")
        if refused := [name for name in _SAMPLERS if name in self._without]:
            found.append(f"{label} refuses {', '.join(refused)}: it samples otherwise than the levels.")
        if THOUGHT_BUDGET in self._without:
            found.append(f"{label} takes no limit for a thought: its thoughts share the limit of the answer.")
        if self._thought:
            found.append(
                f"{label} thinks before it answers; what it thinks is not judged, and counts against max_tokens."
            )
        if self._unanswered:
            found.append(
                f"{self._unanswered} answers of {label} were cut while it still thought: raise their max_tokens."
            )
        return tuple(found)

    def _adapted(self, request: ChatRequest, error: EngineError) -> bool:
        """Whether the endpoint refused a field by its name, and later requests do without it."""
        if not isinstance(error, ReplyStatus) or error.status not in (400, 422):
            return False
        said = error.found.lower()
        if "max_completion_tokens" in said and request.max_tokens_field == "max_tokens":
            self._max_tokens_field = "max_completion_tokens"
            return True
        for name in _NOT_ESSENTIAL:
            if name not in request.without and re.search(rf"\b{name}\b", said):
                with self._lock:
                    self._without = tuple(dict.fromkeys((*self._without, name)))
                return True
        return False

    def _same_as_before(self, served: str) -> None:
        wanted = self.settings.model
        with self._lock:
            self._served = first = self._served or served
        if wanted and served and not same_model(wanted, served):
            raise WrongModel(
                f"{self.settings.base_url} was asked for '{wanted}' and answered as '{served}'.",
                means="It routes to another model, so its answers say nothing about the one you want.",
                do="Name the model as the endpoint does, or ask an endpoint that serves it.",
            )
        if served != first:
            raise WrongModel(
                f"{self.settings.base_url} answered as '{first}' first and as '{served}' now.",
                means="The model was exchanged while it was measured.",
                do="Measure again: what was measured belongs to two models.",
            )

    def _without_key(self, error: EngineError) -> EngineError:
        """The same error with the key, should the endpoint have repeated it, blotted out."""
        if self._key:
            for part in ("found", "means", "do"):
                setattr(error, part, getattr(error, part).replace(self._key, "[key]"))
            error.args = (error.found,)
        return error


def _wait_before(error: EngineError, attempt: int) -> float | None:
    """Seconds to wait before trying again, doubling each time; None when trying again cannot help."""
    if isinstance(error, ReplyStatus):
        if error.status not in _TRY_AGAIN:
            return None
        if error.retry_after_s is not None:
            return min(error.retry_after_s, _LONGEST_WAIT_S)
    return float(min(2**attempt, _LONGEST_WAIT_S))


class _Gate:
    """Lets at most so many through per minute, evenly spaced."""

    def __init__(self, per_minute: float, sleep: Callable[[float], None]) -> None:
        self._gap_s = 60.0 / per_minute if per_minute > 0 else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        self._sleep = sleep

    def wait(self) -> None:
        if not self._gap_s:
            return
        with self._lock:
            now = time.monotonic()
            mine = max(now, self._next)
            self._next = mine + self._gap_s
        if mine > now:
            self._sleep(mine - now)
