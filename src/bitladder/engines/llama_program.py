"""An installed ``llama-server``: find it, see whether it will do, and say how to start it.

It is asked for its version and its flags rather than believed to be of one build: distributions, package
managers and people's own builds differ, and flags come and go.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitladder.engines.base import EngineTask, Identity, Launch
from bitladder.errors import BadInput

if TYPE_CHECKING:
    from bitladder.engines.llama import LlamaServer, LlamaSettings

NAME = "llama-server"
LEAST_BUILD = 4600
"""January 2025: from then on both chat and text completions tell log-probabilities as OpenAI's do."""
_SHALLOW = 1000
"""A build number is a count of commits, and 1 or so when it was built from a shallow copy: it then tells nothing. The
real ones under a thousand had no program of this name.
"""
_VERSION = re.compile(r"^version: (?:(\d+) \(|\S+ \(build (\d+))", re.MULTILINE)
SPEC_TYPES = {"ngram": "ngram-cache", "draft": "draft-simple", "mtp": "draft-mtp"}
"""Ways to guess to what ``--spec-type`` calls them; its help lists those that the build has."""
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_NEEDED = ("--model", "--alias", "--port", "--ctx-size", "--parallel", "--threads", "--cache-type-k", "--jinja")
"""The last came days before ``LEAST_BUILD``."""
_ASK_S = 30.0  # a build for GPUs looks for them first


@dataclass(frozen=True)
class LlamaProgram:
    """A ``llama-server`` that was asked what it is; an ``engines.base.EngineKind``."""

    path: str
    build: int
    """llama.cpp's build number; 0 when it does not tell one."""
    flags: frozenset[str]
    """What its ``--help`` names."""
    guesses: frozenset[str] = frozenset()
    """Values of ``--spec-type`` that it names there."""

    @property
    def name(self) -> str:
        """Engine and version, as evidence and the live view name them."""
        return str(self.identity())

    @property
    def takes_projectors(self) -> bool:
        """Builds since May 2025 do."""
        return "--mmproj" in self.flags

    def missing(self) -> str:
        """Nothing: it was asked, and answered."""
        return ""

    def identity(self) -> Identity:
        """Its name and build."""
        return Identity(NAME, str(self.build or "of an unknown build"))

    def prepare(self, launch: Launch) -> LlamaServer:
        """The engine for a GGUF file, not yet started."""
        from bitladder.engines.llama import LlamaServer

        return LlamaServer(launch, self)

    def command(self, settings: LlamaSettings, port: int, *, pools_by_mean: bool = False) -> list[str]:
        """What starts it with these settings; the same that the built-in engine gets."""
        for_text = settings.task is EngineTask.TEXT
        batch = settings.n_batch if for_text else settings.n_ctx  # an input is computed in one go, or not at all
        pairs = {
            "--model": str(settings.path),
            "--alias": settings.model_name,
            "--host": settings.host,
            "--port": port,
            # llama.cpp divides its context among the slots; ours is what one request may use.
            "--ctx-size": settings.n_ctx * settings.n_parallel,
            "--parallel": settings.n_parallel,
            "--batch-size": max(batch, settings.n_parallel),
            "--ubatch-size": batch,
            "--threads": settings.threads,
            "--threads-batch": settings.threads,
            "--cache-type-k": settings.cache_type_k,
            "--cache-type-v": settings.cache_type_v,
        }
        if settings.n_gpu_layers >= 0:
            pairs["--n-gpu-layers"] = settings.n_gpu_layers
        if settings.projector:
            pairs |= self._known({"--mmproj": str(settings.projector)})
        if not settings.chats:
            pairs |= self._known({"--chat-template": "chatml"})
        # Newer builds shrink the context to fit and keep 8 GiB of old prompts, unless told not to.
        pairs |= self._known({"--fit": "off", "--cache-ram": settings.prompt_cache_mib})
        pairs |= self._speculation(settings)
        switches = ["--metrics", "--no-kv-unified", "--no-webui"]
        if settings.prompt_cache_mib == 0:
            switches.append("--no-cache-idle-slots")
        if not for_text:
            switches.append("--embeddings" if settings.task is EngineTask.EMBEDDINGS else "--reranking")
        if pools_by_mean:
            pairs["--pooling"] = "mean"
        words = [str(word) for pair in pairs.items() for word in pair]
        return [self.path, *words, *(switch for switch in switches if switch in self.flags)]

    def _speculation(self, settings: LlamaSettings) -> dict[str, object]:
        """How guesses are asked for; raises BadInput where this build takes none of the kind."""
        if not settings.speculate:
            return {}
        kind = SPEC_TYPES[settings.speculate]
        flag = "--model-draft" if settings.draft else "--spec-type"
        # Older builds have no types and draft with whatever draft they are given.
        lacking = flag if flag not in self.flags else "" if settings.draft or kind in self.guesses else f"{flag} {kind}"
        if lacking:
            raise BadInput(
                f"'{self.path}' cannot speculate so: its help names no {lacking}.",
                do="Update it, or use --engine built-in.",
            )
        draft: dict[str, object] = {flag: settings.draft} if settings.draft else {}
        return draft | ({"--spec-type": kind} if kind in self.guesses else {})

    def _known(self, pairs: dict[str, object]) -> dict[str, object]:
        return {flag: value for flag, value in pairs.items() if flag in self.flags}


def find_program(where: str = NAME) -> LlamaProgram:
    """The program at a path, or of this name on the search path.

    Raises:
        BadInput: there is none, it is no llama-server, or it is too old.
    """
    path = shutil.which(where)
    if path is None:
        raise BadInput(
            f"There is no program '{where}'.",
            do="Install llama.cpp's server, give its path with --engine, or use --engine built-in.",
        )
    version, told = _VERSION.search(_said(path, "--version")), _said(path, "--help")
    flags = frozenset(_FLAG.findall(told))
    lacking = [flag for flag in _NEEDED if flag not in flags]
    if version is None or lacking:
        found = f"has no flag {lacking[0]}" if version else "prints no version as llama.cpp does"
        raise BadInput(f"'{path}' is no llama-server that will do: it {found}.", do="Install a newer one.")
    build = int(version[1] or version[2])
    if build < _SHALLOW:
        build = 0
    elif build < LEAST_BUILD:
        raise BadInput(
            f"'{path}' is build {build} of llama.cpp; at least {LEAST_BUILD} is needed.",
            means="Older ones do not report the log-probabilities of tokens that escalation and comparing rest on.",
            do="Update it, or use --engine built-in.",
        )
    return LlamaProgram(path, build, flags, frozenset(value for value in SPEC_TYPES.values() if value in told))


def chosen_program(engine: str) -> tuple[LlamaProgram | None, str]:
    """The engine that ``--engine`` names, None for the built-in one, and what is to be said about it.

    ``built-in``; ``auto``, which takes a ``llama-server`` from the search path if it will do; else a program.

    Raises:
        BadInput: the program named cannot be used.
    """
    if engine == "built-in" or (engine == "auto" and shutil.which(NAME) is None):
        return None, ""
    try:
        program = find_program(NAME if engine == "auto" else engine)
    except BadInput as error:
        if engine != "auto":
            raise
        return None, f"The built-in engine serves: {error.found}"
    said = f"The engine is {program.path} ({program.name}); `--engine built-in` serves with the one that was measured."
    return program, said


def _said(path: str, flag: str) -> str:
    """What it prints when asked, on either stream."""
    try:
        done = subprocess.run([path, flag], stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadInput(f"'{path}' cannot be run: {error}.") from None
    return (done.stdout + b"\n" + done.stderr).decode(errors="replace")
