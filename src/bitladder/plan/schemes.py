"""Which scheme each linear layer of a checkpoint gets: the least predicted loss within a budget, or the fewest bytes
for a loss.

As recipes of GGUF files (``plan/recipe.py``), by the same table and integer program, with two differences. Engines
multiply some matrices as one (q, k and v; gate and up; the experts of a layer), which must have one scheme: they are
one group of the program. And embedding, head and norms stay 16 bits wide, so a budget in bits per weight counts the
linear layers alone; one in bytes counts every tensor.

How fast a server runs a scheme nobody here can know, but whoever runs it can time a checkpoint of that scheme alone. A
mix takes as long for a token as its layers do, each its share (its weights that a token meets, of all) of what such a
checkpoint takes; what is not spent in linear layers is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from bitladder.describe.model import Model
from bitladder.errors import NothingFits, UsageError
from bitladder.levels.checkpoints.mixed import FLOAT, Mixed, mixed_level
from bitladder.plan.allocate import TensorGroup, TypeChoice, fewest, least_loss
from bitladder.plan.recipe import Limits, allowed_loss
from bitladder.records.recipe import Recipe, SensitivityTable, TensorLoss
from bitladder.units import human_bytes

Groups = Sequence[Sequence[str]]
"""Names of tensors that must have one scheme, group by group."""


def choose_schemes(table: SensitivityTable, groups: Groups, model: Model, wish: Limits) -> Recipe:
    """The best schemes that a wish allows.

    Args:
        table: predicted losses of the linear layers, by scheme.
        groups: their tensors; those that nothing is predicted of stay float.
        model: its tensors.
        wish: a limit of bits per weight of the linear layers, of bytes of all tensors, or of loss; with
            ``least_decode`` schemes that ``speeds`` does not name are not chosen.

    Returns:
        A scheme for every tensor, ``FLOAT`` for what keeps 16 bits; ``bytes`` of all of them, exactly as they will be
        written, ``bpw`` of the linear layers.

    Raises:
        NothingFits: a limit cannot be met; the message has the least that can.
        UsageError: no limit, or one above what 16 bits take.
    """
    elements = {tensor.name: tensor.elements for tensor in model.tensors}
    open_groups = [
        _group(names, table, elements, wish, share) for names, share in zip(groups, _shares(groups, model), strict=True)
    ]
    in_time = {"seconds": _seconds(open_groups, wish)} if wish.least_decode else {}
    linear = sum(elements[name] for names in groups for name in names)
    fixed = Mixed.float_bytes * (sum(elements.values()) - linear)
    if wish.kl is not None:
        found = fewest("bytes", open_groups, in_time, loss=allowed_loss(open_groups, table, wish.kl, wish))
    else:
        budget = _budget(wish, linear, fixed, model.header_bytes)
        _check(open_groups, wish, budget, linear=linear, beside=fixed + model.header_bytes)
        found = least_loss(open_groups, {"bytes": budget, **in_time})
    schemes = {name: found.qtypes[own.name] for own, names in zip(open_groups, groups, strict=True) for name in names}
    size = int(found.costs["bytes"])
    bits = 8 * size / max(1, linear)
    vectors = {tensor.name for tensor in model.tensors if len(tensor.shape) < 2}
    others = {name: "F32" if name in vectors else FLOAT for name in elements}
    return Recipe(
        label=mixed_level(Mixed(round(bits, 2))).name,
        architecture=model.dims.architecture,
        qtypes=others | schemes,
        bytes=size + fixed,
        bpw=bits,
        expected_kl=table.expected(found.loss, feedback=wish.feedback),
        limits=wish.words(),
        feedback=wish.feedback,
    )


def least_bits(table: SensitivityTable, groups: Groups, model: Model) -> float:
    """Bits per weight of the linear layers in their smallest schemes."""
    elements = {tensor.name: tensor.elements for tensor in model.tensors}
    least = sum(_least(_group(names, table, elements, Limits(), 0.0)) for names in groups)
    return 8 * least / max(1, sum(elements[name] for names in groups for name in names))


def _group(
    names: Sequence[str], table: SensitivityTable, elements: dict[str, int], wish: Limits, share: float
) -> TensorGroup:
    """Schemes that all of a group's tensors may have, and floats; ``share``: of the time that a token takes."""
    own = [{one.qtype: one for one in table.losses.get(name, ())} for name in names]
    common = [scheme for scheme in own[0] if all(scheme in losses for losses in own)]
    choices = [_choice(scheme, [losses[scheme] for losses in own], wish) for scheme in common]
    whole = float(Mixed.float_bytes * sum(elements[name] for name in names))
    choices.append(TypeChoice(FLOAT, 0.0, {"bytes": whole}))
    if wish.least_decode:
        choices = [_timed(one, share / wish.speeds[one.qtype]) for one in choices if one.qtype in wish.speeds]
    return TensorGroup(names[0], tuple(choices))


