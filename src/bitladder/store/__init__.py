"""The evidence store: every measurement with what it was measured on, in SQLite or PostgreSQL."""

from __future__ import annotations

from bitladder.store.evidence import KINDS, Evidence, EvidenceRow

__all__ = ["KINDS", "Evidence", "EvidenceRow"]
