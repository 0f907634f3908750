"""llama.cpp's recipes (its ``file_type``s): which qtype each tensor of a level gets.

A recipe is a default qtype and, per role of a tensor, a list of rules; the first whose condition holds wins,
and no rule means the default. Around the rules stand the cases that all recipes share: what is never
quantized, the output and embedding tables, models of eight experts, 80-layer models, and what happens to rows
that do not divide into blocks.

Source: the behaviour of llama.cpp's llama-quantize (src/llama-quant.cpp, build 11434), checked tensor by
tensor against what it does with eight model shapes at twelve levels (tests/fixtures/llama-recipes.json.gz).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bitladder.errors import UnknownLevel
from bitladder.formats.blocks import QTYPES, TRAINED
from bitladder.formats.families import family_of
from bitladder.formats.parts import nextn_blocks
from bitladder.formats.tensors import TensorInfo


class RecipeDims(Protocol):
    """What recipes ask of a model."""

    @property
    def architecture(self) -> str: ...  # noqa: D102
    @property
    def n_layer(self) -> int: ...  # noqa: D102
    @property
    def n_gqa(self) -> int: ...  # noqa: D102
    @property
    def n_expert(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands: the ``index``-th of ``total`` of its role, in which model."""

    index: int
    total: int
    dims: RecipeDims
    has_importance: bool

    @property
    def light_down(self) -> bool:
        return family_of(self.dims.architecture).mix.light_down


_Condition = Callable[[_Place], bool]
_Rule = tuple[_Condition, str]


def _always(place: _Place) -> bool:  # noqa: ARG001
    return True


def _sensitive(place: _Place) -> bool:
    """The first and last eighth of the layers, and every third between."""
    n = place.total
    return place.index < n // 8 or place.index >= 7 * n // 8 or (place.index - n // 8) % 3 == 2


def _first(share: int) -> _Condition:
    """The first 1/``share`` of the layers."""
    return lambda place: place.index < place.total // share


def _before(count: int) -> _Condition:
    """The first ``count`` tensors of the role."""
    return lambda place: place.index < count


def _grouped(place: _Place) -> bool:
    """At least four query heads share a key/value head, so attn_v is small."""
    return place.dims.n_gqa >= 4


def _light_down(place: _Place) -> bool:
    return place.light_down


def _usual(condition: _Condition = _always) -> _Condition:
    return lambda place: not place.light_down and condition(place)


def _light_down_and(condition: _Condition) -> _Condition:
    return lambda place: place.light_down and condition(place)


def _no_importance(condition: _Condition) -> _Condition:
    return lambda place: not place.has_importance and condition(place)


def _with_importance(condition: _Condition) -> _Condition:
    return lambda place: place.has_importance and condition(place)


def _shared_or_experts(place: _Place) -> bool:
    """attn_v is small beside the rest: shared by four heads, or in a mixture."""
    return _grouped(place) or place.dims.n_expert >= 4


def _experts_and(condition: _Condition) -> _Condition:
    return lambda place: place.dims.n_expert == 8 and condition(place)


def _middle(place: _Place) -> bool:
    """All but the first and last eighth of the layers."""
    return place.total // 8 <= place.index < 7 * place.total // 8


def _few_experts(place: _Place) -> bool:
    return place.dims.n_expert != 8


def _dense(place: _Place) -> bool:
    return not place.light_down and place.dims.n_expert != 8


@dataclass(frozen=True)
class FileRecipe:
    """One ``file_type``: its number in files, the qtype in its name, and rules by role."""

    level: str
    file_type: int
    qtype: str
    rules: Mapping[str, tuple[_Rule, ...]] = field(default_factory=dict)
    attn_output_of_8_experts: bool = False
    """Whether attn_output gets Q5_K in a model of eight experts."""
    beside_experts: str = ""
    """What all but stacked experts get instead; empty where the recipe is for every matrix."""
    output: str = "Q6_K"
    """What the output matrix gets, or an embedding that doubles as one."""
    embedding: str = ""
    """What an embedding gets that is nothing else; ``qtype`` where empty."""
    plain_exceptions: bool = True
    """Whether the cases of eight experts and of 80 layers are those that most recipes share."""


