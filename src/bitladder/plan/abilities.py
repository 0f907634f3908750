"""What a model can have beside a plan: proof of its levels, an importance matrix, calibrated levels, recipes; and where
it cannot, why not. Said by `plan`, before an hour of work.

Three ways lead there, and a model may be open to some of them:

    the walk                 layers of its family are known here by a row (``formats/families``)
    the derived walk         transformers' own layers, found by what they do
    the engine               llama.cpp's own forward pass, for whatever it runs
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from bitladder.describe.model import Model
from bitladder.formats.families import family_of


class Route(StrEnum):
    """How something is done for a model."""

    CONVERTER = "converter"
    QUANTIZER = "quantizer"
    WALK = "walk"
    DERIVED = "derived walk"
    ENGINE = "engine"
    NONE = "none"


@dataclass(frozen=True)
class Ability:
    """One thing that a model can have, or not."""

    what: str
    way: Route
    reason: str = ""
    """Why not, where the way is ``NONE``."""


@dataclass(frozen=True)
class Facts:
    """What decides. ``None`` where nobody here can tell; such a model is given the benefit of the doubt."""

    is_gguf: bool
    """There is a GGUF file already."""
    converts: bool | None
    """llama.cpp's converter reads the checkpoint."""
    engine_knows: bool | None
    """llama.cpp runs the architecture."""
    walk_gap: str
    """Why the rows here do not describe its layers; "" where they do (``walk_gap``)."""
    transformers_class: bool | None
    """transformers has its class, without code of the checkpoint's own."""
    engine_gap: str = ""
    """Why llama.cpp's library cannot measure it, though it may run; "" where it can."""
    tokenizer_gap: str = ""
    """Why the converter does not read its tokenizer; "" where it does."""


_WAYS: dict[str, tuple[Route, ...]] = {
    "GGUF file": (Route.CONVERTER,),
    "K-quants": (Route.QUANTIZER,),
    "proof": (Route.WALK, Route.DERIVED, Route.ENGINE),
    "importance": (Route.WALK, Route.DERIVED, Route.ENGINE),
    "calibration": (Route.WALK, Route.DERIVED),
    "recipes": (Route.WALK, Route.DERIVED),
    "workload": (Route.ENGINE,),
}
"""What there is to have, and the ways to it, the best first. ``proof``: KL divergence, perplexity and top-1 agreement
of levels. ``calibration``: GPTQ, AWQ, INT8, error feedback. ``workload``: answers through the real engine."""


_FILES = ("GGUF file", "K-quants", "recipes")


def abilities(facts: Facts) -> tuple[Ability, ...]:
    """Everything of ``_WAYS`` that is not there already, in its order."""
    found = []
    no_file = _no_file(facts)
    for what, ways in _WAYS.items():
        if facts.is_gguf and ways == (Route.CONVERTER,):
            continue
        shut = {way: no_file or _no_tokenizer(what, way, facts) or _shut(what, way, facts) for way in ways}
        way = next((way for way, reason in shut.items() if not reason), Route.NONE)
        found.append(Ability(what, way, "" if way is not Route.NONE else "; ".join(dict.fromkeys(shut.values()))))
    return tuple(found)


def _no_file(facts: Facts) -> str:
    return "" if facts.is_gguf or facts.converts is not False else "llama.cpp's converter does not read the checkpoint"


def _no_tokenizer(what: str, way: Route, facts: Facts) -> str:
    """What a file without a tokenizer is no use for: it runs nowhere; the walk reads texts by the checkpoint's own."""
    gap = facts.tokenizer_gap if way is Route.ENGINE or what in _FILES else ""
    return f"llama.cpp's converter does not read its tokenizer ({gap})" if gap else ""


def _shut(what: str, way: Route, facts: Facts) -> str:
    """Why a way is closed; "" where it is open."""
    if way is Route.WALK:
        return facts.walk_gap
    if way is Route.ENGINE and facts.engine_knows is False:
        return "llama.cpp does not know the architecture"
    if way is Route.ENGINE and what != "workload" and facts.engine_gap:
        return f"the engine cannot measure it: {facts.engine_gap}"
    if way is Route.DERIVED and facts.is_gguf:
        return "a GGUF file's header lacks what transformers needs to know; give the checkpoint's folder or hf:org/name"
    if way is Route.DERIVED and facts.transformers_class is False:
        return "transformers does not know the class"
    return ""


def walk_gap(model: Model) -> str:
    """Why the rows of families do not describe a model's layers; "" where they do, as far as its header tells."""
    architecture = model.dims.architecture
    layers = family_of(architecture).layers_of(model.dims.n_expert)
    if layers is None:
        return f"the layers of '{architecture}' are not known here"
    prefix = architecture + "."
    keys = {key.removeprefix(prefix): value for key, value in model.metadata.items() if key.startswith(prefix)}
    strange = layers.unplaced(keys, model.dims.n_layer, (tensor.name for tensor in model.tensors))
    if strange:
        return f"'{strange[0][:60]}' has no place in the layers of '{architecture}' that are known here"
    odd = [key for key in layers.variant_keys if key in keys]
    return f"it is a variant of '{architecture}' ('{odd[0]}' in its header)" if odd else ""