def _choice(scheme: str, losses: Sequence[TensorLoss], wish: Limits) -> TypeChoice:
    lost = sum(one.fed if wish.feedback else one.plain for one in losses)
    return TypeChoice(scheme, lost, {"bytes": float(sum(one.bytes for one in losses))})


def _timed(choice: TypeChoice, seconds: float) -> TypeChoice:
    return TypeChoice(choice.qtype, choice.loss, {**choice.costs, "seconds": seconds})


def _shares(groups: Groups, model: Model) -> list[float]:
    """Of the weights that a token meets in all groups, those in each."""
    dims, tensors = model.dims, {tensor.name: tensor for tensor in model.tensors}
    active = dims.n_expert_used / dims.n_expert if dims.n_expert else 1.0
    met = [
        sum(tensors[name].elements * (active if len(tensors[name].shape) > 2 else 1.0) for name in names)
        for names in groups
    ]
    return [one / max(1.0, sum(met)) for one in met]


def _seconds(groups: Sequence[TensorGroup], wish: Limits) -> float:
    """The time that a token may take; raises UsageError or NothingFits where no mix can be that fast."""
    asked = wish.least_decode or 0.0
    bare = next((group.name for group in groups if not group.choices), None)
    if bare is not None:
        raise UsageError(
            f"No scheme that {bare} can have is among those whose speed is known ({', '.join(wish.speeds) or 'none'}).",
            do="Time a checkpoint of such a scheme and name it, as in --schemes W4A16-g32=52.",
        )
    least = sum(min(choice.costs["seconds"] for choice in group.choices) for group in groups)
    if least > 1 / asked:
        raise NothingFits(
            f"{asked:g} tokens/s are asked for; all layers in the fastest of these schemes give {1 / least:.4g}.",
            means="No mix of them is that fast on the server that was timed.",
            do=f"Ask for at most {1 / least:.4g}, or name a faster scheme.",
        )
    return 1 / asked


def _least(group: TensorGroup) -> float:
    return min(choice.costs["bytes"] for choice in group.choices)


def _budget(wish: Limits, linear: int, fixed: int, header: int) -> int:
    """Bytes for the linear layers."""
    if wish.bpw is not None:
        return int(wish.bpw * linear / 8)
    if wish.bytes is None:
        raise UsageError("A recipe needs a limit.", do="Give one of --budget, --bpw or --kl.")
    return wish.bytes - fixed - header


def _check(groups: Sequence[TensorGroup], wish: Limits, budget: int, *, linear: int, beside: int) -> None:
    """Refuse what cannot be met, or is met by the source, in the words of whoever asked."""
    least, most = int(sum(_least(group) for group in groups)), Mixed.float_bytes * linear
    in_bits = wish.bpw is not None
    if least > budget:
        asked = f"{wish.bpw:g} bits per weight" if in_bits else human_bytes(wish.bytes or 0)
        needed = f"{8 * least / max(1, linear):.2f} bits" if in_bits else human_bytes(least + beside)
        raise NothingFits(
            f"{asked} are allowed; in their smallest schemes the linear layers take {human_bytes(least)}, and what "
            f"stays 16 bits wide (embedding, head, norms) {human_bytes(beside)}.",
            means="No mix of schemes is that small.",
            do=f"Give at least {needed}, or take a smaller model"
            + ("." if in_bits else "; a GGUF recipe can make embedding and head smaller, too."),
        )
    if budget > most:
        raise UsageError(
            f"The budget is more than the {human_bytes(most)} that the linear layers have with 16 bits.",
            means="Nothing can be gained: the source loses nothing.",
            do="Use the source, or give a smaller budget.",
        )
