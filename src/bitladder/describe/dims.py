"""A model's dimensions from the keys of its GGUF header.

Keys are ``<architecture>.<name>``, the same for every family, so a family needs no rows of its own here: what
the engine knows is asked by who reads files (``files/engine_package.py``).
Where a model states a number per layer (grouped heads that vary, say) the largest is taken: sizes derived
from it are upper bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.describe.header_keys import HeaderKeys
from bitladder.describe.model import ModelDims
from bitladder.errors import BadFile
from bitladder.formats.tensors import TensorInfo

MAX_LAYERS = 10_000
"""More layers than this no model has; what follows from a number of layers is listed in memory."""


def _architecture(metadata: Mapping[str, Any]) -> str:
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise BadFile(
            f"general.architecture is {name!r}, not a name.",
            means="The file holds something else than a language model, or its header is damaged.",
            do="Convert the model again from its original checkpoint.",
        )
    return name


def dims_from_metadata(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> ModelDims:
    """Dimensions of the model that a header describes; the vocabulary's size comes from the embedding, which
    cannot lie.

    Raises:
        BadFile: a key is missing, has the wrong type or an absurd value.
    """
    architecture = _architecture(metadata)
    if not tensors:
        raise BadFile(
            "The file holds no tensors.",
            means="It is a vocabulary alone, or its conversion did not finish.",
            do="Give a GGUF file of the whole model.",
        )
    keys = HeaderKeys(metadata, architecture)
    n_layer = keys.number("block_count", smallest=1, largest=MAX_LAYERS)
    n_embd = keys.number("embedding_length", smallest=1)
    n_head = keys.number("attention.head_count", 0)
    n_head_kv = keys.number("attention.head_count_kv", n_head)
    head_dim = n_embd // n_head if n_head else 0
    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    n_vocab = _vocabulary(metadata) if embedding is None or len(embedding.shape) != 2 else embedding.shape[0]
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
        n_ctx_train=0 if keys.raw("context_length") is None else keys.number("context_length", smallest=1),
        n_expert=keys.number("expert_count", 0),
        n_expert_used=keys.number("expert_used_count", 0),
        sliding_window=keys.number("attention.sliding_window", 0),
    )


def _vocabulary(metadata: Mapping[str, Any]) -> int:
    """Tokens that the header lists."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise BadFile(
            f"The key 'tokenizer.ggml.tokens' is {repr(tokens)[:60]}, not a list of tokens.",
            means="The header was written by an unfinished conversion, or is damaged.",
            do="Convert the model again from its original checkpoint.",
        )
    return len(tokens)
