"""llama.cpp: its server in a child process, built in or installed, spoken to over its own API."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder.describe.cache_types import CACHE_TYPES, CacheTypes
from bitladder.engines.base import Chat, Completion, EngineTask, Identity, Launch, Message, TokenChoice
from bitladder.engines.chat_api import ChatRequest, Timeouts
from bitladder.engines.served import ServedEngine
from bitladder.errors import BadInput, EngineError, EngineReply
from bitladder.files.engine_package import ENGINE, engine_version
from bitladder.files.gguf import read_header

if TYPE_CHECKING:
    from bitladder.engines.llama_program import LlamaProgram
    from bitladder.engines.speculation import Speculation

KEY_VARIABLE = "LLAMA_API_KEY"
"""Where llama.cpp's server looks for its key."""


@dataclass(frozen=True)
class LlamaSettings(Launch):
    """A launch with what only llama.cpp can be told. It divides its context among its slots: the engine is given
    ``n_ctx * n_parallel`` in all.
    """

    n_batch: int = 512
    """Tokens of a prompt computed in one go."""
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    speculate: str = ""
    """``ngram``, ``draft`` or ``mtp``; empty: one token after the other."""
    draft: str = ""
    """The small model's file."""
    prompt_cache_mib: int = 0
    """Memory for prompts that left their slot. llama.cpp's own default is 8 GiB, which no plan has counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_batch < 1:
            raise BadInput(f"The n_batch of an engine must be at least 1. Got {self.n_batch} instead.")
        for name in ("cache_type_k", "cache_type_v"):
            if getattr(self, name) not in CACHE_TYPES:
                allowed = ", ".join(CACHE_TYPES)
                raise BadInput(
                    f"The {name} of an engine must be one of {allowed}. Got '{getattr(self, name)}' instead."
                )


def with_cache(launch: Launch, cache: CacheTypes) -> Launch:
    """The same launch with a KV cache of these types; unchanged where they are llama.cpp's own."""
    if cache.is_default:
        return launch
    own = launch if isinstance(launch, LlamaSettings) else LlamaSettings(**vars(launch))
    return dataclasses.replace(own, cache_type_k=cache.k, cache_type_v=cache.v)


def with_speculation(launch: Launch, speculation: Speculation | None) -> Launch:
    """The same launch with guesses from there; unchanged for None."""
    if speculation is None:
        return launch
    own = launch if isinstance(launch, LlamaSettings) else LlamaSettings(**vars(launch))
    return dataclasses.replace(own, speculate=speculation.kind, draft=str(speculation.draft or ""))


@dataclass(frozen=True)
class BuiltIn:
    """The llama.cpp that comes with Bitladder, as an ``engines.base.EngineKind``."""

    name = "built-in"

    def missing(self) -> str:
        """Empty where the wheel is installed."""
        return "" if engine_version() else f"Install it: pip install {ENGINE}"

    def identity(self) -> Identity:
        """The package and its whole version."""
        return Identity(ENGINE, metadata.version(ENGINE))

    def prepare(self, launch: Launch) -> LlamaServer:
        """The engine for a GGUF file, not yet started."""
        return LlamaServer(launch)


