"""How a checkpoint stretches its rotary positions, as its config.json spells it, and what llama.cpp makes of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PLAIN = frozenset({"default", "none", "linear", "yarn", "longrope", "su", "llama3", "dynamic", "mrope", "proportional"})
"""Kinds that every build of the converter reads, or that scale nothing by themselves."""


def rope_kinds(config: Mapping[str, Any]) -> Iterator[str | None]:
    """The kind of every scaling that a config.json states; None for one that states a factor without a kind."""
    for scaling in _scalings(config):
        kind = _kind(scaling)
        if kind is not None:
            yield str(kind)
        elif "factor" in scaling:
            yield None


def _kind(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type", scaling.get("type"))


def _scalings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every object of a config.json that may scale positions: the model's, or one for each kind of layer."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("rope_parameters", "rope_scaling"):
            yield from _within(part.get(key))


def _within(scaling: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(scaling, dict):
        yield scaling
        for inner in scaling.values():
            yield from _within(inner)


def rope_warnings(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a user should know of scalings that llama.cpp computes otherwise than transformers, or not at all."""
    found = []
    own = str(config.get("model_type")).lower().startswith("hunyuan")  # converted into a fixed base instead
    if not own and "dynamic" in rope_kinds(config):
        trained = config.get("max_position_embeddings")
        up_to = f"{trained} tokens" if isinstance(trained, int) else "the length it was trained for"
        found.append(
            f"This checkpoint stretches its positions dynamically beyond {up_to}, which llama.cpp does not compute: "
            "the GGUF is right up to there and not beyond."
        )
    if any(_kind(one) == "yarn" and one.get("truncate") is False for one in _scalings(config)):
        found.append(
            "This checkpoint stretches its positions with YaRN between bounds that are not rounded (truncate: false), "
            "and llama.cpp rounds them, for which a GGUF has no key: what the engine answers parts a little from "
            "transformers, in every level alike. Figures of the walk are of transformers' model; `bitladder selfcheck` "
            "measures the difference."
        )
    return tuple(found)
