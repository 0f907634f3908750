"""What the name of a level means, from the tables that write it: block formats, recipes, checkpoint formats."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bitladder.errors import UnknownLevel
from bitladder.files.catalogue import model_named
from bitladder.files.quality_prior import published_costs
from bitladder.formats.blocks import QTYPES, TRAINED, QType
from bitladder.formats.recipes import FALLBACKS, LEVELS, RECIPES
from bitladder.levels import (
    WHOLE_ROW,
    CheckpointLevel,
    FeedbackLevel,
    FoldedLevel,
    Level,
    Needs,
    RecipeLevel,
    parse_level,
)
from bitladder.levels.checkpoints import FORMATS
from bitladder.plan.cost import level_size
from bitladder.plan.quality import level_cost
from bitladder.plan.recommend import cost_words
from bitladder.units import human_bytes

EXAMPLE = "meta-llama/Llama-3.1-8B-Instruct"
"""The model of which sizes and mixes are told."""


@dataclass(frozen=True)
class Explanation:
    """A name and what there is to say of it, a heading and sentences each."""

    name: str
    summary: str
    parts: tuple[tuple[str, str], ...]


FIELDS = {
    "d": "scale", "dmin": "scale of the minimums", "m": "minimum", "s": "sum", "e": "scale, a power of two",
    "scales": "scales of the sub-blocks", "scales_h": "scales of the sub-blocks, high bits",
    "scales_l": "scales of the sub-blocks, low bits", "qs": "codes", "ql": "codes, low bits", "qh": "codes, high bits",
    "hmask": "codes, high bits", "signs": "signs", "bsums": "sums", "x": "value",
}  # fmt: skip
"""What the fields of blocks hold."""

SUFFIXES = {
    "_0": "a scale for each block of 32 weights, which lie evenly around zero",
    "_1": "a scale and a minimum for each block of 32 weights",
    "_K": "a K-quant: 256 weights share a scale, and sub-blocks of 16 or 32 have small whole numbers that say how "
    "much of it is theirs, so that scales cost few bits",
    "S": "small: nearly every matrix gets the type in the name",
    "M": "medium: matrices that cost most when rounded (attn_v and ffn_down) get a finer type in some layers",
    "L": "large: those matrices get a finer type in every layer",
    "NL": "codes stand for values of a table that lie closer together near zero",
    "XS": "extra small: as NL, in blocks of 256 whose sub-blocks share a scale",
}
"""What the endings of llama.cpp's names mean."""

WHEN = {
    16: "The reference that others are compared with. Twice the memory of 8 bits for nothing that can be measured",
    8: "When memory allows: no loss is measurable in most work",
    6: "Practically as good as 8 bits, a quarter smaller",
    5: "The quality tier where memory is short",
    4: "The usual choice: about a quarter of the memory of 16 bits for a loss that most work does not show",
    3: "When 4 bits do not fit. Losses show in long and exacting answers: test on your own inputs",
    2: "A last resort. A smaller model at 4 bits is usually better",
    1: "A last resort. A smaller model at 4 bits is usually better",
}
"""Bits of a code -> when to take such a level."""

METHODS = {
    "GPTQ": "Codes are chosen with error feedback: what one weight loses by rounding, later ones make up for, measured "
    "on calibration text",
    "AWQ": "Input channels with large activations are scaled up before rounding, so that they lose less, and the layer "
    "before takes it back",
    "INT8": "Whole numbers of 8 bits. W8A8 rounds activations, too, which GPUs multiply fast; W8A16 leaves them alone",
    "FP8": "Floating point of 8 bits, for GPUs that multiply it",
}
"""Words that name a method or a family and no level."""


def explain(name: str) -> Explanation:
    """A level, a block format, or a method by its name, in any case.

    Raises:
        UnknownLevel: none of them; the nearest level is suggested.
    """
    plain = name.strip()
    try:
        return _level(parse_level(plain))
    except UnknownLevel:  # "GPTQ-4bit" asks what GPTQ is; "GPTQ-4bit-g63" for a level that nothing runs
        method = re.fullmatch(r"(\w+?)([-_]\d+BIT)?", plain.upper())
        if (qtype := QTYPES.get(plain.upper())) is not None:
            return _block(qtype)
        if method and method[1] in METHODS:
            return _method(method[1])
        raise


