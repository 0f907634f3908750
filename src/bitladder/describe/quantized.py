"""Whether a source is quantized already, told from its header or its configuration, and what that means.

What an earlier quantization lost cannot come back: eight bits made of four are four. So every verb that takes a source
says it once, and none refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitladder.describe.model import Model
from bitladder.formats import gguf
from bitladder.formats.blocks import QTYPES, TRAINED
from bitladder.formats.recipes import LEVEL_BY_FILE_TYPE, RECIPES

KEY_BEFORE = gguf.PROVENANCE + "requantized_from"
"""What a file's weights were quantized as before they were made what they are; only where they were."""
_MEANS = "what that lost stays lost, and every loss is relative to this file, not to the original model."
_CHECKPOINT_MEANS = "what that lost stays lost, and every loss is relative to it, not to the original model."
_LEVELS = re.compile(r"[\w.+-]{1,40}(, then [\w.+-]{1,40}){0,7}")
"""Headers come from outside: whatever else is there is not repeated."""


@dataclass(frozen=True)
class QuantizedSource:
    """How a model's weights were quantized. ``level`` is "" where they are floats now; ``before`` is "" where nothing
    is known of an earlier quantization; one of both is not empty."""

    level: str
    before: str
    stored: str
    """What they are stored as now."""
    bpw: float

    @property
    def steps(self) -> str:
        """Every quantization, the earliest first: ``Q4_K_M, then Q8_0``; what a file made from this one records."""
        both = ", then ".join(step for step in (self.before, self.level) if step)
        return both if _LEVELS.fullmatch(both) else self.level or self.before

    def sentence(self, subject: str = "The source") -> str:
        """What it is, and what that means."""
        origin = f", made from {self.before}" if self.before else ""
        if self.level:
            return f"{subject} is itself quantized ({self.level}, {self.bpw:.2f} bits per weight{origin}): {_MEANS}"
        return (
            f"{subject} is itself quantized, though stored as {self.stored} (it was made from {self.before}): {_MEANS}"
        )


def quantized(model: Model) -> QuantizedSource | None:
    """How a model's weights were quantized, by the types of its tensors and by what our own header records; None where
    neither says so. F32, F16 and BF16 are no quantization.
    """
    counts: dict[str, int] = {}
    for tensor in model.tensors:
        counts[tensor.qtype] = counts.get(tensor.qtype, 0) + tensor.elements
    packed = {qtype: count for qtype, count in counts.items() if QTYPES[qtype].is_quantized}
    recorded = model.metadata.get(KEY_BEFORE)
    before = recorded if isinstance(recorded, str) and _LEVELS.fullmatch(recorded) else ""
    if not packed and not before:
        return None
    stored = max(counts, key=lambda qtype: counts[qtype])
    level = _declared(model) or max(packed, key=lambda qtype: packed[qtype]) if packed else ""
    return QuantizedSource(level, before, stored, model.bpw if model.elements else 0.0)


def kept_note(model: Model) -> str:
    """The sentence for a model with weights in types that models are trained in; "" where there are none."""
    counts: dict[str, int] = {}
    for tensor in model.tensors:
        if tensor.qtype in TRAINED:
            counts[tensor.qtype] = counts.get(tensor.qtype, 0) + tensor.elements
    if not counts:
        return ""
    share = sum(counts.values()) / model.elements
    types = " and ".join(sorted(counts))
    return (
        f"{share:.0%} of its weights are {types}, types that models are trained in: they stay so at every level, since "
        "another grid loses and is seldom smaller (`quantize --requantize` changes them)."
    )


def _declared(model: Model) -> str:
    """The level that general.file_type names, if it is one that quantizes."""
    number = model.metadata.get(gguf.KEY_FILE_TYPE)
    level = LEVEL_BY_FILE_TYPE.get(number, "") if isinstance(number, int) else ""
    return level if level and QTYPES[RECIPES[level].qtype].is_quantized else ""


def checkpoint_note(config: Mapping[str, Any], dtypes: Iterable[str] = ()) -> str:
    """The sentence for a checkpoint whose config.json says that it is quantized (FP8, MXFP4, GPTQ, AWQ, ...), or whose
    tensors have the types of one (``dtypes``, as safetensors calls them); "" where neither does.
    """
    found = _checkpoint_method(config, dtypes)
    return f"The checkpoint is itself quantized ({found}): {_CHECKPOINT_MEANS}" if found else ""


def checkpoint_origin(config: Mapping[str, Any], dtypes: Iterable[str] = ()) -> str:
    """How the weights of a checkpoint were quantized, in the word that files made of them record (``KEY_BEFORE``);
    "" where neither config.json nor the types of its tensors say so."""
    word = _checkpoint_method(config, dtypes)
    bits = quantization_of(config).get("bits")
    counted = isinstance(bits, int) and not isinstance(bits, bool) and 0 < bits < 16
    word = f"{word}-{bits}bit" if word and counted else word
    return word if _LEVELS.fullmatch(word) else "quantized" if word else ""


def decoded_from(model: Model, origin: str) -> Model:
    """The model of a checkpoint's converted file with the note of what its weights were before. The same where they are
    quantized still, so that their types say it, and where ``origin`` is ""."""
    if not origin or quantized(model) is not None:
        return model
    return replace(model, metadata={**model.metadata, KEY_BEFORE: origin})


def _checkpoint_method(config: Mapping[str, Any], dtypes: Iterable[str]) -> str:
    found = _quantization(config)
    if found:
        return _method(found)
    return "FP8" if any(dtype.startswith(("F8_E4", "F8_E5")) for dtype in dtypes) else ""


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of how weights are quantized, its own or its language part's; empty where nothing."""
    found = _quantization(config)
    return found if isinstance(found, Mapping) else {}


def _quantization(config: Mapping[str, Any]) -> Any:
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config", "quantization"):
            found = part.get(key) if isinstance(part, Mapping) else None
            if found:
                return found
    return None


def _method(found: Any) -> str:
    """A quantization_config's method in a word; it comes from outside."""
    names = (found.get(key) for key in ("quant_method", "quant_algo", "format")) if isinstance(found, Mapping) else ()
    words = (name for name in names if isinstance(name, str) and re.fullmatch(r"[\w.+-]{1,40}", name))
    of_mlx = isinstance(found, Mapping) and {"group_size", "bits"} <= found.keys()  # whose folders name no method
    return next(words, "MLX" if of_mlx else "method not named")
