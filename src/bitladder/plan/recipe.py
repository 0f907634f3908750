"""From predicted losses and a wish to a recipe: what a budget, a loss or a speed means for the choice of types."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bitladder.describe.model import Model
from bitladder.describe.rates import PoolRates
from bitladder.errors import NothingFits, UsageError
from bitladder.formats.blocks import QTYPES
from bitladder.formats.recipes import assign, is_quantizable, types_for
from bitladder.formats.roles import EMBEDDING, OUTPUT
from bitladder.formats.tensors import TensorInfo
from bitladder.levels import FeedbackLevel
from bitladder.plan.allocate import Allocation, TensorGroup, TypeChoice, fewest, least_loss
from bitladder.records.recipe import Recipe, SensitivityTable
from bitladder.units import check_above_zero, human_bytes

_LOW_LEVEL = "Q3_K_S"
"""At no more bytes than this level of a model, recipes choose from codebook types, too."""


@dataclass(frozen=True)
class Limits:
    """What a recipe must keep to; raises UsageError for numbers that nothing keeps to.

    Exactly one of ``bytes`` (of the file), ``bpw`` and ``kl`` is set; with ``kl`` the file is as small as that allows,
    else the loss. ``least_decode``: tokens per second, by ``rates``.
    ``aim``: the share of ``kl`` to choose for, where the file must hold it and may lose more than predicted.
    ``vram_bytes``: what the last ``gpu_layers`` layers, and the output matrix, may take there. ``speeds``: tokens per
    second by scheme, of checkpoints that have it for all linear layers; ``least_decode`` of a mix is by these."""

    bytes: int | None = None
    bpw: float | None = None
    kl: float | None = None
    aim: float = 1.0
    least_decode: float | None = None
    rates: PoolRates | None = None
    gpu_layers: int = 0
    vram_bytes: int | None = None
    feedback: bool = True
    speeds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option, value in {"--bpw": self.bpw, "--kl": self.kl, "--tps": self.least_decode}.items():
            check_above_zero(option, value)

    def words(self) -> tuple[str, ...]:
        """The limits as a person would state them."""
        said = [
            f"at most {human_bytes(self.bytes)}" if self.bytes is not None else "",
            f"at most {self.bpw:g} bits per weight" if self.bpw is not None else "",
            f"mean KL of at most {self.kl:g}" if self.kl is not None else "",
            f"at least {self.least_decode:g} tokens/s" if self.least_decode else "",
            f"{self.gpu_layers} layers in {human_bytes(self.vram_bytes)} of VRAM" if self.vram_bytes else "",
        ]
        return tuple(one for one in said if one)


def choose(table: SensitivityTable, model: Model, wish: Limits, *, header_bytes: int = 0) -> Recipe:
    """The best recipe that a wish allows.

    Args:
        table: predicted losses of this model.
        model: its tensors; of those without losses matrices become Q8_0, whose loss hardly counts, others stay as
            they are.
        wish: the limits.
        header_bytes: what the file holds beside tensors, counted against ``wish.bytes``.

    Raises:
        NothingFits: a limit cannot be met; the message has the least that can.
        UsageError: the wish names none of a budget, bits per weight and a loss, or a budget above the source.
    """
    check(model, wish, header_bytes=header_bytes)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    groups = [_group(tensors[name], _losses(table, name, wish), model, wish) for name in table.losses]
    others = [tensor for tensor in model.tensors if tensor.name not in table.losses]
    kept = sum(QTYPES[_unweighed(tensor)].nbytes(tensor.shape) for tensor in others)
    limits = _room(model, wish)
    if wish.kl is not None:
        found = fewest("bytes", groups, limits, loss=allowed_loss(groups, table, wish.kl, wish))
    else:
        limits["bytes"] = _budget(model, wish, header_bytes) - kept
        found = least_loss(groups, limits)
    return _recipe(table, model, wish, found)


def _room(model: Model, wish: Limits) -> dict[str, float]:
    """What the matrices may take of time and VRAM, where that is limited; raises NothingFits where it is nothing."""
    limits: dict[str, float] = {}
    if wish.least_decode and wish.rates:
        fixed = wish.rates.token_s + model.dims.n_layer * wish.rates.layer_s
        limits["seconds"] = 1 / wish.least_decode - fixed
        if limits["seconds"] <= 0:
            raise NothingFits(
                f"--tps {wish.least_decode:g} leaves {1000 / wish.least_decode:.3g} ms a token; "
                f"{1000 * fixed:.3g} ms pass before any weight is read.",
                means="No choice of types is that fast on this machine.",
                do=f"Ask for at most {0.9 / fixed:.0f} tokens/s.",
            )
    if wish.vram_bytes is not None:
        limits["vram"] = wish.vram_bytes
    return limits


def allowed_loss(groups: Sequence[TensorGroup], table: SensitivityTable, kl: float, wish: Limits) -> float:
    """The sum of losses to stay under for a KL divergence."""
    sums = sum(min(choice.loss for choice in group.choices) for group in groups)
    least = table.expected(sums, feedback=wish.feedback)
    if least > kl:
        raise NothingFits(
            f"A mean KL of {kl:g} is asked for; the most precise types are predicted to lose {least:.3g}.",
            means="No recipe of these types comes that close to the source.",
            do="Ask for a larger loss, or take the source itself.",
        )
    return max(table.needed(wish.aim * kl, feedback=wish.feedback), sums)


def _check_room(model: Model, wish: Limits) -> None:
    """Refuse, in its own units, a limit that the cheapest types already pass."""
    limits = _room(model, wish)
    if not limits:
        return
    low = wants_low(model, wish)
    groups = [
        _group(tensor, [(qtype, 0.0) for qtype in types_for(tensor, low=low)], model, wish)
        for tensor in model.tensors
        if is_quantizable(tensor)
    ]
    for name, limit in limits.items():
        least = sum(min(choice.costs[name] for choice in group.choices) for group in groups)
        if least > limit:
            option, allowed, needed = "--vram", human_bytes(int(limit)), human_bytes(int(least))
            means, do = "No choice of types keeps it.", "Put fewer layers on the GPU, or allow more."
            if name == "seconds":
                option, allowed, needed = "--tps", f"{1000 * limit:.3g} ms a token", f"{1000 * least:.3g} ms"
                means, do = "No choice of types is that fast here.", "Ask for fewer tokens/s."
            raise NothingFits(
                f"{option} leaves {allowed} for the matrices; in the types that take least they need {needed}.",
                means=means,
                do=do,
            )


def check(model: Model, wish: Limits, *, header_bytes: int = 0) -> None:
    """Refuse what no table of losses is needed to refuse; arguments and errors as ``choose``."""
    if wish.kl is None:
        _check_budget(model, wish, header_bytes)
    _check_room(model, wish)


def _check_budget(model: Model, wish: Limits, header_bytes: int) -> None:
    budget = _budget(model, wish, header_bytes)
    least, _ = bounds(model, low=True)
    if least > budget:
        raise NothingFits(
            f"The budget leaves {human_bytes(max(0, budget))} for the tensors; in their smallest types they take "
            f"{human_bytes(least)}.",
            means="No recipe is that small.",
            do=f"Give at least {human_bytes(least + header_bytes)} for the whole file, or take a smaller model.",
        )


def evenly(model: Model, bpw: float) -> dict[str, str]:
    """Types for all tensors that take at most so many bits per weight, before anything is known of the tensors: every
    bit is taken to halve a weight's error, whosever it is.

    Raises:
        NothingFits, UsageError: the bits are too few or too many.
    """
    check(model, Limits(bpw=bpw))
    left, low = _budget(model, Limits(bpw=bpw), 0), wants_low(model, Limits(bpw=bpw))
    qtypes = {tensor.name: tensor.qtype for tensor in model.tensors}
    steps = []
    for number, tensor in enumerate(model.tensors):
        ladder = sorted(_sizes(tensor, low=low).items(), key=lambda one: one[1])
        qtypes[tensor.name] = ladder[0][0]
        left -= ladder[0][1]
        for (_, below), (qtype, size) in itertools.pairwise(ladder):
            steps.append((8 * below / tensor.elements, number, qtype, size - below))
    full: set[int] = set()
    for _, number, qtype, more in sorted(steps):  # the least precise grow first
        if more > left:
            full.add(number)
        if number not in full:
            qtypes[model.tensors[number].name] = qtype
            left -= more
    return qtypes


def wants_low(model: Model, wish: Limits) -> bool:
    """Whether a file is to be so small that codebook types are worth their slower decoding."""
    if wish.kl is not None:
        return False
    limit, _ = recipe_bytes(model, assign(_LOW_LEVEL, model.tensors, model.dims))
    return _budget(model, wish, 0) <= limit


def bounds(model: Model, *, low: bool = False) -> tuple[int, int]:
    """Bytes of all tensors in their smallest types (``low``: codebooks among them), and as the source has them."""
    least = sum(min(_sizes(tensor, low=low).values()) for tensor in model.tensors)
    return least, sum(tensor.nbytes for tensor in model.tensors)


def _sizes(tensor: TensorInfo, *, low: bool) -> dict[str, int]:
    """Bytes of a tensor in each type that it may get and that is smaller than its own, and in its own."""
    offered = types_for(tensor, low=low) if is_quantizable(tensor) else ()
    sizes = {qtype: QTYPES[qtype].nbytes(tensor.shape) for qtype in offered}
    return {**{qtype: size for qtype, size in sizes.items() if size < tensor.nbytes}, tensor.qtype: tensor.nbytes}


def _budget(model: Model, wish: Limits, header_bytes: int) -> int:
    """Bytes for all tensors."""
    if wish.bytes is None and wish.bpw is None:
        raise UsageError("A recipe needs a limit.", do="Give one of --budget, --bpw, --kl or --fits.")
    source = sum(tensor.nbytes for tensor in model.tensors)
    weights = sum(tensor.elements for tensor in model.tensors)
    budget = wish.bytes - header_bytes if wish.bytes is not None else int((wish.bpw or 0.0) * weights / 8)
    if budget > source:
        asked = human_bytes(wish.bytes) if wish.bytes is not None else f"{wish.bpw:g} bits per weight"
        raise UsageError(
            f"The budget is {asked}, the source itself has {human_bytes(source)}, {8 * source / weights:.2f} bits.",
            means="Nothing can be gained: the source loses nothing.",
            do="Use the source, or give a smaller budget.",
        )
    return budget


def _losses(table: SensitivityTable, name: str, wish: Limits) -> list[tuple[str, float]]:
    """Types that a tensor was weighed in, with what each is predicted to lose."""
    return [(one.qtype, one.fed if wish.feedback else one.plain) for one in table.losses[name]]


def _group(tensor: TensorInfo, losses: Sequence[tuple[str, float]], model: Model, wish: Limits) -> TensorGroup:
    smaller = [(qtype, loss) for qtype, loss in losses if QTYPES[qtype].nbytes(tensor.shape) < tensor.nbytes]
    offered = [*smaller, (tensor.qtype, 0.0)]
    return TensorGroup(tensor.name, tuple(TypeChoice(q, loss, _costs(tensor, q, model, wish)) for q, loss in offered))


def _unweighed(tensor: TensorInfo) -> str:
    """The type of a tensor that nothing is known of: what the walk does not run (heads that predict several tokens), or
    does not see the inputs of."""
    if not is_quantizable(tensor) or "Q8_0" not in types_for(tensor):
        return tensor.qtype
    return "Q8_0" if QTYPES["Q8_0"].nbytes(tensor.shape) < tensor.nbytes else tensor.qtype


def _costs(tensor: TensorInfo, qtype: str, model: Model, wish: Limits) -> dict[str, float]:
    size = QTYPES[qtype].nbytes(tensor.shape)
    costs = {"bytes": float(size)}
    if wish.rates is not None:
        costs["seconds"] = _token_seconds(tensor, qtype, model, wish.rates)
    if wish.vram_bytes is not None:
        costs["vram"] = float(size) if _on_gpu(tensor.name, model, wish.gpu_layers) else 0.0
    return costs


def _token_seconds(tensor: TensorInfo, qtype: str, model: Model, rates: PoolRates) -> float:
    """What reading a tensor costs each token: nothing for a table that is only looked up, of experts the active."""
    if tensor.name == EMBEDDING and not _is_tied(model):
        return 0.0
    dims = model.dims
    stacked = len(tensor.shape) > 2 and dims.n_expert
    active = dims.n_expert_used / dims.n_expert if stacked else 1.0
    rows = math.prod(tensor.shape[:-1])
    return active * (QTYPES[qtype].nbytes(tensor.shape) / rates.stream_of(qtype) + rows * rates.row_of(qtype))


def _on_gpu(name: str, model: Model, gpu_layers: int) -> bool:
    """llama.cpp puts the last layers on the GPU, and the output matrix once a layer is there."""
    if name.startswith("blk."):
        return int(name.split(".", 2)[1]) >= model.dims.n_layer - gpu_layers
    return gpu_layers > 0 and name == (EMBEDDING if _is_tied(model) else OUTPUT)


def _is_tied(model: Model) -> bool:
    """Whether the embedding doubles as output matrix."""
    return all(tensor.name != OUTPUT for tensor in model.tensors)


def _recipe(table: SensitivityTable, model: Model, wish: Limits, found: Allocation) -> Recipe:
    qtypes = {tensor.name: found.qtypes.get(tensor.name) or _unweighed(tensor) for tensor in model.tensors}
    size, bpw = recipe_bytes(model, qtypes)
    return Recipe(
        label=FeedbackLevel(bpw=round(bpw, 2)).name,
        architecture=model.dims.architecture,
        qtypes=qtypes,
        bytes=size,
        bpw=bpw,
        expected_kl=table.expected(found.loss, feedback=wish.feedback),
        limits=wish.words(),
        feedback=wish.feedback,
    )


def recipe_bytes(model: Model, qtypes: Mapping[str, str]) -> tuple[int, float]:
    """Bytes of all tensors in these types, and bits per weight."""
    size = sum(QTYPES[qtypes.get(tensor.name, tensor.qtype)].nbytes(tensor.shape) for tensor in model.tensors)
    return size, 8 * size / max(1, sum(tensor.elements for tensor in model.tensors))


def predicted(table: SensitivityTable, qtypes: Mapping[str, str], *, feedback: bool) -> float:
    """The sum of predicted losses of any recipe; a tensor in a type that was not tried counts as lossless."""
    total = 0.0
    for name, losses in table.losses.items():
        for one in losses:
            if one.qtype == qtypes.get(name):
                total += one.fed if feedback else one.plain
    return total


def fitted(table: SensitivityTable, checked: Sequence[tuple[float, float]]) -> SensitivityTable:
    """The table with its predictions scaled to measured recipes: (sum of plain losses, measured mean KL) of each.

    A straight line in logarithms: second-order sums grow faster than the divergence itself, which saturates.
    """
    pairs = np.array([(s, kl) for s, kl in checked if s > 0 and kl > 0])
    if len(pairs) == 0:
        return table
    x, y = np.log(pairs[:, 0]), np.log(pairs[:, 1])
    if len(pairs) == 1:
        power, scale = 1.0, float(np.exp(y[0] - x[0]))
        error = float("nan")
    else:
        power = min(max(float(np.polyfit(x, y, 1)[0]), 0.3), 1.5)
        scale = float(np.exp(np.mean(y - power * x)))
        rest = y - power * x - math.log(scale)
        error = float(np.exp(np.sqrt(np.mean(rest**2))) - 1)
    return replace(
        table, checked=tuple((float(s), float(kl)) for s, kl in pairs), scale=scale, power=power, error=error
    )


def reapplied(recipe: Recipe, model: Model) -> Recipe:
    """A recipe for another checkpoint of the same family: the same type for the same tensor.

    Raises:
        UsageError: the models' tensors differ, or a row does not divide into its type's blocks.
    """
    tensors = {tensor.name: tensor for tensor in model.tensors}
    missing = sorted(set(recipe.qtypes) ^ set(tensors))
    if model.dims.architecture != recipe.architecture or missing:
        found = f"the first tensor that only one of them has is '{missing[0]}'" if missing else "its layers are others"
        raise UsageError(
            f"The recipe is for a '{recipe.architecture}' of {len(recipe.qtypes)} tensors, "
            f"this model is a '{model.dims.architecture}' of {len(tensors)}; {found}.",
            means="Types are given tensor by tensor; they carry over between checkpoints of one size only.",
            do="Make a recipe for this model: bitladder recipe MODEL --bpw ...",
        )
    for name, qtype in recipe.qtypes.items():
        if tensors[name].shape and tensors[name].shape[-1] % QTYPES[qtype].block_size:
            raise UsageError(
                f"'{name}' has rows of {tensors[name].shape[-1]} weights; {qtype} stores blocks of "
                f"{QTYPES[qtype].block_size}.",
                do="Make a recipe for this model: bitladder recipe MODEL --bpw ...",
            )
    size, bpw = recipe_bytes(model, recipe.qtypes)
    return Recipe(recipe.label, recipe.architecture, recipe.qtypes, size, bpw, None, recipe.limits, recipe.feedback)
