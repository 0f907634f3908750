"""A GGUF model run layer by layer through transformers' own decoder layers, one layer of weights in memory at
a time.

The module structure lives on torch's meta device, where parameters have shapes and no memory. ``layer``
builds one decoder layer, fills it with weights from any callable, and whoever holds it drops it before the
next. Embedding rows are looked up one by one and the head is read in slices of the vocabulary
(``walk/head.py``), so memory grows with the largest layer, not with the model. Arithmetic is float32 on
the CPU or a GPU.

What a family needs beyond transformers' layer is in its row (``formats/families``); what differs from its ``forward``
is nothing: the tests compare logits with transformers' own full model for every family.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.describe.layers import layers_of
from bitladder.describe.model import Model
from bitladder.errors import BadFile, UnknownArchitecture
from bitladder.files.safetensors_writer import PiecewiseTensor
from bitladder.formats import roles
from bitladder.formats.disk_names import absorbing_parameters
from bitladder.formats.families.family import LayerKind, Layers
from bitladder.formats.roles import SharedInput, layer_tensor
from bitladder.kernels.gpu import check_device
from bitladder.levels.checkpoints import CheckpointFormat
from bitladder.walk.rope import Rope, rope_from_header
from bitladder.walk.rounding import QTypeOf, round_inputs
from bitladder.walk.transforms import apply

F32 = NDArray[np.float32]
Rows = slice | NDArray[np.int64] | None


class Weights(Protocol):
    """Where a tensor's weights come from: f32 in the tensor's numpy shape, or f32[rows, columns] of the rows
    asked for."""

    def __call__(self, name: str, rows: Rows = None) -> F32:
        """Read a tensor or some rows of it."""


@dataclass(frozen=True)
class Entry:
    """Where a pass can begin in the middle of a layer: before the last linear module of a part of it, if its input was
    kept. Paths are within the layer."""

    linear: str
    module: str
    """The part, whose forward gives what that linear module gives."""
    norm: str | None
    """A norm that only this part reads."""
    pair: bool
    """Whether the part gives a pair, as attention modules do."""


@contextmanager
def inference() -> Iterator[None]:
    """No autograd; the arithmetic of every pass here."""
    with torch.inference_mode():
        yield


def tensor_at(block: nn.Module, path: str) -> torch.Tensor:
    """A parameter of a layer, or a buffer that its file holds."""
    owner, _, leaf = path.rpartition(".")
    found: torch.Tensor = getattr(block.get_submodule(owner), leaf)
    return found


def _keys(model: Model) -> dict[str, Any]:
    prefix = model.dims.architecture + "."
    return {key.removeprefix(prefix): value for key, value in model.metadata.items() if key.startswith(prefix)}


def _check_tensors(model: Model, family: Layers, keys: dict[str, Any]) -> None:
    """Refuse a file with a tensor that no row uses: its effect would silently be missing."""
    unplaced = family.unplaced(keys, model.dims.n_layer, (tensor.name for tensor in model.tensors))
    if unplaced:
        raise UnknownArchitecture(
            f"The tensor '{unplaced[0]}' has no place in the layers of '{model.dims.architecture}'.",
            means="The file is a variant of its family that these rows do not describe.",
            do="Measure this model through the engine with a workload instead.",
        )


def _config(model: Model, family: Layers, keys: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    dims = model.dims
    head_dim = dims.head_dim_k
    fields: dict[str, Any] = {
        "vocab_size": dims.n_vocab,
        "hidden_size": dims.n_embd,
        "intermediate_size": dims.n_ff,
        "num_hidden_layers": dims.n_layer,
        "num_attention_heads": dims.n_head,
        "num_key_value_heads": dims.n_head_kv,
        "head_dim": head_dim,
        "max_position_embeddings": dims.n_ctx_train,
        "pad_token_id": None,
        **dict(family.constants),
    }
    for field, key in family.options:
        if key in keys:
            fields[field.removesuffix("?")] = keys[key]
        elif not field.endswith("?"):
            raise BadFile(
                f"The key '{dims.architecture}.{key}' is missing.",
                means="The header was written by an old or unfinished conversion.",
                do="Convert the model again from its original checkpoint.",
            )
    names = {tensor.name for tensor in model.tensors}
    if family.bias_field:
        fields[family.bias_field] = layer_tensor(0, "attn_q.bias") in names
    if family.windows:
        fields["query_pre_attn_scalar"] = (
            dims.n_embd // dims.n_head if dims.n_layer == family.wide_query_layers else head_dim
        )
        fields["layer_types"] = [
            "sliding_attention" if family.windows.window(layer) else "full_attention" for layer in range(dims.n_layer)
        ]
    config = AutoConfig.for_model(family.model_type, **fields)
    # sdpa has no soft cap on attention scores; the loop over experts is the only path that needs no fused
    # kernels.
    config._attn_implementation = "eager" if fields.get("attn_logit_softcapping") else "sdpa"
    config._experts_implementation = "eager"
    return config


class LayeredModel:
    """A model's forward pass in pieces: ``embed``, then ``layer`` and ``run`` for each layer, then ``normed``
    and the head.

    Hidden states are f32[windows, n, n_embd]. ``n`` may be anything up to the trained context.

    Raises:
        UnknownArchitecture: no rows describe the family, or the file holds tensors that they do not place.
        BadFile: a key that the family needs is missing.
        BadInput: positions are scaled in a way that is not known here.
        UsageError: torch has no such device here.
    """

    at_once: ClassVar[bool] = True
    """Whether a layer's module may run several batches at the same time."""
    head_bias: F32 | None = None
    """What is added to the head's outputs f32[n_vocab], of every level alike; None: nothing."""

    def __init__(self, model: Model, weights: Weights, *, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        if device != "cpu":
            check_device(device)
        self.model, self.family, self.device = model, layers_of(model), torch.device(device)
        self._keys = _keys(model)
        _check_tensors(model, self.family, self._keys)
        self.config = _config(model, self.family, self._keys)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                self.config, attn_implementation=self.config._attn_implementation
            )
        self._blocks = skeleton.model.layers
        self._norm = skeleton.model.norm
        names = {tensor.name for tensor in model.tensors}
        self.n_layer: int = model.dims.n_layer
        self.width: int = model.dims.n_embd
        self.embedding = roles.EMBEDDING
        self.output = roles.OUTPUT if roles.OUTPUT in names else roles.EMBEDDING
        self.logit_softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self._names = names
        self._stored = {name: weights(name) for name in roles.ROPE_TENSORS if name in names}
        self._ropes: dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]] = {}
        self._check_positions()

    def _check_positions(self) -> None:
        """Refuse position schemes that transformers' layer would do differently, before any work."""
        self._rope(1, local=False)
        dims, head_dim = self._rotated_dims, self.model.dims.head_dim_k
        window = int(self._keys.get("attention.sliding_window", 0))
        variants = [key for key in self.family.variant_keys if key in self._keys]
        if variants:
            raise UnknownArchitecture(
                f"The header of this '{self.model.dims.architecture}' model has '{variants[0]}'.",
                means="It is a variant of its family that these rows do not describe.",
                do="Measure this model through the engine with a workload instead.",
            )
        alternating = window and not self.family.windows and not self.family.plain_with_window
        if (dims != head_dim and not self.family.partial_rotary) or (alternating and "rope.scaling.type" in self._keys):
            raise UnknownArchitecture(
                f"This '{self.model.dims.architecture}' model rotates {dims} of {head_dim} dimensions of a head, "
                f"with a sliding window of {window}.",
                means="It is a variant of its family that these rows do not describe.",
                do="Measure this model through the engine with a workload instead.",
            )

    @property
    def _rotated_dims(self) -> int:
        return int(self._keys.get("rope.dimension_count", self.model.dims.head_dim_k))

    def kind(self, layer: int) -> LayerKind:
        """What a layer is made of; in a hybrid not every layer is alike."""
        return self.family.kind(self._keys, layer)

    def first_of_each_kind(self) -> list[tuple[int, LayerKind]]:
        """The first layer of every kind that the model has, with its kind."""
        first: dict[LayerKind, int] = {}
        for layer in range(self.n_layer):
            first.setdefault(self.kind(layer), layer)
        return [(layer, kind) for kind, layer in first.items()]

    def layer_names(self, layer: int) -> list[str]:
        """The GGUF tensors that a layer reads, in the order of the family's rows."""
        return [
            name
            for parameter in self.kind(layer).parameters
            for role in parameter.roles
            if (name := layer_tensor(layer, role)) in self._names
        ]

    def inputs(self, layer: int, block: nn.Module) -> list[SharedInput]:
        """The inputs of a layer's linear modules, in the order they are computed: what can be observed in it."""
        modules = {name for name, _ in block.named_modules()}
        return [shared for shared in self.kind(layer).inputs if shared.module in modules]

    def entries(self, layer: int, block: nn.Module) -> list[Entry]:
        """Where a pass through a layer can begin in its middle."""
        modules = {name for name, _ in block.named_modules()}
        norms = {
            shared.module.partition(".")[0]: parameter.path.removesuffix(".weight")
            for shared in self.kind(layer).inputs
            for parameter in absorbing_parameters(self.family, shared)
            if parameter.path.count(".") == 1 and parameter.path.endswith("norm.weight")
        }
        return [
            Entry(stop.module, stop.owner, norms.get(stop.owner), stop.returns_pair)
            for stop in self.kind(layer).stops
            if stop.module in modules
        ]

    def shape(self, path: str, layer: int = 0) -> tuple[int, ...]:
        """Of a layer's parameter, as the header's dimensions say."""
        return tuple(tensor_at(self._blocks[layer], path).shape)

    def embed(self, tokens: NDArray[np.int64], weights: Weights) -> torch.Tensor:
        """Embeddings f32[windows, n, n_embd] of token ids int64[windows, n]; only the rows that occur are
        read."""
        used, where = np.unique(tokens, return_inverse=True)
        table = weights(roles.EMBEDDING, used)
        states = torch.from_numpy(table[where.reshape(tokens.shape)]).to(self.device)
        return states * self.config.hidden_size**0.5 if self.family.scaled_embedding else states

    def outline(self, layer: int) -> nn.Module:
        """As ``driver.Stages``."""
        block: nn.Module = self._blocks[layer]
        return block

    def empty(self, layer: int) -> nn.Module:
        """A layer of one's own without weights, for ``fill``."""
        return _copy_structure(self._blocks[layer])

    def layer(self, layer: int, weights: Weights) -> nn.Module:
        """A decoder layer filled with weights, ready for ``run``.

        Raises:
            BadFile: a tensor is missing or has another shape than the header's dimensions say.
        """
        block = self.empty(layer)
        self.fill(block, layer, weights, [path for path, _ in block.named_parameters()])
        return block.to(self.device)

    def fill(self, block: nn.Module, layer: int, weights: Weights, paths: Collection[str]) -> None:
        """Fill some parameters of an empty layer, on this model's device; raises as ``layer``."""
        rows = {parameter.path: parameter for parameter in self.kind(layer).parameters}
        for path, empty in list(block.named_parameters()):
            if path not in paths:
                continue
            parameter = rows[path]
            parts = [weights(name) for name in self._parts(layer, parameter)]
            heads = self.model.dims.n_head if "q_proj" in path else self.model.dims.n_head_kv
            value = apply(parameter.transform, parts, heads) if parts else np.zeros(tuple(empty.shape), np.float32)
            self._fill(block, path, value, parameter.roles)

    def _parts(self, layer: int, parameter: roles.Parameter) -> list[str]:
        names = [layer_tensor(layer, role) for role in parameter.roles]
        missing = [name for name in names if name not in self._names]
        if missing and not parameter.optional:
            raise BadFile(
                f"The tensor '{missing[0]}' is missing.",
                means="The file is incomplete, or a variant of its family that the rows do not describe.",
                do="Convert the model again from its original checkpoint.",
            )
        return [] if missing else names

    def _fill(self, module: nn.Module, path: str, value: F32, sources: tuple[str, ...]) -> None:
        owner, _, leaf = path.rpartition(".")
        target = module.get_submodule(owner)
        expected = tuple(getattr(target, leaf).shape)
        if value.shape != expected:
            raise BadFile(
                f"{' and '.join(sources)} give a parameter of shape {value.shape}, "
                f"the header's dimensions need {expected}.",
                means="The file is a variant of its family that the rows do not describe, or damaged.",
                do="Convert the model again from its original checkpoint.",
            )
        tensor = torch.from_numpy(np.ascontiguousarray(value)).to(self.device)
        setattr(target, leaf, nn.Parameter(tensor, requires_grad=False))

    def run(self, block: nn.Module, layer: int, states: torch.Tensor) -> torch.Tensor:
        """Push hidden states f32[windows, n, n_embd] through a filled layer."""
        with inference():
            return self.forward(block, layer, states)

    def forward(self, block: nn.Module, layer: int, states: torch.Tensor) -> torch.Tensor:
        """As ``run``, leaving to the caller whether autograd watches."""
        n = states.shape[1]
        sliding = self._slides(layer)
        out = block(
            states,
            attention_mask=self._mask(n, sliding),
            position_ids=torch.arange(n, device=self.device)[None],
            position_embeddings=self._rope(n, local=sliding and self.family.local_rope),
        )
        return out if isinstance(out, torch.Tensor) else out[0]

    def round_inputs(self, block: nn.Module, layer: int, qtype_of: QTypeOf) -> None:
        """Make a layer round what its linear modules read as llama.cpp does beside weights of these types."""
        round_inputs(block, self.kind(layer), layer, qtype_of)

    @property
    def embedded(self) -> tuple[str, ...]:
        """The file's tensors that decide what enters the first layer."""
        return (self.embedding,)

    @property
    def norm_names(self) -> tuple[str, ...]:
        """The file's tensors that the norm before the head is made of."""
        return (roles.OUTPUT_NORM,) if self.family.has_output_norm else ()

    @property
    def embedding_energy(self) -> float:
        """The square of what embeddings are multiplied by."""
        return float(self.config.hidden_size) if self.family.scaled_embedding else 1.0

    @property
    def beside(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds outside the layers, embedding, last norm and head apart, by name on disk."""
        return {}

    def copied(self) -> list[PiecewiseTensor]:
        """What a checkpoint holds of other parts than the text model, to be copied beside its levels."""
        return []

    def check_disk_names(self, forms: Iterable[CheckpointFormat]) -> None:
        """Refuse checkpoint levels of a model whose matrices have no place of their own in a checkpoint of a format."""

    def columns(self, layer: int, role: str) -> NDArray[np.int64] | None:  # noqa: ARG002
        """Where each input of the linear layer that a tensor is meets the tensor: its column. None where inputs and
        columns are in one order."""
        return None

    def norm(self, weights: Weights) -> nn.Module:
        """The norm before the head, filled."""
        module = _copy_structure(self._norm)
        if self.family.has_output_norm:
            value = apply(self.family.norm_transform, [weights(roles.OUTPUT_NORM)], 1)
            self._fill(module, "weight", value, (roles.OUTPUT_NORM,))
        return module.to(self.device)

    def _slides(self, layer: int) -> bool:
        return self.family.windows is not None and self.family.windows.window(layer)

    def _mask(self, n: int, sliding: bool) -> torch.Tensor | None:
        """None lets sdpa use its causal kernel; otherwise a mask to add, f32[1, 1, n, n]."""
        window = self.config.sliding_window if sliding else n
        if window >= n and self.config._attn_implementation == "sdpa":
            return None
        at = torch.arange(n, device=self.device)
        distance = at[:, None] - at[None, :]
        allowed = (distance >= 0) & (distance < window)
        return torch.zeros(n, n, device=self.device).masked_fill(~allowed, float("-inf"))[None, None]

    def _rope(self, n: int, *, local: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if (n, local) not in self._ropes:
            dims = self._rotated_dims
            if local:  # Gemma 3's sliding layers: an own base, no scaling
                base = float(self._keys.get("rope.freq_base_swa", 10000.0))
                rope = Rope(base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims))
            else:
                rope = rope_from_header(self._keys, dims, n, self._stored)
            with torch.inference_mode(False):  # kept, and met by passes that autograd watches
                self._ropes[n, local] = rope.cos_sin(n, self.device)
        return self._ropes[n, local]


def _copy_structure(module: nn.Module) -> nn.Module:
    """A copy whose parameters are still on the meta device."""
    import copy

    return copy.deepcopy(module)