class LlamaServer(ServedEngine):
    """One GGUF file in llama.cpp, as a context manager::

        with LlamaServer(Launch(path, n_ctx=2048, n_parallel=4, threads=8)) as server:
            server.chat(Chat.of("Hello", 32)).text

    ``program``: an installed ``llama-server`` to run instead of the built-in engine.
    """

    def __init__(
        self, launch: Launch, program: LlamaProgram | None = None, *, timeouts: Timeouts | None = None
    ) -> None:
        identity = program.identity() if program else BuiltIn().identity()
        super().__init__(launch, identity, timeouts=timeouts)
        self.settings = launch if isinstance(launch, LlamaSettings) else LlamaSettings(**vars(launch))
        self._program = program

    def command(self, port: int) -> Sequence[str]:
        """What starts the installed program."""
        assert self._program is not None
        return self._program.command(self.settings, port, pools_by_mean=self.pools_by_mean())

    def pools_by_mean(self) -> bool:
        """Whether vectors are the mean over the tokens because the model does not say how it makes one of many."""
        if self.launch.task is not EngineTask.EMBEDDINGS:
            return False
        metadata = read_header(Path(self.launch.path)).metadata
        return f"{metadata.get('general.architecture')}.pooling_type" not in metadata

    def environment(self) -> dict[str, str | None]:
        """Its key: not on the command line, where others can read it."""
        return {KEY_VARIABLE: self.launch.api_key or None}

    def _start_process(self, timeout_s: float) -> None:
        if not Path(self.launch.path).is_file():
            raise BadInput(f"There is no file '{self.launch.path}'.", do="Give the path of a GGUF file.")
        if self._program is not None:
            super()._start_process(timeout_s)
            return
        paths = {"path": str(self.launch.path), "projector": str(self.launch.projector)}
        given = dataclasses.asdict(self.settings) | paths | {"alias": self.name, "pools_by_mean": self.pools_by_mean()}
        del given["api_key"]
        command = ["bitladder.engines.llama_child", json.dumps(given)]
        version = self.process.start(command, self.environment(), timeout_s=timeout_s)
        self.identity = dataclasses.replace(self.identity, version=version)

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids. ``add_special`` adds BOS and EOS where the model wants them; ``<|im_end|>`` is a special token."""
        tokens: list[int] = self._post("/tokenize", {"content": text, "add_special": add_special})["tokens"]
        return tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        text: str = self._post("/detokenize", {"tokens": list(tokens)})["content"]
        return text

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt that the model's own chat template makes of a chat; ``tools`` in OpenAI's form."""
        body: dict[str, Any] = {"messages": [dict(message) for message in messages]}
        if tools:
            body["tools"] = [dict(tool) for tool in tools]
        prompt: str = self._post("/apply-template", body)["prompt"]
        return prompt

    def props(self) -> dict[str, Any]:
        """What the engine says about the model and itself."""
        props: dict[str, Any] = self._request("GET", "/props")
        return props

    def takes_tools(self) -> bool | None:
        """Whether the chat template has a place for tools (``engines.base.TellsOfTools``). Where it has none, llama.cpp
        leaves them out without a word.
        """
        try:
            caps = self.props().get("chat_template_caps")
        except EngineError:
            return None
        told = caps.get("supports_tools") if isinstance(caps, dict) else None
        return told if isinstance(told, bool) else None

    def chat(self, chat: Chat) -> Completion:
        """Answer a chat through the model's own template (``engines.base.Engine.chat``).

        Not streamed: the process's death is noticed anyway, and only a whole reply carries the probability of
        the token that ended the answer. The prompt cache is off: keys and values computed in batches of
        another shape differ in their last bits, and an answer must not depend on what was asked before.
        """
        extra: dict[str, Any] = {"cache_prompt": False}
        if chat.temperature == 0:
            extra["top_k"] = 1
        return self._chat(ChatRequest(self.name, chat, stream=False, extra=extra))

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

    def sample(
        self, tokens: Sequence[int], *, max_tokens: int, seed: int, sampling: Mapping[str, float]
    ) -> tuple[list[int], bool]:
        """A sampled continuation of a prompt given as token ids: ids, and whether the last of them ends the answer.
        ``sampling``: ``temperature``, ``top_p``, ``min_p``, ...

        Raises:
            EngineError: the engine died, stalled or answered nonsense.
        """
        body = {
            **sampling,
            "prompt": list(tokens),
            "n_predict": max_tokens,
            "seed": seed,
            "return_tokens": True,
            "cache_prompt": False,
        }
        reply = self._post("/completion", body)
        found = reply.get("tokens")
        if not isinstance(found, list) or not all(isinstance(one, int) for one in found):
            raise EngineReply("The engine did not say which tokens it sampled.")
        return found, bool(found) and reply.get("stop_type") == "eos"

    def time_tokens(self, tokens: Sequence[int], *, max_tokens: int, again: bool = False) -> Mapping[str, float]:
        """The engine's own ``timings`` for computing a prompt and decoding exactly ``max_tokens`` after it."""
        body = {
            "prompt": list(tokens),
            "n_predict": max_tokens,
            "temperature": 0,
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": again,
        }
        timings: Mapping[str, float] = self._post("/completion", body)["timings"]
        return timings
