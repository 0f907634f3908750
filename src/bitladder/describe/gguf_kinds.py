"""What a GGUF file is when it is no language model: a projector, an adapter, an importance matrix, a vocabulary.

All have the same container, lie side by side in repositories, and are told apart by ``general.type``, which older files
lack, by the architecture and by the names of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.errors import BadInput
from bitladder.formats.parts import nextn_blocks
from bitladder.formats.tensors import TensorInfo
from bitladder.units import human_bytes

PROJECTOR, ADAPTER, IMATRIX, CONTROL = "mmproj", "adapter", "imatrix", "controlvector"
_TOWERS = {"v": "pictures", "a": "sounds", "mm": "their projection"}
_IN_TOWER = re.compile(r"(v|a|mm)\.\w+\.\w")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_OWN = "Give the model's own GGUF file, a checkpoint folder or hf:org/name."


def kind_of(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> str:
    """``mmproj``, ``adapter``, ``imatrix``, ``controlvector``; empty for a model, or what may be one."""
    named, architecture = metadata.get("general.type"), metadata.get("general.architecture")
    if named in (PROJECTOR, ADAPTER, IMATRIX):
        return str(named)
    if architecture == CONTROL:
        return CONTROL
    if architecture == "clip":
        return PROJECTOR
    if "adapter.type" in metadata or any(tensor.name.endswith((".lora_a", ".lora_b")) for tensor in tensors):
        return ADAPTER
    sums = tensors and all(tensor.name.endswith((".in_sum2", ".counts")) for tensor in tensors)
    return IMATRIX if "imatrix.datasets" in metadata or sums else ""


def towers_in(tensors: Sequence[TensorInfo]) -> dict[str, int]:
    """Bytes of the tensors that take in pictures and sounds, by what they are for."""
    found: dict[str, int] = {}
    for tensor in tensors:
        if match := _IN_TOWER.match(tensor.name):
            what = _TOWERS[match[1]]
            found[what] = found.get(what, 0) + tensor.nbytes
    return found


def refuse_other_kinds(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> None:
    """Say what a file is that is no language model.

    Raises:
        BadInput: it is one of those above, holds no weights, holds a tower that no engine of ours loads from there, or
            has a vocabulary of another size than its embedding, which llama.cpp loads for no architecture.
    """
    kind = kind_of(metadata, tensors)
    if kind:
        raise _ERRORS[kind](metadata, tensors)
    if not tensors:
        raise BadInput(
            f"It holds a vocabulary{_of(metadata)} and no weights."
            if "tokenizer.ggml.model" in metadata or "tokenizer.ggml.tokens" in metadata
            else "It holds no tensors.",
            means="Only the vocabulary was converted, or it is one part of a split model."
            if "general.architecture" in metadata
            else "The conversion did not finish, or it is no model.",
            do=_OWN,
        )
    heads = nextn_blocks(tensor.name for tensor in tensors)
    blocks = {int(match[1]) for tensor in tensors if (match := _BLOCK.match(tensor.name))}
    if heads and blocks == heads:
        raise BadInput(
            f"It is the head that predicts several tokens (MTP){_of(metadata)}, no whole model.",
            means="It was converted to draft tokens for the model that it belongs to.",
            do=_OWN,
        )
    if towers := towers_in(tensors):
        raise BadInput(
            f"Beside the language model it holds tensors for {' and '.join(towers)}, "
            f"{human_bytes(sum(towers.values()))} in one file.",
            means="llama.cpp loads these from a file of their own (mmproj) and refuses a model that holds them; such "
            "files are Ollama's.",
            do="Give the model as llama.cpp's converter writes it, or its checkpoint folder or hf:org/name.",
        )
    _refuse_other_vocabulary(metadata, tensors)


def _refuse_other_vocabulary(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    shapes = [tensor.shape for tensor in tensors if tensor.name == "token_embd.weight"]
    if not isinstance(tokens, list) or not tokens or not shapes or len(shapes[0]) != 2 or shapes[0][0] == len(tokens):
        return
    raise BadInput(
        f"Its vocabulary lists {len(tokens):,} tokens, its embedding has {shapes[0][0]:,} rows.",
        means="No llama.cpp loads it. It was converted with another model's tokenizer, or tokens were added to one of "
        "the two only.",
        do="Convert the model again with the tokenizer it was trained with: the converter fills up missing tokens.",
    )


def _projector(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> BadInput:
    senses = [
        word for word, key in (("pictures", "clip.has_vision_encoder"), ("sounds", "clip.has_audio_encoder"))
        if metadata.get(key) is True
    ]  # fmt: skip
    takes = " and ".join(senses) or "pictures or sounds"
    size = human_bytes(sum(tensor.nbytes for tensor in tensors))
    return BadInput(
        f"It is a projector (mmproj, {size}): the part of a model that takes in {takes}, no language model.",
        means="It runs only beside the model that it was made with, and serves every level of it as it is.",
        do=_OWN,
    )


def _adapter(metadata: Mapping[str, Any], _tensors: Sequence[TensorInfo]) -> BadInput:
    kind = metadata.get("adapter.type")
    word = "LoRA adapter" if kind in (None, "lora") else "adapter"
    return BadInput(
        f"It is a {word}{_of(metadata)}: differences to a model, no model.",
        means="Its effect depends on the model that it is added to.",
        do="Merge it into that model (llama.cpp: llama-export-lora) and give the merged file.",
    )


def _imatrix(_metadata: Mapping[str, Any], _tensors: Sequence[TensorInfo]) -> BadInput:
    return BadInput(
        "It is an importance matrix: statistics about a model, no model.",
        do="Give it with --imatrix, beside the model that it was made for.",
    )


def _control(metadata: Mapping[str, Any], _tensors: Sequence[TensorInfo]) -> BadInput:
    return BadInput(f"It is a control vector{_of(metadata)}: directions in a model's states, no model.", do=_OWN)


def _of(metadata: Mapping[str, Any]) -> str:
    """`` of 'llama'``; a name from outside is repeated only where it is one."""
    name = metadata.get("general.architecture")
    known = isinstance(name, str) and re.fullmatch(r"[\w.-]{1,40}", name) and name not in ("clip", CONTROL)
    return f" of '{name}'" if known else ""


_ERRORS = {PROJECTOR: _projector, ADAPTER: _adapter, IMATRIX: _imatrix, CONTROL: _control}
