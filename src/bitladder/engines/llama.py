"""llama.cpp under test: its server in a child process, spoken to over its own API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from bitladder.engines.base import Completion, Message, TokenChoice
from bitladder.engines.chat_api import ChatRequest, Timeouts, chat, parse_json, status_error, translated
from bitladder.engines.llama_process import LlamaProcess, LlamaSettings
from bitladder.errors import EngineError, EngineReply


class LlamaServer:
    """One GGUF file in llama.cpp, as a context manager::

        with LlamaServer(path, n_ctx=2048, n_parallel=4, threads=8) as server:
            server.chat([{"role": "user", "content": "Hello"}], max_tokens=32).text

    ``n_ctx`` is what one request may use; ``n_parallel`` requests are computed together. Methods may be
    called from several threads at once. A crash of the engine is an EngineError with the engine's last words,
    never our end.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_ctx: int = 4096,
        n_parallel: int = 1,
        threads: int = 2,
        n_gpu_layers: int = -1,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        timeouts: Timeouts | None = None,
        start_timeout_s: float = 600.0,
    ) -> None:
        settings = LlamaSettings(
            path=str(path),
            n_ctx=n_ctx,
            n_parallel=n_parallel,
            threads=threads,
            n_gpu_layers=n_gpu_layers,
            cache_type_k=cache_type_k,
            cache_type_v=cache_type_v,
        )
        self.process = LlamaProcess(settings)
        self.name = settings.model_name
        self.parallel = n_parallel
        self._timeouts = timeouts or Timeouts(stall_s=1800.0)
        self._start_timeout_s = start_timeout_s
        self._client: httpx.Client | None = None

    @property
    def settings(self) -> LlamaSettings:
        """How it runs."""
        return self.process.settings

    @property
    def base_url(self) -> str:
        """``http://127.0.0.1:PORT``; the OpenAI-compatible API is under ``/v1``."""
        return self.process.base_url

    def start(self) -> Self:
        """Start the engine; ``with`` does it by itself.

        Raises:
            BadInput: there is no such file.
            EngineError: the engine did not start; the message carries its last words.
        """
        self.process.start(self._start_timeout_s)
        # No proxies from the environment: the engine is on this machine.
        limits = httpx.Limits(max_connections=self.parallel + 4, max_keepalive_connections=self.parallel + 4)
        self._client = httpx.Client(trust_env=False, timeout=self._timeouts.for_httpx(), limits=limits)
        return self

    def close(self) -> None:
        """End the engine."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self.process.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids. ``add_special`` adds BOS and EOS where the model wants them; ``<|im_end|>`` is a special token."""
        tokens: list[int] = self._post("/tokenize", {"content": text, "add_special": add_special})["tokens"]
        return tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        text: str = self._post("/detokenize", {"tokens": list(tokens)})["content"]
        return text

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that the model's own chat template makes of a chat."""
        prompt: str = self._post("/apply-template", {"messages": [dict(message) for message in messages]})["prompt"]
        return prompt

    def props(self) -> dict[str, Any]:
        """What the engine says about the model and itself."""
        props: dict[str, Any] = self._request("GET", "/props")
        return props

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        logprobs: int = 0,
        stop: Sequence[str] = (),
    ) -> Completion:
        """Answer a chat through the model's own template (``engines.base.Engine.chat``).

        Not streamed: the process's death is noticed anyway, and only a whole reply carries the probability of
        the token that ended the answer. The prompt cache is off: keys and values computed in batches of
        another shape differ in their last bits, and an answer must not depend on what was asked before.
        """
        extra: dict[str, Any] = {"cache_prompt": False}
        if temperature == 0:
            extra["top_k"] = 1
        request = ChatRequest(self.name, messages, max_tokens, temperature, seed, logprobs, stop, False, extra)
        try:
            return chat(self._http(), f"{self.base_url}/v1/chat/completions", request)
        except EngineError as error:
            raise self._explained(error) from error

    def continue_tokens(
        self, tokens: Sequence[int], *, max_tokens: int, top: int = 2, cache: bool = True
    ) -> list[TokenChoice]:
        """Greedy continuation of a prompt given as token ids, with the ``top`` most likely tokens at each place.

        Raises:
            EngineError: the engine died, stalled or answered nonsense.
        """
        body = {
            "prompt": list(tokens),
            "n_predict": max_tokens,
            "temperature": 0,
            "top_k": 1,
            "n_probs": top,
            "cache_prompt": cache,
        }
        choices = self._post("/completion", body).get("completion_probabilities", [])
        return [
            TokenChoice(
                choice["token"],
                float(choice["logprob"]),
                choice["id"],
                tuple(
                    TokenChoice(other["token"], float(other["logprob"]), other["id"])
                    for other in choice["top_logprobs"]
                ),
            )
            for choice in choices
        ]

    def time_tokens(self, tokens: Sequence[int], *, max_tokens: int) -> Mapping[str, float]:
        """The engine's own ``timings`` for computing a prompt anew and decoding exactly ``max_tokens`` after it."""
        body = {
            "prompt": list(tokens),
            "n_predict": max_tokens,
            "temperature": 0,
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        timings: Mapping[str, float] = self._post("/completion", body)["timings"]
        return timings

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
            raise self.process.death() or EngineError("The engine is closed.", do="Use it inside its `with` block.")
        return self._client

    def _explained(self, error: EngineError) -> EngineError:
        """If the engine has died, its last words say more than the broken connection does."""
        if isinstance(error, EngineReply) and getattr(error, "status", None) is not None:
            return error
        return self.process.death(wait_s=2.0) or error