def bits_of(qtype: str) -> int:
    """Bits of a code: the number in the type's name; 16 of what is no code."""
    if QTYPES[qtype].block_size == 1:
        return 16
    found = re.search(r"\d+", qtype.replace("MXFP", "").replace("NVFP", ""))
    return min(int(found[0]), 8) if found else 16


def _level(level: Level) -> Explanation:
    recipe: str | None
    match level:
        case RecipeLevel():
            return _recipe(level)
        case CheckpointLevel():
            return _checkpoint(level)
        case FoldedLevel():
            how, recipe = METHODS["AWQ"], level.recipe
        case FeedbackLevel():
            how, recipe = METHODS["GPTQ"], level.recipe
    if recipe is None:
        size = level_size(model_named(EXAMPLE).whole(), level)
        types = "Every tensor gets the type with which the whole loses least under the budget; each is weighed for it"
        summary = f"A GGUF file of {size.bpw:.2f} bits per weight on average"
        return Explanation(level.name, summary, (("Types", types), ("Codes", how)))
    plain = _recipe(RecipeLevel(recipe))
    summary = f"{plain.summary}, made with calibration: as large as {recipe}, and it runs wherever that does"
    same = tuple((head, text) for head, text in plain.parts if head not in ("Costs", "Beside it"))
    return Explanation(level.name, summary, (("Codes", how), *same))


def _recipe(level: RecipeLevel) -> Explanation:
    recipe = RECIPES[level.recipe]
    model = model_named(EXAMPLE).whole()
    size, whole = level_size(model, level), level_size(model, RecipeLevel("F16"))
    bits = bits_of(recipe.qtype)
    short = EXAMPLE.rsplit("/", maxsplit=1)[-1]
    sizes = f"{human_bytes(size.tensor_bytes)} where 16 bits take {human_bytes(whole.tensor_bytes)}"
    parts = [
        ("Bits", f"{size.bpw:.2f} per weight in {short}, all counted: {sizes}"),
        ("Block", block_words(QTYPES[recipe.qtype])),
        *[("Name", text) for text in _suffix_words(level.recipe)],
        ("Mix", mix_words(level.recipe)),
    ]  # fmt: skip
    if recipe.qtype in FALLBACKS:
        instead = f"Rows that do not divide by 256 get {FALLBACKS[recipe.qtype]} instead, which is larger"
        parts.append(("Rows", f"{instead}: common in small models"))
    cost = level_cost(level.recipe, model_named(EXAMPLE).params, published_costs())
    if cost is not None and cost.value:
        parts.append(
            ("Costs", f"about {cost_words(cost)} in a model of 8 billion weights; `bitladder run` measures yours")
        )
    parts += [("When", WHEN[bits]), ("Beside it", _beside(level.recipe)), ("Runs in", ", ".join(level.engines))]
    what = "floating point, nothing rounded further" if bits == 16 else f"{bits} bits"
    return Explanation(level.recipe, f"A GGUF file, {what}", tuple((head, text) for head, text in parts if text))


def block_words(qtype: QType) -> str:
    """``Q4_K: 256 weights in 144 bytes, 4.5 bits each: 2 scale, ...``, from the table of blocks."""
    if qtype.block_size == 1:
        return f"{qtype.name}: every weight by itself in {qtype.type_size} bytes"
    fields = ", ".join(f"{size} {FIELDS[name]}" for name, size in qtype.fields)
    size = f"{qtype.block_size} weights in {qtype.type_size} bytes"
    return f"{qtype.name}: {size} ({fields}), {qtype.bpw:g} bits per weight"


def _suffix_words(name: str) -> list[str]:
    """What the endings of a name mean, in their order."""
    endings = name.split("_")[1:]
    found = []
    for ending in endings:
        key = f"_{ending}" if f"_{ending}" in SUFFIXES else ending
        if key in SUFFIXES:
            found.append(f"{key.removeprefix('_')}: {SUFFIXES[key]}")
    return found


