"""How Hugging Face checkpoints name a decoder layer's tensors on disk, where that differs from transformers'
modules.

Dense families: ``model.layers.N.`` and the module's path. Mixtures: transformers fuses experts into stacks
(``mlp.experts.gate_up_proj`` [experts, 2 x width, inputs]); checkpoints hold them one by one, under names that the
family's row has.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitladder.formats.families.family import Layers
from bitladder.formats.roles import Parameter, SharedInput

LAYERS = "model.layers."
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class DiskLinear:
    """One linear layer as a checkpoint names it, without ``.weight``: part ``part`` of ``parts`` equal runs
    of rows."""

    name: str
    part: int = 0
    parts: int = 1

    def rows(self, count: int) -> slice:
        """Its rows, of so many in all of its parts."""
        share = count // self.parts
        return slice(self.part * share, (self.part + 1) * share)

    @property
    def tensor(self) -> str:
        """What its floats are called."""
        return self.name if self.name.endswith(".bias") else f"{self.name}.weight"


def disk_name(family: Layers, path: str) -> str:
    """A parameter's name on disk, after the layer's prefix; for parameters that are not stacked experts."""
    return family.renamed.get(path, path)


def disk_linears(family: Layers, path: str, expert: int | None) -> tuple[DiskLinear, ...]:
    """The linear layers that a parameter (of one expert) is on disk."""
    if expert is None:
        return (DiskLinear(disk_name(family, path).removesuffix(".weight")),)
    names = family.experts[path]
    return tuple(DiskLinear(name.format(expert), part, len(names)) for part, name in enumerate(names))


def quantized_parameters(family: Layers, shared: SharedInput) -> tuple[Parameter, ...]:
    """The weight matrices that read a shared input and are quantized: all but routers, whose few weights
    decide much."""
    return tuple(
        parameter
        for parameter in family.parameters
        if parameter.path.removesuffix(".weight") not in family.routers and set(parameter.roles) & set(shared.roles)
    )


def absorbing_parameters(family: Layers, shared: SharedInput) -> tuple[Parameter, ...]:
    """The parameters (weight, and bias where a linear layer has one) that can take up a scale on a shared
    input.

    None for stacked experts: a scale of each expert's own would have to go into rows that other experts
    share.
    """
    if shared.absorbs is None or shared.kind != "linear":
        return ()
    stem = shared.absorbs.removesuffix(".weight")
    return tuple(p for p in family.parameters if p.roles in ((f"{stem}.weight",), (f"{stem}.bias",)))
