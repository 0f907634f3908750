"""Whether config.json and the headers of the weights speak of the same model.

A config.json that was edited, or that belongs to another checkpoint, converts without a word into a file that no engine
loads. What can be told from headers is told here, before an hour of work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.describe.config_keys import Config, layer_number
from bitladder.describe.estimate import Stored, language_tensors, llama_name
from bitladder.describe.hf_config import shape_of
from bitladder.describe.shapes import model_of
from bitladder.errors import BadFile, BadInput
from bitladder.formats.tensors import TensorInfo

_OTHER_WIDTHS = ("word_embed_proj_dim", "embedding_size", "embedding_hidden_size", "embedding_dim")
_OTHER_VOCABULARIES = ("padded_vocab_size", "tokenizer_vocab_size")


def check_config(label: str, config: Mapping[str, Any], tensors: Sequence[Stored]) -> None:
    """Compare the number of layers, the width and the vocabulary; the layers with one another; and the matrices with
    those that the family's row, where there is one, derives from config.json.

    Args:
        label: How to call the model.
        config: config.json.
        tensors: The checkpoint's; none are no contradiction.

    Raises:
        BadFile: they contradict each other, or a figure is absurd.
    """
    numbers = Config(label, config)
    numbers.check_context()
    language = language_tensors(tensors)
    _check_layers(label, numbers, language)
    if not numbers.packed:
        _check_embedding(label, numbers, language)
        _check_gap(label, config, language)
        _check_row(label, config, tensors)


def _check_row(label: str, config: Mapping[str, Any], tensors: Sequence[Stored]) -> None:
    try:
        implied = model_of(shape_of(label, config)).tensors
    except BadInput:  # no row, or figures that it needs and the converter may not
        return
    check_shapes(label, implied, tensors)


def check_shapes(label: str, implied: Sequence[TensorInfo], tensors: Sequence[Stored]) -> None:
    """Compare the matrices of layers one by one with those that a family's row derives from config.json.

    Experts are left out, because checkpoints stack and transpose them in several ways.

    Raises:
        BadFile: one has another shape.
    """
    known = {tensor.name: tensor.shape for tensor in implied}
    for tensor in language_tensors(tensors):
        name = llama_name(tensor.name)
        wanted = known.get(name)
        if wanted is None or "_exps" in name or len(wanted) != len(tensor.shape) or wanted == tensor.shape:
            continue
        raise _contradiction(label, f"{tensor.name} is {list(tensor.shape)}, where config.json implies {list(wanted)}")


def _check_layers(label: str, numbers: Config, tensors: Sequence[Stored]) -> None:
    stacks = Counter(_stack(tensor.name) for tensor in tensors if layer_number(tensor.name) is not None)
    if not stacks or not numbers.n_layer:
        return
    main = stacks.most_common(1)[0][0]
    there = 1 + max(layer_number(tensor.name) or 0 for tensor in tensors if _stack(tensor.name) == main)
    heads = numbers.number("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
    if there < numbers.n_layer:
        raise _contradiction(label, f"config.json has {numbers.n_layer} layers, the weights have {there}")
    if there > numbers.n_layer + max(heads, _headed(tensors, main, numbers.n_layer)):
        raise _contradiction(label, f"config.json has {numbers.n_layer} layers, the weights have {there}")


def _check_gap(label: str, config: Mapping[str, Any], tensors: Sequence[Stored]) -> None:
    """A layer that has nothing of its own and lacks what all the others have is one whose tensors were lost: hybrids'
    layers of another kind have tensors of that kind. Layers that use the keys of others, that were searched for one by
    one, and first layers (of ModernBERT, RWKV) lack some by design.

    Raises:
        BadFile: one does.
    """
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    if any(part.get(key) for part in parts for key in ("num_kv_shared_layers", "block_configs")):
        return
    stacks: dict[str, dict[int, set[str]]] = {}
    for tensor in tensors:
        number = layer_number(tensor.name)
        if number is not None:
            within = tensor.name.partition(f".{number}.")[2]
            stacks.setdefault(_stack(tensor.name), {}).setdefault(number, set()).add(within)
    for layers in stacks.values():
        held = Counter(name for own in layers.values() for name in own)
        nearly = {name for name, count in held.items() if count == len(layers) - 1}
        for number, here in layers.items():
            lost = nearly - here
            if len(layers) > 2 and number > 0 and lost and all(held[name] == len(layers) for name in here):
                raise BadFile(
                    f"{label}: layer {number} lacks {min(lost)}, which every other layer has.",
                    means="A shard or a tensor was lost: no engine would load what is made of the rest.",
                    do="Fetch the weights again.",
                )


def _headed(tensors: Sequence[Stored], stack: str, n_layer: int) -> int:
    """Layers after the last that hold a head for several tokens, by what only such layers have."""
    marks = ("eh_proj", "enorm", "hnorm", "mtp", "nextn")
    late = {
        number
        for tensor in tensors
        if _stack(tensor.name) == stack
        and (number := layer_number(tensor.name) or 0) >= n_layer
        and any(mark in tensor.name for mark in marks)
    }
    return len(late)


def _check_embedding(label: str, numbers: Config, tensors: Sequence[Stored]) -> None:
    found = next((tensor for tensor in tensors if llama_name(tensor.name) == "token_embd.weight"), None)
    if found is None or len(found.shape) != 2:
        return
    rows, columns = found.shape
    widths = {numbers.n_embd, *(numbers.number(key) for key in _OTHER_WIDTHS)}
    if numbers.n_embd and columns not in widths:
        raise _contradiction(
            label, f"config.json has vectors of {numbers.n_embd}, {found.name} has rows of {columns} weights"
        )
    vocabularies = {numbers.n_vocab, *(numbers.number(key) for key in _OTHER_VOCABULARIES)}
    if numbers.n_vocab and rows not in vocabularies:
        raise _contradiction(label, f"config.json has {numbers.n_vocab} tokens, {found.name} has {rows} rows")


def _stack(name: str) -> str:
    """What stands before a layer's number: towers and heads for speech have stacks of their own."""
    number = layer_number(name)
    return "" if number is None else name.partition(f".{number}.")[0]


def _contradiction(label: str, found: str) -> BadFile:
    return BadFile(
        f"{label}: {found}.",
        means="config.json was changed, or belongs to other weights: no engine would load what is made of them.",
        do="Fetch config.json and the weights again, from one place.",
    )
