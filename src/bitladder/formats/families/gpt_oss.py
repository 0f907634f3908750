"""gpt-oss: attention sinks, biases everywhere, experts published in MXFP4."""

from __future__ import annotations

from bitladder.formats.families.family import CheckpointTraits, Family, Windows

GPT_OSS = Family(
    "gpt-oss",
    CheckpointTraits(("GptOssForCausalLM",), expert_qtype="MXFP4"),
    features=frozenset({"all_bias", "sinks", "ffn_norm_called_post"}),
    windows=Windows(2),
)
