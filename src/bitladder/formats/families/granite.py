"""Granite: Llama with four factors."""

from __future__ import annotations

from bitladder.formats.families.family import CheckpointTraits, Family

GRANITE = Family("granite", CheckpointTraits(("GraniteForCausalLM",)), features=frozenset())
