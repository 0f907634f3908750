"""Figures of a language model in a config.json of any class, by the keys that families share; whole numbers, bounded.

Of a model that also sees or hears they are those of its language part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bitladder.describe.dims import MAX_LAYERS
from bitladder.describe.header_keys import LARGEST
from bitladder.errors import BadFile

_TEXT = ("text_config", "llm_config", "language_config", "lm_config", "thinker_config", "lfm")
"""Where models of several parts keep their language part."""
_STATES = {"linear_attention", "lightning_attention"}
"""Kinds of layers that are called so and keep a state."""
_FEEDS = {"mlp", "moe"}
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")
_WINDOWED = {"sliding_attention", "chunked_attention", "local_attention"}


def _attends(kind: str) -> bool:
    """A kind of layer, in ``layer_types`` and its like, that has keys and values: whole, windowed, sparse attention."""
    return kind.endswith("attention") and kind not in _STATES


def layer_number(name: str) -> int | None:
    """The layer that a tensor's name puts it in; None outside of layers. Absurd numbers are none."""
    found = re.search(r"(?:^|\.)(?:layers?|h|blocks|block)\.(\d{1,6})\.", name)
    return int(found[1]) if found else None


def not_a_count(name: str, key: str, value: object) -> str:
    """What is wrong with a figure of a config.json, in words."""
    return f"config.json of {name}: {key} is {repr(value)[:60]}, not a whole number from 0 to {LARGEST - 1:,}."


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language part over what stands outside of it; parts in parts are followed three deep."""
    merged = dict(config)
    for _ in range(3):
        inner = next((merged[key] for key in _TEXT if isinstance(merged.get(key), Mapping)), None)
        if inner is None:
            break
        outer = {key: value for key, value in merged.items() if key not in _TEXT}
        merged = {**outer, **inner}
    return merged


class Config:
    """A config.json to ask.

    Raises:
        BadFile: from whatever is asked, where a figure is no number, or absurd.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self.name, self.whole, self.values = name, config, text_config(config)

    def number(self, *keys: str) -> int:
        """The first of several spellings that is there and not 0; 0 when none is. Of a list the largest."""
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
                value = max(value)
            if value is None or value == 0:
                continue
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST:
                raise BadFile(not_a_count(self.name, key, value), do="Fetch it again.")
            return value
        return 0

    @property
    def model_type(self) -> str:
        """transformers' word for the family; ``unknown`` where there is none that could be a name."""
        for value in (self.values.get("model_type"), self.whole.get("model_type")):
            if isinstance(value, str) and re.fullmatch(r"[\w.-]{1,64}", value):
                return value
        return "unknown"

    @property
    def n_layer(self) -> int:
        """Layers, 0 when unsaid."""
        count = self.number("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        if count > MAX_LAYERS:
            raise BadFile(
                f"config.json of {self.name} has {count} layers; at most {MAX_LAYERS} are read.",
                means="No model has so many: the file is damaged, or an attack.",
                do="Fetch it again.",
            )
        return count

    @property
    def n_embd(self) -> int:
        """Width of the embedding."""
        return self.number("hidden_size", "n_embd", "d_model", "dim")

    @property
    def n_ff(self) -> int:
        """Width of the dense feed-forward."""
        return self.number("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "d_ff")

    @property
    def n_head(self) -> int:
        """Query heads; 0 of a model that does not attend."""
        return self.number("num_attention_heads", "n_head", "num_heads") if not self._stateful_only else 0

    @property
    def _stateful_only(self) -> bool:
        return not self.number("num_attention_heads", "n_head") and bool(self.number("state_size"))

    @property
    def n_head_kv(self) -> int:
        """Heads of keys and values."""
        shared = 1 if self.values.get("multi_query") is True else 0
        return self.number("num_key_value_heads", "n_head_kv", "num_kv_heads") or shared or self.n_head

    @property
    def head_dim(self) -> int:
        """Width of a key as it is cached."""
        if self.kv_rank:
            return self.kv_rank + self.number("qk_rope_head_dim")
        own = self._whole_head_dim or self.number("head_dim", "attention_head_dim")
        return own or (self.n_embd // self.n_head if self.n_head else 0)

    @property
    def _whole_head_dim(self) -> int:
        """Width in layers that see everything where those with a window have another; 0 where all are alike."""
        stated = self.number("global_head_dim")
        layers = self.values.get("per_layer_config")  # how transformers spells it
        rows = list(layers.values())[:MAX_LAYERS] if isinstance(layers, Mapping) else []
        widths = [Config(self.name, row).number("head_dim") for row in rows if isinstance(row, Mapping)]
        return stated or max(widths, default=0)

    @property
    def head_dim_v(self) -> int:
        """Width of a value as it is cached."""
        return self.kv_rank or self.number("v_head_dim") or self.head_dim

    @property
    def kv_rank(self) -> int:
        """Width of the compressed row of latent attention; 0 without."""
        return self.number("kv_lora_rank")

    @property
    def n_vocab(self) -> int:
        """Tokens."""
        return self.number("vocab_size", "padded_vocab_size")

    @property
    def n_ctx(self) -> int:
        """Tokens of context that the model was made for; 0 when unsaid."""
        return self.number(*_CONTEXT)

    def check_context(self) -> None:
        """Refuse a context of no tokens, which is no figure that is unsaid.

        Raises:
            BadFile: it says so.
        """
        said = next((key for key in _CONTEXT if self.values.get(key) == 0), None)
        if said and not self.n_ctx:
            raise BadFile(
                f"config.json of {self.name}: {said} is 0, no length of a context.",
                means="An engine would let such a model read nothing.",
                do="Write there what the model was trained for, or fetch it again.",
            )

    @property
    def n_expert(self) -> int:
        """Routed experts; 0 of a dense model."""
        return self.number("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")

    @property
    def n_expert_used(self) -> int:
        """Routed experts of a token."""
        return self.number("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")

    @property
    def sliding_window(self) -> int:
        """Tokens that layers with a window see; 0 where no layer is said to have one."""
        return self.number("sliding_window", "attention_chunk_size") if self._windowed else 0

    @property
    def _windowed(self) -> bool:
        return any(kind in _WINDOWED for kind in self.layer_types)

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer where config.json lists it, in transformers' words."""
        for key in ("layer_types", "layers_block_type", "layer_types_list"):
            listed = self.values.get(key)
            if isinstance(listed, list) and 0 < len(listed) <= MAX_LAYERS and all(isinstance(k, str) for k in listed):
                return listed
        pattern = self.values.get("hybrid_override_pattern")
        if isinstance(pattern, str) and 0 < len(pattern) <= MAX_LAYERS:
            return ["attention" if mark == "*" else "state" if mark == "M" else "mlp" for mark in pattern]
        places = self._attending
        return ["attention" if layer in places else "state" for layer in range(self.n_layer)] if places else []

    @property
    def _attending(self) -> set[int]:
        """The layers that attend in a model of states, where config.json lists them or gives their distance."""
        listed = self.values.get("attn_layer_indices")
        if isinstance(listed, list):
            return {layer for layer in listed if isinstance(layer, int)}
        every = self.number("attn_layer_period")
        return set(range(self.number("attn_layer_offset"), self.n_layer, every)) if every else set()

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding; False where config.json does not say."""
        return self.values.get("tie_word_embeddings") is True

    @property
    def bits(self) -> int:
        """Bits of a packed weight, 4 where nothing is said."""
        found = self.whole.get("quantization_config") or self.values.get("quantization_config")
        if isinstance(found, Mapping):
            bits = found.get("bits", found.get("w_bit"))
            groups = found.get("config_groups")
            for group in groups.values() if isinstance(groups, Mapping) else ():
                weights = group.get("weights") if isinstance(group, Mapping) else None
                bits = weights.get("num_bits") if isinstance(weights, Mapping) else bits
            if bits in (2, 3, 4, 5, 6, 8):
                return int(bits)
        return 4

    @property
    def packed(self) -> bool:
        """Whether the weights are quantized, so that tensors have other shapes than their class gives them."""
        parts = (self.whole, self.values)
        return any(part.get(key) for part in parts for key in ("quantization_config", "compression_config"))

    def cache_keys(self, n_layer: int) -> dict[str, Any]:
        """What decides the cache, in the keys of a GGUF header without the architecture's prefix."""
        kinds = self.layer_types[:n_layer]
        keys: dict[str, Any] = {"block_count": n_layer, "context_length": self.n_ctx}
        if self.kv_rank:
            keys["attention.kv_lora_rank"] = self.kv_rank
            keys["rope.dimension_count"] = self.number("qk_rope_head_dim")
            keys["attention.key_length_mla"] = self.number("qk_nope_head_dim") + self.number("qk_rope_head_dim")
        if len(kinds) == n_layer:
            whole = self.number("num_global_key_value_heads") or self.n_head_kv
            heads = {kind: self.n_head_kv if kind in _WINDOWED else whole if _attends(kind) else 0 for kind in kinds}
            keys["attention.head_count_kv"] = [heads[kind] for kind in kinds]
            if _FEEDS & set(kinds):  # a layer is one of state, attention and feed-forward
                keys["feed_forward_length"] = [max(1, self.n_ff) if kind in _FEEDS else 0 for kind in kinds]
            if self.sliding_window:
                keys["attention.sliding_window_pattern"] = [kind in _WINDOWED for kind in kinds]
                if self._whole_head_dim:
                    keys["attention.key_length_swa"] = keys["attention.value_length_swa"] = self.number("head_dim")
        shared = self.number("num_kv_shared_layers")
        if 0 < shared < n_layer:
            keys["attention.shared_kv_layers"] = shared
        if self.n_expert:
            keys["expert_feed_forward_length"] = self.number("moe_intermediate_size", "expert_intermediate_size")
        return keys | self._state_keys()

    def _state_keys(self) -> dict[str, int]:
        """Sizes of recurrent states: gated delta nets, Mamba 2, short convolutions."""
        linear = self.values.get("linear_attn_config")
        if isinstance(linear, Mapping):  # Kimi's delta attention
            own = Config(self.name, linear)
            return {
                "ssm.conv_kernel": own.number("short_conv_kernel_size") or 4,
                "kda.head_dim": own.number("head_dim"),
            }
        if heads := self.number("linear_num_value_heads"):
            return {
                "ssm.conv_kernel": self.number("linear_conv_kernel_dim") or 4,
                "ssm.inner_size": heads * self.number("linear_value_head_dim"),
                "ssm.state_size": self.number("linear_key_head_dim"),
                "ssm.group_count": self.number("linear_num_key_heads"),
            }
        if size := self.number("mamba_d_state", "ssm_state_size", "state_size"):
            heads = self.number("mamba_n_heads", "mamba_num_heads", "num_heads")
            width = self.number("mamba_d_head", "mamba_head_dim", "head_dim")
            inner = heads * width or self.number("mamba_expand", "expand") * self.n_embd
            return {
                "ssm.conv_kernel": self.number("mamba_d_conv", "conv_kernel") or 4,
                "ssm.inner_size": inner,
                "ssm.state_size": size,
                "ssm.group_count": self.number("mamba_n_groups", "n_groups") or (1 if heads else 0),  # Mamba 1: none
            }
        if "conv" in self.layer_types:
            return {"shortconv.l_cache": self.number("conv_L_cache") or 3}
        return {}
