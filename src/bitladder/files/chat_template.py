"""Whether a model's chat template ends. It is a program of a stranger's, and llama.cpp, which tries it on a few chats
while it loads the model, bounds neither its time nor its memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitladder.errors import ModelRefused
from bitladder.files.fence import ended_after, environment, fenced, memory_bound, package_folders
from bitladder.system import HAS_PROCESS_LIMITS, ended_by
from bitladder.units import GiB, MiB

OTHER_TEMPLATE = (
    "Put the original's template into the file (tokenizer.chat_template). `plan`, `quantize`, `measure` and `recipe` "
    "work without one."
)
"""Advice where a model's own will not do."""
_CPU_SECONDS = 10
"""Real ones take milliseconds."""
_SECONDS = 120


def refuse_endless(metadata: Mapping[str, Any], label: str) -> None:
    """Refuse a model whose template does not end, before an engine gets it.

    Raises:
        ModelRefused: it does not.
    """
    if not template_ends(str(metadata.get("tokenizer.chat_template", ""))):
        raise ModelRefused(
            f"The chat template of {label} does not end: it writes without bounds, or computes for ever.",
            means="The engine would try it while it loads the model, until the machine's memory is full.",
            do=OTHER_TEMPLATE,
            reason="its chat template does not end",
        )


def template_ends(template: str) -> bool:
    """Whether a template writes one short chat within bounds, in a process behind the fence. One that fails does: what
    it lacks the engine says. On Windows nothing is tried.
    """
    if not HAS_PROCESS_LIMITS or not template.strip():
        return True
    with tempfile.TemporaryDirectory(prefix="bitladder-") as held:
        work, file = Path(held, "work"), Path(held, "template")
        work.mkdir()
        file.write_text(template, encoding="utf-8", errors="replace")
        job: Any = {
            "converter": [], "packages": package_folders(), "work": str(work), "task": "template",
            "arguments": [str(file)], "without_mtp": False, "data_bytes": memory_bound(GiB), "file_bytes": MiB,
            "cpu_seconds": _CPU_SECONDS,
        }  # fmt: skip
        with fenced(job, environment(work), work) as child, ended_after(child, _SECONDS):
            assert child.stdout is not None
            said = child.stdout.read(1 << 16)
            return "does not end" not in said and not ended_by(child.wait(), "SIGXCPU", "SIGKILL")
