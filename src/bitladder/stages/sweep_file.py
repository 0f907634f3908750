"""A sweep's file: which models, ladders, workloads and bars; every fault by its line.

    name: spring fine-tunes                       # optional
    models: [hf:org/one, hf:org/two, mine.gguf]
    levels: [Q8_0, Q5_K_M, Q4_K_M]                # optional: the usual ladder; a list of lists is several ladders
    workloads: [support.yaml, invoices.yaml]      # optional: the one that ships
    bars: ["kl < 0.1", "passes >= reference - 5 points"]      # optional: the usual one
    ctx: 4096                                     # optional, as are these, as `run` takes them
    text: [reports.txt]
    imatrix: auto
    effort: good
    price: {hour: 0.80, currency: EUR}            # optional: of an hour of this machine

Paths are relative to the file.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitladder.describe import criterion_values as values
from bitladder.describe.document import Document, shortened
from bitladder.errors import BadInput, BitladderError
from bitladder.files.documents import read_document
from bitladder.files.workloads import STARTER, load_workload
from bitladder.levels import Level, parse_level
from bitladder.plan.bar import parse_bar
from bitladder.units import KiB

if TYPE_CHECKING:
    from bitladder.kernels import Effort

_FIELDS = ("name", "models", "levels", "workloads", "bars", "ctx", "text", "imatrix", "effort", "price")
_LARGEST = 256 * KiB
MOST_JOBS = 10_000


@dataclass(frozen=True)
class SweepFile:
    """What a sweep is of. Every combination of the first four is a job."""

    name: str
    models: tuple[str, ...]
    ladders: tuple[tuple[Level, ...] | None, ...] = (None,)
    workloads: tuple[str | Path, ...] = (STARTER,)
    bars: tuple[str | None, ...] = (None,)
    n_ctx: int | None = None
    texts: tuple[Path, ...] = ()
    imatrix: str = "auto"
    effort: Effort = "good"
    price: float | None = None
    """Of an hour of a machine."""
    currency: str = ""

    @property
    def jobs(self) -> list[tuple[str, tuple[Level, ...] | None, str | Path, str | None]]:
        """Model, ladder, workload and bar of each job; those of one model stand together."""
        return list(itertools.product(self.models, self.ladders, self.workloads, self.bars))


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep's file; what it names is looked at, but for models that lie elsewhere.

    Raises:
        BadInput: it cannot be read, or has faults: all of them, each with its line.
    """
    document, top = read_document(path, _LARGEST, "models, levels and workloads")
    if not isinstance(top, dict) or "models" not in top:
        raise BadInput(f"{path.name} names no models.", do="Write a line such as `models: [a.gguf, hf:org/name]`.")
    document.known(top, _FIELDS)
    made = _sweep(document, top, path)
    document.check()
    if len(made.jobs) > MOST_JOBS:
        raise BadInput(f"{path.name} makes {len(made.jobs)} jobs, and a sweep has at most {MOST_JOBS}.")
    return made


def _sweep(document: Document, top: dict[str, Any], path: Path) -> SweepFile:
    """The sweep, faulty parts left out and noted."""
    from bitladder.kernels.rows import EFFORTS

    folder = path.parent
    here = _Reader(document, top)
    price = top.get("price")
    hour, currency = None, ""
    if price is not None:
        wanted = functools.partial(
            values.fields, required={"hour": values.a_number}, optional={"currency": ("", values.a_string)}
        )
        found = document.attempt(lambda: document.read(wanted, price, "price")) or {}
        hour, currency = found.get("hour"), found.get("currency", "")
        if hour is not None and not 0 <= hour < float("inf"):
            document.faults.append(document.fault(f"a price is a number from 0 on, got {hour}.", "price", "hour"))
    return SweepFile(
        name=here.one("name", values.a_string, path.stem),
        models=tuple(here.several("models", functools.partial(_model, folder=folder))),
        ladders=tuple(_ladders(document, top.get("levels"))) or (None,),
        workloads=tuple(here.several("workloads", functools.partial(_workload, folder=folder))) or (STARTER,),
        bars=tuple(here.several("bars", _bar)) or (None,),
        n_ctx=here.one("ctx", values.a_count, None),
        texts=tuple(here.several("text", functools.partial(_file, folder=folder))),
        imatrix=here.one("imatrix", functools.partial(_imatrix, folder=folder), "auto"),
        effort=here.one("effort", values.choice(*EFFORTS), "good"),
        price=hour,
        currency=currency,
    )


