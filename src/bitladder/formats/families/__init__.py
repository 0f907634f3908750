"""Model families: one row each, in small files by kin.

``FAMILIES`` lists them; ``family_of`` finds one by its name in GGUF, ``family_of_class`` by transformers' class.
Nothing outside this package names an architecture (``tests/formats/test_families.py``). A new family is a row here and
a case in ``tests/tiny_models.py`` (where it is walked) or ``tests/describe/test_shapes.py`` (where it is planned).
"""

from __future__ import annotations

from bitladder.formats.families import (
    cohere,
    deepseek,
    ernie,
    gemma,
    glm,
    gpt_oss,
    granite,
    llama,
    olmo,
    others,
    phi,
    qwen,
)
from bitladder.formats.families.family import Family

_ROWS = (
    llama.LLAMA, llama.SMOLLM3, llama.LLAMA4, llama.DECI,
    qwen.QWEN2, qwen.QWEN2_VL, qwen.QWEN2_MOE, qwen.QWEN3, qwen.QWEN3_MOE,
    qwen.QWEN3_NEXT, qwen.QWEN35, qwen.QWEN35_MOE,
    gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3, gemma.GEMMA3N,
    phi.PHI3,
    olmo.OLMO, olmo.OLMO2,
    ernie.ERNIE4_5_MOE,
    glm.GLM4,
    granite.GRANITE,
    cohere.COMMAND_R, cohere.COHERE2,
    deepseek.DEEPSEEK2,
    gpt_oss.GPT_OSS,
    others.EXAONE4, others.SMALLTHINKER, others.PLAMO3, others.FALCON_H1, others.NEMOTRON_H, others.NEMOTRON_H_MOE,
    others.JAIS2, others.FALCON, others.GROK, others.AFMOE,
)  # fmt: skip

FAMILIES: dict[str, Family] = {row.architecture: row for row in _ROWS}
"""By architecture."""
BY_CLASS: dict[str, Family] = {name: row for row in _ROWS if row.checkpoint for name in row.checkpoint.classes}
"""By transformers' class, as config.json names it."""


def family_of(architecture: str) -> Family:
    """What is known of a GGUF architecture; of one without a row nothing but its name."""
    return FAMILIES.get(architecture) or Family(architecture)


def planned() -> tuple[str, ...]:
    """Architectures whose shapes follow from dimensions."""
    return tuple(name for name, row in FAMILIES.items() if row.features is not None)


def walked() -> tuple[str, ...]:
    """Architectures whose layers can be run one by one."""
    return tuple(name for name, row in FAMILIES.items() if row.layers or row.expert_layers)
