"""What is known of a model behind an address."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Fingerprint:
    """Short answers to fixed questions, by which a model is known again under the same name."""

    replies: tuple[str, ...]
    repeats: bool
    """Whether it said the same when asked twice; an endpoint that does not cannot be told from another model."""
    model: str
    """The model it said it was."""

    @property
    def digest(self) -> str:
        """Part of the key of every answer that it gave."""
        return hashlib.sha256(json.dumps(self.replies, ensure_ascii=False).encode()).hexdigest()
