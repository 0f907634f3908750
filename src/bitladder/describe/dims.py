"""A model's dimensions from the keys of its GGUF header.

Keys are ``<architecture>.<name>``, the same for every family, so a family needs no rows of its own here.
Where a model states a number per layer (grouped heads that vary, say) the largest is taken: sizes derived
from it are upper bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.describe.model import ModelDims
from bitladder.errors import BadFile, UnknownArchitecture
from bitladder.formats.families import FAMILIES
from bitladder.formats.tensors import TensorInfo

_LARGEST = 1 << 31


def known_architectures() -> frozenset[str]:
    """Architecture names that llama.cpp's own package knows; importing it takes longer than reading a header."""
    from gguf.constants import MODEL_ARCH_NAMES

    return frozenset(MODEL_ARCH_NAMES.values())


def _architecture(metadata: Mapping[str, Any]) -> str:
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise BadFile(
            f"general.architecture is {name!r}, not a name.",
            means="The file holds something else than a language model, or its header is damaged.",
            do="Convert the model again from its original checkpoint.",
        )
    if name not in FAMILIES and name not in (known := known_architectures()):
        raise UnknownArchitecture(
            f"The architecture '{name}' is not known.",
            means=f"Known are: {', '.join(sorted(known))}.",
            do="Update the gguf package (pip install -U gguf) if the model is new, or choose another model.",
        )
    return name


class _Keys:
    """Whole numbers under one architecture's prefix."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata = metadata
        self.prefix = architecture + "."

    def number(self, name: str, default: int | None = None, *, smallest: int = 0, first: bool = False) -> int:
        """The key's value; of a list the largest element, or the first."""
        key = self.prefix + name
        value = self.metadata.get(key, default)
        if isinstance(value, list) and value:
            value = value[0] if first else max(value, key=lambda one: one if isinstance(one, int) else -1)
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < _LARGEST:
            found = "is missing" if key not in self.metadata else f"is {value!r}, not a number from {smallest} up"
            raise BadFile(
                f"The key '{key}' {found}.",
                means="The header was written by an unfinished conversion, or is damaged.",
                do="Convert the model again from its original checkpoint.",
            )
        return value


def dims_from_metadata(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> ModelDims:
    """Dimensions of the model that a header describes; the vocabulary's size comes from the embedding, which
    cannot lie.

    Raises:
        BadFile: a key is missing, has the wrong type or an absurd value.
        UnknownArchitecture: nobody knows this model family.
    """
    architecture = _architecture(metadata)
    keys = _Keys(metadata, architecture)
    n_layer = keys.number("block_count", smallest=1)
    n_embd = keys.number("embedding_length", smallest=1)
    n_head = keys.number("attention.head_count", 0)
    n_head_kv = keys.number("attention.head_count_kv", n_head)
    head_dim = n_embd // n_head if n_head else 0
    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    n_vocab = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else len(tokens)
    return ModelDims(
        architecture=architecture,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=keys.number("feed_forward_length", 0),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim_k=keys.number("attention.key_length", head_dim),
        head_dim_v=keys.number("attention.value_length", head_dim),
        n_vocab=n_vocab,
        n_ctx_train=keys.number("context_length", 0),
        n_expert=keys.number("expert_count", 0),
        n_expert_used=keys.number("expert_used_count", 0),
        sliding_window=keys.number("attention.sliding_window", 0),
    )
