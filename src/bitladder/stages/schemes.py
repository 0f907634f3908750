"""A scheme for every linear layer of a checkpoint: what there is to choose from, what must be alike, the choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitladder.errors import UsageError
from bitladder.formats.disk_names import disk_linears, quantized_parameters
from bitladder.formats.roles import Parameter, layer_tensor
from bitladder.formats.tensors import TensorInfo
from bitladder.kernels.threads import one_thread
from bitladder.levels import CheckpointLevel
from bitladder.levels.checkpoints import CheckpointFormat, Mixed, parse_checkpoint
from bitladder.levels.checkpoints.mixed import FLOAT, SCHEMES, SchemeGroup, mixed_level
from bitladder.levels.methods import GPTQ
from bitladder.plan.recipe import Limits
from bitladder.plan.schemes import choose_schemes, least_bits
from bitladder.records.recipe import SensitivityTable, TensorLoss
from bitladder.stages.fidelity import Candidate
from bitladder.stages.job import Build, Job
from bitladder.stages.sensitivity import FEW_ROWS, SeenInput, Weighed
from bitladder.stages.weighing import parts_of_text, sizes_between, weighed_tensors
from bitladder.walk.opened import layered
from bitladder.walk.scheme_weights import SchemeWeights, rounded
from bitladder.walk.weights import FileWeights

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from bitladder.files.gguf import GgufFile
    from bitladder.records.recipe import Recipe
    from bitladder.walk.layers import LayeredModel

    F32 = NDArray[np.float32]


_PREDICTED = "written"
"""How losses are predicted; tables of another way are made again."""


@dataclass(frozen=True)
class Linears:
    """The linear layers of a model, as engines multiply them and as checkpoints name them."""

    groups: tuple[tuple[str, ...], ...]
    """GGUF tensors that must have one scheme."""
    targets: Mapping[str, tuple[str, ...]]
    """Of a GGUF tensor: how a configuration names it, whole names or, of experts, a pattern."""


def linears_of(model: LayeredModel) -> Linears:
    """Groups by what reads one input; all experts of a layer are one."""
    present = {tensor.name for tensor in model.model.tensors}
    groups: list[tuple[str, ...]] = []
    targets: dict[str, tuple[str, ...]] = {}
    for layer in range(model.n_layer):
        kind = model.kind(layer)
        experts: dict[str, None] = {}
        for shared in kind.inputs:
            own: dict[str, None] = {}
            for parameter in quantized_parameters(model.family, shared):
                names = [layer_tensor(layer, role) for role in parameter.roles]
                if parameter in kind.parameters and set(names) <= present:
                    (experts if parameter.path in model.family.experts else own).update(dict.fromkeys(names))
                    targets |= dict.fromkeys(names, tuple(_targets(model, layer, parameter)))
            groups += [tuple(own)] if own else []
        groups += [tuple(experts)] if experts else []
    return Linears(tuple(groups), targets)


def _targets(model: LayeredModel, layer: int, parameter: Parameter) -> Iterator[str]:
    prefix = f"{model.family.disk.layers}{layer}."
    if parameter.path not in model.family.experts:
        yield from (prefix + linear.name for linear in disk_linears(model.family, parameter.path, None))
        return
    for name in model.family.experts[parameter.path]:
        before, after = (part.replace(".", r"\.") for part in (prefix + name).split("{}"))
        yield rf"re:^{before}\d+{after}$"


class SchemeChoices:
    """``Choices`` of linear layers: those of some schemes that all matrices of a group can be stored as."""

    holds_out = True
    by_head = False

    def __init__(self, tensors: Sequence[TensorInfo], linears: Linears, schemes: Sequence[str]) -> None:
        self._forms = {scheme: form_of(scheme) for scheme in schemes}
        self.key = ",".join((_PREDICTED, *schemes))
        shapes = {tensor.name: (tensor.shape[-2], tensor.shape[-1]) for tensor in tensors if len(tensor.shape) > 1}
        self._offered: dict[str, tuple[str, ...]] = {}
        for names in linears.groups:
            own = {name: shapes[name] for name in names}
            offered = tuple(scheme for scheme, form in self._forms.items() if _fits(scheme, form, own))
            self._offered |= dict.fromkeys(names, offered)

    def of(self, info: TensorInfo) -> tuple[str, ...]:
        """As ``Choices``."""
        return self._offered.get(info.name, ())

    def nbytes(self, info: TensorInfo, choice: str) -> int:
        """As ``Choices``."""
        *stacked, outputs, inputs = info.shape
        return int(np.prod(stacked, dtype=int)) * self._forms[choice].stored_bytes(outputs, inputs)

    def rows(self, choice: str) -> int:  # noqa: ARG002 - the same for all
        """As ``Choices``."""
        return FEW_ROWS

    def errors(self, weights: F32, choice: str, importance: F32, threads: int) -> NDArray[np.float64]:  # noqa: ARG002
        """As ``Choices``."""
        return np.asarray((rounded(self._forms[choice], weights, importance) - weights).astype(np.float64) ** 2)

    def fed(
        self,
        weights: F32,
        choice: str,
        errors: NDArray[np.float64],  # noqa: ARG002
        seen: SeenInput,
    ) -> NDArray[np.float64]:
        """As ``Choices``: rows are written as the checkpoint's will be, on scales searched as there."""
        with one_thread():
            wrong = GPTQ.apply(self._forms[choice], seen.prepared, weights).decoded - weights
        return seen.costs(wrong)


def form_of(scheme: str) -> CheckpointFormat:
    """The format of a scheme, which every linear layer of its own level has."""
    form = parse_checkpoint(scheme).format
    assert isinstance(form, CheckpointFormat)  # of the names in ``SCHEMES``
    return form