@dataclass
class _Reader:
    """Reads fields of the file; what a reader does not take is a fault of the value's line."""

    document: Document
    top: dict[str, Any]

    def one(self, name: str, read: Callable[[Any], Any], otherwise: Any) -> Any:
        """A field's value, or another where it is not there or faulty."""
        if self.top.get(name) is None:
            return otherwise
        found = self.document.attempt(lambda: self.document.read(_told(read), self.top[name], name))
        return otherwise if found is None else found

    def several(self, name: str, read: Callable[[Any], Any]) -> list[Any]:
        """A field's values, each once; a single one need be no list."""
        value = self.top.get(name)
        if value is None:
            return []
        items = value if isinstance(value, list) else [value]
        if not items:
            self.document.faults.append(self.document.fault(f"{name} is empty.", name))
        path: tuple[str | int, ...]
        found = []
        for place, item in enumerate(items):
            path = (name, place) if isinstance(value, list) else (name,)
            made = self.document.attempt(functools.partial(self.document.read, _told(read), item, *path))
            if made is not None:
                found.append(made)
        return list(dict.fromkeys(found))


def _told(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A reader whose errors of ours are ValueErrors, which get their line."""

    def told(value: Any) -> Any:
        try:
            return read(value)
        except BitladderError as error:
            raise ValueError(" ".join(f"is no good: {error.found} {error.do}".split()).rstrip(".")) from error

    return told


def _ladders(document: Document, value: Any) -> list[tuple[Level, ...]]:
    """One ladder, or several as lists in a list."""
    if value is None:
        return []
    if not isinstance(value, list) or not value:
        document.faults.append(
            document.fault("levels must be a list that is not empty, such as [Q8_0, Q4_K_M].", "levels")
        )
        return []
    nested = all(isinstance(item, list) for item in value)
    ladders = []
    for number, ladder in enumerate(value if nested else [value]):
        levels = []
        for place, item in enumerate(ladder):
            path = ("levels", number, place) if nested else ("levels", place)
            reader = _told(lambda text: parse_level(values.a_string(text)))
            level = document.attempt(functools.partial(document.read, reader, item, *path))
            if level is not None:
                levels.append(level)
        if not ladder:
            document.faults.append(document.fault("this ladder is empty.", "levels", number))
        ladders.append(tuple(dict.fromkeys(levels)))
    return ladders


def _model(value: Any, folder: Path) -> str:
    """A model as `run` takes it; a file beside the sweep's own by its path."""
    text = values.a_string(value)
    if "://" in text:
        raise BadInput("a sweep builds levels, and an address has none.", do="Name a file, a folder or hf:org/name.")
    beside = folder / Path(text).expanduser()
    if beside.exists():
        return str(beside)
    if (text.endswith(".gguf") and ":" not in text) or text.startswith((".", "/", "~")):
        raise BadInput(f"there is no '{shortened(text)}'.", do="Check the path.")
    return text


def _workload(value: Any, folder: Path) -> str | Path:
    text = values.a_string(value)
    if text == STARTER:
        return text
    path = folder / Path(text).expanduser()
    load_workload(path)
    return path


def _file(value: Any, folder: Path) -> Path:
    path = folder / Path(values.a_string(value)).expanduser()
    if not path.is_file():
        raise BadInput(f"there is no file '{path}'.")
    return path


def _imatrix(value: Any, folder: Path) -> str:
    text = values.a_string(value)
    return text if text in ("auto", "none") else str(_file(text, folder))


def _bar(value: Any) -> str:
    return values.a_string(value) if parse_bar(values.a_string(value)) else ""
