"""What the benchmarks of recipes share: options, texts to fit to and to measure on; it measures nothing itself."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.describe.model import Model
from bitladder.describe.text import Document
from bitladder.describe.windows import WINDOW, Window, text_windows
from bitladder.engines.llama import LlamaServer
from bitladder.files.gguf import GgufFile


def parser_of(doc: str) -> argparse.ArgumentParser:
    """The options that they all take."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name in ("--model", "--calibrate", "--text"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser


def parsed(parser: argparse.ArgumentParser, *more: str, hint: str = "") -> argparse.Namespace:
    """Options, torch's threads set; the benchmark ends where a file is absent (``more``: options of further files)."""
    options = parser.parse_args()
    needed = [options.model, options.calibrate, options.text]
    for name in more:
        needed += [Path(given) for given in getattr(options, name) or () if str(given) != "-"]
    absent = [path for path in needed if not path.exists()]
    if absent:
        print(f"{absent[0]} is absent; nothing was measured{hint}")
        sys.exit(1)
    torch.set_num_threads(options.threads)
    return options


def articles(path: Path, count: int) -> list[Document]:
    """WikiText's articles, by their headings, spread over the file."""
    parts = re.split(r"(?m)^ = (?!=)(.+?) = $", path.read_text(encoding="utf-8"))
    found = [Document(title.strip(), body) for title, body in zip(parts[1::2], parts[2::2], strict=True)]
    long = [one for one in found if len(one.text) > 4000]
    return [long[at] for at in np.linspace(0, len(long) - 1, min(count, len(long))).astype(int)]


def first_windows(server: LlamaServer, source: GgufFile, documents: Sequence[Document]) -> list[Window]:
    """The first whole window of each document, or its only one."""
    windows = text_windows(documents, lambda text: server.tokenize(text, add_special=True), source.model)
    return list({window.document: window for window in reversed(windows)}.values())


def fitting_windows(server: LlamaServer, source: GgufFile, path: Path, tokens: int, part: int = 0) -> list[Window]:
    """Windows from the ``part``-th stretch of a text; no two parts share any."""
    start = 12 * tokens * part
    document = Document("calibration", path.read_text(encoding="utf-8")[start : start + 12 * tokens])
    windows = text_windows([document], lambda text: server.tokenize(text, add_special=True), source.model)
    return windows[: tokens // WINDOW]


def per_document(values: NDArray[np.float64], windows: Sequence[Window]) -> NDArray[np.float64]:
    """Sums of what was found per scored token, for each window."""
    ends = np.cumsum([window.scored for window in windows])
    return np.array([part.sum() for part in np.split(values, ends[:-1])])


def part_of(model: Model, layers: int) -> Model:
    """The model without all tensors but those of so many layers, spread evenly; 0: all of it."""
    if not layers:
        return model
    chosen = set(np.linspace(0, model.dims.n_layer - 1, layers).astype(int).tolist())
    own = tuple(one for one in model.tensors if one.name.startswith("blk.") and int(one.name.split(".")[1]) in chosen)
    return dataclasses.replace(model, tensors=own)
