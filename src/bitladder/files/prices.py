"""What clouds charge: a table that the user keeps, since prices change and differ by contract.

# prices.yaml in the data folder: per million tokens, in your currency
gpt-4o-mini: {in: 0.15, out: 0.60}
claude-*:    {in: 3, out: 15}
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from bitladder.errors import BadInput
from bitladder.files.folders import data_folder

FILE = "prices.yaml"
GPUS = "gpus"
"""The key of the same file under which prices of GPUs stand (``stages/search.py``); no model's name."""


@dataclass(frozen=True)
class Price:
    """Of a million tokens."""

    prompt: float
    answer: float


def price_file() -> Path:
    """Where the table lies."""
    return data_folder() / FILE


def price_of(model: str, path: Path | None = None) -> Price | None:
    """The first row whose name or pattern is the model's (its vendor's prefix aside); None when there is none.

    Raises:
        BadInput: the table has a fault.
    """
    path = path or price_file()
    if not path.exists():
        return None
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"The prices in {path} cannot be read: {error}.") from error
    if not isinstance(rows, dict):
        raise BadInput(f"{path} needs a row for each model, like: gpt-4o-mini: {{in: 0.15, out: 0.60}}.")
    names = (model.lower(), model.lower().rsplit("/", 1)[-1])
    for pattern, row in rows.items():
        if pattern == GPUS:  # machines, which plan reads
            continue
        price = _price(path, pattern, row)
        if any(fnmatchcase(name, str(pattern).lower()) for name in names):
            return price
    return None


def _price(path: Path, pattern: object, row: object) -> Price:
    values = [row.get(name) for name in ("in", "out")] if isinstance(row, dict) and len(row) == 2 else []
    numbers = [float(value) for value in values if isinstance(value, int | float) and value >= 0]
    if len(numbers) != 2:
        raise BadInput(
            f"{path}: the prices of '{pattern}' need two numbers 'in' and 'out', got {row!r}.",
            do="Write a row like: gpt-4o-mini: {in: 0.15, out: 0.60}, per million tokens.",
        )
    return Price(*numbers)
