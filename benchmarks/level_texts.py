"""What the benchmarks of recipes share: options, texts to fit to and to measure on, and how files are
compared; it measures nothing itself."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.describe.model import Model
from bitladder.describe.text import Document
from bitladder.describe.windows import WINDOW, Window, text_windows
from bitladder.engines.llama import LlamaServer
from bitladder.files.folders import cache_key
from bitladder.files.gguf import GgufFile
from bitladder.files.texts import shipped_texts
from bitladder.formats.tensors import TensorInfo
from bitladder.records.recipe import Recipe, SensitivityTable
from bitladder.stages.fidelity import Candidate, token_scores
from bitladder.stages.sensitivity import BlockTypes
from bitladder.stats.bootstrap import ratio_interval


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


def measuring_texts(
    server: LlamaServer, source: GgufFile, options: argparse.Namespace, other: Sequence[Document] = ()
) -> dict[str, list[Window]]:
    """What files are measured on: ``--documents`` articles of ``--text``, and texts of other kinds, by default those
    that ship."""
    return {
        "in domain": first_windows(server, source, articles(options.text, options.documents)),
        "other domain": first_windows(server, source, other or shipped_texts()),
    }


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


class SomeTypes(BlockTypes):
    """Block types of some tensors; the others are not weighed."""

    def __init__(self, names: frozenset[str], *, low: bool) -> None:
        super().__init__(low=low)
        self.names = names
        self.key += f"-{cache_key(*sorted(names))[:8]}"

    def of(self, info: TensorInfo) -> tuple[str, ...]:
        """As ``Choices``."""
        return super().of(info) if info.name in self.names else ()


def weighed_only(table: SensitivityTable) -> SensitivityTable:
    """The table without tensors that were not weighed."""
    return dataclasses.replace(table, losses={name: own for name, own in table.losses.items() if own})


def with_the_rest(recipe: Recipe, model: Model) -> Recipe:
    """A recipe of a part of the model, all other tensors as they are stored."""
    stored = {one.name: one.qtype for one in model.tensors}
    return dataclasses.replace(recipe, qtypes={**stored, **recipe.qtypes})


@dataclass(frozen=True)
class Side:
    """A file of a comparison."""

    columns: dict[str, str | int]
    """What it is told by, in the table and in JSON."""
    candidate: Candidate
    against: int
    """The place of the file that its loss is a share of."""


def compare(
    source: GgufFile, sides: Sequence[Side], windows: Sequence[Window], name: str, widths: Sequence[int],
    *, of: str, threads: int, keep: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """Prints mean KL of each file on windows, and its share of another's with a paired 95% interval over documents.

    ``widths``: of the columns; ``of``: what losses are a share of; ``keep``: where a killed walk goes on from.
    """
    scores = token_scores(source, [one.candidate for one in sides], windows, threads=threads, keep=keep)[1:]
    kl = [per_document(one.kl, windows) for one in scores]
    tokens = per_document(np.ones(len(scores[0].kl)), windows)

    def told(cells: Iterable[str | int]) -> str:
        return " ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))

    print(f"\n{name}: {len(windows)} documents, {int(tokens.sum())} scored tokens")
    print(f"{told(sides[0].columns)} {'mean KL':>9} {'of ' + of:>13} {'95% interval':>17}")
    rows = []
    for place, (side, own) in enumerate(zip(sides, kl, strict=True)):
        ratio = ratio_interval(own, kl[side.against], np.random.default_rng(0), scale="log")
        mean = float(own.sum() / tokens.sum())
        interval = "" if side.against == place else f"[{ratio.low:.3f}, {ratio.high:.3f}]"
        print(f"{told(side.columns.values())} {mean:9.4f} {ratio.value:13.3f} {interval:>17}", flush=True)
        rows.append({"text": name, **side.columns, "kl": mean, "ratio": ratio.value,
                     "low": ratio.low, "high": ratio.high, "per_document": own.tolist()})  # fmt: skip
    return rows
