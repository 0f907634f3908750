"""Headers of catalogue rows that are stated as config.json: what llama.cpp's converter makes of them, shipped in short.

Made by ``scripts/catalogue_sizes.py``, so that planning the catalogue needs neither the converter nor transformers. In
``headers.json`` a model has the keys of its GGUF header, and its tensors as runs of layers that have the same ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from typing import Any

from bitladder.describe.dims import dims_from_metadata
from bitladder.describe.model import Model
from bitladder.formats.tensors import TensorInfo

Short = dict[str, Any]
"""``keys``: the header's; ``tensors``: [name with {} for the layer, shape, qtype, [[first, last layer], ...]]; outside
of layers the last item is empty."""
_LAYER = re.compile(r"^blk\.(\d+)\.")
_LEFT_OUT = ("tokenizer.", "general.")


@cache
def shipped_headers() -> dict[str, Short]:
    """Hub name -> header in short."""
    text = resources.files("bitladder").joinpath("data/catalogue/headers.json").read_text(encoding="utf-8")
    loaded: dict[str, Short] = json.loads(text)
    return loaded


def shorten(model: Model) -> Short:
    """A model's header in short."""
    kept = {key: value for key, value in model.metadata.items() if not key.startswith(_LEFT_OUT)}
    runs: dict[tuple[str, tuple[int, ...], str], list[list[int]]] = {}
    for tensor in model.tensors:
        found = _LAYER.match(tensor.name)
        name = _LAYER.sub("blk.{}.", tensor.name)
        layers = runs.setdefault((name, tensor.shape, tensor.qtype), [])
        if found is None:
            continue
        layer = int(found[1])
        if layers and layers[-1][1] == layer - 1:
            layers[-1][1] = layer
        else:
            layers.append([layer, layer])
    architecture = {"general.architecture": model.dims.architecture}
    return {
        "keys": {**architecture, **kept},
        "tensors": [[name, list(shape), qtype, layers] for (name, shape, qtype), layers in runs.items()],
    }


def expand(name: str, short: Short, *, tensors: bool = True) -> Model:
    """The model that a short header describes, called ``name``; its header's bytes are an estimate. Without ``tensors``
    only its dimensions and keys."""
    listed = tuple(_tensors(short["tensors"]))
    keys = short["keys"]
    dims = dims_from_metadata(keys, listed)
    header = 40 * dims.n_vocab + 100 * len(listed)
    return Model(name, dims, listed if tensors else (), keys, header_bytes=header)


def _tensors(rows: Sequence[Sequence[Any]]) -> Iterator[TensorInfo]:
    """Those outside of layers first, then layer by layer."""
    inner: list[tuple[int, TensorInfo]] = []
    for name, shape, qtype, layers in rows:
        if not layers:
            yield TensorInfo(name, tuple(shape), qtype)
        for first, last in layers:
            inner += [
                (layer, TensorInfo(name.replace("{}", str(layer)), tuple(shape), qtype))
                for layer in range(first, last + 1)
            ]
    yield from (tensor for _, tensor in sorted(inner, key=lambda item: item[0]))
