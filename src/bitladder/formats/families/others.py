"""Families of which one thing is known beyond what a GGUF header says: how the cache or a recipe departs."""

from __future__ import annotations

from bitladder.formats.families.family import Family, Mix, StateTraits, Windows

EXAONE4 = Family("exaone4", windows=Windows(4))
AFMOE = Family("afmoe", windows=Windows(4))
SMALLTHINKER = Family("smallthinker", windows=Windows(4, whole_first=True))
PLAMO3 = Family("plamo3", windows=Windows(8))
FALCON_H1 = Family("falcon-h1", states=StateTraits(beside_attention=True))
NEMOTRON_H = Family("nemotron_h", states=StateTraits(one_job=True))
NEMOTRON_H_MOE = Family("nemotron_h_moe", states=StateTraits(one_job=True))
JAIS2 = Family("jais2", mix=Mix(seventy_layers=68))
GROK = Family("grok", flash_attention=False)
FALCON = Family("falcon", mix=Mix(light_down=True))
