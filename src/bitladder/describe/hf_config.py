"""A model's shape from its config.json, so that a checkpoint can be planned before it is downloaded or converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitladder.describe.config_keys import not_a_count
from bitladder.describe.dims import MAX_LAYERS
from bitladder.describe.header_keys import LARGEST
from bitladder.describe.shapes import Shape
from bitladder.errors import BadFile, UnknownArchitecture
from bitladder.formats.families import BY_CLASS
from bitladder.formats.families.family import Family


def shape_of(name: str, config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes; of a model that also sees, that of its language part.

    Raises:
        UnknownArchitecture: no rows for its family.
        BadFile: a figure is missing or no positive whole number.
    """
    listed = config.get("architectures")
    classes = listed if isinstance(listed, list) and listed else ["none"]
    family = BY_CLASS.get(str(classes[0]))
    if family is None or family.checkpoint is None:
        raise UnknownArchitecture(
            f"{name} is a {classes[0]}, whose shapes are not known here.",
            means=f"Known are {', '.join(BY_CLASS)}.",
            do="Plan a GGUF file of it instead: every architecture is read from its header.",
        )
    text = config.get("text_config")
    numbers = _Numbers(name, {**config, **text} if isinstance(text, dict) else dict(config))
    tied = numbers.values.get("tie_word_embeddings", family.checkpoint.tied)
    return Shape(
        name=name,
        architecture=family.architecture,
        n_layer=numbers.need("num_hidden_layers", most=MAX_LAYERS),
        n_embd=numbers.need("hidden_size"),
        n_ff=numbers.need("intermediate_size"),
        n_head=numbers.need("num_attention_heads"),
        n_head_kv=numbers.get("num_key_value_heads") or numbers.need("num_attention_heads"),
        n_vocab=numbers.need("vocab_size"),
        n_ctx=numbers.get("max_position_embeddings"),
        head_dim=numbers.get("head_dim"),
        tied=bool(tied),
        n_expert=numbers.first("num_local_experts", "n_routed_experts", "num_experts"),
        n_expert_used=numbers.get("num_experts_per_tok"),
        n_ff_expert=numbers.get("moe_intermediate_size"),
        n_ff_shared=numbers.get("n_shared_experts") * numbers.get("moe_intermediate_size"),
        n_dense_layers=numbers.get("first_k_dense_replace"),
        expert_bias=config.get("topk_method") == "noaux_tc",
        sliding_window=_window(family, numbers),
        rope_factors=_rope_factors(family, numbers),
        q_rank=numbers.get("q_lora_rank"),
        kv_rank=numbers.get("kv_lora_rank"),
        qk_nope=numbers.get("qk_nope_head_dim"),
        qk_rope=numbers.get("qk_rope_head_dim"),
        v_head=numbers.get("v_head_dim"),
        expert_qtype=family.checkpoint.expert_qtype if _quantized(config) else "F16",
    )


def _quantized(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that weights are stored in another type than a float's; a copy in floats is not."""
    return isinstance(config.get("quantization_config"), dict)


class _Numbers:
    """Whole numbers of a config."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name, self.values = name, values

    def get(self, key: str) -> int:
        """The figure, 0 when it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST:
            raise BadFile(not_a_count(self.name, key, value), do="Fetch it again.")
        return value

    def need(self, key: str, most: int = LARGEST) -> int:
        """A figure that must be there and positive."""
        value = self.get(key)
        if value > most:
            raise BadFile(
                f"config.json of {self.name}: {key} is {value}; at most {most} are read.", do="Fetch it again."
            )
        if value < 1:
            raise BadFile(
                f"config.json of {self.name} has {'no' if self.values.get(key) is None else '0 as'} {key}.",
                means="It is no language model's, or it was cut short.",
            )
        return value

    def first(self, *keys: str) -> int:
        """The first of several spellings."""
        return next((self.get(key) for key in keys if self.get(key)), 0)


def _window(family: Family, numbers: _Numbers) -> int:
    """Only families whose llama.cpp implementation has windows; others see everything whatever config.json says."""
    return numbers.get("sliding_window") if family.windows else 0


def _rope_factors(family: Family, numbers: _Numbers) -> int:
    scaling = numbers.values.get("rope_scaling") or numbers.values.get("rope_parameters")
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
    if kind not in family.rope_tables.scalings:
        return 0
    head = numbers.get("head_dim") or numbers.need("hidden_size") // numbers.need("num_attention_heads")
    partial = numbers.values.get("partial_rotary_factor") or 1.0
    if isinstance(partial, bool) or not isinstance(partial, (int, float)) or not 0 < partial <= 1:
        raise BadFile(
            f"config.json of {numbers.name}: partial_rotary_factor is {repr(partial)[:60]}, not a share.",
            do="Fetch it again.",
        )
    return int(head * partial) // 2
