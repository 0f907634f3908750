"""The catalogue of widely used open models: rows shipped with the package and rows users add, with the sizes of
their levels.

Users add rows in ``models.yaml`` in the user's data folder (``BITLADDER_DATA``), in the same form; a row with a known
hub name replaces the shipped one. Sizes of shipped rows are shipped too (``sizes.json``, a test compares them with the
recipes), since planning the whole catalogue must not take seconds; sizes of added rows are computed when they are read.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from bitladder.describe.dims import MAX_LAYERS
from bitladder.describe.model import Model
from bitladder.describe.shapes import Shape, model_of
from bitladder.errors import BadInput
from bitladder.files.catalogue_headers import expand, shipped_headers
from bitladder.files.folders import data_folder
from bitladder.formats.families import planned
from bitladder.formats.parts import parts_of
from bitladder.formats.recipes import LEVELS, assign
from bitladder.formats.tensors import TensorInfo

Parts = dict[str, dict[str, int]]
"""Part of a model -> qtype -> bytes, as ``formats.parts`` defines parts."""


@dataclass(frozen=True)
class CatalogueModel:
    """One row."""

    hub: str
    licence: str
    params: float
    """Billions of weights, as published."""
    shape: Shape | None
    """The row's figures; None of a row that is stated as a config.json."""
    source: str
    """Where the shape was read, in words."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What config.json has beside the defaults of its class in transformers; empty where there is a shape."""
    released: str = ""
    """Month of its first publication, ``2025-04``; empty where the row has none."""
    made_for: str = "chat"
    """``chat``, ``code`` or ``base`` (a model that was not taught to answer)."""

    @property
    def name(self) -> str:
        """The hub name without its owner."""
        return self.hub.split("/")[-1]

    @property
    def model(self) -> Model:
        """Dimensions and header keys, without tensors."""
        return self._model(tensors=False)

    def whole(self) -> Model:
        """The model with its tensors."""
        return self._model(tensors=True)

    def _model(self, *, tensors: bool) -> Model:
        if self.shape is not None:
            return model_of(self.shape, tensors=tensors)
        return expand(self.name, shipped_headers()[self.hub], tensors=tensors)

    @property
    def architecture(self) -> str:
        """llama.cpp's word for its family."""
        return self.shape.architecture if self.shape is not None else self.model.dims.architecture


def load_catalogue() -> tuple[CatalogueModel, ...]:
    """Every row, the shipped ones first.

    Raises:
        BadInput: a row that a user added is faulty; the message names it.
    """
    rows = {row.hub: row for row in _shipped()}
    added = data_folder("models.yaml")
    if added.is_file():
        rows |= {row.hub: row for row in _parse(added.read_text(encoding="utf-8"), added)}
    return tuple(rows.values())


@cache
def _shipped() -> tuple[CatalogueModel, ...]:
    return _parse(_data("models.yaml"), Path("models.yaml"))


def _data(name: str) -> str:
    return resources.files("bitladder").joinpath(f"data/catalogue/{name}").read_text(encoding="utf-8")


def _parse(text: str, where: Path) -> tuple[CatalogueModel, ...]:
    try:
        table = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise BadInput(f"{where} is no YAML: {error}", do="Correct it, or move it away.") from error
    rows = table.get("models") if isinstance(table, dict) else None
    if not isinstance(rows, list):
        raise BadInput(
            f"{where} has no list 'models'.",
            do="Begin the file with 'models:', and give each model a line '- {hub: org/name, ...}' beneath.",
        )
    sources = table.get("sources")
    known = sources if isinstance(sources, dict) else {}
    return tuple(_row(row, number, where, known) for number, row in enumerate(rows, start=1))


_OPTIONAL = {field.name for field in dataclasses.fields(Shape) if field.default is not dataclasses.MISSING}
_NEEDED = {field.name for field in dataclasses.fields(Shape)} - _OPTIONAL - {"name"}


