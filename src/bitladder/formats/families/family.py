"""What can be known of a model family, as one value.

    architecture     its name in GGUF files: one row for each
    checkpoint       its config.json: classes, and what they leave unsaid
    features         what its layers have, from which the shapes of all tensors follow
    windows, states  which layers attend to a window only, which keep a recurrent state: the cache follows
    layers           how transformers' decoder layers are filled and what they share: the walk follows
    mix              where llama.cpp's recipes treat it apart

A part that is not known is None, and whoever needs it says so. Windows, states and mix have a value that holds
for families nobody has a row for: every layer attends to everything, the header tells about states, no exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bitladder.formats.roles import (
    EMBEDDING,
    OUTPUT,
    OUTPUT_NORM,
    ROPE_TENSORS,
    Parameter,
    SharedInput,
    Stop,
    factored,
    layer_tensor,
)

Feature = Literal[
    "qkv_bias", "all_bias", "fused_qkv", "fused_gate", "latent", "sinks", "head_norms", "row_norms",
    "post_norms", "only_post_norms", "one_norm", "ffn_norm_called_post",
]  # fmt: skip
"""What a layer has beside or instead of separate q, k, v, output, gate, up and down matrices with a norm before
attention and one before the feed-forward:

    qkv_bias, all_bias      biases on q, k and v; on every matrix, routers and experts included
    fused_qkv, fused_gate   one matrix for q, k and v; one for gate and up
    latent                  multi-head latent attention (DeepSeek)
    sinks                   one learned logit per head
    head_norms, row_norms   q and k normed per head; over all heads together
    post_norms              norms after attention and feed-forward too
    only_post_norms         those only
    one_norm                one norm, before attention and feed-forward side by side
    ffn_norm_called_post    the norm before the feed-forward is stored as post_attention_norm
"""


@dataclass(frozen=True)
class RopeTables:
    """Factors of the rotary embedding that a file of some scalings stores: of which, in which tensors."""

    scalings: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ("rope_freqs",)


@dataclass(frozen=True)
class CheckpointTraits:
    """A family in config.json."""

    classes: tuple[str, ...]
    """transformers' classes, as ``architectures`` names them."""
    tied: bool = False
    """Whether the head is the embedding where config.json does not say."""
    expert_qtype: str = "F16"
    """What experts are published in."""


@dataclass(frozen=True)
class Windows:
    """Layers in groups of ``every``: one attends to the whole context, the others to a window.

    ``tokens``: the window's length where headers do not have it (Llama 4 attends in chunks).
    """

    every: int
    whole_first: bool = False
    """The layer that sees everything is the first of its group, not the last."""
    tokens: int = 0

    def window(self, layer: int) -> bool:
        """Whether a layer sees a window only."""
        return layer % self.every != (0 if self.whole_first else self.every - 1)


@dataclass(frozen=True)
class StateTraits:
    """Which layers keep a recurrent state, in families that have one and whose header does not tell by itself."""

    beside_attention: bool = False
    """Every layer attends and keeps a state at once."""
    attention_every: int = 0
    """Every n-th layer attends, the others keep a state, unless the header has another n; 0: headers tell."""
    one_job: bool = False
    """A layer is one of state, attention and feed-forward."""


@dataclass(frozen=True)
class Mix:
    """Exceptions of llama.cpp's recipes."""

    seventy_layers: int = 0
    """Layers of the model that llama.cpp knows as "70B": with grouped heads its attn_v gets more bits. 0: none."""
    light_down: bool = False
    """ffn_down and attn_output get fewer bits than elsewhere, the output table Q8_0."""


@dataclass(frozen=True)
class LayerKind:
    """What decoder layers of one kind are made of.

    ``parameters``: every parameter of the module. ``inputs``: the vectors that its linear layers share, in the
    order they are computed. ``stops``: where a pass may stop.
    """

    parameters: tuple[Parameter, ...]
    inputs: tuple[SharedInput, ...]
    stops: tuple[Stop, ...]


KindOf = Callable[[Mapping[str, Any], int], int]
"""Which kind a layer is: the header's keys without the architecture's prefix, the layer -> index into ``kinds``."""


def alike(keys: Mapping[str, Any], layer: int) -> int:  # noqa: ARG001
    """Every layer is of the first kind."""
    return 0


@dataclass(frozen=True)
class DiskNames:
    """What a checkpoint calls what is not named after a module in a layer."""

    layers: str = "model.layers."
    """Before a layer's number."""
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"


