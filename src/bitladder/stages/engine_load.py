"""Whether the engine loads a model's file, and whose tokenizer reads texts for it: the engine's, so that tokens are
those that users get; the checkpoint's own where the engine does not load the file, whose layers may be walked all the
same.

What was found out is noted in the cache, for this file and this build of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bitladder.errors import BitladderError, EngineGone, EngineTimeout, ModelRefused

if TYPE_CHECKING:
    from bitladder.files.gguf import GgufFile

_CHATS = "and reads its chat template"


def engine_ids(source: GgufFile, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts by the engine's tokenizer, special tokens added as the model asks for. Nothing is computed there.

    Raises:
        ModelRefused: the engine does not run this file.
        EngineError: it did not start, or died.
    """
    from bitladder.engines.base import Launch
    from bitladder.engines.registry import start

    with start(Launch(source.path, n_ctx=64, threads=1, chats=False)) as engine:
        return [list(engine.tokenize(text, add_special=True)) for text in texts]


def refusal_of(source: GgufFile) -> str:
    """Why the engine does not load a file, in its words; empty where it does, whether or not it can read the chat
    template. It is tried where nothing is noted.

    Raises:
        EngineError: that cannot be found out: it ended for want of memory or time.
    """
    from bitladder.files.engine_package import ENGINE, engine_version

    if not engine_version():
        return f"{ENGINE} is not installed"
    noted = _noted(source)
    if noted is None:
        try:
            engine_ids(source, ())
            noted = ""
        except ModelRefused as refusal:
            noted = refusal.reason
        _note(source, noted)
    return noted


def require_engine(source: GgufFile, label: str, *, instead: str) -> None:
    """Refuse a model that the engine does not load, before anything is built for it. What is noted of a refusal is
    tried again: the machine may have been at fault. A source that is too large to be loaded is none: its levels may
    not be.

    Args:
        source: the model.
        label: what messages call it.
        instead: what still works, in a sentence.

    Raises:
        ModelRefused: the engine does not load it.
        EngineError: no engine is installed.
    """
    from bitladder.engines.base import Launch
    from bitladder.engines.registry import start
    from bitladder.files.chat_template import OTHER_TEMPLATE, refuse_endless

    if _noted(source, _CHATS) == "":
        return
    refuse_endless(source.metadata, label)
    try:
        with start(Launch(source.path, n_ctx=64, threads=1)):
            pass
    except ModelRefused as refusal:
        template = "chat template" in refusal.reason
        if not template:
            _note(source, refusal.reason)
        raise ModelRefused(
            f"The engine does not load {label}: {refusal.reason}. So no workload can be answered with it.",
            means="Its chat template was written for another program (Ollama's are in Go), is newer than this build of "
            "the engine, or was cut short."
            if template
            else "This build of the engine lacks the architecture, or a variant of it, or cannot read its tokenizer.",
            do=OTHER_TEMPLATE if template else instead,
            reason=refusal.reason,
        ) from refusal
    except (EngineGone, EngineTimeout):
        return
    _note(source, "")
    _note(source, "", _CHATS)


def tokenizer_key(folder: Path) -> str:
    """What ids by a checkpoint's own tokenizer depend on."""
    from importlib import metadata

    from bitladder.files.folders import cache_key
    from bitladder.files.hashing import file_sha256
    from bitladder.files.staging import data_files

    files = [part for path in data_files(folder) for part in (path.name, file_sha256(path))]
    return cache_key("checkpoint's tokenizer", metadata.version("transformers"), *files)


def _noted(source: GgufFile, what: str = "") -> str | None:
    """Why the engine does not load the file, "" where it does; None where nothing is noted. ``what``: of the model with
    its chat template."""
    with suppress(OSError, ValueError):
        return _note_path(source, what).read_text(encoding="utf-8")
    return None


def _note(source: GgufFile, reason: str, what: str = "") -> None:
    from bitladder.files.atomic import write_whole

    with suppress(BitladderError, OSError):  # without a cache it is tried again
        write_whole(_note_path(source, what), reason)


def _note_path(source: GgufFile, what: str) -> Path:
    from bitladder.files.engine_package import engine_version
    from bitladder.files.folders import cache_folder, cache_key

    return cache_folder("engine-loads", cache_key(source.sha256, engine_version(), *filter(None, [what]))[:32] + ".txt")
