"""Command R: attention and feed-forward side by side, after one norm."""

from __future__ import annotations

from bitladder.formats.families.family import CheckpointTraits, Family, Windows

COMMAND_R = Family("command-r", CheckpointTraits(("CohereForCausalLM",), tied=True), features=frozenset({"one_norm"}))
COHERE2 = Family("cohere2", windows=Windows(4))