def _under_three_bits(
    level: str, file_type: int, qtype: str, *, better: str, embedding: str, attn_output: str = ""
) -> FileRecipe:
    """One of llama.cpp's six smallest mixes, which have exceptions of their own: ``better`` for what is delicate."""
    outputs: tuple[_Rule, ...] = ((_experts_and(_always), "Q5_K"),)
    if attn_output:
        outputs += ((_few_experts, attn_output),)
    rules = {
        "attn_v": ((_shared_or_experts, "Q4_K"), (_always, better)),
        "attn_k": ((_experts_and(_always), "Q4_K"),),
        "ffn_down": ((_first(8), better),),
        "attn_output": outputs,
    }
    return FileRecipe(level, file_type, qtype, rules, output="Q5_K", embedding=embedding, plain_exceptions=False)


_RECIPES = (
    FileRecipe("F32", 0, "F32"),
    FileRecipe("BF16", 32, "BF16"),
    FileRecipe("F16", 1, "F16"),
    FileRecipe("Q8_0", 7, "Q8_0"),
    FileRecipe("Q6_K", 18, "Q6_K"),
    FileRecipe("Q5_1", 9, "Q5_1"),
    FileRecipe("Q5_K_M", 17, "Q5_K", {"attn_v": ((_sensitive, "Q6_K"),), "ffn_down": ((_sensitive, "Q6_K"),)}),
    FileRecipe("Q5_K_S", 16, "Q5_K"),
    FileRecipe("Q5_0", 8, "Q5_0", {"ffn_down": ((_with_importance(_first(8)), "Q5_1"),)}),
    FileRecipe("MXFP4_MOE", 38, "MXFP4", beside_experts="Q8_0"),
    FileRecipe("Q4_1", 3, "Q4_1"),
    FileRecipe(
        "Q4_K_M",
        15,
        "Q4_K",
        {
            "attn_v": ((_sensitive, "Q6_K"),),
            "ffn_down": (
                (_light_down_and(_first(16)), "Q6_K"),
                (_light_down_and(_sensitive), "Q5_K"),
                (_usual(_sensitive), "Q6_K"),
            ),
        },
        attn_output_of_8_experts=True,
    ),
    FileRecipe(
        "Q4_K_S",
        14,
        "Q4_K",
        {"attn_v": ((_before(4), "Q5_K"),), "ffn_down": ((_usual(_first(8)), "Q5_K"),)},
        attn_output_of_8_experts=True,
    ),
    FileRecipe("Q4_0", 2, "Q4_0", {"ffn_down": ((_with_importance(_first(8)), "Q4_1"),)}),
    FileRecipe(
        "IQ4_NL",
        25,
        "IQ4_NL",
        {"attn_v": ((_grouped, "Q5_K"),), "ffn_down": ((_no_importance(_first(8)), "Q5_K"),)},
        attn_output_of_8_experts=True,
    ),
    FileRecipe(
        "IQ4_XS",
        30,
        "IQ4_XS",
        {"attn_v": ((_grouped, "Q5_K"),), "ffn_down": ((_no_importance(_first(8)), "Q5_K"),)},
        attn_output_of_8_experts=True,
    ),
    FileRecipe(
        "Q3_K_L",
        13,
        "Q3_K",
        {
            "attn_v": ((_always, "Q5_K"),),
            "ffn_down": ((_light_down, "Q4_K"), (_always, "Q5_K")),
            "attn_output": ((_light_down, "Q4_K"), (_dense, "Q5_K")),
        },
    ),
    FileRecipe(
        "Q3_K_M",
        12,
        "Q3_K",
        {
            "attn_v": ((_before(2), "Q5_K"), (_always, "Q4_K")),
            "ffn_down": ((_first(16), "Q5_K"), (_usual(), "Q4_K"), (_sensitive, "Q4_K")),
            "attn_output": ((_dense, "Q4_K"),),
        },
        attn_output_of_8_experts=True,
    ),
    FileRecipe(
        "IQ3_M",
        27,
        "IQ3_S",
        {
            "attn_v": ((_always, "Q4_K"),),
            "ffn_down": ((_first(8), "Q4_K"), (_experts_and(_sensitive), "Q4_K")),
            "attn_output": ((_dense, "Q4_K"),),
        },
        attn_output_of_8_experts=True,
    ),
    FileRecipe("Q3_K_S", 11, "Q3_K", attn_output_of_8_experts=True),
    FileRecipe("IQ3_S", 26, "IQ3_S", {"attn_v": ((_grouped, "Q4_K"),)}, attn_output_of_8_experts=True),
    FileRecipe(
        "IQ3_XS",
        22,
        "IQ3_S",
        {
            "attn_v": ((_grouped, "Q4_K"),),
            "attn_k": ((_always, "IQ3_XXS"),),
            "attn_q": ((_always, "IQ3_XXS"),),
            "ffn_gate": ((_middle, "IQ3_XXS"),),
            "ffn_up": ((_middle, "IQ3_XXS"),),
        },
        attn_output_of_8_experts=True,
    ),
    FileRecipe(
        "IQ3_XXS",
        23,
        "IQ3_XXS",
        {
            "attn_v": ((_grouped, "Q4_K"), (_no_importance(_always), "IQ3_S")),
            "attn_k": ((_always, "IQ2_S"),),
            "attn_q": ((_always, "IQ2_S"),),
            "ffn_down": ((_no_importance(_first(8)), "Q4_K"), (_no_importance(_always), "Q3_K")),
            "attn_output": ((_dense, "IQ3_S"),),
        },
        attn_output_of_8_experts=True,
        output="Q5_K",
        embedding="IQ3_S",
    ),
    FileRecipe(
        "Q2_K",
        10,
        "Q2_K",
        {
            "attn_v": ((_grouped, "Q4_K"), (_always, "Q3_K")),
            "ffn_down": ((_always, "Q3_K"),),
            "attn_output": ((_dense, "Q3_K"),),
        },
        attn_output_of_8_experts=True,
    ),
    FileRecipe("Q2_K_S", 21, "Q2_K", {"attn_v": ((_grouped, "Q4_K"),), "ffn_down": ((_first(8), "Q4_K"),)}),
    _under_three_bits("IQ2_M", 29, "IQ2_S", better="IQ3_S", embedding="IQ3_S", attn_output="IQ3_S"),
    _under_three_bits("IQ2_S", 28, "IQ2_XS", better="IQ3_S", embedding="IQ3_S", attn_output="IQ3_S"),
    _under_three_bits("IQ2_XS", 20, "IQ2_XS", better="Q2_K", embedding="Q2_K"),
    _under_three_bits("IQ2_XXS", 19, "IQ2_XXS", better="Q2_K", embedding="Q2_K"),
    _under_three_bits("IQ1_M", 31, "IQ1_M", better="Q2_K", embedding="Q2_K", attn_output="IQ2_XXS"),
    _under_three_bits("IQ1_S", 24, "IQ1_S", better="Q2_K", embedding="Q2_K", attn_output="IQ2_XXS"),
)

