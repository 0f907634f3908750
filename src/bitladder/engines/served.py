"""An engine of our own behind OpenAI's API: any server that a command starts, spoken to over HTTP.

What one of them adds is its command, and the services that its own API has beside the common ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from bitladder.engines.base import Chat, Completion, Identity, Launch, Unsupported
from bitladder.engines.chat_api import ChatRequest, Timeouts, parse_json, send_chat, status_error, translated
from bitladder.engines.process import EngineProcess, free_port
from bitladder.errors import BadInput, EngineError, EngineGone, EngineReply

KEEPER = "bitladder.engines.keeper"


class ServedEngine(ABC):
    """A server that ``command`` starts; an ``engines.base.Running``. Its methods may be called from several threads.

    A subclass gives `command`, `environment` where it reads its key from, and overrides `tokenize` and `time_tokens`
    where it has them. A crash of the engine is an EngineError with the engine's last words, never our end.
    """

    def __init__(self, launch: Launch, identity: Identity, *, timeouts: Timeouts | None = None) -> None:
        self.launch = launch
        self.identity = Identity(identity.engine, identity.version, launch.model_name)
        self.name = launch.model_name
        self.parallel = launch.n_parallel
        self.process = EngineProcess(launch)
        self._timeouts = timeouts or Timeouts(stall_s=1800.0)
        self._client: httpx.Client | None = None

    @abstractmethod
    def command(self, port: int) -> Sequence[str]:
        """The program and its arguments; it listens on ``launch.host`` and this port."""

    def environment(self) -> dict[str, str | None]:
        """Variables that it is given beside ours; None takes one away."""
        return {}

    @property
    def base_url(self) -> str:
        """``http://127.0.0.1:PORT``; the OpenAI-compatible API is under ``/v1``."""
        return self.process.base_url

    @property
    def load_seconds(self) -> float:
        """From starting to answering; NaN before."""
        return self.process.load_seconds

    def start(self, timeout_s: float = 600.0) -> Self:
        """Start the engine, unless it runs already; ``with`` does it by itself (``engines.base.Running.start``)."""
        if self._client is not None:
            return self
        if not Path(self.launch.path).exists():
            raise BadInput(f"There is no file '{self.launch.path}'.", do="Give the path of a GGUF file.")
        self._start_process(timeout_s)
        # No proxies from the environment: the engine is on this machine.
        limits = httpx.Limits(max_connections=self.parallel + 4, max_keepalive_connections=self.parallel + 4)
        key = self.launch.api_key
        self._client = httpx.Client(
            headers={"authorization": f"Bearer {key}"} if key else {},
            trust_env=False, timeout=self._timeouts.for_httpx(), limits=limits,
        )  # fmt: skip
        return self

    def _start_process(self, timeout_s: float) -> None:
        port = self.launch.port or free_port(self.launch.host)
        self.process.start(
            [KEEPER, *self.command(port)],
            self.environment(),
            base_url=f"http://{self.launch.host}:{port}",
            timeout_s=timeout_s,
        )

    def poll(self) -> int | None:
        """None while it runs, otherwise its exit code (negative: the signal that ended it)."""
        return self.process.poll()

    @property
    def pid(self) -> int | None:
        """Process id while there is one."""
        return self.process.pid

    def last_log(self, lines: int = 8) -> str:
        """The engine's last words."""
        return self.process.last_log(lines)

    def death(self, wait_s: float = 0.0) -> EngineGone | None:
        """An error that tells how it ended, or None when it still runs after waiting ``wait_s`` for the end."""
        return self.process.death(wait_s)

    def stop(self, grace_s: float = 5.0) -> None:
        """End it, by force after ``grace_s``. Calling it twice does no harm."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
        self.process.stop(grace_s)

    def close(self) -> None:
        """End the engine."""
        self.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def chat(self, chat: Chat) -> Completion:
        """Answer a chat through the model's own template (``engines.base.Engine.chat``)."""
        return self._chat(ChatRequest(self.name, chat))

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:  # noqa: ARG002
        """Token ids (``engines.base.Running.tokenize``)."""
        raise Unsupported(f"{self.identity.engine} does not give the tokens of a text.", do="Use an engine that does.")

    def time_tokens(
        self,
        tokens: Sequence[int],  # noqa: ARG002
        *,
        max_tokens: int,  # noqa: ARG002
        again: bool = False,  # noqa: ARG002
    ) -> Mapping[str, float]:
        """The engine's own clock (``engines.base.Running.time_tokens``)."""
        raise Unsupported(f"{self.identity.engine} does not report its own timings.")

    def _chat(self, request: ChatRequest) -> Completion:
        try:
            return send_chat(self._http(), f"{self.base_url}/v1/chat/completions", request)
        except EngineError as error:
            raise self._explained(error) from error

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        url = f"{self.base_url}{path}"
        try:
            with translated(url):
                response = self._http().request(method, url, json=body)
            if response.status_code != httpx.codes.OK:
                raise status_error(url, response)
            reply = parse_json(url, response.text)
            if not isinstance(reply, dict):
                raise EngineReply(f"The engine at {url} answered with a {type(reply).__name__} instead of an object.")
        except EngineError as error:
            raise self._explained(error) from error
        return reply

    def _http(self) -> httpx.Client:
        if self._client is None:
            raise self.death() or EngineError("The engine is closed.", do="Use it inside its `with` block.")
        return self._client

    def _explained(self, error: EngineError) -> EngineError:
        """If the engine has died, its last words say more than the broken connection does."""
        if isinstance(error, EngineReply) and getattr(error, "status", None) is not None:
            return error
        return self.death(wait_s=2.0) or error