def _row(row: Any, number: int, where: Path, sources: dict[str, str]) -> CatalogueModel:
    """A checked row; ``sources`` spells out the short names of sources."""
    at = f"{where}, model {number}"
    if not isinstance(row, dict) or not isinstance(row.get("hub"), str):
        raise BadInput(f"{at} has no hub name.", do="Give hub: org/name.")
    at += f" ({row['hub']})"
    own = {"hub", "licence", "params", "source"}
    publication = _publication(row, at)
    if "config" in row:
        return _stated(row, at, sources, publication)
    missing = sorted((_NEEDED | {"params"}) - row.keys())
    unknown = sorted(row.keys() - _NEEDED - _OPTIONAL - own - publication.keys())
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise BadInput(
            f"{at} {wrong}.",
            do=f"A row has {', '.join(sorted(_NEEDED | own))}, and may have "
            f"{', '.join(sorted(_OPTIONAL | publication.keys()))}.",
        )
    if row["architecture"] not in planned():
        raise BadInput(f"{at}: architecture '{row['architecture']}' is not one of {', '.join(planned())}.")
    numbers = {key: value for key, value in row.items() if key in _NEEDED - {"architecture"}}
    wrong_numbers = [
        key for key, value in numbers.items() if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    if wrong_numbers:
        raise BadInput(f"{at}: {', '.join(wrong_numbers)} must be positive whole numbers.")
    if row["n_layer"] > MAX_LAYERS:
        raise BadInput(f"{at}: n_layer is {row['n_layer']}; at most {MAX_LAYERS} are read.")
    dims = {key: value for key, value in row.items() if key not in own | publication.keys()}
    shape = Shape(name=row["hub"].split("/")[-1], **dims)
    source = str(row.get("source", ""))
    spelled = str(sources.get(source, source))
    return CatalogueModel(
        row["hub"], str(row.get("licence", "")), float(row["params"]), shape, spelled, **publication
    )  # fmt: skip


MADE_FOR = ("chat", "code", "base")


def _publication(row: dict[str, Any], at: str) -> dict[str, Any]:
    """When a model was published and what it was made for: checked, and with their defaults."""
    released, made_for = row.get("released", ""), row.get("made_for", "chat")
    if released and not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", str(released)):
        raise BadInput(f"{at}: released is '{released}', which is no month.", do="Write it as 2025-04.")
    if made_for not in MADE_FOR:
        raise BadInput(f"{at}: made_for is '{made_for}'.", do=f"It is one of {', '.join(MADE_FOR)}.")
    return {"released": str(released), "made_for": made_for}


def _stated(row: dict[str, Any], at: str, sources: dict[str, str], publication: dict[str, Any]) -> CatalogueModel:
    """A row that is stated as a config.json, whose header is shipped."""
    config, params = row["config"], row.get("params")
    if not isinstance(config, dict) or isinstance(params, bool) or not isinstance(params, (int, float)):
        raise BadInput(f"{at}: config is no mapping, or params no number.")
    if row["hub"] not in shipped_headers():
        raise BadInput(
            f"{at} has a config and no header made from it.",
            do="Rows of your own have dimensions; a config.json is planned as it is: bitladder plan FOLDER.",
        )
    source = str(row.get("source", ""))
    spelled = str(sources.get(source, source))
    return CatalogueModel(row["hub"], str(row.get("licence", "")), float(params), None, spelled, config, **publication)


def find_models(text: str) -> tuple[CatalogueModel, ...]:
    """Rows whose hub name, family or licence contains every word of ``text``; all rows for an empty one."""
    words = text.lower().split()
    return tuple(
        row
        for row in load_catalogue()
        if all(word in f"{row.hub} {row.architecture} {row.licence}".lower() for word in words)
    )


def model_named(name: str) -> CatalogueModel:
    """The one row a name means: hub name, or the part after the owner, in any case.

    Raises:
        BadInput: there is none; the nearest names are in the message.
    """
    rows = load_catalogue()
    wanted = name.lower().removeprefix("hf:")
    for row in rows:
        if wanted in (row.hub.lower(), row.name.lower()):
            return row
    names = {row.name.lower(): row.name for row in rows} | {row.hub.lower(): row.hub for row in rows}
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4)
    raise BadInput(
        f"The catalogue has no model '{name}'.",
        means="Nearest: " + ", ".join(names[key] for key in close) if close else "",
        do="`bitladder catalog` lists what it has; a GGUF file, folder or hf: name needs no row.",
    )


def level_parts(row: CatalogueModel) -> dict[str, Parts]:
    """Level -> part -> qtype -> bytes, largest level first."""
    stored = _sizes().get(size_key(row))
    return stored if stored is not None else compute_parts(row.whole())


@cache
def _sizes() -> dict[str, dict[str, Parts]]:
    loaded: dict[str, dict[str, Parts]] = json.loads(_data("sizes.json"))
    return loaded


def size_key(row: CatalogueModel) -> str:
    """What sizes depend on: every field of a shape but the name and the context, or the model itself."""
    return _shape_key(row.shape) if row.shape is not None else row.hub


def _shape_key(shape: Shape) -> str:
    values = dataclasses.asdict(shape)
    return " ".join(f"{value}" for key, value in values.items() if key not in ("name", "n_ctx"))


def compute_parts(model: Model) -> dict[str, Parts]:
    """Sizes from the recipes, without the shipped table."""
    found = {}
    for level in LEVELS:
        chosen = assign(level, model.tensors, model.dims)
        found[level] = parts_of([TensorInfo(t.name, t.shape, chosen[t.name]) for t in model.tensors])
    return dict(sorted(found.items(), key=lambda item: -sum(sum(part.values()) for part in item[1].values())))