RECIPES: dict[str, FileRecipe] = {recipe.level: recipe for recipe in _RECIPES}
LEVELS: tuple[str, ...] = (
    "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
)  # fmt: skip
"""The ladder that is offered when nobody asks for particular levels, largest first. ``RECIPES`` has more."""
FILE_TYPES: dict[str, int] = {recipe.level: recipe.file_type for recipe in _RECIPES}
LEVEL_BY_FILE_TYPE: dict[int, str] = {recipe.file_type: recipe.level for recipe in _RECIPES}

# Rows that do not divide into the wanted block get the next type with blocks of 32; rows that do not divide
# into those get F16.
FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), "IQ4_NL"),
    "MXFP4": "Q8_0",
}

# The role of a tensor is decided by the first of these found in its name.
_ROLES = (
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "attn_q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
NEXTN_TYPE = "Q8_0"
"""Of the matrices of multi-token-prediction blocks, at every level that quantizes, unless the source has less."""
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")

# Small or delicate matrices that stay in the source's type.
_NEVER = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel",
    "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight",
    "indexer.q_proj.weight", "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight",
    "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight",
    "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd",
    "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook",
    "mm.a.code_embd",
)  # fmt: skip
_NEVER_WHOLE = ("position_embd.weight", "token_types.weight")