def _is_rope_table(name: str) -> bool:
    return name in ROPE_TENSORS or (name.startswith("blk.") and name.endswith(ROPE_TENSORS))


@dataclass(frozen=True)
class Layers:
    """transformers' decoder layers of a family, and how a GGUF file fills them.

    ``options``: (configuration field, GGUF key after the architecture's prefix); a missing key leaves
    transformers' default when the field ends in ``?`` and is an error otherwise. ``constants``: fields that the
    family fixes.
    """

    model_type: str
    kinds: tuple[LayerKind, ...]
    kind_of: KindOf = alike
    options: tuple[tuple[str, str], ...] = ()
    constants: tuple[tuple[str, object], ...] = ()
    bias_field: str | None = None
    """Configuration field that says whether attention projections have biases, set when the file has
    ``attn_q.bias``."""
    norm_transform: str = "same"
    """How the norm before the head is stored."""
    has_output_norm: bool = True
    scaled_embedding: bool = False
    """Embeddings are multiplied by the root of their width (Gemma)."""
    wide_query_layers: int | None = None
    """Gemma models with this many layers scale attention by width / heads instead of by the head's width
    (their 27B sizes)."""
    partial_rotary: bool = False
    """Heads may rotate fewer dimensions than they have (Phi-4-mini)."""
    windows: Windows | None = None
    """Windows that transformers' layers take; None where they see everything whatever the header says."""
    local_rope: bool = False
    """Layers with a window rotate by a base of their own, without scaling (Gemma 3)."""
    plain_with_window: bool = False
    """A window in the header beside scaled positions makes no other model of it (Phi-3). Elsewhere windows and
    scaling together are a variant that these layers would run wrongly."""
    variant_keys: tuple[str, ...] = ()
    """Keys of the header that only variants have which these layers would run wrongly."""
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Stacked experts on disk: path of the parameter -> the names of one expert's linear layers, one for each equal
    run of rows, ``{}`` for the expert's number. Dense layers are on disk as in the module. Of a stack of biases names
    end with ``.bias``."""
    in_turn: frozenset[str] = frozenset()
    """Paths in ``experts`` whose rows belong to its linear layers in turn (gate, up, gate, up), not in runs."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Path of a parameter -> its name on disk, where that differs."""
    disk: DiskNames = DiskNames()
    routers: tuple[str, ...] = ()
    """Modules that choose experts, by all names that disks and engines have for them: their few weights decide
    much and are never quantized in checkpoints."""

    def kind(self, keys: Mapping[str, Any], layer: int) -> LayerKind:
        """What a layer is made of; ``keys``: as ``KindOf``."""
        return self.kinds[self.kind_of(keys, layer)]

    def unplaced(self, keys: Mapping[str, Any], n_layer: int, names: Iterable[str]) -> list[str]:
        """Tensors of a file that no row places: their effect would silently be missing. ``keys``: as ``KindOf``."""
        known = {
            layer_tensor(layer, role)
            for layer in range(n_layer)
            for parameter in self.kind(keys, layer).parameters
            for role in parameter.roles
        }
        known |= {EMBEDDING, OUTPUT} | ({OUTPUT_NORM} if self.has_output_norm else set())
        return [
            name for name in names if name not in known and factored(name) not in known and not _is_rope_table(name)
        ]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Those of all kinds together, each once."""
        return tuple(dict.fromkeys(parameter for kind in self.kinds for parameter in kind.parameters))

    @property
    def inputs(self) -> tuple[SharedInput, ...]:
        """Those of all kinds together, each once."""
        return tuple(dict.fromkeys(shared for kind in self.kinds for shared in kind.inputs))


@dataclass(frozen=True)
class Family:
    """All that is known of a GGUF architecture."""

    architecture: str
    checkpoint: CheckpointTraits | None = None
    features: frozenset[Feature] | None = None
    rope_tables: RopeTables = RopeTables()
    windows: Windows | None = None
    states: StateTraits = StateTraits()
    mix: Mix = Mix()
    layers: Layers | None = None
    flash_attention: bool = True
    """Whether llama.cpp attends with its flash kernel, which quantized values in the cache need."""
    expert_layers: Layers | None = None
    """The layers of a file with experts, where that is another model of transformers (Mixtral is llama with
    experts)."""

    def layers_of(self, n_expert: int) -> Layers | None:
        """The layers of a file with so many experts."""
        return self.expert_layers if n_expert and self.expert_layers else self.layers
