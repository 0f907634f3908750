"""How a checkpoint stretches its rotary positions, as its config.json spells it, and what llama.cpp makes of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PLAIN = frozenset({"default", "none", "linear", "yarn", "longrope", "su", "llama3", "dynamic", "mrope", "proportional"})
"""Kinds that every build of the converter reads, or that scale nothing by themselves."""


def rope_kinds(config: Mapping[str, Any]) -> Iterator[str | None]:
    """The kind of every scaling that a config.json states; None for one that states a factor without a kind."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("rope_parameters", "rope_scaling"):
            yield from _kinds(part.get(key))


def _kinds(scaling: Any) -> Iterator[str | None]:
    if not isinstance(scaling, dict):
        return
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind is not None:
        yield str(kind)
    elif "factor" in scaling:
        yield None
    for inner in scaling.values():  # a scaling for each kind of layer
        yield from _kinds(inner)


def rope_warning(config: Mapping[str, Any]) -> str:
    """What a user should know of a scaling that llama.cpp does not compute; empty when there is nothing."""
    own = str(config.get("model_type")).lower().startswith("hunyuan")  # converted into a fixed base instead
    if own or "dynamic" not in rope_kinds(config):
        return ""
    trained = config.get("max_position_embeddings")
    up_to = f"{trained} tokens" if isinstance(trained, int) else "the length it was trained for"
    return (
        f"This checkpoint stretches its positions dynamically beyond {up_to}, which llama.cpp does not compute: "
        "the GGUF is right up to there and not beyond."
    )
