"""DeepSeek V2 and V3: multi-head latent attention, the first layers dense, experts after."""

from __future__ import annotations

from bitladder.formats.families.family import CheckpointTraits, Family

DEEPSEEK2 = Family(
    "deepseek2", CheckpointTraits(("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")), features=frozenset({"latent"})
)