_BLOCK = re.compile(r"blk\.(\d+)\.")


def level_named(text: str) -> str:
    """The level that ``text`` names, in any case.

    Raises:
        UnknownLevel: no level has this name; the nearest is suggested.
    """
    name = text.strip().upper()
    if name in RECIPES:
        return name
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.3)
    raise UnknownLevel(
        f"There is no level '{text}'.",
        means=f"Did you mean {near[0]}?" if near else "",
        do=f"Levels are {', '.join(RECIPES)}.",
    )


def nearest_level(qtypes: Mapping[str, str], tensors: Sequence[TensorInfo]) -> str:
    """The named recipe whose main type stores most of the weights of ``qtypes``: what a file's type says then."""
    weights: dict[str, int] = {}
    for tensor in tensors:
        if is_quantizable(tensor):
            qtype = qtypes.get(tensor.name, tensor.qtype)
            weights[qtype] = weights.get(qtype, 0) + tensor.elements
    named = {recipe.qtype: recipe.level for recipe in reversed(_RECIPES)}
    return named[max((qtype for qtype in weights if qtype in named), key=lambda qtype: weights[qtype], default="F16")]


def is_quantizable(tensor: TensorInfo) -> bool:
    """Whether recipes change a tensor's type at all: matrices and stacks of them, but no norms, routers and
    other small ones.
    """
    if sum(1 for size in tensor.shape[:-1] if size != 1) == 0:
        return False
    name = tensor.name
    if tensor.qtype.startswith("I") and not QTYPES[tensor.qtype].is_quantized:
        return False  # a table of integers
    return name.endswith("weight") and name not in _NEVER_WHOLE and not any(part in name for part in _NEVER)


LOW_CHOICES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
"""What recipes of our own choose from as well where bits are few: half of a K-quant's speed on a CPU."""
CHOICES = ("Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K", "Q4_1", "Q5_K", "Q5_0", "Q5_1", "Q6_K", "Q8_0")
"""What recipes of our own choose from."""


def types_for(info: TensorInfo, *, low: bool = False) -> tuple[str, ...]:
    """The types a tensor may get: K-quants where its rows divide into 256, else those with blocks of 32; none instead
    of a type that models are trained in. ``low``: codebooks too, for files of few bits."""
    if info.qtype in TRAINED:
        return ()
    columns = info.shape[-1]
    wide = columns % 256 == 0
    return tuple(
        name
        for name in (LOW_CHOICES if low else ()) + CHOICES
        if columns % QTYPES[name].block_size == 0 and (not wide or QTYPES[name].block_size == 256 or name == "Q8_0")
    )


def without_blocks(tensors: Iterable[TensorInfo], qtype: str) -> list[TensorInfo]:
    """Matrices whose rows do not divide into the blocks of a type, so that another stands in for it."""
    return [one for one in tensors if is_quantizable(one) and one.shape[-1] % QTYPES[qtype].block_size]


def fallback(qtype: str, columns: int) -> str:
    """``qtype``, or what stands in for it when rows of ``columns`` weights do not divide into its blocks."""
    if columns % QTYPES[qtype].block_size == 0:
        return qtype
    stand_in = FALLBACKS.get(qtype, "F16")
    return stand_in if columns % QTYPES[stand_in].block_size == 0 else "F16"


def _role(name: str) -> str:
    return next((role for part, role in _ROLES if part in name), "")


def _layer_order(tensor: TensorInfo) -> tuple[int, str]:
    """llama.cpp counts tensors layer by layer, by name within a layer, whatever their order in the file."""
    block = _BLOCK.match(tensor.name)
    return (int(block[1]) if block else -1, tensor.name)


