"""Granite: Llama with four factors."""

from __future__ import annotations

from bitladder.formats.families.family import Checkpoint, Family

GRANITE = Family("granite", Checkpoint(("GraniteForCausalLM",)), features=frozenset())