def mix_words(recipe: str) -> str:
    """Which tensors of the example get which type, by role: what the writer would do, counted."""
    model = model_named(EXAMPLE).whole()
    main = RECIPES[recipe].qtype
    roles: dict[str, list[str]] = {}
    for tensor in level_size(model, RecipeLevel(recipe)).tensors:
        if len(tensor.shape) > 1:
            roles.setdefault(re.sub(r"^blk\.\d+\.|\.weight$", "", tensor.name), []).append(tensor.qtype)
    finer = [f"{role} {_types(qtypes, main)}" for role, qtypes in roles.items() if set(qtypes) != {main}]
    if not finer:
        return f"every matrix {main}"
    return f"{'; '.join(finer)}; every other matrix {main}"


def _types(qtypes: Iterable[str], main: str) -> str:
    """Where a role's types differ from the main one."""
    listed = list(qtypes)
    counts = {qtype: listed.count(qtype) for qtype in dict.fromkeys(listed)}
    if len(counts) == 1:
        return listed[0]
    other = sorted((qtype, count) for qtype, count in counts.items() if qtype != main)
    return ", ".join(f"{qtype} in {count} of {len(listed)} layers" for qtype, count in other)


def _beside(recipe: str) -> str:
    """The neighbours on the ladder, and what GPU servers take instead."""
    if recipe not in LEVELS:
        return "not on the usual ladder; name it with --levels or --to"
    at = LEVELS.index(recipe)
    larger, smaller = LEVELS[:at], LEVELS[at + 1 :]
    near = [f"larger and closer: {larger[-1]}"] if larger else []
    near += [f"smaller: {smaller[0]}"] if smaller else []
    bits = bits_of(RECIPES[recipe].qtype)
    servers = {16: "the checkpoint itself", 8: "INT8-W8A8 or FP8-DYNAMIC", 4: "AWQ-4bit-g128 or GPTQ-4bit-g128"}
    near += [f"for vLLM: {servers[bits]}"] if bits in servers else []
    return "; ".join(near)


def _checkpoint(level: CheckpointLevel) -> Explanation:
    form = level.format
    sizes = sorted({one.group_size for one in form.forms})
    shared = [
        "a whole row shares a scale" if size == WHOLE_ROW else f"scales are shared in groups of {size}"
        for size in sizes
    ]
    rest = "norms alone stay" if form.everywhere else "embedding, head and norms stay"
    parts = [
        ("What", form.about),
        ("Bits", f"{form.bpw:.2f} per weight of the matrices, scales included; {rest} at {8 * form.float_bytes}"),
        ("Groups", "; ".join(shared)),
        ("Made by", "a walk over calibration text" if level.needs is Needs.CALIBRATION else "rounding alone"),
        ("Block", f"in a GGUF file {block_words(QTYPES[level.name])}" if level.name in QTYPES else ""),
        *[("Note", note.rstrip(".")) for note in form.notes()],
        ("Runs in", ", ".join(level.engines)),
    ]  # fmt: skip
    summary = f"A checkpoint folder (safetensors) for {', '.join(level.engines)}; llama.cpp does not run it"
    return Explanation(level.name, summary, tuple((head, text.rstrip(".")) for head, text in parts if text))


def _block(qtype: QType) -> Explanation:
    used = [name for name, recipe in RECIPES.items() if recipe.qtype == qtype.name]
    where = (
        f"levels with it as their main type: {', '.join(used)}" if used else "it is read, and no level here writes it"
    )
    note = [("Trained", "models are published in it, and it is kept as it is")] if qtype.name in TRAINED else []
    name = [("Name", text) for text in _suffix_words(qtype.name)]
    parts = (("Block", block_words(qtype)), *name, ("Levels", where), *note)
    return Explanation(qtype.name, "A block format: how one tensor is stored; a level is a mix of them", parts)


def _method(method: str) -> Explanation:
    own = [form for form in FORMATS if method in form.prefixes and form.grammar.startswith(method)]
    own = own or [form for form in FORMATS if method in form.prefixes]
    files = {"GPTQ": "GPTQ-Q4_K_M", "AWQ": "AWQ-Q4_K_M"}.get(method)
    parts = [("Levels", ", ".join(form.grammar for form in own))]
    parts += [("What", form.about.rstrip(".")) for form in own]
    parts += [("Files", f"{files} and the like: the same method, written as an ordinary GGUF")] if files else []
    return Explanation(method, METHODS[method], tuple(parts))
