"""Texts to measure or calibrate on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text with a name. Documents, not tokens, are what intervals resample."""

    name: str
    text: str


def text_hash(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts, so that evidence is tied to the very words it was measured on."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            raw = part.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
