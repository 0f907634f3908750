"""Weigh a model's tensors once, for all recipes of it: predicted losses, checked against a few measured recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bitladder.describe.windows import different, weighing_part
from bitladder.errors import BadInput
from bitladder.records import to_json
from bitladder.records.reading import read_json
from bitladder.records.recipe import SensitivityTable
from bitladder.stages.calibration import calibration_texts, tuning_windows
from bitladder.stages.forecast import PASSES, forecast, walking_need
from bitladder.stages.job import Build, CalibrationPart, Job
from bitladder.stages.model_route import route_of

if TYPE_CHECKING:
    from bitladder.describe.windows import Window
    from bitladder.records.recipe import Recipe
    from bitladder.stages.fidelity import Candidate
    from bitladder.stages.sensitivity import Choices, Weighed

_HELD_OUT_TOKENS = 4096
"""Tokens that nothing is fitted to: predictions and the finished file are compared with the source on them."""
_LARGEST_HELD_OUT = 4
"""At most every fourth window is held out."""
_CHECKED = (1.06, 5.5, 4)
"""Recipes that predictions are scaled to: from so much above the smallest possible, to so many bits, how many."""


@dataclass(frozen=True)
class RecipeTexts:
    """The calibration text: ``held_out`` shares no window with the others, ``weighing`` is a part of ``fitting``."""

    weighing: list[Window]
    fitting: list[Window]
    held_out: list[Window]


class Storage(Protocol):
    """What tensors are weighed for: the choices that they have, and whole recipes that predictions are checked by."""

    @property
    def choices(self) -> Choices:
        """What each tensor may be stored as."""

    def spread(self, table: SensitivityTable) -> list[Recipe]:
        """Recipes from small to precise."""

    def candidates(self, recipes: Sequence[Recipe], weighed: Weighed) -> list[Candidate]:
        """The same, made on the fly with plain rounding."""


class GgufStorage:
    """``Storage`` in a GGUF file; ``low``: of so few bits that codebook types are chosen from, too."""

    def __init__(self, job: Job, *, low: bool = False) -> None:
        from bitladder.stages.sensitivity import BlockTypes

        self._job, self._low, self.choices = job, low, BlockTypes(low=low)

    def spread(self, table: SensitivityTable) -> list[Recipe]:
        """As ``Storage``."""
        from bitladder.plan.recipe import Limits, bounds, choose

        model = self._job.source.model
        least, most = (8 * size / sum(t.elements for t in model.tensors) for size in bounds(model, low=self._low))
        sizes = sizes_between(least, most)
        return [choose(table, model, Limits(bpw=bpw, feedback=False)) for bpw in sizes if least <= bpw <= most]

    def candidates(self, recipes: Sequence[Recipe], weighed: Weighed) -> list[Candidate]:
        """As ``Storage``."""
        from bitladder.stages.fidelity import Candidate
        from bitladder.walk.weights import FileWeights, MadeWeights, Quantizer

        threads, device = self._job.threads, self._job.device
        exact = FileWeights(self._job.source, threads=threads)
        quantizer = Quantizer(exact, importance=weighed.importance, effort="fast", threads=threads, device=device)
        return [Candidate(recipe.label, MadeWeights(quantizer, recipe.qtypes)) for recipe in recipes]


def sizes_between(least: float, most: float) -> list[float]:
    """Bits per weight of recipes that predictions are scaled to."""
    import numpy as np

    return [float(size) for size in np.geomspace(_CHECKED[0] * least, min(_CHECKED[1], most), _CHECKED[2])]


def parts_of_text(windows: Sequence[Window]) -> RecipeTexts:
    """Windows spread over the text are held out; sensitivities are taken from others, spread over the rest. What the
    text repeats counts once.

    Raises:
        BadInput: there are too few windows to hold one out.
    """
    windows = different(windows)
    if len(windows) < _LARGEST_HELD_OUT:
        raise BadInput(
            f"The calibration text makes {len(windows)} different windows; at least {_LARGEST_HELD_OUT} are needed.",
            means="One in four is held out, to measure the file on text that nothing was fitted to.",
            do="Give a longer text, or leave it out to use the one that ships.",
        )
    total = sum(len(window.tokens) for window in windows)
    stride = max(_LARGEST_HELD_OUT, round(total / _HELD_OUT_TOKENS))
    held = list(windows[stride - 1 :: stride])
    rest = [window for at, window in enumerate(windows) if (at + 1) % stride]
    return RecipeTexts(weighing_part(rest), rest, held)


def recipe_texts(job: Job, texts: Sequence[CalibrationPart], build: Build | None) -> RecipeTexts:
    """The calibration text in its parts. What a build tunes on is read as well: what is wrong with it is said before a
    model is weighed.

    Raises:
        BadInput: as ``parts_of_text`` and ``tuning_windows`` say.
    """
    whole = job.windows(calibration_texts(job, texts))
    if build is not None:
        tuning_windows(job, whole, build)
    return parts_of_text(whole)


def weighed_tensors(
    job: Job, parts: RecipeTexts, texts: Sequence[CalibrationPart], storage: Storage | None = None
) -> tuple[SensitivityTable, Path]:
    """The table of predicted losses, checked against measured recipes, and where it is kept between runs; ``storage``:
    a GGUF file by default."""
    from bitladder.files.folders import cache_folder, cache_key
    from bitladder.stages.curvature import keep_curvatures
    from bitladder.stages.sensitivity import MADE_BY, weigh

    source, text, storage = job.source, job.text_key(calibration_texts(job, texts)), storage or GgufStorage(job)
    own = (storage.choices.key,) if storage.choices.key else ()
    key = cache_key(*MADE_BY, source.sha256, text, route_of(source), *own)
    kept = cache_folder("sensitivity", f"{key[:32]}.json")
    if (table := read_table(kept)) is not None:
        job.journal.reuse("sensitivity", [source.model.name])
        return table, kept
    need = walking_need(source, parts.weighing, PASSES, kind="weigh")
    with forecast(need.named(f"weigh {source.model.name}'s tensors"), job.journal):
        keep = cache_folder("walks", "weigh")
        weighed = weigh(
            source, parts.weighing, threads=job.threads, device=job.device, keep=keep, progress=job.progress,
            choices=storage.choices,
        )  # fmt: skip
    if weighed.curvatures is not None:
        keep_curvatures(source, parts.weighing, weighed.half, weighed.curvatures)
    table = _checked(job, weighed, parts, storage)
    keep_table(kept, table)
    return table, kept


def keep_table(kept: Path, table: SensitivityTable) -> None:
    """Keep a table for later calls."""
    from bitladder.files.atomic import write_whole

    write_whole(kept, json.dumps(to_json(table)))


def read_table(kept: Path) -> SensitivityTable | None:
    """The table that was kept there; None where there is none, or one that cannot be read: it is made again."""
    try:
        return read_json(SensitivityTable, kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _checked(job: Job, weighed: Weighed, parts: RecipeTexts, storage: Storage) -> SensitivityTable:
    """Measure a few whole recipes, made on the fly, and scale the predictions to them.

    The walk may be in bfloat16: that adds 4% to a loss of 0.03 and less to larger ones (docs/log.md), and what is told
    of a file is measured in f32."""
    from bitladder.plan.recipe import fitted, predicted
    from bitladder.stages.fidelity import walk
    from bitladder.walk.products import wants_half_products

    table, source, threads, device = weighed.table, job.source, job.threads, job.device
    recipes = storage.spread(table)
    candidates = storage.candidates(recipes, weighed)
    windows = parts.held_out
    with forecast(walking_need(source, windows, [recipe.label for recipe in recipes]), job.journal):
        half = wants_half_products(None, device)
        found = walk(source, candidates, windows, progress=job.progress, threads=threads, device=device, half=half)
    sums = [predicted(table, recipe.qtypes, feedback=False) for recipe in recipes]
    return fitted(table, [(s, one.kl_mean) for s, one in zip(sums, found, strict=True)])
