"""Architectures whose heads for further tokens (MTP, NextN) llama.cpp runs to guess with.

It loads such heads of others and leaves them out of every computation. Source: llama.cpp's src/models (build 11549),
the graphs that exist for ``LLM_GRAPH_TYPE_DECODER_MTP``.
"""

from __future__ import annotations

HEADS_RUN = frozenset(
    (
        "bailingmoe3", "cohere2moe", "deepseek2", "deepseek32", "deepseek4", "glm-dsa", "glm4moe", "glm5-next", "hy_v3",
        "mimo2", "nemotron_h_moe", "qwen35", "qwen35moe", "qwen3next", "qwen4exp", "step35",
    )
)  # fmt: skip
