"""What clouds and machines cost: a table that the user keeps, since prices change and differ by contract.

# prices.yaml in the data folder: per million tokens, in your currency
gpt-4o-mini: {in: 0.15, out: 0.60}
claude-*:    {in: 3, out: 15}
# an hour of the machine that Bitladder runs on
machine:     {hourly: 0.40, date: 2026-01-31, source: a quote}
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from bitladder.errors import BadInput
from bitladder.files.folders import data_folder

FILE = "prices.yaml"
GPUS = "gpus"
"""The key of the same file under which prices of GPUs stand (``stages/search.py``); no model's name."""
MACHINE = "machine"
"""The key under which the price of an hour of this machine stands; no model's name."""


@dataclass(frozen=True)
class Price:
    """Of a million tokens."""

    prompt: float
    answer: float


@dataclass(frozen=True)
class Hourly:
    """An hour of a machine, in the user's currency, with what the price is of, when and where it was read."""

    price: float
    basis: str


def price_file() -> Path:
    """Where the table lies."""
    return data_folder() / FILE


def price_of(model: str, path: Path | None = None) -> Price | None:
    """The first row whose name or pattern is the model's (its vendor's prefix aside); None when there is none.

    Raises:
        BadInput: the table has a fault.
    """
    path = path or price_file()
    rows = _rows(path)
    names = (model.lower(), model.lower().rsplit("/", 1)[-1])
    for pattern, row in rows.items():
        if pattern in (GPUS, MACHINE):  # machines, which have another kind of price
            continue
        price = _price(path, pattern, row)
        if any(fnmatchcase(name, str(pattern).lower()) for name in names):
            return price
    return None


def machine_price(path: Path | None = None) -> Hourly | None:
    """An hour of this machine; None when the table has none.

    Raises:
        BadInput: the table has a fault.
    """
    path = path or price_file()
    row = _rows(path).get(MACHINE)
    if row is None:
        return None
    values = row if isinstance(row, dict) else {}
    price, date, source = (values.get(name) for name in ("hourly", "date", "source"))
    number = isinstance(price, int | float) and not isinstance(price, bool)
    if price is None or not number or not 0 <= price < math.inf or not date or not source:
        raise BadInput(
            f"{path}: the price of the '{MACHINE}' is not complete, got {row!r}.",
            means="A price without a date and a source cannot be trusted later.",
            do="Write 'machine: {hourly: 0.4, date: 2026-01-31, source: where}'.",
        )
    return Hourly(float(price), f"this machine at {float(price):g} an hour ({date}, {source})")


def _rows(path: Path) -> dict[object, object]:
    """The table; empty without a file."""
    if not path.exists():
        return {}
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"The prices in {path} cannot be read: {error}.") from error
    if not isinstance(rows, dict):
        raise BadInput(f"{path} needs a row for each model, like: gpt-4o-mini: {{in: 0.15, out: 0.60}}.")
    return rows


def _price(path: Path, pattern: object, row: object) -> Price:
    values = [row.get(name) for name in ("in", "out")] if isinstance(row, dict) and len(row) == 2 else []
    numbers = [float(value) for value in values if isinstance(value, int | float) and value >= 0]
    if len(numbers) != 2:
        raise BadInput(
            f"{path}: the prices of '{pattern}' need two numbers 'in' and 'out', got {row!r}.",
            do="Write a row like: gpt-4o-mini: {in: 0.15, out: 0.60}, per million tokens.",
        )
    return Price(*numbers)
