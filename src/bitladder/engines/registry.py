"""The engines of our own, and the one way to start one.

To add one, write its `EngineKind` in a file of its own (for a server behind OpenAI's API a command on top of
``engines.served.ServedEngine``) and name it here. Measuring, tokenizing and serving take it from here.
"""

from __future__ import annotations

from pathlib import Path

from bitladder.engines.base import EngineKind, Launch, Running
from bitladder.engines.llama import BuiltIn
from bitladder.engines.mlx_server import MlxLm
from bitladder.engines.vllm import Vllm
from bitladder.errors import BitladderError, EngineError
from bitladder.levels import Container

ENGINES: dict[Container, tuple[EngineKind, ...]] = {
    Container.FILE: (BuiltIn(),),
    Container.FOLDER: (Vllm(), MlxLm()),
}
"""What runs a model, by how it is stored; the first that can run here is taken. An installed ``llama-server``
(``engines.llama_program``) is a kind, too, and is taken where the user wants it.
"""


def container_of(path: str | Path) -> Container:
    """How the model at a path is stored. What is not there counts as a file: starting it says that there is none."""
    return Container.FOLDER if Path(path).is_dir() else Container.FILE


def engine_for(container: Container, path: str | Path | None = None) -> EngineKind:
    """The engine that runs models stored so.

    Args:
        container: How the model is stored.
        path: Where it is: of a folder, the engines count that serve its format.

    Raises:
        EngineError: none that is installed does; the message says which would, and how to get it.
    """
    missing = []
    for kind in _kinds(container, path):
        if not (advice := kind.missing()):
            return kind
        missing.append((kind.name, advice))
    what = "a checkpoint folder" if container is Container.FOLDER else "a GGUF file"
    raise EngineError(
        f"No engine here runs {what}: {', '.join(name for name, _ in missing)} "
        f"{'is' if len(missing) == 1 else 'are'} not installed.",
        means="It can be planned, built and measured in the walk, but it cannot answer prompts.",
        do=" ".join(advice for _, advice in missing),
    )


def _kinds(container: Container, path: str | Path | None) -> tuple[EngineKind, ...]:
    """Those that may run a model; of a folder in no format that is known, all that run folders."""
    kinds = ENGINES[container]
    if container is Container.FILE or path is None:
        return kinds
    from bitladder.files.checkpoint_check import format_of_folder

    try:
        engines = format_of_folder(Path(path)).engines
    except BitladderError:  # floats, or what some engine may know: it will say
        return kinds
    return tuple(kind for kind in kinds if kind.name in engines) or kinds


def prepare(launch: Launch, kind: EngineKind | None = None) -> Running:
    """The engine for a launch, not yet started: for who must be able to stop it while it starts.

    Args:
        launch: what to run, and how.
        kind: the engine to run it with; None: the first that can.

    Raises:
        EngineError: no engine for it is installed.
    """
    return (kind or engine_for(container_of(launch.path), launch.path)).prepare(launch)


def start(launch: Launch, kind: EngineKind | None = None) -> Running:
    """A running engine; use it as a context manager, so that it ends::

        with start(Launch(path, n_ctx=2048, threads=8)) as engine:
            engine.chat(Chat.of("Hello", 32)).text

    Raises:
        BadInput: there is no such file or folder.
        EngineError: no engine for it is installed, or it did not start.
    """
    return prepare(launch, kind).start()