def _fits(scheme: str, form: CheckpointFormat, shapes: Mapping[str, tuple[int, int]]) -> bool:
    try:
        form.check_shapes(scheme, shapes)
    except UsageError:
        return False
    return True


class SchemeStorage:
    """``Storage`` in a mixed checkpoint."""

    def __init__(
        self,
        source: GgufFile,
        schemes: Sequence[str] = SCHEMES,
        *,
        checkpoint: Path | None = None,
        threads: int = 1,
    ) -> None:
        """``checkpoint``: the folder that the source was converted from; by default the one that Bitladder converted.

        Raises:
            UnknownArchitecture: nothing is known of the model's layers.
            UsageError: one of ``schemes`` is none that recipes choose from, or none fits a layer.
        """
        self._source, self._weights = source, FileWeights(source, threads=threads)
        model = layered(source, self._weights, checkpoint=checkpoint)
        known = known_schemes(schemes)
        model.check_disk_names(form for scheme in known for form in parse_checkpoint(scheme).format.forms)
        self.linears = linears_of(model)
        self.choices = SchemeChoices(source.model.tensors, self.linears, known)
        self._check(schemes)

    def _check(self, schemes: Sequence[str]) -> None:
        tensors = {tensor.name: tensor for tensor in self._source.model.tensors}
        bare = next((names[0] for names in self.linears.groups if not self.choices.of(tensors[names[0]])), None)
        if bare is not None:
            every = SchemeChoices(self._source.model.tensors, self.linears, SCHEMES).of(tensors[bare])
            rows, columns = tensors[bare].shape[-2:]
            raise UsageError(
                f"None of {', '.join(schemes)} can store {bare}, which is {rows} x {columns}.",
                means="Groups must divide every row, and codes fill whole words.",
                do=f"Schemes that can: {', '.join(every)}.",
            )

    def require(self, wish: Limits) -> None:
        """Refuse a wish that no losses would make possible, before they are predicted, which takes long.

        Raises:
            NothingFits, UsageError: as ``choose_schemes``.
        """
        model = self._source.model
        losses = {
            info.name: tuple(
                TensorLoss(scheme, self.choices.nbytes(info, scheme), 0.0, 0.0) for scheme in self.choices.of(info)
            )
            for info in model.tensors
        }
        choose_schemes(SensitivityTable("", "", 0, losses), self.linears.groups, model, wish)

    def spread(self, table: SensitivityTable) -> list[Recipe]:
        """As ``Storage``."""
        model, groups = self._source.model, self.linears.groups
        least, most = least_bits(table, groups, model), 16.0
        sizes = [bits for bits in sizes_between(least, most) if least <= bits <= most]
        return [choose_schemes(table, groups, model, Limits(bpw=bits, feedback=False)) for bits in sizes]

    def candidates(self, recipes: Sequence[Recipe], weighed: Weighed) -> list[Candidate]:
        """As ``Storage``."""
        found = []
        for recipe in recipes:
            forms = {name: form_of(recipe.qtypes[name]) for name in self.quantized(recipe)}
            found.append(Candidate(recipe.label, SchemeWeights(self._weights, forms, weighed.importance)))
        return found

    def quantized(self, recipe: Recipe) -> list[str]:
        """Tensors that a recipe does not leave float."""
        names = [name for group in self.linears.groups for name in group]
        return [name for name in names if recipe.qtypes[name] != FLOAT]

    def level(self, recipe: Recipe, bits: float) -> CheckpointLevel:
        """The level of a recipe, under the name that so many bits have."""
        by_scheme: dict[str, dict[str, None]] = {}
        for names in self.linears.groups:
            for name in names:
                by_scheme.setdefault(recipe.qtypes[name], {}).update(dict.fromkeys(self.linears.targets[name]))
        floats = tuple(by_scheme.pop(FLOAT, {}))
        groups = tuple(SchemeGroup(form_of(scheme), tuple(by_scheme[scheme])) for scheme in sorted(by_scheme))
        return mixed_level(Mixed(bits, groups, floats))


def known_schemes(names: Sequence[str]) -> tuple[str, ...]:
    """Schemes by their names in any case, each once; raises UsageError for one that recipes do not choose from."""
    spelled = {scheme.upper(): scheme for scheme in SCHEMES}
    for name in names:
        if name.upper() not in spelled:
            raise UsageError(
                f"'{name}' is no scheme that recipes choose from.", do=f"Choose among {', '.join(SCHEMES)}."
            )
    return tuple(dict.fromkeys(spelled[name.upper()] for name in names))


def with_schemes(job: Job, level: CheckpointLevel, build: Build) -> CheckpointLevel:
    """A level as it can be made: ``CT-bpw4.60`` with the schemes that lose least, any other as it is.

    Raises:
        NothingFits, UsageError: so few or so many bits cannot be.
        BadInput, BadWeights, UnknownArchitecture: the model cannot be weighed on this text.
    """
    form = level.format
    if not isinstance(form, Mixed) or form.groups:
        return level
    from bitladder.stages.calibration import calibration_texts

    storage = SchemeStorage(job.source, checkpoint=job.found.checkpoint, threads=job.threads)
    storage.require(Limits(bpw=form.bits))
    parts = parts_of_text(job.windows(calibration_texts(job, build.calibration)))
    table, _ = weighed_tensors(job, parts, build.calibration, storage)
    recipe = choose_schemes(table, storage.linears.groups, job.source.model, Limits(bpw=form.bits))
    return storage.level(recipe, form.bits)
