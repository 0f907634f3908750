"""A workload as a model's deployment has it: the model's own sampling filled in, tools only where it can be told of
them. Both are known before any work is done.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder.errors import BadInput, BitladderError, UsageError

if TYPE_CHECKING:
    from bitladder.describe.workload import Workload
    from bitladder.engines.base import Engine

TEMPLATE = "tokenizer.chat_template"
_WORDS_OF_TOOLS = ("tool", "function")
"""A chat template that has a place for tools names them."""
_UNTAUGHT = (
    "The model has no chat template: the engine asks it in ChatML, which it may never have seen (a base model has seen "
    "none). Its answers say less of it than of others; fidelity does not depend on templates."
)
_IN_HEADERS = {
    "temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repeat_penalty": "penalty_repeat",
}  # fmt: skip
"""A setting to what GGUF headers call it, after ``general.sampling.``."""
_IN_CONFIGS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
}  # fmt: skip
"""A setting to what ``generation_config.json`` calls it."""
_MOST = {"temperature": 100.0, "top_p": 1.0, "min_p": 1.0, "top_k": 10_000_000, "repeat_penalty": 100.0}
"""Larger ones, and negative ones, are no settings."""


def as_deployed(workload: Workload, metadata: Mapping[str, Any], checkpoint: Path | None = None) -> Workload:
    """The workload as this model is asked it.

    Args:
        workload: as its file has it.
        metadata: of the model's GGUF header.
        checkpoint: the folder that it was converted from, whose ``generation_config.json`` counts where the header
            recommends nothing.

    Raises:
        BadInput: it gives tools, and the model's chat template has no place for them.
        UsageError: it wants the sampling that the model recommends, and it recommends none.
    """
    stored = metadata.get(TEMPLATE)
    template = stored.lower() if isinstance(stored, str) else ""
    if not template and _UNTAUGHT not in workload.warnings:
        workload = dataclasses.replace(workload, warnings=(*workload.warnings, _UNTAUGHT))
    if any(one.tools for one in workload.inputs) and not any(word in template for word in _WORDS_OF_TOOLS):
        raise no_tools(workload)
    return _with_recommended(workload, metadata, checkpoint) if workload.recommended else workload


def for_model(workload: Workload, model: str) -> Workload:
    """`as_deployed` with a model as the user names it; its header alone is read.

    Raises:
        BadInput: there is no such model here, or as `as_deployed`.
        UsageError: as `as_deployed`.
    """
    from bitladder.stages.job import Work, opened

    with opened(model, Work(), warn=False) as job:
        return as_deployed(workload, job.source.metadata, job.checkpoint)


def no_tools(workload: Workload) -> BadInput:
    """The error of a workload with tools for a model without."""
    names = [one.id for one in workload.inputs if one.tools]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    given = "input gives" if len(names) == 1 else "inputs give"
    return BadInput(
        f"{len(names)} {given} tools ({shown}), and this model's chat template has no place for them.",
        means="The engine would leave them out without a word, and every level would fail alike.",
        do="Take these inputs out, or use a model that was trained to call tools.",
    )


def refuse_unheard_tools(workload: Workload, engine: Engine) -> None:
    """Raises BadInput where the engine says that its model cannot be told of the tools that inputs give."""
    from bitladder.engines.base import TellsOfTools

    if any(one.tools for one in workload.inputs) and isinstance(engine, TellsOfTools) and engine.takes_tools() is False:
        raise no_tools(workload)


def _with_recommended(workload: Workload, metadata: Mapping[str, Any], checkpoint: Path | None) -> Workload:
    names = {setting: f"general.sampling.{name}" for setting, name in _IN_HEADERS.items()}
    found = _settings(metadata, names)
    config = {} if found or checkpoint is None else _generation_config(checkpoint)
    if config:
        found = {"temperature": 0.0} if config.get("do_sample") is False else _settings(config, _IN_CONFIGS)
    if not found:
        raise UsageError(
            "The workload wants the sampling that the model recommends, and it recommends none.",
            means="Neither its header (general.sampling.*) nor a generation_config.json names any.",
            do="Write the settings into the workload, like: sampling: {temperature: 0.7, top_p: 0.95}.",
        )
    found = {"temperature": 1.0, **found}  # what a configuration means that samples and names no temperature
    temperature = found.pop("temperature")
    return dataclasses.replace(workload, temperature=temperature, sampling=found, recommended=False)


def _settings(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, float]:
    """Settings that can be some. Headers hold single precision, so six digits are kept."""
    found: dict[str, float] = {}
    for setting, name in names.items():
        value = given.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isfinite(value) and 0 <= value <= _MOST[setting]:
            found[setting] = int(value) if setting == "top_k" else float(f"{value:.6g}")
    return found


def _generation_config(folder: Path) -> dict[str, Any]:
    """Empty where there is none that can be read."""
    from bitladder import json_text
    from bitladder.files.regular import read_regular

    try:
        found = json_text.read(read_regular(folder / "generation_config.json", 1 << 20).decode("utf-8"))
    except (OSError, ValueError, BitladderError):
        return {}
    return found if isinstance(found, dict) else {}