def _table_type(recipe: FileRecipe, tensor: TensorInfo, dims: RecipeDims) -> str:
    """The output matrix (or the embedding that doubles as one) gets the recipe's type for it, or Q8_0 where that is
    asked or rows do not divide.
    """
    if family_of(dims.architecture).mix.light_down or tensor.shape[-1] % QTYPES[recipe.qtype].block_size:
        return "Q8_0"
    return recipe.qtype if recipe.qtype == "Q8_0" else recipe.output


def _role_type(recipe: FileRecipe, role: str, place: _Place) -> str:
    """What the rules say for a tensor of a role, before fallbacks."""
    dims = place.dims
    qtype = next((qtype for holds, qtype in recipe.rules.get(role, ()) if holds(place)), recipe.qtype)
    if not recipe.plain_exceptions:
        return qtype
    seventy = family_of(dims.architecture).mix.seventy_layers == dims.n_layer and dims.n_gqa > 1
    if role == "attn_v" and seventy and qtype in ("Q3_K", "Q4_K"):
        qtype = "Q5_K"  # eight query heads share attn_v there: more bits cost almost nothing
    if dims.n_expert == 8 and role in ("attn_v", "attn_k"):
        return "Q8_0"  # tiny beside eight experts
    if dims.n_expert == 8 and role == "attn_output" and recipe.attn_output_of_8_experts and not place.light_down:
        return "Q5_K"
    return qtype


def assign(
    level: str,
    tensors: Sequence[TensorInfo],
    dims: RecipeDims,
    *,
    has_importance: bool = False,
    requantize: bool = False,
) -> dict[str, str]:
    """The qtype of every tensor at a level, in the order given.

    Tensors that recipes leave alone keep their own type. ``has_importance``: an importance matrix will be
    used, which a few rules ask about. ``requantize``: weights in a type that models are trained in get the level's.

    Raises:
        UnknownLevel: no level has this name.
    """
    recipe = RECIPES[level_named(level)]
    names = {tensor.name for tensor in tensors}
    tied = "output.weight" not in names
    heads = nextn_blocks(names)
    total_attn_v = sum(_role(name) == "attn_v" for name in names)
    counted = dict.fromkeys(("attn_v", "ffn_down", "ffn_up", "ffn_gate"), 0)
    chosen: dict[str, str] = {}
    for tensor in sorted(tensors, key=_layer_order):
        if not is_quantizable(tensor) or (tensor.qtype in TRAINED and not requantize):
            chosen[tensor.name] = tensor.qtype
            continue
        if not QTYPES[recipe.qtype].is_quantized:
            chosen[tensor.name] = recipe.qtype
            continue
        role = _role(tensor.name)
        if recipe.beside_experts and _layer_order(tensor)[0] not in heads:
            stacked = len(tensor.shape) > 2 and tensor.shape[0] > 1
            qtype = recipe.qtype if stacked else recipe.beside_experts
        elif tensor.name == "output.weight" or (tied and tensor.name in _EMBEDDINGS):
            qtype = _table_type(recipe, tensor, dims)
        elif tensor.name in _EMBEDDINGS:
            qtype = recipe.embedding or recipe.qtype
        elif _layer_order(tensor)[0] in heads:
            qtype = NEXTN_TYPE if QTYPES[tensor.qtype].bpw > QTYPES[NEXTN_TYPE].bpw else tensor.qtype
        else:
            index = counted.get(role, 0)
            if role.startswith("ffn_") and dims.n_expert > 1 and recipe.plain_exceptions:
                index = _layer_order(tensor)[0]  # several such tensors a layer: count layers instead
            total = total_attn_v if role == "attn_v" else dims.n_layer
            qtype = _role_type(recipe, role, _Place(index, total, dims, has_importance))
        if role in counted:
            counted[role] += 1
        chosen[tensor.name] = fallback(qtype, tensor.shape[-1])
    return {tensor.name: chosen[tensor.name] for tensor in tensors}
